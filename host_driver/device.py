"""The driver of one device: the same code for golden model, simulated RTL and board."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from host_driver.compiler import LAYERS, STEP, CompiledModel
from host_driver.errors import DeviceError, DeviceFault, DeviceTimeout, InvalidRequest, SpecMismatch
from host_driver.transport import Progress, Transport
from spec import csr
from spec.config import LANES, AcceleratorConfig
from spec.faults import DebugSpace
from spec.hashing import spec_hash

TIMEOUT_S = 3600.0
"""Default deadline of one doorbell: simulated RTL may need minutes for a large model's prefill tile."""

GENERATED_WORDS = 4
"""Debug words of a generated token: token, cycle low, cycle high, 0."""

DUMPED_REGISTERS = ("status", "fault", "fault_descriptor", "position", "token_count", "descriptor_index", "generated")
"""State that a timeout reports."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one doorbell gave. `cycles[i]` counts from the doorbell to the end of token i's step."""

    tokens: tuple[int, ...]
    cycles: tuple[int, ...]
    logits: NDArray[np.float32] | None
    """(vocab,) of the last token, if they were asked for."""
    counters: dict[str, int]
    wall_s: float


class Device:
    """Programs, memory, doorbell and counters over a transport.

    Parameters
    ----------
    transport
        Registers and memory.
    config
        The build that the device must be. SpecMismatch if its registers say otherwise.
    timeout_s
        Deadline of one doorbell.
    """

    def __init__(self, transport: Transport, config: AcceleratorConfig, *, timeout_s: float = TIMEOUT_S) -> None:
        self.transport = transport
        self.config = config
        self.timeout_s = timeout_s
        self._compiled: CompiledModel | None = None
        magic, version = self.read("magic"), self.read("version")
        if magic != csr.MAGIC:
            raise SpecMismatch(f"this is no Lutra device: magic {magic:#010x}, expected {csr.MAGIC:#010x}")
        if version != csr.VERSION:
            raise SpecMismatch(f"the device has register map {version}, this driver speaks {csr.VERSION}: rebuild one")
        found, expected = self.read64("spec_hash"), spec_hash(config)
        if found != expected:
            raise SpecMismatch(
                f"the device was made from another spec or preset than {config.name!r}: "
                f"hash {found:#018x}, expected {expected:#018x}; rebuild the device or choose its preset"
            )

    # registers ---------------------------------------------------------------------------------------------------

    def read(self, name: str, index: int = 0) -> int:
        """A register by name."""
        return self.transport.read32(csr.BY_NAME[name].offset + 4 * index)

    def write(self, name: str, value: int, index: int = 0) -> None:
        """A register by name."""
        self.transport.write32(csr.BY_NAME[name].offset + 4 * index, value)

    def read64(self, name: str, index: int = 0) -> int:
        """Two consecutive words, low first."""
        return self.read(name, index) | self.read(name, index + 1) << 32

    def write64(self, name: str, value: int) -> None:
        """Two consecutive words, low first."""
        self.write(name, value & 0xFFFFFFFF)
        self.write(name, value >> 32, 1)

    def status(self, field: str) -> bool:
        """A flag of the status register."""
        return bool(self.read("status") & csr.STATUS.field(field).mask)

    def command(self, name: str) -> None:
        """Start, resume or reset."""
        self.transport.write32(csr.CONTROL.offset, csr.CONTROL.field(name).mask)

    def counters(self) -> dict[str, int]:
        """All counters of the last doorbell, by name."""
        return {name: self.read64("counters", 2 * index) for index, (name, _) in enumerate(csr.COUNTERS)}

    # memory ------------------------------------------------------------------------------------------------------

    @property
    def compiled(self) -> CompiledModel:
        """The model in the device's memory."""
        if self._compiled is None:
            raise DeviceError("no model is in the device's memory: call load first")
        return self._compiled

    def load(self, compiled: CompiledModel, image: Iterable[tuple[int, bytes]]) -> None:
        """Writes a model's memory image and tells the device its limits."""
        if compiled.memory.limit > self.transport.memory_bytes:
            raise InvalidRequest(
                f"model {compiled.model.name!r} needs {compiled.memory.limit} bytes of device memory, "
                f"there are {self.transport.memory_bytes}"
            )
        for address, data in image:
            self.transport.write_mem(address, data)
        self.write64("memory_limit", compiled.memory.limit)
        self.write("cache_slots", compiled.slots)
        self.write64("logits", compiled.memory["logits"].address)
        self._compiled = compiled

    def read_logits(self) -> NDArray[np.float32]:
        """(vocab,) logits of the last step that wrote them."""
        compiled = self.compiled
        data = self.transport.read_mem(compiled.memory["logits"].address, 4 * compiled.model.vocab)
        return np.frombuffer(data, dtype="<f4").astype(np.float32)

    # doorbell ----------------------------------------------------------------------------------------------------

    def prepare(
        self, tokens: Sequence[int], position: int, *, head: bool, repeat: int = 1, stop_token: int | None = None,
        logits: bool = False, break_at: int | None = None,
    ) -> None:
        """Sets all registers of a step. Raises InvalidRequest on a step that does not fit the device."""
        compiled = self.compiled
        if not 1 <= len(tokens) <= compiled.tile:
            raise InvalidRequest(f"a step takes 1 to {compiled.tile} tokens, not {len(tokens)}")
        if position < 0 or position + len(tokens) > compiled.slots:
            raise InvalidRequest(
                f"tokens at positions {position} to {position + len(tokens) - 1} do not fit a cache of {compiled.slots}"
            )
        if not 1 <= repeat <= csr.OUT_TOKENS:
            raise InvalidRequest(f"one doorbell generates 1 to {csr.OUT_TOKENS} tokens, not {repeat}")
        self.write64("program", compiled.programs[STEP if head else LAYERS].address)
        self.write("position", position)
        self.write("token_count", len(tokens))
        for index, token in enumerate(tokens):
            self.write("tokens", token, index)
        self.write("repeat", repeat)
        self.write("stop_token", csr.NONE if stop_token is None else stop_token)
        self.write("logits_enable", int(logits))
        self.write("break_at", csr.NONE if break_at is None else break_at)

    def wait(self, progress: Progress | None = None) -> None:
        """Until the device is done or paused. Raises DeviceFault, or DeviceTimeout at the deadline."""
        self.transport.wait(self.timeout_s, progress)
        if self.status("fault"):
            fault = self.read("fault")
            code, tag = csr.FAULT.field("code"), csr.FAULT.field("tag")
            raise DeviceFault(
                code=(fault & code.mask) >> code.lsb,
                tag=(fault & tag.mask) >> tag.lsb,
                address=self.read64("fault_addr"),
                descriptor=self.read("fault_descriptor"),
            )
        if not (self.status("done") or self.status("paused")):
            registers = {name: self.read(name) for name in DUMPED_REGISTERS}
            raise DeviceTimeout(f"the device is still busy after {self.timeout_s:g} s", registers)

    def generated(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of the last doorbell and the cycles at which each was there."""
        tokens, cycles = [], []
        for entry in range(self.read("generated")):
            first = GENERATED_WORDS * entry
            tokens.append(self.debug_word(DebugSpace.GENERATED, first))
            low, high = (self.debug_word(DebugSpace.GENERATED, first + word) for word in (1, 2))
            cycles.append(low | high << 32)
        return tuple(tokens), tuple(cycles)

    def run_step(
        self, tokens: Sequence[int], position: int, *, head: bool, repeat: int = 1, stop_token: int | None = None,
        logits: bool = False, progress: Progress | None = None,
    ) -> StepResult:
        """One doorbell: ``tokens`` at ``position`` on through the layers, and with ``head`` to the next token.

        ``repeat`` above 1 feeds the argmax back; ``logits`` reads back those of the last token.
        """
        started = perf_counter()
        self.prepare(tokens, position, head=head, repeat=repeat, stop_token=stop_token, logits=logits)
        self.command("start")
        self.wait(progress)
        out_tokens, cycles = self.generated() if head else ((), ())
        return StepResult(
            tokens=out_tokens,
            cycles=cycles,
            logits=self.read_logits() if head and logits else None,
            counters=self.counters(),
            wall_s=perf_counter() - started,
        )

    def reset(self) -> None:
        """Drops all work and faults; memory and registers keep their contents, so the model stays loaded."""
        self.command("reset")
        self.transport.wait(self.timeout_s)  # bus transfers in flight end first

    # looking inside ----------------------------------------------------------------------------------------------

    def debug_word(self, space: DebugSpace, index: int) -> int:
        """A word behind `debug_addr`, while the device is idle or paused."""
        register = csr.BY_NAME["debug_addr"]
        self.write("debug_addr", index << register.field("index").lsb | space << register.field("space").lsb)
        return self.read("debug_data")

    def read_vector(self, row: int, rows: int) -> NDArray[np.uint32]:
        """(rows * 8,) bit patterns of the vector memory."""
        words = [self.debug_word(DebugSpace.VECTOR, row * LANES + word) for word in range(rows * LANES)]
        return np.array(words, dtype=np.uint32)
