// A component with one input stream and one output stream, driven by a compiled loop: all beats of a run, with random
// stalls on both sides, in one call from cosim/stream_harness.py.
#include "unit_bench.hpp"

namespace {

struct Run {
    const uint8_t *in;  // IN_BYTES a beat
    uint64_t in_beats;
    uint8_t *out;     // OUT_BYTES a beat
    uint64_t *cycle;  // in which each was taken
    uint64_t out_beats;
    uint32_t stall_in, stall_out;  // chances in 256 of a cycle
    uint64_t seed, max_cycles, idle;  // cycles at most; cycles after the last beat, in which no other may come
};

struct Bench : lutra::UnitBench {
    Bench() {
        top.i_valid = top.o_ready = 0;
        reset();
    }
    int64_t run(const Run &job);
};

// Beats taken, or -1 with `error`.
int64_t Bench::run(const Run &job) {
    begin(job.seed);
    uint64_t sent = 0, taken = 0, idle = 0;
    bool waiting = false;
    uint8_t held[OUT_BYTES];
    top.i_valid = 0;
    for (uint64_t cycle = 0; cycle < job.max_cycles && idle < job.idle; ++cycle) {
        if (!top.i_valid && sent < job.in_beats && !chance(job.stall_in)) {  // what was offered and not taken stays
            std::memcpy(&top.i_payload, job.in + sent * IN_BYTES, IN_BYTES);
            top.i_valid = 1;
        }
        top.o_ready = !chance(job.stall_out);
        settle();
        if (waiting && (!top.o_valid || std::memcmp(held, &top.o_payload, OUT_BYTES)))
            return fail("a beat changed or vanished while it waited");
        waiting = top.o_valid && !top.o_ready;
        std::memcpy(held, &top.o_payload, OUT_BYTES);
        idle += taken >= job.out_beats;
        if (top.o_valid && top.o_ready) {
            if (taken < job.out_beats) {
                std::memcpy(job.out + taken * OUT_BYTES, held, OUT_BYTES);
                job.cycle[taken] = cycle;
            }
            ++taken;
        }
        const bool accepted = top.i_valid && top.i_ready;
        edge();
        if (accepted) ++sent, top.i_valid = 0;
    }
    return int64_t(taken);
}

}  // namespace

LUTRA_UNIT_BENCH(Bench, Run)
