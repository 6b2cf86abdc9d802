// The Verilated accelerator with its memory: clock, AXI ports, register access, run until an event.
//
// The design (class Vdut) has clk, rst, irq, an AXI4-Lite port s_axil_, an AXI4 read port m_axi_w_ and an AXI4 port
// m_axi_d_. Port widths are read from the types of the ports.
#pragma once

#include <memory>
#include <string>

#include "Vdut.h"
#include "dram.hpp"
#include "protocol.hpp"
#if LUTRA_VERILATED
#include "verilated.h"
#endif
#if VM_TRACE_VCD
#include "verilated_vcd_c.h"
#endif

// LUTRA_GATES(f): f(unit) for each unit with a clock of its own, clk_<unit>, that ticks while wake_<unit> is 1.
#ifndef LUTRA_GATES
#define LUTRA_GATES(f)
#endif

namespace lutra {

enum Reason : int { IRQ = 0, BUDGET = 1, VIOLATION = 2 };

class Simulator {
  public:
    static constexpr uint32_t weight_bytes = sizeof(Vdut::m_axi_w_rdata);
    static constexpr uint32_t data_bytes = sizeof(Vdut::m_axi_d_rdata);
    static_assert(weight_bytes <= 512, "a weight port of up to 4096 bits");
    static_assert(data_bytes <= 64, "a data port of up to 512 bits: a strobe a byte in one word");

    static constexpr uint32_t widest = weight_bytes > data_bytes ? weight_bytes : data_bytes;

    explicit Simulator(const DramParams &params)
        : memory(params.memory_bytes), params_(params), budget_(params, widest), weight_(params, weight_bytes),
          read_(params, data_bytes), write_(params, data_bytes) {
        reset();
    }
    ~Simulator() {
        trace_close();
        top_.final();
    }

    // Eight cycles of reset; forgets all traffic in flight, keeps memory and counters.
    void reset() {
        weight_ = ReadChannel(params_, weight_bytes);
        read_ = ReadChannel(params_, data_bytes);
        write_ = WriteChannel(params_, data_bytes);
        weight_rules_.reset(), read_rules_.reset(), write_rules_.reset(), data_rules_.reset();
        violation.clear();
        top_.s_axil_awvalid = top_.s_axil_wvalid = top_.s_axil_arvalid = 0;
        top_.s_axil_bready = top_.s_axil_rready = 0;
        top_.s_axil_awprot = top_.s_axil_arprot = 0;
        top_.m_axi_w_rid = top_.m_axi_d_rid = top_.m_axi_d_bid = 0;
        put_inputs();
        top_.rst = 1;
        settle();
        for (int i = 0; i < 8; ++i) edge_pair();
        top_.rst = 0;
        settle();
    }

    Reason run(uint64_t max_cycles) {
        for (uint64_t end = cycle_ + max_cycles; cycle_ < end;) {
            if (top_.irq) return IRQ;
            tick();
            if (__builtin_expect(violation.found(), 0)) return VIOLATION;
        }
        return top_.irq ? IRQ : BUDGET;
    }

