"""A unit of a netlist as expressions: what its registers, memories and outputs become, from the JSON that Yosys writes.

A unit is a module with all that is below it. Its signals are followed bit by bit through the hierarchy, and put together again
to the widest words that come from one cell.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cosim.vector.cells import Bit, Cell, CellReader, words_of
from cosim.vector.expression import WORD, Expressions, Node, UnsupportedError

__all__ = ["Memory", "Modules", "Register", "Slot", "Unit", "Write", "read_unit"]

Modules = dict[str, Any]
"""``modules`` of Yosys's JSON, by name."""


@dataclass(eq=False, slots=True)
class Slot:
    """A word of the state or of the inputs."""

    name: str
    width: int
    offset: int = -1
    """In bytes, from the beginning of the unit's state; set by the layout."""


@dataclass(eq=False)
class Memory:
    """Rows of ``width`` bits. Written at the end of a clock edge; ``init`` by row."""

    name: str
    width: int
    rows: int
    init: tuple[int, ...]
    offset: int = -1
    """Of row 0, in bytes; set by the layout, as is ``pitch``, the distance of rows."""
    pitch: int = 0


@dataclass(frozen=True, eq=False)
class Register:
    """A word that takes ``next`` at an edge of ``clock``."""

    slot: Slot
    init: int
    next: Node
    clock: str


@dataclass(frozen=True, eq=False)
class Write:
    """Bits ``low`` and on of a row take ``data`` where ``enable`` is 1."""

    memory: Memory
    clock: str
    enable: Node
    address: Node
    low: int
    data: Node


@dataclass
class Unit:
    """A flat synchronous machine."""

    name: str
    expressions: Expressions
    inputs: dict[str, list[Slot]] = field(default_factory=dict)
    """By port, in words; without clocks."""
    widths: dict[str, int] = field(default_factory=dict)
    """Of all ports but clocks."""
    clocks: list[str] = field(default_factory=list)
    outputs: dict[str, list[Node]] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    cells: int = 0


def read_unit(modules: Modules, name: str) -> Unit:
    """Module ``name``. Raises UnsupportedError."""
    return _Reader(modules, name).unit


def _plain(name: str) -> str:
    """Without the number that Yosys and Amaranth append to make a name unique."""
    return re.sub(r"\$\d+$", "", name)


