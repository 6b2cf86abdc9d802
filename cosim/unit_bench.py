"""A Verilated unit with the compiled loop around it: the side of cosim/harness/unit_bench.hpp that tests see."""

import ctypes
from ctypes import Structure, c_char_p, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

__all__ = ["UnitBench", "of_256"]


def of_256(chance: float) -> int:
    """A chance as the loops take it."""
    return round(chance * 256)


@cache
def _load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.bench_create.restype = c_void_p
    lib.bench_destroy.argtypes = [c_void_p]
    lib.bench_op_bytes.restype = c_uint64
    lib.bench_run.argtypes, lib.bench_run.restype = [c_void_p, c_void_p], c_int64
    lib.bench_error.argtypes, lib.bench_error.restype = [c_void_p], c_char_p
    return lib


class UnitBench:
    """One unit after reset; what a run leaves in it stays for the next."""

    def __init__(self, library: Path) -> None:
        self._handle = None
        self.lib = _load(library)
        self._handle = self.lib.bench_create()
        if not self._handle:
            raise RuntimeError("the model cannot be made")

    def __del__(self) -> None:
        if self._handle:
            self.lib.bench_destroy(self._handle)

    def operation(self, payload: int) -> bytes:
        """Payload of ``i_op`` as the model's type has it."""
        return payload.to_bytes(self.lib.bench_op_bytes(), "little")

    def run(self, job: Structure) -> int:
        """What the loop counts. Raises AssertionError with its reason."""
        count = self.lib.bench_run(self._handle, ctypes.byref(job))
        if count < 0:
            raise AssertionError(self.lib.bench_error(self._handle).decode())
        return count