    // Registers through the AXI4-Lite port; the response, or -1 if there was none within a thousand cycles.
    int csr_write(uint32_t offset, uint32_t value) {
        top_.s_axil_awaddr = offset, top_.s_axil_wdata = value, top_.s_axil_wstrb = 15;
        top_.s_axil_awvalid = top_.s_axil_wvalid = top_.s_axil_bready = 1;
        int response = -1;
        for (int i = 0; i < 1000 && response < 0; ++i) {
            settle();
            bool aw = top_.s_axil_awvalid && top_.s_axil_awready, w = top_.s_axil_wvalid && top_.s_axil_wready;
            if (top_.s_axil_bvalid) response = top_.s_axil_bresp;
            tick();
            if (aw) top_.s_axil_awvalid = 0;
            if (w) top_.s_axil_wvalid = 0;
        }
        top_.s_axil_awvalid = top_.s_axil_wvalid = top_.s_axil_bready = 0;
        settle();
        tick(), tick();  // until the effect of a doorbell shows in irq
        return response;
    }
    int csr_read(uint32_t offset, uint32_t *value) {
        top_.s_axil_araddr = offset;
        top_.s_axil_arvalid = top_.s_axil_rready = 1;
        int response = -1;
        for (int i = 0; i < 1000 && response < 0; ++i) {
            settle();
            bool ar = top_.s_axil_arvalid && top_.s_axil_arready;
            if (top_.s_axil_rvalid) response = top_.s_axil_rresp, *value = top_.s_axil_rdata;
            tick();
            if (ar) top_.s_axil_arvalid = 0;
        }
        top_.s_axil_arvalid = top_.s_axil_rready = 0;
        settle();
        return response;
    }

    uint64_t cycle() const { return cycle_; }
    bool irq() const { return top_.irq; }

    // Waveforms of the cycles [first, end).
    bool trace_open(const char *path, uint64_t first, uint64_t end) {
#if VM_TRACE_VCD
        trace_close();
        if (!trace_) {
            trace_ = std::make_unique<VerilatedVcdC>();
            top_.trace(trace_.get(), 99);
        }
        trace_->open(path);
        trace_first_ = first, trace_end_ = trace_->isOpen() ? end : 0;
        return trace_->isOpen();
#else
        (void)path, (void)first, (void)end;
        return false;
#endif
    }
    void trace_close() {
#if VM_TRACE_VCD
        if (trace_ && trace_->isOpen()) trace_->close();
        trace_end_ = 0;
#endif
    }

    Memory memory;
    Violation violation;
    Counters weight_counters, data_counters;

    // Cycles in which the clock of each unit ticked.
    struct {
#define COUNT(unit) uint64_t unit = 0;
        LUTRA_GATES(COUNT)
#undef COUNT
    } awake;

  private:
    // Combinational outputs follow the inputs.
    void settle() {
        top_.clk = 0;
#define LOW(unit) top_.clk_##unit = 0;
        LUTRA_GATES(LOW)
#undef LOW
        top_.eval();
    }
    // The rising edge, for units that are awake; needs settled outputs, and leaves them to `settle`.
    void rise() {
        top_.clk = 1;
#define RISE(unit) top_.clk_##unit = top_.wake_##unit, awake.unit += top_.wake_##unit;
        LUTRA_GATES(RISE)
#undef RISE
        top_.eval();
    }

    void edge_pair() {
        dump(0);
        rise();
        dump(1);
        ++cycle_;
        settle();
    }

    // One cycle: sample what the design drives, decide what it will see in the coming cycle, clock, drive it. Outputs are settled
    // before and after.
    void tick() {
        dump(0);
        check();
        const uint64_t coming = cycle_ + 1;
        weight_.transfer(top_.m_axi_w_arvalid, top_.m_axi_w_araddr, top_.m_axi_w_arlen, top_.m_axi_w_rready, cycle_,
                         weight_counters);
        read_.transfer(top_.m_axi_d_arvalid, top_.m_axi_d_araddr, top_.m_axi_d_arlen, top_.m_axi_d_rready, cycle_,
                       data_counters);
        write_.transfer(top_.m_axi_d_awvalid, top_.m_axi_d_awaddr, top_.m_axi_d_awlen, top_.m_axi_d_wvalid,
                        &top_.m_axi_d_wdata, top_.m_axi_d_wstrb, top_.m_axi_d_bready, cycle_, memory, data_counters);
        budget_.next_cycle();
        const uint32_t beats[3] = {weight_bytes, data_bytes, data_bytes};
        const unsigned wanting = weight_.wants(coming, budget_) | read_.wants(coming, budget_) << 1 | write_.wants() << 2;
        const unsigned served = wanting ? budget_.arbitrate(wanting, beats) : 0;
        weight_.drive(served & 1, memory, budget_);
        read_.drive(served >> 1 & 1, memory, budget_);
        write_.drive(served >> 2 & 1, coming, budget_);
        rise();
        dump(1);
        ++cycle_;
        put_inputs();
        settle();
    }

