"""Fault codes and debug spaces: enumerations that registers carry."""

from enum import IntEnum


class FaultCode(IntEnum):
    """Why the device stopped. `fault_addr` holds the address where one is meaningful."""

    NONE = 0
    AXI_WEIGHT_READ = 1
    """Error response on the weight port."""
    AXI_DATA_READ = 2
    """Error response to a read on the data port."""
    AXI_DATA_WRITE = 3
    """Error response to a write on the data port."""
    ILLEGAL_DESCRIPTOR = 4
    """Unknown opcode, or a field outside its legal range; `fault_addr` is the descriptor's."""
    ADDRESS = 5
    """A DMA beyond `memory_limit`."""
    WEIGHT_STREAM = 6
    """Bad segment header, wrong kind, or an illegal dense byte in the weight stream."""
    POSITION = 7
    """position + token_count exceeds cache_slots, or token_count is out of range."""
    WATCHDOG = 8
    """No progress for `watchdog` cycles."""


class DebugSpace(IntEnum):
    """Memory seen through `debug_addr`."""

    VECTOR = 0
    GENERATED = 1
