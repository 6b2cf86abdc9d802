// C interface of the simulator, as cosim/simulator.py loads it by ctypes. No exception leaves it.
#include <exception>
#include <stdexcept>

#include "simulator.hpp"

using lutra::Simulator;

// Called by Verilator on an internal error (a loop that does not settle); its default would end the process.
void vl_fatal(const char *, int, const char *, const char *message) { throw std::runtime_error(message); }

namespace {

// Runs a call; an exception becomes a violation, and the result `failed`.
template <class Call> auto guarded(Simulator *sim, Call call, decltype(call()) failed) -> decltype(call()) {
    try {
        return call();
    } catch (const std::exception &error) {
        sim->violation.report(sim->cycle(), "simulation", "%s", error.what());
        return failed;
    }
}

}  // namespace

extern "C" {

Simulator *sim_create(const lutra::DramParams *params) {
    try {
        return new Simulator(*params);
    } catch (const std::exception &) {
        return nullptr;
    }
}
void sim_destroy(Simulator *sim) { delete sim; }

int sim_reset(Simulator *sim) {
    return guarded(sim, [&] { return sim->reset(), 0; }, -1);
}
int sim_run(Simulator *sim, uint64_t max_cycles) {
    return guarded(sim, [&] { return int(sim->run(max_cycles)); }, int(lutra::VIOLATION));
}
int sim_csr_read(Simulator *sim, uint32_t offset, uint32_t *value) {
    return guarded(sim, [&] { return sim->csr_read(offset, value); }, -1);
}
int sim_csr_write(Simulator *sim, uint32_t offset, uint32_t value) {
    return guarded(sim, [&] { return sim->csr_write(offset, value); }, -1);
}

// The back door: 0, or -1 if the range is not inside the memory.
int sim_mem_read(Simulator *sim, uint64_t address, void *data, uint64_t count) {
    if (!sim->memory.contains(address, count)) return -1;
    std::memcpy(data, sim->memory.at(address), count);
    return 0;
}
int sim_mem_write(Simulator *sim, uint64_t address, const void *data, uint64_t count) {
    if (!sim->memory.contains(address, count)) return -1;
    std::memcpy(sim->memory.at(address), data, count);
    return 0;
}
void sim_inject(Simulator *sim, uint64_t first, uint64_t end) { sim->memory.inject(first, end); }

uint64_t sim_cycle(const Simulator *sim) { return sim->cycle(); }
int sim_irq(const Simulator *sim) { return sim->irq(); }
const char *sim_violation(const Simulator *sim) { return sim->violation.text(); }

// read bytes, write bytes, read bursts, write bursts of the weight port, then of the data port.
void sim_counters(const Simulator *sim, uint64_t *values) {
    for (const lutra::Counters *port : {&sim->weight_counters, &sim->data_counters})
        for (uint64_t value : {port->read_bytes, port->write_bytes, port->read_bursts, port->write_bursts})
            *values++ = value;
}

// Units with a clock of their own, and in how many cycles each of them ticked.
const char *sim_gates() {
#define NAME(unit) #unit " "
    return "" LUTRA_GATES(NAME);
#undef NAME
}
void sim_awake(const Simulator *sim, uint64_t *values) {
#define PUT(unit) *values++ = sim->awake.unit;
    LUTRA_GATES(PUT)
#undef PUT
    (void)values;
}

int sim_trace_open(Simulator *sim, const char *path, uint64_t first, uint64_t end) {
    return sim->trace_open(path, first, end) ? 0 : -1;
}
void sim_trace_close(Simulator *sim) { sim->trace_close(); }
}