    void put_inputs() {
        top_.m_axi_w_arready = weight_.arready;
        put_beat(weight_, top_.m_axi_w_rvalid, top_.m_axi_w_rlast, top_.m_axi_w_rresp, &top_.m_axi_w_rdata, weight_bytes);
        top_.m_axi_d_arready = read_.arready;
        put_beat(read_, top_.m_axi_d_rvalid, top_.m_axi_d_rlast, top_.m_axi_d_rresp, &top_.m_axi_d_rdata, data_bytes);
        top_.m_axi_d_awready = write_.awready;
        top_.m_axi_d_wready = write_.wready;
        top_.m_axi_d_bvalid = write_.bvalid;
        top_.m_axi_d_bresp = write_.bresp;
    }
    void put_beat(const ReadChannel &channel, uint8_t &valid, uint8_t &last, uint8_t &response, void *data,
                  uint32_t beat_bytes) {
        valid = channel.rvalid;
        if (!channel.loaded) return;
        last = channel.rlast;
        response = channel.rresp;
        if (channel.rresp == OKAY)
            std::memcpy(data, memory.at(channel.address), beat_bytes);
        else
            std::memset(data, 0, beat_bytes);
    }

    void check() {
        weight_rules_.check(top_.m_axi_w_arvalid, top_.m_axi_w_arready, top_.m_axi_w_araddr, top_.m_axi_w_arlen,
                            top_.m_axi_w_arsize, top_.m_axi_w_arburst, cycle_, violation);
        read_rules_.check(top_.m_axi_d_arvalid, top_.m_axi_d_arready, top_.m_axi_d_araddr, top_.m_axi_d_arlen,
                          top_.m_axi_d_arsize, top_.m_axi_d_arburst, cycle_, violation);
        write_rules_.check(top_.m_axi_d_awvalid, top_.m_axi_d_awready, top_.m_axi_d_awaddr, top_.m_axi_d_awlen,
                           top_.m_axi_d_awsize, top_.m_axi_d_awburst, cycle_, violation);
        const bool expected = write_.expects_data();
        data_rules_.check(top_.m_axi_d_wvalid, top_.m_axi_d_wready, &top_.m_axi_d_wdata, top_.m_axi_d_wstrb,
                          top_.m_axi_d_wlast, expected, expected && write_.expects_last(), top_.m_axi_d_awvalid, cycle_,
                          violation);
    }

    void dump(int half) {
#if VM_TRACE_VCD
        if (__builtin_expect(cycle_ < trace_end_ && cycle_ >= trace_first_, 0)) trace_->dump(2 * cycle_ + half);
        if (__builtin_expect(half && trace_end_ && cycle_ + 1 == trace_end_, 0)) trace_close();
#else
        (void)half;
#endif
    }

#if LUTRA_VERILATED
    struct Context : VerilatedContext {
        Context() {
#if VM_TRACE_VCD
            traceEverOn(true);
#endif
        }
    };
    Context context_;
    Vdut top_{&context_, "lutra"};
#else
    Vdut top_;
#endif

    DramParams params_;
    Budget budget_;
    ReadChannel weight_, read_;
    WriteChannel write_;
    AddressRules weight_rules_{"weight port AR", weight_bytes}, read_rules_{"data port AR", data_bytes},
        write_rules_{"data port AW", data_bytes};
    DataRules data_rules_{data_bytes};
    uint64_t cycle_ = 0;
#if VM_TRACE_VCD
    std::unique_ptr<VerilatedVcdC> trace_;
    uint64_t trace_first_ = 0, trace_end_ = 0;
#endif
};

}  // namespace lutra
