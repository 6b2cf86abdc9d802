"""The golden device: executes the same descriptors from the same memory bytes as the RTL, with PyTorch.

It answers the same registers (spec/csr.py) as a transport of the host driver. It has no clock: cycle counters read 0.
Byte counters count what operations mean; the bus moves whole beats, so the RTL's may be larger.
"""

from collections.abc import Callable

import numpy as np
import torch

from golden.execute import Executor, FaultError
from spec.config import LANES, AcceleratorConfig
from spec.csr import BY_NAME, CONTROL, COUNTERS, OUT_TOKENS, REGISTERS, STATUS
from spec.descriptors import DESCRIPTOR_BYTES, Epilogue, Opcode, unpack
from spec.faults import DebugSpace, FaultCode
from spec.hashing import spec_hash
from spec.limits import field_limits
from spec.presets import PRESETS


class GoldenTransport:
    """Registers and memory of a golden device.

    Parameters
    ----------
    config
        The build it stands for: legal ranges and beat sizes come from it.
    memory_bytes
        Size of its memory.
    """

    def __init__(self, config: AcceleratorConfig, memory_bytes: int) -> None:
        self.config = config
        self.memory_bytes = memory_bytes
        self._memory = np.zeros(memory_bytes, dtype=np.uint8)
        self._words: dict[int, int] = {}
        for register in REGISTERS:
            for i in range(register.count):
                self._words[register.offset + 4 * i] = register.reset
        digest = spec_hash(config)
        self._set("spec_hash", digest & 0xFFFFFFFF, digest >> 32)
        self._limits = field_limits(config)
        self._reset()

    # registers ---------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """Value of the register word at a byte offset."""
        if offset == BY_NAME["debug_data"].offset:
            return self._debug_word()
        if offset not in self._words:
            raise ValueError(f"no register at offset {offset:#x}")
        return self._words[offset]

    def write32(self, offset: int, value: int) -> None:
        """Write a register word; CONTROL acts at once, the work is done by `wait`."""
        if offset not in self._words:
            raise ValueError(f"no register at offset {offset:#x}")
        if offset != CONTROL.offset:
            self._words[offset] = value & 0xFFFFFFFF
            return
        commands = {field.name for field in CONTROL.fields if value & field.mask}
        if "reset" in commands:
            self._reset()
        elif "start" in commands and not self._running:
            self._start()
        elif "resume" in commands and self._paused:
            self._paused, self._skip_break = False, True

    def read_mem(self, address: int, size: int) -> bytes:
        """Bytes of the memory."""
        self._check(address, size)
        return self._memory[address : address + size].tobytes()

    def write_mem(self, address: int, data: bytes) -> None:
        """Write bytes to the memory."""
        self._check(address, len(data))
        self._memory[address : address + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._executor.forget_weights()

    def wait(self, timeout_s: float | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Run until done, paused or fault. The golden device has no clock, so neither argument is used."""
        try:
            while self._running and not self._paused:
                self._step()
        except FaultError as fault:
            self._running = False
            self._fault(fault)
        self._publish()

    # program -----------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._executor = Executor(self.config, self._memory)
        self._running = self._paused = self._skip_break = self._feedback = self._done = False
        self._index = self._generated = 0
        self._records: list[int] = []
        self._set("fault", 0)
        self._publish()

    def _start(self) -> None:
        self._done = self._paused = self._skip_break = False
        self._running = True
        self._index = self._generated = 0
        self._records = []
        executor = self._executor
        executor.begin(
            position=self._get("position"),
            tokens=[self._words[BY_NAME["tokens"].offset + 4 * i] for i in range(min(self._get("token_count"), 32))],
            slots=self._get("cache_slots"),
            limit=self._get64("memory_limit"),
            logits=self._get64("logits") if self._get("logits_enable") & 1 else None,
        )
        count = self._get("token_count")
        if not 1 <= count <= self.config.matmul.tokens or executor.position + count > executor.slots:
            self._running = False
            self._fault(FaultError(FaultCode.POSITION, executor.position))
            self._publish()

    def _step(self) -> None:
        """One descriptor."""
        if self._index == self._get("break_at") and not self._skip_break:
            self._paused = True
            return
        self._skip_break = False
        executor = self._executor
        address = self._get64("program") + self._index * DESCRIPTOR_BYTES
        data = executor.read("activation_bytes", address, DESCRIPTOR_BYTES)
        try:
            opcode, op = unpack(data.tobytes())
            for (limited, name), limit in self._limits.items():
                if limited == opcode and op[name] > limit:
                    raise ValueError(f"{opcode.name}.{name} is {op[name]}, above {limit}")
        except ValueError as error:
            raise FaultError(FaultCode.ILLEGAL_DESCRIPTOR, address) from error
        executor.tag = op["tag"]
        if opcode is Opcode.END:
            self._end()
            return
        executor.execute(opcode, op)
        if opcode is Opcode.MATMUL and op["epilogue"] == Epilogue.LOGITS:
            self._feedback = True
        self._index += 1

    def _end(self) -> None:
        executor = self._executor
        again = False
        if self._feedback:
            self._feedback = False
            if self._generated < OUT_TOKENS:
                self._records += [executor.argmax, 0, 0, 0]  # token, cycle low, cycle high, 0
            self._generated += 1
            again = (
                self._generated < self._get("repeat")
                and executor.argmax != self._get("stop_token")
                and executor.position + len(executor.tokens) < executor.slots
            )
        if again:
            executor.next_token()
            self._index = 0
        else:
            self._running, self._done = False, True

    def _fault(self, fault: FaultError) -> None:
        self._set("fault", int(fault.code) | self._executor.tag << 8)
        self._set("fault_addr", fault.address & 0xFFFFFFFF, fault.address >> 32)
        self._set("fault_descriptor", self._index)

    def _publish(self) -> None:
        state = {
            "busy": self._running and not self._paused,
            "done": self._done,
            "paused": self._paused,
            "fault": self._get("fault") & 0xFF != 0,
        }
        self._set("status", sum(STATUS.field(name).mask for name, value in state.items() if value))
        self._set("argmax", self._executor.argmax)
        self._set("generated", self._generated)
        self._set("descriptor_index", self._index)
        words = []
        for name, _doc in COUNTERS:
            count = self._executor.counts.get(name, 0)
            words += [count & 0xFFFFFFFF, count >> 32]
        self._set("counters", *words)

    # helpers -----------------------------------------------------------------------------------------------------

    def _get(self, name: str) -> int:
        return self._words[BY_NAME[name].offset]

    def _get64(self, name: str) -> int:
        offset = BY_NAME[name].offset
        return self._words[offset] | self._words[offset + 4] << 32

    def _set(self, name: str, *values: int) -> None:
        for i, value in enumerate(values):
            self._words[BY_NAME[name].offset + 4 * i] = value

    def _check(self, address: int, size: int) -> None:
        if address < 0 or address + size > self.memory_bytes:
            raise ValueError(f"bytes {address:#x} to {address + size:#x} are outside the memory of {self.memory_bytes}")

    def _debug_word(self) -> int:
        register = BY_NAME["debug_addr"]
        value = self._get("debug_addr")
        index = (value & register.field("index").mask) >> register.field("index").lsb
        space = (value & register.field("space").mask) >> register.field("space").lsb
        if space == DebugSpace.VECTOR:
            return self._executor.vector_bits(index // LANES, index % LANES)
        return self._records[index] if index < len(self._records) else 0


def open_device(preset: str, memory_bytes: int, **options: object) -> GoldenTransport:
    """A golden device of a preset. It has no options."""
    torch.set_num_threads(1)  # the tensors of a step are small: more threads only wait for each other
    if options:
        raise ValueError(f"the golden device has no option {sorted(options)[0]!r}")
    return GoldenTransport(PRESETS[preset], memory_bytes)
