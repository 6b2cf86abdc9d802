// The table-lookup engine behind its weight stream (cosim/streamed_engine.py), driven by a compiled loop:
// all operations of a run, with random stalls on every stream, in one call from cosim/matmul_harness.py.
#include "unit_bench.hpp"

namespace {

struct Operation {
    const uint8_t *activations;  // tokens x rows x 8 bytes; null: those of the operation before
    const void *payload;         // of i_op, as the model's type has it
    uint32_t tokens, rows;       // of activations
    uint64_t prefetch;           // beats of the weight stream that are taken before the operation is offered
    uint64_t beats;              // of o_y that it gives
};

struct Result {
    uint64_t begun, ended;               // cycles in which it was taken, and its last beat was
    uint64_t lookups, starved, stalled;  // cycles, while no operation before it ran
};

struct Run {
    const uint8_t *weights;  // beats
    uint64_t weight_beats;
    const Operation *operations;
    uint64_t count;
    Result *results;
    int32_t *sums;     // 8 a beat
    uint8_t *tokens;   // one a beat
    uint32_t overlap;  // an operation is written and offered while others run, as soon as the engine allows
    uint32_t stall_in, stall_out, stall_op;  // chances in 256 of a cycle
    uint64_t seed, max_cycles;
};

struct Bench : lutra::UnitBench {
    Bench() {
        top.i_beat_valid = top.i_op_valid = top.act_en = top.i_clear = top.o_y_ready = top.o_aux_ready = 0;
        reset();
    }
    int64_t run(const Run &job);
};

constexpr size_t beat_bytes = sizeof(Vdut::i_beat_payload);
constexpr size_t y_bytes = sizeof(Vdut::o_y_payload);

// Total cycles, or -1 with `error`.
int64_t Bench::run(const Run &job) {
    enum { WAIT, WRITE, PREFETCH, OFFER } phase = WAIT;
    begin(job.seed);
    // operations: `number` is next to be offered, `ended` is the oldest that runs
    uint64_t sent = 0, number = 0, ended = 0, written = 0, beats = 0, left = 0, cycle = 0, idle = 0;
    bool held = false, free = true;
    uint8_t held_y[y_bytes];
    std::memset(job.results, 0, job.count * sizeof(Result));
    top.i_beat_valid = top.i_op_valid = top.act_en = 0;
    for (; ended < job.count || idle < 32; ++cycle) {
        if (cycle >= job.max_cycles) return fail("too many cycles");
        // inputs of this cycle; what was offered and not taken stays
        if (!top.i_beat_valid && sent < job.weight_beats && !chance(job.stall_in)) {
            std::memcpy(&top.i_beat_payload, job.weights + sent * beat_bytes, beat_bytes);
            top.i_beat_valid = 1;
        }
        const bool all_done = ended == job.count;
        top.o_y_ready = all_done || !chance(job.stall_out);
        top.o_aux_ready = !chance(job.stall_out);
        top.act_en = 0;
        if (number < job.count) {
            const Operation &op = job.operations[number];
            if (phase == WAIT && free && (job.overlap || ended == number)) phase = WRITE, written = 0;
            if (phase == WRITE) {
                if (op.activations && written < uint64_t(op.tokens) * op.rows) {
                    if (!chance(job.stall_op)) {
                        top.act_en = 1;
                        top.act_token = written / op.rows;
                        top.act_row = written % op.rows;
                        std::memcpy(&top.act_data, op.activations + 8 * written, 8);
                        ++written;
                    }
                } else {
                    phase = PREFETCH;
                }
            }
            if (phase == PREFETCH && sent >= op.prefetch && !chance(job.stall_op)) {
                std::memcpy(&top.i_op_payload, op.payload, sizeof top.i_op_payload);
                top.i_op_valid = 1;
                phase = OFFER;
            }
        }
        idle += all_done;
        settle();
        if (top.o_error) return fail("error in the weight stream");
        if (held && (!top.o_y_valid || std::memcmp(held_y, &top.o_y_payload, y_bytes)))
            return fail("o_y changed while it was held back");
        held = top.o_y_valid && !top.o_y_ready;
        if (held) std::memcpy(held_y, &top.o_y_payload, y_bytes);
        if (top.o_stalled != held) return fail("o_stalled is not that o_y is held back");
        if (top.o_busy != (ended < number)) return fail("o_busy is not that a beat is still to come");
        if (!top.o_busy && (top.o_lookup || top.o_starved || top.o_y_valid)) return fail("at work while not busy");
        if (phase != WAIT && !top.i_op_ready) return fail("not ready any more, and no operation was taken");
        const bool taken = top.i_op_valid && top.i_op_ready, sends = top.i_beat_valid && top.i_beat_ready;
        free = top.i_op_ready && !taken;
        if (ended < number) {
            Result &result = job.results[ended];
            result.lookups += top.o_lookup, result.starved += top.o_starved, result.stalled += top.o_stalled;
            if (top.o_y_valid && top.o_y_ready) {
                std::memcpy(job.sums + 8 * beats, &top.o_y_payload, 32);
                job.tokens[beats++] = reinterpret_cast<const uint8_t *>(&top.o_y_payload)[32];
                if (!left) left = job.operations[ended].beats;
                if (!--left) result.ended = cycle, ++ended;
            }
        }
        if (taken) job.results[number++].begun = cycle, phase = WAIT;
        edge();
        if (taken) top.i_op_valid = 0;
        if (sends) top.i_beat_valid = 0, ++sent;
    }
    if (sent != job.weight_beats) return fail("weights were left over");
    return int64_t(cycle);
}

}  // namespace

LUTRA_UNIT_BENCH(Bench, Run)
