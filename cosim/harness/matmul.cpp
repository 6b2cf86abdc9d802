// The table-lookup engine behind its weight stream (cosim/bench_tlmm.py StreamedTlmm), driven by a compiled loop:
// all operations of a run, with random stalls on every stream, in one call from cosim/matmul_harness.py.
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "Vdut.h"
#include "verilated.h"

// Called by Verilator on an internal error; its default would end the process.
void vl_fatal(const char *, int, const char *, const char *message) { throw std::runtime_error(message); }

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

struct Bench {
    VerilatedContext context;
    Vdut top{&context};
    const char *error = nullptr;
    uint64_t noise_ = 1;

    bool chance(uint32_t of_256) {  // xorshift64
        if (!of_256) return false;
        noise_ ^= noise_ << 13, noise_ ^= noise_ >> 7, noise_ ^= noise_ << 17;
        return (noise_ >> 24 & 255) < of_256;
    }
    void settle() {
        top.clk = 0;
        top.eval();
    }
    void edge() {
        top.clk = 1;
        top.eval();
    }
    void reset() {
        top.rst = 1;
        top.i_beat_valid = top.i_op_valid = top.act_en = top.i_clear = top.o_y_ready = top.o_aux_ready = 0;
        for (int i = 0; i < 4; ++i) settle(), edge();
        top.rst = 0;
    }
    int64_t run(const Run &job);
};

constexpr size_t beat_bytes = sizeof(Vdut::i_beat_payload);
constexpr size_t y_bytes = sizeof(Vdut::o_y_payload);

// Total cycles, or -1 with `error`.
int64_t Bench::run(const Run &job) {
    enum { WAIT, WRITE, PREFETCH, OFFER } phase = WAIT;
    noise_ = job.seed * 2 + 1;
    error = nullptr;
    // operations: `number` is next to be offered, `ended` is the oldest that runs
    uint64_t sent = 0, number = 0, ended = 0, written = 0, beats = 0, left = 0, cycle = 0, idle = 0;
    bool held = false, free = true;
    uint8_t held_y[y_bytes];
    std::memset(job.results, 0, job.count * sizeof(Result));
    top.i_beat_valid = top.i_op_valid = top.act_en = 0;
    for (; ended < job.count || idle < 32; ++cycle) {
        if (cycle >= job.max_cycles) return error = "too many cycles", -1;
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
        if (top.o_error) return error = "error in the weight stream", -1;
        if (held && (!top.o_y_valid || std::memcmp(held_y, &top.o_y_payload, y_bytes)))
            return error = "o_y changed while it was held back", -1;
        held = top.o_y_valid && !top.o_y_ready;
        if (held) std::memcpy(held_y, &top.o_y_payload, y_bytes);
        if (top.o_stalled != held) return error = "o_stalled is not that o_y is held back", -1;
        if (top.o_busy != (ended < number)) return error = "o_busy is not that a beat is still to come", -1;
        if (!top.o_busy && (top.o_lookup || top.o_starved || top.o_y_valid)) return error = "at work while not busy", -1;
        if (phase != WAIT && !top.i_op_ready) return error = "not ready any more, and no operation was taken", -1;
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
    if (sent != job.weight_beats) return error = "weights were left over", -1;
    return int64_t(cycle);
}

}  // namespace

extern "C" {

Bench *bench_create() {
    try {
        auto bench = std::make_unique<Bench>();
        bench->reset();
        return bench.release();
    } catch (const std::exception &) {
        return nullptr;
    }
}
void bench_destroy(Bench *bench) { delete bench; }
uint64_t bench_op_bytes() { return sizeof(Vdut::i_op_payload); }
int64_t bench_run(Bench *bench, const Run *job) {
    try {
        return bench->run(*job);
    } catch (const std::exception &) {
        return bench->error = "internal error of the model", -1;
    }
}
const char *bench_error(const Bench *bench) { return bench->error ? bench->error : ""; }
}
