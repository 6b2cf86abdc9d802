// DRAM model: a flat memory behind AXI4 read and write channels that share one bandwidth budget.
//
// Time:    a burst accepted in cycle t gives its first beat no sooner than in cycle t + latency; a write is
//          acknowledged no sooner than latency cycles after its last beat. One beat a cycle a channel.
// Budget:  `bytes_per_cycle` flow into a bucket that all channels share; a beat takes its full width out of it.
//          Channels take turns beat by beat; whose turn it is and who lacks budget makes the others wait, so that a
//          narrow channel cannot starve a wide one. The bucket holds one widest beat and one cycle's income: idle time
//          is not saved up.
// Refresh: every `refresh_interval` cycles the memory gives and takes nothing for `refresh_cycles` cycles.
// Stalls:  with `stall_threshold` each channel stands still in a cycle with probability threshold / 2^32.
// Errors:  DECERR beyond the memory, SLVERR in the injected range; erroneous beats read as zero and write nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <sys/mman.h>
#include <vector>

namespace lutra {

enum Response : uint8_t { OKAY = 0, SLVERR = 2, DECERR = 3 };

// Mirrors the ctypes structure `DramParams` of cosim/simulator.py.
struct DramParams {
    uint64_t memory_bytes;
    uint64_t bytes_per_cycle_q16;  // fixed point, 16 fraction bits
    uint64_t stall_seed;
    uint32_t stall_threshold;  // probability * 2^32; 0: never
    uint32_t latency_cycles;
    uint32_t max_reads;   // bursts in flight a port
    uint32_t max_writes;  // bursts in flight a port
    uint32_t refresh_interval;  // 0: no refresh
    uint32_t refresh_cycles;
};

// A queue of fixed capacity.
template <class T> class Ring {
  public:
    explicit Ring(size_t capacity) : items_(capacity) {}
    bool empty() const { return count_ == 0; }
    size_t size() const { return count_; }
    T &front() { return items_[head_]; }
    void pop() {
        head_ = head_ + 1 == items_.size() ? 0 : head_ + 1;
        --count_;
    }
    void push(const T &item) {
        size_t tail = head_ + count_;
        items_[tail >= items_.size() ? tail - items_.size() : tail] = item;
        ++count_;
    }
    void clear() { head_ = count_ = 0; }

  private:
    std::vector<T> items_;
    size_t head_ = 0, count_ = 0;
};

class Memory {
  public:
    explicit Memory(uint64_t bytes) : bytes_(bytes) {
        void *base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::runtime_error("cannot map the simulated memory");
        base_ = static_cast<uint8_t *>(base);
    }
    ~Memory() { munmap(base_, bytes_); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    bool contains(uint64_t address, uint64_t count) const { return count <= bytes_ && address <= bytes_ - count; }
    uint8_t *at(uint64_t address) { return base_ + address; }

    // [first, end): addresses that answer SLVERR.
    void inject(uint64_t first, uint64_t end) { error_first_ = first, error_end_ = end; }

    Response response(uint64_t address, uint32_t count) const {
        if (!contains(address, count)) return DECERR;
        return address < error_end_ && address + count > error_first_ ? SLVERR : OKAY;
    }

  private:
    uint8_t *base_;
    uint64_t bytes_, error_first_ = 0, error_end_ = 0;
};

// Bandwidth, refresh and random stalls.
class Budget {
  public:
    Budget(const DramParams &params, uint32_t widest_beat)
        : params_(params), cap_((uint64_t(widest_beat) << 16) + params.bytes_per_cycle_q16),
          random_(params.stall_seed * 0x9E3779B97F4A7C15ull | 1), until_refresh_(params.refresh_interval) {}

    void next_cycle() {
        if (refreshing_) {
            --refreshing_;
            return;
        }
        if (params_.refresh_interval && --until_refresh_ == 0) {
            until_refresh_ = params_.refresh_interval - params_.refresh_cycles;
            refreshing_ = params_.refresh_cycles;
        }
        tokens_ += params_.bytes_per_cycle_q16;
        if (tokens_ > cap_) tokens_ = cap_;
    }
    bool refreshing() const { return refreshing_ != 0; }

    // Gives each wanting channel its beat as far as the budget goes; returns the mask of those served.
    unsigned arbitrate(unsigned wanting, const uint32_t (&beat_bytes)[3]) {
        unsigned served = 0;
        if (refreshing_) return 0;
        for (unsigned i = 0, channel = turn_; i < 3 && wanting; ++i, channel = channel == 2 ? 0 : channel + 1) {
            if (!(wanting >> channel & 1)) continue;
            uint64_t price = uint64_t(beat_bytes[channel]) << 16;
            if (tokens_ < price) {
                turn_ = channel;
                break;
            }
            tokens_ -= price;
            if (!served) turn_ = channel == 2 ? 0 : channel + 1;
            served |= 1u << channel;
        }
        return served;
    }

    bool stall() {
        if (!params_.stall_threshold) return false;
        random_ ^= random_ << 13;
        random_ ^= random_ >> 7;
        random_ ^= random_ << 17;
        return uint32_t(random_ >> 32) < params_.stall_threshold;
    }

