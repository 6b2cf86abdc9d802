"""Lanes to vectors: expressions that are the same in several lanes become operations on vectors (superword parallelism).

What is packed begins with families of registers (`layout.py`) and goes on through the operands as long as these are alike. The
result is a graph of machine operations on scalars and vectors, which `edge.py` and `text.py` write as C++.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cosim.vector.expression import WORD, Expressions, Node
from cosim.vector.layout import FEWEST, Layout, container
from cosim.vector.netlist import Memory, Register, Slot, Unit, Write

__all__ = ["Op", "Packer", "Root", "TooWideError", "pack_edge", "pack_outputs"]

STRIDES = (8, 16, 32, 64)
"""Bits from lane to lane that a vector load can bridge."""

VECTOR_BITS = 512

MOST_BLENDS = 16
"""Alternatives of a choice that differs from lane to lane."""


class TooWideError(Exception):
    """Vectors of 16 lanes have no words of more than 32 bits."""


@dataclass(eq=False, slots=True)
class Op:
    """A machine operation.

    ``lanes`` is 0 for a scalar. Of a vector only the first ``used`` lanes mean something.
    Operations are those of `Node`, with ``slot`` and ``read`` as ``load`` (param: where), and for vectors ``splat``, ``build``
    (one scalar a lane), ``lane`` (scalar out of a vector; param: which), ``gather`` (a memory read at each lane's address) and
    ``constants``. A load's param: first bit, bytes from row to row, bits from lane to lane, whether nothing lies above.
    """

    name: str
    width: int
    lanes: int
    used: int = 0
    args: tuple["Op", ...] = ()
    param: Any = None
    reads: tuple[Any, ...] = ()
    """Slots or memories that it looks at."""


@dataclass(frozen=True, eq=False)
class Root:
    """A store: of a word or vector to registers, or to a row of memories, where ``guard`` is 1 (None: always)."""

    clock: str
    guard: Op | None
    value: Op
    targets: tuple[Any, ...]
    """Slots or memories that change."""
    address: Op | None = None
    offset: int = 0
    """In bytes; of a memory with the row's pitch on top."""
    pitch: int = 0


@dataclass(frozen=True)
class _Place:
    """A bit of the state or of a row of a memory."""

    owner: Any
    address: Node | None
    pitch: int
    bit: int

    def reaches_end(self, width: int) -> bool:
        """Whether so many bits reach to the end of a machine word's contents, above which there are zeros."""
        return self.owner.width <= WORD and self.bit - 8 * self.owner.offset + width == self.owner.width


@dataclass
class Packer:
    """Makes machine operations of expressions."""

    lanes: int = 16
    """Of the vectors that are being made: 8, or 16."""
    scalars: dict[int, Op] = field(default_factory=dict)
    vectors: dict[tuple[int, ...], Op] = field(default_factory=dict)
    homes: dict[int, tuple[Op, int]] = field(default_factory=dict)
    """Vector and lane that hold an expression."""
    made: list[tuple[str, Any]] = field(default_factory=list)
    """Keys of what was made, in order, so that an attempt can be taken back."""

    # Scalars ----------------------------------------------------------------------------------------------------------
    def scalar(self, node: Node) -> Op:
        """A scalar expression."""
        if id(node) in self.scalars:
            return self.scalars[id(node)]
        if id(node) in self.homes:
            vector, lane = self.homes[id(node)]
            op = Op("lane", node.width, 0, args=(vector,), param=lane)
        else:
            op = self._scalar(node)
        self.scalars[id(node)] = op
        self.made.append(("scalars", id(node)))
        return op

    def _scalar(self, node: Node) -> Op:
        if (place := _place(node)) is not None:
            address = None if place.address is None else self.scalar(place.address)
            return self._load(node.width, 0, 0, [place], address, place.pitch, 0)
        if node.op == "select" and (found := _steps(node)) is not None:
            places, step = found
            return self._load(node.width, 0, 0, places, self.scalar(node.args[0]), step, 0)
        return Op(node.op, node.width, 0, args=tuple(map(self.scalar, node.args)), param=node.param)

    def _load(
        self, width: int, lanes: int, used: int, places: Sequence[_Place], index: Op | None, pitch: int, stride: int
    ) -> Op:
        """From the first of ``places``, which are all that may be looked at: ``index`` times ``pitch`` bytes on."""
        reaches_end = all(place.reaches_end(width) for place in places)
        owners = tuple(place.owner for place in places)
        args = () if index is None else (index,)
        return Op("load", width, lanes, used, args, (places[0].bit, pitch, stride, reaches_end), owners)

    # Vectors ----------------------------------------------------------------------------------------------------------
    def vector(self, nodes: tuple[Node, ...]) -> Op:
        """A vector of expressions of one width, one a lane."""
        key = self.lanes, *map(id, nodes)
        if key in self.vectors:
            return self.vectors[key]
        if container(nodes[0].width) * self.lanes > VECTOR_BITS:
            raise TooWideError
        op = self._vector(nodes)
        self.vectors[key] = op
        self.made.append(("vectors", key))
        if op.name not in ("splat", "build", "constants", "load"):
            for lane, node in enumerate(nodes):
                if id(node) not in self.homes:
                    self.homes[id(node)] = op, lane
                    self.made.append(("homes", id(node)))
        return op

    def _new(self, name: str, width: int, nodes: Sequence[Node], *args: Op, param: Any = None, reads: tuple[Any, ...] = ()) -> Op:
        return Op(name, width, self.lanes, len(nodes), args, param, reads)

    def _vector(self, nodes: tuple[Node, ...]) -> Op:
        first = nodes[0]
        if all(node is first for node in nodes):
            return self._new("splat", first.width, nodes, self.scalar(first))
        if all(node.op == "const" for node in nodes):
            return self._new("constants", first.width, nodes, param=tuple(node.param for node in nodes))
        for attempt in (self._strided, self._gathered, self._alike):
            if (op := attempt(nodes)) is not None:
                return op
        return self._new("build", first.width, nodes, *map(self.scalar, nodes))

    def _strided(self, nodes: tuple[Node, ...]) -> Op | None:
        """One load, if the lanes lie at equal distances."""
        places = [place for node in nodes if (place := _place(node)) is not None]
        first = places[0] if len(places) == len(nodes) else None
        if first is None or any(place.address is not first.address or place.pitch != first.pitch for place in places):
            return None
        stride = self._stride(places, nodes[0].width)
        if not stride:
            return None
        address = None if first.address is None else self.scalar(first.address)
        return self._load(nodes[0].width, self.lanes, len(nodes), places, address, first.pitch, stride)

    def _stride(self, places: Sequence[_Place], width: int) -> int:
        """Bits from lane to lane, if one load can bridge them, or 0."""
        if len(places) < 2:
            return 0
        first, stride = places[0].bit, places[1].bit - places[0].bit
        if stride not in STRIDES or any(place.bit != first + lane * stride for lane, place in enumerate(places)):
            return 0
        return stride if first % stride + width <= stride and stride * self.lanes <= VECTOR_BITS else 0

    def _gathered(self, nodes: tuple[Node, ...]) -> Op | None:
        """A table, read at the address of each lane."""
        first = nodes[0]
        if any(node.op != "read" or node.param != first.param for node in nodes):
            return None
        memory, low = first.param
        if memory.width > 64:
            return None
        addresses = self.vector(tuple(node.args[0] for node in nodes))
        return self._new("gather", first.width, nodes, addresses, param=(memory, low), reads=(memory,))

    def _alike(self, nodes: tuple[Node, ...]) -> Op | None:
        """The same operation in all lanes."""
        first = nodes[0]
        shape = [arg.width for arg in first.args]
        if not first.args or any(node.op != first.op or [arg.width for arg in node.args] != shape for node in nodes):
            return None
        if first.op == "read":
            return None
        if first.op == "select":
            return self._choice(nodes)
        if first.op == "slice":
            lows = tuple(node.param for node in nodes)
            source = self.vector(tuple(node.args[0] for node in nodes))
            return self._new("slice", first.width, nodes, source, param=lows[0] if len(set(lows)) == 1 else lows)
        args = [self.vector(tuple(node.args[at] for node in nodes)) for at in range(len(shape))]
        return self._new(first.op, first.width, nodes, *args, param=first.param)

    def _choice(self, nodes: tuple[Node, ...]) -> Op | None:
        first = nodes[0]
        if all(node.args[0] is first.args[0] for node in nodes):
            found = [steps for node in nodes if (steps := _steps(node)) is not None]
            if len(found) == len(nodes) and len({step for _, step in found}) == 1:
                stride = self._stride([places[0] for places, _ in found], first.width)
                if stride:
                    every = [place for places, _ in found for place in places]
                    return self._load(
                        first.width, self.lanes, len(nodes), every, self.scalar(first.args[0]), found[0][1], stride
                    )
        if len(first.args) - 1 > MOST_BLENDS:
            return None
        args = [self.vector(tuple(node.args[at] for node in nodes)) for at in range(len(first.args))]
        return self._new("select", first.width, nodes, *args)

    # Attempts ---------------------------------------------------------------------------------------------------------
    def attempt(self, nodes: tuple[Node, ...], lanes: int) -> Op | None:
        """A vector, unless most of its lanes have to be put together one by one, or it does not fit."""
        mark, self.lanes = len(self.made), lanes
        packed, single = 0, 0
        try:
            op = self.vector(nodes)
        except TooWideError:
            op = None
        for table, key in self.made[mark:]:
            if table == "vectors":
                made = self.vectors[key]
                packed += made.name not in ("splat", "constants", "build") and made.used - 1
                single += made.name == "build" and made.used
        if op is not None and (packed > single or len(self.made) == mark):
            return op
        for table, key in reversed(self.made[mark:]):
            del getattr(self, table)[key]
        del self.made[mark:]
        return None


def _place(node: Node) -> _Place | None:
    """Where the lowest bit of an expression lies, if it lies somewhere."""
    low, inner = 0, node
    if node.op == "slice":
        low, inner = node.param, node.args[0]
    if inner.op == "slot":
        slot: Slot = inner.param
        return _Place(slot, None, 0, 8 * slot.offset + low)
    if inner.op == "read":
        memory: Memory
        memory, first = inner.param
        return _Place(memory, inner.args[0], memory.pitch, 8 * memory.offset + first + low)
    return None


def _steps(node: Node) -> tuple[list[_Place], int] | None:
    """Places of the alternatives of a choice, and the bytes from each to the next, where these are equal."""
    index, *alternatives = node.args
    places = [place for one in alternatives if (place := _place(one)) is not None and place.address is None]
    if len(places) < 1 << index.width or len(places) < 2:
        return None
    step = places[1].bit - places[0].bit
    if step % 8 or any(place.bit != places[0].bit + number * step for number, place in enumerate(places)):
        return None
    return places, step // 8


def _change(x: Expressions, node: Node, old: Node, known: dict[int, tuple[Node, Node]]) -> tuple[Node, Node]:
    """Condition under which a register changes, and what it becomes then. ``known``: of expressions already seen."""
    if node is old:
        return x.const(0, 1), node
    if node.op != "mux":
        return x.const(1, 1), node
    if id(node) not in known:
        condition, *branches = node.args
        (changes, one), (changes_too, zero) = (_change(x, branch, old, known) for branch in branches)
        when = x.mux(condition, changes, changes_too)
        if one is old or zero is old:
            known[id(node)] = when, zero if one is old else one
        else:
            known[id(node)] = when, x.mux(condition, one, zero)
    return known[id(node)]


def _guarded(x: Expressions, registers: Sequence[Register]) -> tuple[Node | None, tuple[Node, ...]]:
    """Condition under which registers change, if it is one for all, and what they become then."""
    found = []
    for register in registers:
        old = x.make("slot", register.slot.width, (), register.slot)
        found.append(_change(x, register.next, old, {}))
    guard = found[0][0]
    if guard.op == "const" or any(when is not guard for when, _ in found):
        return None, tuple(register.next for register in registers)
    return guard, tuple(value for _, value in found)


def pack_outputs(unit: Unit) -> dict[str, list[Op]]:
    """Words of the outputs, by port."""
    packer = Packer()
    return {port: [packer.scalar(node) for node in nodes] for port, nodes in unit.outputs.items()}


def pack_edge(unit: Unit, layout: Layout) -> list[Root]:
    """All stores at a clock edge."""
    packer = Packer()
    roots, single = [], []
    by_slot = {id(register.slot): register for register in unit.registers}
    for family in layout.families:
        registers = [by_slot[id(slot)] for slot in family]
        found, rest = _store_family(unit, packer, registers) if len(family) >= FEWEST else ([], registers)
        roots.extend(found)
        single.extend(rest)
    alone = []
    for writes in _write_families(unit.writes):
        if len(writes) > 1 and (root := _store_rows(packer, writes)) is not None:
            roots.append(root)
        else:
            alone.extend(writes)
    roots.extend(_store_word(unit, packer, register) for register in single)
    roots.extend(_store_row(packer, write) for write in alone)
    return roots


def _store_family(unit: Unit, packer: Packer, registers: Sequence[Register]) -> tuple[list[Root], list[Register]]:
    """Vector stores, and the registers that are none."""
    roots, single = [], []
    at = 0
    while at < len(registers):
        for lanes in (16, 8):
            chunk = registers[at : at + lanes]
            if lanes == 16 and len(chunk) <= 8:
                continue
            if len(chunk) > 1 and (root := _store_vector(unit, packer, chunk, lanes)) is not None:
                roots.append(root)
                break
        else:
            single.extend(chunk)
        at += len(chunk)
    return roots, single


def _store_vector(unit: Unit, packer: Packer, registers: Sequence[Register], lanes: int) -> Root | None:
    first = registers[0]
    if any(register.clock != first.clock for register in registers):
        return None
    guard, values = _guarded(unit.expressions, registers)
    widest = max(value.width for value in values)  # the last word of a wide signal may be narrower
    value = packer.attempt(tuple(unit.expressions.zext(value, widest) for value in values), lanes)
    if value is None:
        return None
    condition = None if guard is None else packer.scalar(guard)
    return Root(first.clock, condition, value, tuple(register.slot for register in registers), offset=first.slot.offset)


def _store_word(unit: Unit, packer: Packer, register: Register) -> Root:
    guard, (value,) = _guarded(unit.expressions, [register])
    condition = None if guard is None else packer.scalar(guard)
    return Root(register.clock, condition, packer.scalar(value), (register.slot,), offset=register.slot.offset)


def _write_families(writes: Sequence[Write]) -> list[list[Write]]:
    """Writes with one enable and address to words that lie side by side, eight at most."""
    chunks: list[list[Write]] = []
    for write in sorted(writes, key=_write_offset):
        last = chunks[-1][-1] if chunks else write
        same = (write.clock, write.enable, write.address, write.memory.pitch, write.data.width) == (
            last.clock, last.enable, last.address, last.memory.pitch, last.data.width,
        )  # fmt: skip
        step = _write_offset(write) - _write_offset(last)
        if chunks and len(chunks[-1]) < 8 and same and step == container(write.memory.width) // 8:
            chunks[-1].append(write)
        else:
            chunks.append([write])
    return chunks


def _write_offset(write: Write) -> int:
    return write.memory.offset + write.low // 8


def _store_rows(packer: Packer, writes: Sequence[Write]) -> Root | None:
    first = writes[0]
    # a whole vector is stored: the words behind those that are written are padding only if the family ends here
    if container(first.data.width) != container(first.memory.width) or len(writes) != 8:
        return None
    value = packer.attempt(tuple(write.data for write in writes), 8)
    if value is None:
        return None
    return _row_root(packer, first, value, tuple(write.memory for write in writes))


def _store_row(packer: Packer, write: Write) -> Root:
    return _row_root(packer, write, packer.scalar(write.data), (write.memory,))


def _row_root(packer: Packer, first: Write, value: Op, memories: tuple[Memory, ...]) -> Root:
    guard, address = packer.scalar(first.enable), packer.scalar(first.address)
    return Root(first.clock, guard, value, memories, address, _write_offset(first), first.memory.pitch)
