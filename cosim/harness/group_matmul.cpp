// A group engine behind its weight stream (cosim/streamed_engine.py), driven by a compiled loop:
// all operations of a run, with random stalls on every stream, in one call from cosim/group_harness.py.
#include "unit_bench.hpp"

namespace {

constexpr uint32_t rows_of_group = 4;

struct Operation {
    const uint8_t *activations;  // tokens x groups x 4 rows as the port has them; null: those of the operation before
    const uint16_t *scales;      // tokens x groups bfloat16
    const void *payload;         // of i_op, as the model's type has it
    uint32_t tokens, groups;     // of activations
    uint64_t beats;              // of o_y
    uint64_t prefetch;           // beats of the weight stream that are taken before the operation is offered
};

struct Result {
    uint64_t taken, last;  // cycles in which the operation was taken, and its last beat
    uint64_t lookups, starved, stalled;  // from taking it to taking the next (those of its last beats count for the next)
};

struct Run {
    const uint8_t *weights;  // beats
    uint64_t weight_beats;
    const Operation *operations;
    uint64_t count;
    Result *results;
    uint8_t *beats;     // o_y payloads
    uint64_t capacity;  // of them
    uint32_t stall_in, stall_out, stall_op;  // chances in 256 of a cycle
    uint32_t overlap;      // the next operation comes as soon as it is taken; otherwise when the engine is idle
    uint64_t clear_after;  // nonzero: cycles after the first operation is taken in which all is cleared, and the run ends
    uint64_t seed, max_cycles;
};

struct Bench : lutra::UnitBench {
    Bench() {
        quiet();
        reset();
    }
    void quiet() {
        top.i_beat_valid = top.i_op_valid = top.act_en = top.group_scale_en = top.i_clear = 0;
        top.o_y_ready = top.o_aux_ready = 0;
    }
    int64_t run(const Run &job);
};

constexpr size_t row_bytes = sizeof(Vdut::act_data);
constexpr size_t beat_bytes = sizeof(Vdut::i_beat_payload);
constexpr size_t y_bytes = sizeof(Vdut::o_y_payload);

// Total cycles, or -1 with `error`.
int64_t Bench::run(const Run &job) {
    enum { WRITE, PREFETCH, OFFER, BUSY } phase = WRITE;
    begin(job.seed);
    uint64_t sent = 0, number = 0, rows = 0, scales = 0, cycle = 0, idle = 0, beats = 0, leaving = 0, left_of = 0;
    bool held = false;
    uint8_t held_y[y_bytes];
    std::memset(job.results, 0, job.count * sizeof(Result));
    quiet();
    for (; number < job.count || idle < 32; ++cycle) {
        if (cycle >= job.max_cycles) return fail("too many cycles");
        // inputs of this cycle; what was offered and not taken stays
        if (!top.i_beat_valid && sent < job.weight_beats && !chance(job.stall_in)) {
            std::memcpy(&top.i_beat_payload, job.weights + sent * beat_bytes, beat_bytes);
            top.i_beat_valid = 1;
        }
        const bool all_done = number == job.count;
        top.o_y_ready = all_done || !chance(job.stall_out);
        top.o_aux_ready = !chance(job.stall_out);
        top.act_en = top.group_scale_en = 0;
        if (!all_done) {
            const Operation &op = job.operations[number];
            if (phase == WRITE) {
                const uint64_t groups = op.activations ? uint64_t(op.tokens) * op.groups : 0;
                // scales run ahead of their activations by chance, and come together with them at the latest
                const bool row_next = rows < rows_of_group * groups && !chance(job.stall_op);
                const bool needed = row_next && rows / rows_of_group >= scales;
                if (scales < groups && (needed || (job.stall_op && chance(64)))) {
                    top.group_scale_en = 1;
                    top.group_scale_token = scales / op.groups;
                    top.group_scale_group = scales % op.groups;
                    top.group_scale_data = op.scales[scales];
                    ++scales;
                }
                if (row_next) {
                    top.act_en = 1;
                    top.act_token = rows / rows_of_group / op.groups;
                    top.act_row = rows % (uint64_t(rows_of_group) * op.groups);
                    std::memcpy(&top.act_data, op.activations + row_bytes * rows, row_bytes);
                    ++rows;
                } else if (rows == rows_of_group * groups && scales == groups) {
                    phase = PREFETCH;
                }
            }
            if (phase == PREFETCH && sent >= op.prefetch && !chance(job.stall_op)) {
                std::memcpy(&top.i_op_payload, op.payload, sizeof top.i_op_payload);
                top.i_op_valid = 1;
                phase = OFFER;
            }
        } else {
            ++idle;
        }
        top.i_clear = job.clear_after && (number || phase == BUSY) && cycle == job.results[0].taken + job.clear_after;
        settle();
        if (top.i_clear) {
            edge();
            quiet();
            return int64_t(cycle);
        }
        if (top.o_error) return fail("error in the weight stream");
        if (held && (!top.o_y_valid || std::memcmp(held_y, &top.o_y_payload, y_bytes)))
            return fail("o_y changed while it was held back");
        held = top.o_y_valid && !top.o_y_ready;
        if (held) std::memcpy(held_y, &top.o_y_payload, y_bytes);
        if (top.o_stalled != held) return fail("o_stalled is not that o_y is held back");
        if (!top.o_busy && (top.o_lookup || top.o_starved || top.o_y_valid)) return fail("at work while not busy");
        const bool taken = top.i_op_valid && top.i_op_ready, sends = top.i_beat_valid && top.i_beat_ready;
        if (taken) job.results[number].taken = cycle, phase = BUSY;
        if (phase == BUSY) {
            Result &result = job.results[number];
            result.lookups += top.o_lookup, result.starved += top.o_starved, result.stalled += top.o_stalled;
            if (!taken && (job.overlap ? top.i_op_ready : !top.o_busy)) phase = WRITE, rows = scales = 0, ++number;
        }
        if (top.o_y_valid && top.o_y_ready) {
            if (beats == job.capacity || leaving == job.count) return fail("more beats than expected");
            std::memcpy(job.beats + y_bytes * beats++, &top.o_y_payload, y_bytes);
            job.results[leaving].last = cycle;
            if (++left_of == job.operations[leaving].beats) left_of = 0, ++leaving;
        }
        if (!top.o_busy && !taken && (left_of || leaving != number)) return fail("idle before the last beat");
        // the drain after the last operation is counted only when it is over
        if (number == job.count && leaving != job.count) idle = 0;
        edge();
        if (taken) top.i_op_valid = 0;
        if (sends) top.i_beat_valid = 0, ++sent;
    }
    if (sent != job.weight_beats) return fail("weights were left over");
    if (leaving != job.count) return fail("beats are missing");
    return int64_t(cycle);
}

}  // namespace

LUTRA_UNIT_BENCH(Bench, Run)

extern "C" uint64_t bench_y_bytes() { return y_bytes; }