class _Reader(CellReader):
    def __init__(self, modules: Modules, name: str) -> None:
        self._modules = modules
        self._alias: dict[int, Bit] = {}
        self._driver: dict[int, tuple[Cell, str, int]] = {}
        self._sources: dict[int, tuple[list[Slot], int]] = {}
        """Slots of a register, an input or a read port, and the bit among them, by net."""
        self._clocks: dict[int, str] = {}
        self._reads: dict[int, tuple[Cell, int, int]] = {}
        """Memory, port and bit of an asynchronous read, by net."""
        self._memories: dict[int, Memory] = {}
        self._tables: dict[tuple[int, int, tuple[int, ...]], Memory] = {}
        self._nets = 0
        self._cells: list[Cell] = []
        self._x = Expressions()
        self.unit = Unit(name=name, expressions=self._x)
        top = modules[name]
        clocks = self._clock_ports(name)
        local = {}
        for port, entry in top["ports"].items():
            if entry["direction"] == "input":
                bits = self._fresh(local, entry["bits"])
                if port in clocks:
                    self.unit.clocks.append(port)
                    self._clocks[bits[0]] = port
                    continue
                self.unit.widths[port] = len(bits)
                self.unit.inputs[port] = self._slots(_plain(port), bits)
        self._flatten(name, "", local)
        self._state()
        for port, entry in top["ports"].items():
            if entry["direction"] == "output":
                bits = [local.get(bit, bit) for bit in entry["bits"]]
                self.unit.widths[port] = len(bits)
                self.unit.outputs[port] = [self._value(bits[low : low + width]) for low, width in words_of(len(bits))]
        self.unit.cells = len(self._cells)

    def _clock_ports(self, name: str) -> set[str]:
        """Input ports that clock a register of the module or of one below it."""
        module = self._modules[name]
        nets = set()
        for cell in module["cells"].values():
            kind, nets_of = cell["type"], cell["connections"]
            if kind == "$dff":
                nets.update(nets_of["CLK"])
            elif kind == "$mem_v2":
                nets.update(nets_of["WR_CLK"], nets_of["RD_CLK"])
            elif kind in self._modules:
                for port in self._clock_ports(kind):
                    nets.update(nets_of[port])
        return {port for port, entry in module["ports"].items() if entry["direction"] == "input" and nets & set(entry["bits"])}

    # Hierarchy --------------------------------------------------------------------------------------------------------
    def _fresh(self, local: dict[int, Bit], bits: Sequence[Bit]) -> list[int]:
        numbers = []
        for bit in bits:
            assert isinstance(bit, int), "a port bit of a module's own is a net"
            local[bit] = self._nets
            numbers.append(self._nets)
            self._nets += 1
        return numbers

    def _slots(self, name: str, bits: Sequence[Bit]) -> list[Slot]:
        """Slots that drive nets."""
        words = words_of(len(bits))
        slots = [Slot(name if len(words) == 1 else f"{name}[{low // WORD}]", width) for low, width in words]
        for number, bit in enumerate(bits):
            assert isinstance(bit, int), "a constant has no driver"
            self._sources[bit] = (slots, number)
        return slots

    def _flatten(self, name: str, path: str, local: dict[int, Bit]) -> None:
        """Cells of a module, whose nets have numbers in ``local`` as far as they are known, and of those below."""
        module = self._modules[name]

        def net(bit: Bit) -> Bit:
            if isinstance(bit, str):
                return bit
            if bit not in local:
                local[bit] = self._nets
                self._nets += 1
            return local[bit]

        names, inits = {}, {}
        for signal, entry in module["netnames"].items():
            for number, bit in enumerate(entry["bits"]):
                if not entry["hide_name"]:
                    names.setdefault(bit, signal)
                if "init" in entry["attributes"]:
                    inits[net(bit)] = entry["attributes"]["init"][::-1][number]
        for cell_name, entry in module["cells"].items():
            kind = entry["type"]
            nets = {port: [net(bit) for bit in bits] for port, bits in entry["connections"].items()}
            if kind in self._modules:
                self._enter(kind, f"{path}{_plain(cell_name)}.", nets)
                continue
            own = names.get(entry["connections"]["Q"][0], cell_name) if kind == "$dff" else cell_name
            init = "".join(inits.get(bit, "0") for bit in nets.get("Q", ()))
            cell = Cell(kind, entry["parameters"], nets, path + _plain(own), init)
            self._cells.append(cell)
            for port, direction in entry["port_directions"].items():
                if direction == "output":
                    for number, bit in enumerate(nets[port]):
                        assert isinstance(bit, int), "no cell drives a constant"
                        self._driver[bit] = (cell, port, number)

    def _enter(self, kind: str, path: str, nets: dict[str, list[Bit]]) -> None:
        ports = self._modules[kind]["ports"]
        local: dict[int, Bit] = {}
        outputs = []
        for port, entry in sorted(ports.items(), key=lambda item: item[1]["direction"] != "input"):
            for inner, outer in zip(entry["bits"], nets.get(port, ["x"] * len(entry["bits"])), strict=True):
                if entry["direction"] == "input":
                    local[inner] = outer
                elif isinstance(outer, int):
                    if isinstance(inner, str) or inner in local:
                        outputs.append((outer, inner))
                    else:
                        local[inner] = outer
        self._flatten(kind, path, local)
        for outer, inner in outputs:
            target = inner if isinstance(inner, str) else local[inner]
            if target != outer:
                self._alias[outer] = target

    # State ------------------------------------------------------------------------------------------------------------
    def _state(self) -> None:
        unit, registers, ports = self.unit, [], []
        for cell in self._cells:
            if cell.kind == "$dff":
                self._refuse(cell, "falling edges", [] if cell.number("CLK_POLARITY") else [1])
                registers.append((cell, self._slots(cell.name, cell.nets["Q"])))
            elif cell.kind == "$mem_v2":
                memory = self._memory(cell)
                width = memory.width
                for port, clocked in enumerate(reversed(cell.parameters["RD_CLK_ENABLE"])):
                    data = cell.nets["RD_DATA"][port * width : (port + 1) * width]
                    if clocked == "1":
                        ports.append((cell, memory, port, self._slots(f"{cell.name}.out_{port}", data)))
                    else:
                        for number, bit in enumerate(data):
                            assert isinstance(bit, int), "a read port drives nets"
                            self._reads[bit] = (cell, port, number)
        for cell, slots in registers:
            clock = self._clock(cell.nets["CLK"][0])
            for slot, (low, width) in zip(slots, words_of(len(cell.nets["D"])), strict=True):
                value = int(cell.init[low : low + width][::-1].replace("x", "0"), 2)
                following = self._value(cell.nets["D"][low : low + width])
                unit.registers.append(Register(slot, value, following, clock))
        for cell, memory, port, slots in ports:
            enable, address = self._value([cell.nets["RD_EN"][port]]), self._address(cell, "RD_ADDR", port)
            clock = self._clock(cell.nets["RD_CLK"][port])
            for slot, (low, width) in zip(slots, words_of(memory.width), strict=True):
                old = self._x.make("slot", width, (), slot)
                fetched = self._x.make("read", width, (address,), (memory, low))
                unit.registers.append(Register(slot, 0, self._x.mux(enable, fetched, old), clock))
        for cell in self._cells:
            if cell.kind == "$mem_v2":
                self._write_ports(cell)

    def _memory(self, cell: Cell) -> Memory:
        width, rows = cell.number("WIDTH"), cell.number("SIZE")
        self._refuse(cell, "transparent reads", cell.parameters["RD_TRANSPARENCY_MASK"])
        self._refuse(cell, "an offset", [cell.number("OFFSET")])
        self._refuse(cell, "resets of read ports", (*cell.nets["RD_ARST"], *cell.nets["RD_SRST"]))
        text = cell.parameters["INIT"].replace("x", "0").rjust(rows * width, "0")
        init = tuple(int(text[len(text) - (row + 1) * width : len(text) - row * width], 2) for row in range(rows))
        memory = Memory(cell.name, width, 1 << cell.number("ABITS"), init if any(init) else ())
        if not cell.number("WR_PORTS"):  # lanes may have a table each: one serves them all
            memory = self._tables.setdefault((width, memory.rows, init), memory)
        self._memories[id(cell)] = memory
        if memory not in self.unit.memories:
            self.unit.memories.append(memory)
        return memory

    def _refuse(self, cell: Cell, what: str, flags: Iterable[Bit]) -> None:
        """Raises UnsupportedError unless all flags are 0."""
        if any(flag not in (0, "0", "x") for flag in flags):
            raise UnsupportedError(f"{cell.name}: {what}")

    def _address(self, cell: Cell, port: str, number: int) -> Node:
        bits = cell.number("ABITS")
        return self._value(cell.nets[port][number * bits : (number + 1) * bits])

    def _write_ports(self, cell: Cell) -> None:
        memory = self._memories[id(cell)]
        for port in range(cell.number("WR_PORTS")):
            enables, data = (cell.nets[name][port * memory.width : (port + 1) * memory.width] for name in ("WR_EN", "WR_DATA"))
            clock, address = self._clock(cell.nets["WR_CLK"][port]), self._address(cell, "WR_ADDR", port)
            for low, width in words_of(memory.width):
                if len(set(enables[low : low + width])) != 1:
                    raise UnsupportedError(f"memory {memory.name}: writes of some bits of a word")
                enable = self._value([enables[low]])
                if enable.op == "const" and not enable.param:
                    continue
                word = self._value(data[low : low + width])
                self.unit.writes.append(Write(memory, clock, enable, address, low, word))

    def _clock(self, net: Bit) -> str:
        resolved = self._resolved(net)
        if resolved not in self._clocks:
            raise UnsupportedError("a clock that is no input")
        return self._clocks[resolved]

    # Values -----------------------------------------------------------------------------------------------------------
    def _resolved(self, net: Bit) -> Any:
        while net in self._alias:
            net = self._alias[net]
        return net

    def _value(self, bits: Sequence[Bit]) -> Node:
        parts: list[Node] = []
        nets = [self._resolved(bit) for bit in bits]
        at = 0
        while at < len(nets):
            net, end = nets[at], at + 1
            if isinstance(net, str):
                while end < len(nets) and isinstance(nets[end], str):
                    end += 1
                parts.append(self._x.const(int("".join(reversed(nets[at:end])).replace("x", "0"), 2), end - at))
            else:
                owner, first = self._place(net)
                while end < len(nets) and isinstance(nets[end], int) and self._place(nets[end]) == (owner, first + end - at):
                    end += 1
                bits_of_it = end - at
                while end < len(nets) and nets[end] == nets[at + bits_of_it - 1]:
                    end += 1  # the last one again and again
                parts.append(self._x.sext(self._source(net, bits_of_it), end - at))
            at = end
        return self._x.concat(parts)

    def _signal_place(self, bits: Sequence[Bit]) -> tuple[object, int] | None:
        nets = [self._resolved(bit) for bit in bits]
        if any(net not in self._sources for net in nets):
            return None
        owner, first = self._place(nets[0])
        if any(self._place(net) != (owner, first + number) for number, net in enumerate(nets)):
            return None
        return owner, first

    def _place(self, net: int) -> tuple[Any, int]:
        """What drives a net, and the bit of it."""
        if net in self._sources:
            slots, number = self._sources[net]
            return id(slots), number
        if net in self._reads:
            cell, port, number = self._reads[net]
            return (id(cell), port), number
        if net not in self._driver:
            raise UnsupportedError(f"a net of {self.unit.name} that nothing drives, or a clock used as a signal")
        cell, port, number = self._driver[net]
        return (id(cell), port), number

    def _source(self, net: int, width: int) -> Node:
        """``width`` nets from one source, from ``net`` on."""
        if net in self._sources:
            slots, number = self._sources[net]
            words = [(self._x.make("slot", slot.width, (), slot), WORD * n) for n, slot in enumerate(slots)]
            return self._part(words, number, width)
        if net in self._reads:
            cell, port, number = self._reads[net]
            address, memory = self._address(cell, "RD_ADDR", port), self._memories[id(cell)]
            words = [(self._x.make("read", bits, (address,), (memory, low)), low) for low, bits in words_of(memory.width)]
            return self._part(words, number, width)
        cell, _, number = self._driver[net]
        key = number, width
        if key not in cell.slices:
            cell.slices[key] = self.cell_value(cell, number, width)
        return cell.slices[key]
