// What the compiled benches of single units share: the model with its clock, chance, and the C interface that
// cosim/unit_bench.py loads.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "Vdut.h"
#include "verilated.h"

// Called by Verilator on an internal error; its default would end the process.
void vl_fatal(const char *, int, const char *, const char *message) { throw std::runtime_error(message); }

namespace lutra {

// A bench derives from it, and gives `int64_t run(Run &)`: a count, or fail().
struct UnitBench {
    VerilatedContext context;
    Vdut top{&context};
    const char *error = nullptr;

    int64_t fail(const char *why) { return error = why, -1; }

    // Every run repeats exactly for its seed.
    void begin(uint64_t seed) { noise_ = seed * 2 + 1, error = nullptr; }
    bool chance(uint32_t of_256) {  // xorshift64
        if (!of_256) return false;
        noise_ ^= noise_ << 13, noise_ ^= noise_ >> 7, noise_ ^= noise_ << 17;
        return (noise_ >> 24 & 255) < of_256;
    }

    void settle() { top.clk = 0, top.eval(); }
    void edge() { top.clk = 1, top.eval(); }
    void reset() {
        top.rst = 1;
        for (int i = 0; i < 4; ++i) settle(), edge();
        top.rst = 0;
    }

  private:
    uint64_t noise_ = 1;
};

// Bytes of the payload of `i_op`; 0 of a unit without operations.
template <class Top> constexpr auto op_bytes(int) -> decltype(sizeof(Top::i_op_payload)) { return sizeof(Top::i_op_payload); }
template <class Top> constexpr uint64_t op_bytes(...) { return 0; }

}  // namespace lutra

// No exception leaves the library.
#define LUTRA_UNIT_BENCH(Bench, Run)                                                   \
    extern "C" {                                                                       \
    Bench *bench_create() {                                                            \
        try {                                                                          \
            return new Bench;                                                          \
        } catch (const std::exception &) {                                             \
            return nullptr;                                                            \
        }                                                                              \
    }                                                                                  \
    void bench_destroy(Bench *bench) { delete bench; }                                 \
    uint64_t bench_op_bytes() { return lutra::op_bytes<Vdut>(0); }                     \
    int64_t bench_run(Bench *bench, Run *job) {                                        \
        try {                                                                          \
            return bench->run(*job);                                                   \
        } catch (const std::exception &) {                                             \
            return bench->fail("internal error of the model");                         \
        }                                                                              \
    }                                                                                  \
    const char *bench_error(const Bench *bench) { return bench->error ? bench->error : ""; } \
    }