  private:
    DramParams params_;
    uint64_t cap_, tokens_ = 0, random_;
    uint32_t until_refresh_, refreshing_ = 0;
    unsigned turn_ = 0;
};

struct Counters {
    uint64_t read_bytes = 0, write_bytes = 0, read_bursts = 0, write_bursts = 0;
};

// AR and R of one port. The public members are what the manager sees in the coming cycle.
class ReadChannel {
  public:
    bool arready = false, rvalid = false, rlast = false;
    bool loaded = false;  // a new beat was loaded: its data has to be put on the bus
    Response rresp = OKAY;
    uint64_t address = 0;  // of the beat on the bus

    ReadChannel(const DramParams &params, uint32_t beat_bytes)
        : bursts_(params.max_reads), beat_bytes_(beat_bytes), latency_(params.latency_cycles), max_(params.max_reads) {}

    // 1. what was transferred in this cycle
    void transfer(bool arvalid, uint64_t araddr, unsigned arlen, bool rready, uint64_t cycle, Counters &counters) {
        loaded = false;
        if (rvalid && rready) {
            rvalid = false;
            in_flight_ -= rlast;
            counters.read_bytes += beat_bytes_;
        }
        if (arvalid && arready) {
            bursts_.push({araddr, arlen + 1, cycle + latency_});
            ++in_flight_;
            ++counters.read_bursts;
        }
    }
    // 2. does it want a beat for the coming cycle?
    bool wants(uint64_t coming, Budget &budget) {
        return !rvalid && !bursts_.empty() && bursts_.front().ready_at <= coming && !budget.stall();
    }
    // 3. what the manager will see
    void drive(bool served, const Memory &memory, Budget &budget) {
        if (served) {
            Burst &burst = bursts_.front();
            address = burst.address;
            burst.address += beat_bytes_;
            rvalid = loaded = true;
            rlast = --burst.beats == 0;
            rresp = memory.response(address, beat_bytes_);
            if (rlast) bursts_.pop();
        }
        arready = in_flight_ < max_ && !budget.stall();
    }
    bool idle() const { return in_flight_ == 0; }

  private:
    struct Burst {
        uint64_t address;
        uint32_t beats;
        uint64_t ready_at;
    };
    Ring<Burst> bursts_;
    uint32_t beat_bytes_, latency_, max_, in_flight_ = 0;
};

// AW, W and B of one port.
class WriteChannel {
  public:
    bool awready = false, wready = false, bvalid = false;
    Response bresp = OKAY;

    WriteChannel(const DramParams &params, uint32_t beat_bytes)
        : bursts_(params.max_writes), answers_(params.max_writes), beat_bytes_(beat_bytes),
          latency_(params.latency_cycles), max_(params.max_writes) {}

    bool expects_data() const { return !bursts_.empty(); }
    bool expects_last() { return bursts_.front().beats == 1; }

    void transfer(bool awvalid, uint64_t awaddr, unsigned awlen, bool wvalid, const void *data, uint64_t strobes,
                  bool bready, uint64_t cycle, Memory &memory, Counters &counters) {
        if (bvalid && bready) {
            bvalid = false;
            --in_flight_;
        }
        if (wvalid && wready) {
            Burst &burst = bursts_.front();
            Response response = memory.response(burst.address, beat_bytes_);
            if (response != OKAY)
                burst.response = response;
            else
                store(memory.at(burst.address), static_cast<const uint8_t *>(data), strobes);
            counters.write_bytes += beat_bytes_;
            burst.address += beat_bytes_;
            open_ = false;
            if (--burst.beats == 0) {
                answers_.push({burst.response, cycle + latency_});
                bursts_.pop();
            }
        }
        if (awvalid && awready) {
            bursts_.push({awaddr, awlen + 1, OKAY});
            ++in_flight_;
            ++counters.write_bursts;
        }
    }
    bool wants() { return !open_ && !bursts_.empty(); }
    void drive(bool served, uint64_t coming, Budget &budget) {
        open_ |= served;
        wready = open_ && !budget.refreshing() && !budget.stall();
        awready = in_flight_ < max_ && !budget.stall();
        if (!bvalid && !answers_.empty() && answers_.front().ready_at <= coming && !budget.stall()) {
            bvalid = true;
            bresp = answers_.front().response;
            answers_.pop();
        }
    }
    bool idle() const { return in_flight_ == 0; }

  private:
    struct Burst {
        uint64_t address;
        uint32_t beats;
        Response response;
    };
    struct Answer {
        Response response;
        uint64_t ready_at;
    };
    void store(uint8_t *to, const uint8_t *from, uint64_t strobes) const {
        uint64_t all = beat_bytes_ == 64 ? ~uint64_t(0) : (uint64_t(1) << beat_bytes_) - 1;
        if (strobes == all) {
            std::memcpy(to, from, beat_bytes_);
            return;
        }
        for (uint32_t i = 0; i < beat_bytes_; ++i)
            if (strobes >> i & 1) to[i] = from[i];
    }
    Ring<Burst> bursts_;
    Ring<Answer> answers_;
    uint32_t beat_bytes_, latency_, max_, in_flight_ = 0;
    bool open_ = false;  // budget for the next beat is paid
};

}  // namespace lutra
