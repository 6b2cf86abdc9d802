"""A clock edge as C++: in which order words are stored, and what need not be computed at all."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cosim.vector.pack import Op, Root
from cosim.vector.text import Writer, c_type

__all__ = ["edge_lines"]


def edge_lines(clocks: Sequence[str], roots: Sequence[Root]) -> list[str]:
    """Body of a function of the state ``S`` and ``clocks``, a bit for each that ticks."""
    return _Edge(clocks, roots).lines()


def _below(ops: Iterable[Op]) -> Iterator[Op]:
    """Operations and all their operands, each once."""
    seen: set[int] = set()
    stack = list(ops)
    while stack:
        op = stack.pop()
        if id(op) not in seen:
            seen.add(id(op))
            yield op
            stack.extend(op.args)


def _inputs_of(root: Root) -> list[Op]:
    return [root.value] if root.address is None else [root.value, root.address]


@dataclass
class _Group:
    """Stores with one guard, at edges of one clock."""

    guard: Op | None
    roots: list[Root] = field(default_factory=list)

    @property
    def ops(self) -> list[Op]:
        """What the stores need, without the guard."""
        return [op for root in self.roots for op in _inputs_of(root)]

    @property
    def guards(self) -> list[Op]:
        """The guard, if there is one."""
        return [] if self.guard is None else [self.guard]


def _readers_first(items: Sequence[Sequence[Root]]) -> list[int]:
    """Order in which what reads a word comes before what writes it, as far as there is one."""
    readers: dict[int, list[int]] = defaultdict(list)
    for number, roots in enumerate(items):
        ops = [op for root in roots for op in _inputs_of(root)]
        for owner in {id(owner) for op in _below(ops) for owner in op.reads}:
            readers[owner].append(number)
    order: list[int] = []
    entered: set[int] = set()

    def place(number: int) -> None:
        if number in entered:
            return
        entered.add(number)
        for root in items[number]:
            for target in root.targets:
                for reader in readers[id(target)]:
                    place(reader)
        order.append(number)

    for number in range(len(items)):
        place(number)
    return order


class _Edge:
    """All is computed from the state before the edge.

    What one clock alone needs is computed only if it ticks, what one group of stores alone needs only if its guard is 1. A
    store waits for the end of the function if something that reads what it changes comes after it.
    """

    def __init__(self, clocks: Sequence[str], roots: Sequence[Root]) -> None:
        self._writer = Writer(on_write=self._written)
        self._late: list[tuple[Root, int]] = []
        """Stores that wait, each with the number of the block that it is in."""
        self._blocks = 0
        self._users: dict[int, set[tuple[str, int]]] = defaultdict(set)
        """Groups that need an operation, by clock and number; -1 for a guard."""
        self._pending: dict[int, set[int]] = defaultdict(set)
        """Loads of a slot or memory that are still to be written."""
        groups_of = _grouped(clocks, roots)
        for clock, groups in groups_of.items():
            for number, group in enumerate(groups):
                for op in _below(group.ops):
                    self._users[id(op)].add((clock, number))
                for op in _below(group.guards):
                    self._users[id(op)].add((clock, -1))
        for op in _below(op for groups in groups_of.values() for group in groups for op in (*group.ops, *group.guards)):
            for owner in op.reads:
                self._pending[id(owner)].add(id(op))
        for clock, groups in groups_of.items():
            self._clock(clock, groups, f"clocks & {1 << clocks.index(clock):#x}" if len(clocks) > 1 else None)

    def lines(self) -> list[str]:
        """The body."""
        after = []
        before = [f"bool reached{block} = false;" for block in sorted({block for _, block in self._late if block})]
        for number, (root, block) in enumerate(self._late):
            before.append(f"{c_type(root.value)} late{number};")
            if root.address is not None:
                before.append(f"{c_type(root.address)} row{number};")
            text = _store(root, f"late{number}", None if root.address is None else f"row{number}")
            after.append(f"if (reached{block}) {text}" if block else text)
        return [*before, *self._writer.lines, *after]

    def _clock(self, clock: str, groups: Sequence[_Group], ticks: str | None) -> None:
        everything = [op for group in groups for op in (*group.ops, *group.guards)]
        self._write_shared(everything, lambda users: any(other != clock for other, _ in users))
        with self._block(ticks):
            for number, group in enumerate(groups):
                self._write_shared(group.ops, lambda users, own=(clock, number): users != {own})
                guard = None if group.guard is None else self._writer.name(group.guard)
                with self._block(guard):
                    self._blocks += 1
                    block = self._blocks if ticks or guard else 0
                    for at in _readers_first([[root] for root in group.roots]):
                        self._root(group.roots[at], block)

    def _written(self, op: Op) -> None:
        for owner in op.reads:
            self._pending[id(owner)].discard(id(op))

    def _write_shared(self, ops: Sequence[Op], shared: Callable[[set[tuple[str, int]]], bool]) -> None:
        """Writes the highest operations below that others need too."""
        seen: set[int] = set()
        stack = list(reversed(ops))
        while stack:
            op = stack.pop()
            if id(op) in seen:
                continue
            seen.add(id(op))
            if shared(self._users[id(op)]):
                self._writer.name(op)
            else:
                stack.extend(reversed(op.args))

    @contextmanager
    def _block(self, condition: str | None) -> Iterator[None]:
        """What is named inside is not known behind it."""
        if condition is None:
            yield
            return
        outer = dict(self._writer.names)
        self._writer.lines.append(f"if ({condition}) {{")
        yield
        self._writer.lines.append("}")
        self._writer.names = outer

    def _root(self, root: Root, block: int) -> None:
        value = self._writer.name(root.value)
        address = None if root.address is None else self._writer.name(root.address)
        lines = self._writer.lines
        if not any(self._pending[id(target)] for target in root.targets):
            lines.append(_store(root, value, address))
            return
        number = len(self._late)
        if block and (not self._late or self._late[-1][1] != block):
            lines.append(f"reached{block} = true;")
        self._late.append((root, block))
        lines.append(f"late{number} = {value};")
        if address is not None:
            lines.append(f"row{number} = {address};")


def _grouped(clocks: Sequence[str], roots: Sequence[Root]) -> dict[str, list[_Group]]:
    """Groups by clock; what reads comes before what writes, as far as it can."""
    by_clock: dict[str, dict[int, _Group]] = {clock: {} for clock in clocks}
    for root in roots:
        by_clock[root.clock].setdefault(id(root.guard), _Group(root.guard)).roots.append(root)
    found: dict[str, list[_Group]] = {}
    for clock, groups in by_clock.items():
        listed = list(groups.values())
        found[clock] = [listed[number] for number in _readers_first([group.roots for group in listed])]
    order = _readers_first([[root for group in groups for root in group.roots] for groups in found.values()])
    names = list(found)
    return {names[number]: found[names[number]] for number in order}


def _store(root: Root, value: str, address: str | None) -> str:
    kind = c_type(root.value)
    place = f"S + {root.offset}" + (f" + D({address}) * {root.pitch}" if address is not None else "")
    return f"store<{kind}>({place}, {value});"
