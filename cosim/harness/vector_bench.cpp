// A machine with the ports x and y (and clk, rst), as cosim/vector makes it, driven by a compiled loop: y before each edge.
#include <cstring>

#include "Vdut.h"

extern "C" {

Vdut *bench_create() { return new Vdut(); }
void bench_destroy(Vdut *top) { delete top; }

// `x` and `y` hold a port a cycle, in words of 32 bits; `rst` a byte.
void bench_run(Vdut *top, const uint8_t *x, const uint8_t *rst, uint8_t *y, unsigned cycles) {
    for (unsigned cycle = 0; cycle < cycles; ++cycle) {
        std::memcpy(&top->x, x + cycle * sizeof top->x, sizeof top->x);
        top->rst = rst[cycle];
        top->clk = 0;
        top->eval();
        std::memcpy(y + cycle * sizeof top->y, &top->y, sizeof top->y);
        top->clk = 1;
        top->eval();
    }
}
}
