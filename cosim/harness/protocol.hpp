// AXI4 rules that a manager must obey. The first violation is kept; it ends the run.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace lutra {

class Violation {
  public:
    bool found() const { return text_[0] != 0; }
    const char *text() const { return text_; }
    void clear() { text_[0] = 0; }

    __attribute__((format(printf, 4, 5))) void report(uint64_t cycle, const char *channel, const char *format, ...) {
        if (found()) return;
        int at = std::snprintf(text_, sizeof text_, "cycle %llu, %s: ", static_cast<unsigned long long>(cycle), channel);
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(text_ + at, sizeof text_ - at, format, arguments);
        va_end(arguments);
    }

  private:
    char text_[256] = "";
};

// AR or AW: held until taken, and only bursts that our memories accept.
class AddressRules {
  public:
    AddressRules(const char *channel, uint32_t beat_bytes) : channel_(channel), beat_bytes_(beat_bytes) {
        while (1u << size_ < beat_bytes) ++size_;
    }
    void reset() { stalled_ = false; }

    void check(bool valid, bool ready, uint64_t address, unsigned length, unsigned size, unsigned burst, uint64_t cycle,
               Violation &violation) {
        if (stalled_) {
            if (!valid)
                violation.report(cycle, channel_, "valid was withdrawn before ready");
            else if (address != address_ || length != length_ || size != held_size_ || burst != held_burst_)
                violation.report(cycle, channel_, "payload changed before ready (address %#llx, was %#llx)",
                                 static_cast<unsigned long long>(address), static_cast<unsigned long long>(address_));
        } else if (valid) {
            if (burst != 1) violation.report(cycle, channel_, "burst type %u is not INCR", burst);
            if (size != size_) violation.report(cycle, channel_, "size %u is not the full width %u", size, size_);
            if (address % beat_bytes_)
                violation.report(cycle, channel_, "address %#llx is not aligned to the beat of %u bytes",
                                 static_cast<unsigned long long>(address), beat_bytes_);
            uint64_t end = (address & 4095) + uint64_t(length + 1) * beat_bytes_;
            if (end > 4096)
                violation.report(cycle, channel_, "burst of %u beats at %#llx crosses 4 KiB", length + 1,
                                 static_cast<unsigned long long>(address));
        }
        stalled_ = valid && !ready;
        address_ = address, length_ = length, held_size_ = size, held_burst_ = burst;
    }

  private:
    const char *channel_;
    uint32_t beat_bytes_;
    unsigned size_ = 0, length_ = 0, held_size_ = 0, held_burst_ = 0;
    uint64_t address_ = 0;
    bool stalled_ = false;
};

// W: held until taken, never without its address, WLAST exactly at the end of the burst.
class DataRules {
  public:
    explicit DataRules(uint32_t beat_bytes) : beat_bytes_(beat_bytes) {}
    void reset() { stalled_ = false; }

    // `expected`: an accepted AW still waits for data; `address_offered`: AWVALID is high.
    void check(bool valid, bool ready, const void *data, uint64_t strobes, bool last, bool expected, bool last_expected,
               bool address_offered, uint64_t cycle, Violation &violation) {
        if (stalled_) {
            if (!valid)
                violation.report(cycle, "data port W", "valid was withdrawn before ready");
            else if (strobes != strobes_ || last != last_ || std::memcmp(data, data_, beat_bytes_))
                violation.report(cycle, "data port W", "payload changed before ready");
        }
        if (!valid) {
            stalled_ = false;
            return;
        }
        if (!expected && !address_offered) violation.report(cycle, "data port W", "data without an address");
        if (ready && last != last_expected)
            violation.report(cycle, "data port W", "WLAST is %d where %d is due", last, last_expected);
        stalled_ = !ready;
        if (stalled_) {
            std::memcpy(data_, data, beat_bytes_);
            strobes_ = strobes, last_ = last;
        }
    }

  private:
    uint32_t beat_bytes_;
    bool stalled_ = false, last_ = false;
    uint64_t strobes_ = 0;
    uint8_t data_[128] = {};
};

}  // namespace lutra
