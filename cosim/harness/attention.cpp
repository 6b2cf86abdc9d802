// The attention engine between a memory, a vector memory and a query writer, driven by a compiled loop: one operation a
// call from cosim/attention_harness.py.
#include <deque>

#include "unit_bench.hpp"

namespace {

constexpr uint32_t row_bytes = 32;

struct Run {
    const void *payload;    // of i_op, as the model's type has it
    const uint8_t *memory;  // from address 0
    uint64_t memory_bytes;
    const uint64_t *query;  // rows from 0 on
    uint64_t query_rows;
    const uint32_t *scales;  // token, head, bits
    uint64_t scale_count;
    const uint8_t *vector;   // 2**16 rows that are read
    uint8_t *written;        // 2**16 rows that are written
    uint8_t *writes;         // times that each was
    uint32_t slots, latency; // latency: cycles from a command to its first beat
    uint32_t stall_command, stall_beat;  // chances in 256 of a cycle
    uint64_t seed, max_cycles;
    uint64_t busy, starved, beats;  // results, in cycles
};

struct Bench : lutra::UnitBench {
    Bench() {
        top.i_op_valid = top.kv_cmd_ready = top.kv_beat_valid = top.query_en = top.query_scale_en = 0;
        reset();
    }
    int64_t run(Run &job);
};

constexpr uint32_t beat_bytes = DATA_BITS / 8;

struct Beat {
    uint64_t due, address;
    bool last;
};

int64_t Bench::run(Run &job) {
    begin(job.seed);
    job.busy = job.starved = job.beats = 0;
    std::deque<Beat> beats;
    uint64_t cycle = 0, idle = 0, row = 0, scale = 0, held = 0;
    bool offered = false, taken = false, holding = false;
    top.i_slots = job.slots;
    while (idle < 40) {
        if (++cycle > job.max_cycles) return fail("too many cycles");
        top.query_en = row < job.query_rows;
        if (top.query_en) top.query_row = row, top.query_data = job.query[row], ++row;
        top.query_scale_en = scale < job.scale_count;
        if (top.query_scale_en) {
            const uint32_t *entry = job.scales + 3 * scale++;
            top.query_token = entry[0], top.query_head = entry[1], top.query_scale = entry[2];
        }
        if (!offered && row == job.query_rows && scale == job.scale_count) {
            std::memcpy(&top.i_op_payload, job.payload, sizeof top.i_op_payload);
            top.i_op_valid = offered = true;
        }
        top.kv_cmd_ready = !chance(job.stall_command);
        top.kv_beat_valid = !beats.empty() && beats.front().due <= cycle && !chance(job.stall_beat);
        if (top.kv_beat_valid) {
            auto *payload = reinterpret_cast<uint8_t *>(&top.kv_beat_payload);
            std::memcpy(payload, job.memory + beats.front().address, beat_bytes);
            payload[beat_bytes] = beats.front().last;
            beats.pop_front();
            ++job.beats;
        }
        settle();
        if (holding && (!top.kv_cmd_valid || top.kv_cmd_payload != held)) return fail("an offered command changed");
        holding = top.kv_cmd_valid && !top.kv_cmd_ready;
        held = top.kv_cmd_payload;
        if (top.kv_beat_valid && !top.kv_beat_ready) return fail("a beat that was asked for is not taken");
        if (top.kv_cmd_valid && top.kv_cmd_ready) {
            const uint64_t address = top.kv_cmd_payload & 0xffffffff, count = top.kv_cmd_payload >> 32;
            if (!count || address % beat_bytes || address + count * beat_bytes > job.memory_bytes)
                return fail("a command is empty, not aligned or outside the memory");
            for (uint64_t n = 0; n < count; ++n)
                beats.push_back({cycle + job.latency, address + n * beat_bytes, n + 1 == count});
        }
        if (!top.o_busy && (top.o_starved || top.vector_read_en || (taken && top.kv_cmd_valid)))
            return fail("at work while not busy");
        if (top.vector_write_en) {
            std::memcpy(job.written + row_bytes * top.vector_write_addr, &top.vector_write_data, row_bytes);
            ++job.writes[top.vector_write_addr];
            if (!top.o_busy) return fail("a write while not busy");
        }
        const bool reads = top.vector_read_en;
        const uint32_t read_row = top.vector_read_addr;
        job.busy += top.o_busy, job.starved += top.o_starved;
        const bool takes = top.i_op_valid && top.i_op_ready;
        if (top.i_op_valid && !takes) return fail("an idle engine does not take the operation");
        if (taken && !top.o_busy) ++idle;
        edge();
        if (takes) taken = true, top.i_op_valid = 0;
        if (reads) std::memcpy(&top.vector_read_data, job.vector + row_bytes * read_row, row_bytes);
    }
    if (!beats.empty()) return fail("beats were left over");
    return 0;
}

}  // namespace

LUTRA_UNIT_BENCH(Bench, Run)
