"""Machine operations as C++: a class with the ports of the unit, one function for a clock edge, one for the outputs."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cosim.vector.expression import UnsupportedError
from cosim.vector.layout import Layout, container
from cosim.vector.netlist import Memory, Slot, Unit, words_of
from cosim.vector.pack import Op, Root

__all__ = ["emit_edge", "emit_header", "emit_rest"]


def _type(op: Op) -> str:
    bits = container(op.width)
    return f"V{op.lanes}x{bits}" if op.lanes else {32: "W", 64: "D"}[bits]


def _ones(width: int) -> str:
    return f"{(1 << width) - 1:#x}{'u' if width <= 32 else 'ull'}"


@dataclass
class _Scope:
    """Lines of a function, with the names of what is computed in it."""

    lines: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    count: int = 0

    def add(self, op: Op, text: str) -> None:
        name = f"t{self.count}"
        self.count += 1
        self.names[id(op)] = name
        self.lines.append(f"const {_type(op)} {name} = {text};")


class _Writer:
    """Writes operations into a scope, operands first."""

    def __init__(self, scope: _Scope) -> None:
        self.scope = scope
        self._most: dict[int, int] = {}
        """Largest value of an operation, by what its operands can be."""

    def name(self, op: Op) -> str:
        """What an operation is called; its lines are written if they are not yet."""
        stack = [op]
        names = self.scope.names
        while stack:
            top = stack[-1]
            if id(top) in names:
                stack.pop()
                continue
            missing = [arg for arg in top.args if id(arg) not in names]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            self._write(top)
        return names[id(op)]

    def _write(self, op: Op) -> None:
        self._most[id(op)] = min((1 << op.width) - 1, self._bound(op, [self._most[id(arg)] for arg in op.args]))
        if op.name == "const":
            self.scope.names[id(op)] = f"{_type(op)}({op.param:#x}{'u' if op.width <= 32 else 'ull'})"
            return
        args = [self.scope.names[id(arg)] for arg in op.args]
        self.scope.add(op, self._text(op, args))

    def _bound(self, op: Op, args: list[int]) -> int:
        match op.name:
            case "const":
                return op.param
            case "constants":
                return max(op.param)
            case "add":
                return args[0] + args[1]
            case "mul":
                return args[0] * args[1]
            case "zext" | "splat" | "lane" | "shr":
                return args[0]
            case "build":
                return max(args)
            case "mux":
                return max(args[1:])
            case "and":
                return min(args)
            case "or" | "xor":
                return (1 << max(args).bit_length()) - 1
            case "slice" if isinstance(op.param, int):
                return args[0] >> op.param
            case _:
                return (1 << op.width) - 1

    # Operations -------------------------------------------------------------------------------------------------------
    def _text(self, op: Op, args: list[str]) -> str:
        name, own = op.name, _type(op)
        if special := getattr(self, f"_{name}", None):
            return special(op, args)
        if name in ("and", "or", "xor"):
            return f"{args[0]} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[name]} {args[1]}"
        if name == "not":
            return f"{args[0]} ^ {_ones(op.width)}"
        if name == "add":
            text = f"{args[0]} + {args[1]}"
            return text if sum(self._most[id(arg)] for arg in op.args) < 1 << op.width else self._cut(op, text)
        if name == "sub":
            return self._cut(op, f"{args[0]} - {args[1]}")
        if name == "eq":
            return f"equal({args[0]}, {args[1]})"
        if name == "ltu":
            return f"less({args[0]}, {args[1]})"
        if name == "lts":
            return f"less_signed({', '.join(self._signed(arg, text) for arg, text in zip(op.args, args, strict=True))})"
        if name == "parity":
            return f"parity({args[0]})"
        if name == "splat":
            return f"splat<{own}>({args[0]})"
        if name == "zext":
            return self._converted(op.args[0], args[0], own)
        raise AssertionError(f"no text for {name}")

    def _cut(self, op: Op, text: str) -> str:
        """Without the bits above."""
        return text if op.width == container(op.width) else f"({text}) & {_ones(op.width)}"

    def _signed(self, op: Op, text: str) -> str:
        """With its sign in all bits of the machine word."""
        if op.width == container(op.width):
            return text
        sign = f"{1 << (op.width - 1):#x}{'u' if op.width <= 32 else 'ull'}"
        return f"(({text} ^ {sign}) - {sign})"

    def _converted(self, op: Op, text: str, to: str) -> str:
        own = _type(op)
        if own == to:
            return text
        return f"convert<{to}>({text})" if op.lanes else f"{to}({text})"

    def _mux(self, op: Op, args: list[str]) -> str:
        if op.lanes:
            return f"pick({args[0]}, {args[1]}, {args[2]})"
        return f"{args[0]} ? {args[1]} : {args[2]}"

    def _mul(self, op: Op, args: list[str]) -> str:
        if op.width > 32:
            kinds = [(arg.name, arg.args[0].width if arg.args else arg.width) for arg in op.args]
            if all(kind == "zext" and width <= 32 for kind, width in kinds):
                return self._cut(op, f"multiply_32({args[0]}, {args[1]})")
            if all((kind == "sext" and width <= 32) or (kind == "zext" and width < 32) for kind, width in kinds):
                return self._cut(op, f"multiply_32_signed({args[0]}, {args[1]})")
        return self._cut(op, f"{args[0]} * {args[1]}")

    def _shl(self, op: Op, args: list[str]) -> str:
        return self._cut(op, f"left({args[0]}, {self._converted(op.args[1], args[1], _type(op))})")

    def _shr(self, op: Op, args: list[str]) -> str:
        return f"right({args[0]}, {self._converted(op.args[1], args[1], _type(op))})"

    def _sshr(self, op: Op, args: list[str]) -> str:
        by = self._converted(op.args[1], args[1], _type(op))
        return self._cut(op, f"right_signed({self._signed(op.args[0], args[0])}, {by})")

    def _sext(self, op: Op, args: list[str]) -> str:
        inner = op.args[0]
        text = self._converted(inner, args[0], _type(op))
        sign = f"{1 << (inner.width - 1):#x}{'u' if op.width <= 32 else 'ull'}"
        if inner.width == 1:
            return self._cut(op, f"{_type(op)}{{}} - {text}")
        return self._cut(op, f"({text} ^ {sign}) - {sign}")

    def _slice(self, op: Op, args: list[str]) -> str:
        inner = op.args[0]
        if isinstance(op.param, tuple):
            lows = ", ".join(map(str, op.param))
            text = f"({args[0]} >> {_type(inner)}{{{lows}}})"
        else:
            text = f"({args[0]} >> {op.param})" if op.param else args[0]
            if self._most[id(inner)] >> op.param < 1 << op.width:
                return self._converted(inner, text, _type(op))
            if op.param + op.width == container(inner.width) or (op.param + op.width == inner.width and op.param):
                return self._converted(inner, text, _type(op))
        if op.width == 32 and container(inner.width) == 64:
            return self._converted(inner, text, _type(op))
        return self._converted(inner, f"({text} & {_ones(op.width)})", _type(op))

    def _concat(self, op: Op, args: list[str]) -> str:
        pieces, at = [], 0
        for arg, text in zip(op.args, args, strict=True):
            wide = self._converted(arg, text, _type(op))
            pieces.append(f"({wide} << {at})" if at else wide)
            at += arg.width
        return " | ".join(pieces)

    def _select(self, op: Op, args: list[str]) -> str:
        index, *alternatives = args
        own = _type(op)
        if op.lanes:
            text = f"{own}{{}}"
            for number, alternative in enumerate(alternatives):
                text = f"pick(equal({index}, splat<{_type(op.args[0])}>({number}u)), {alternative}, {text})"
            return text
        text = f"{own}(0)"
        for number, alternative in reversed(list(enumerate(alternatives))):
            text = f"{index} == {number} ? {alternative} : {text}"
        return text

    def _build(self, op: Op, args: list[str]) -> str:
        return f"{_type(op)}{{{', '.join(args)}}}"

    def _constants(self, op: Op, _args: list[str]) -> str:
        return f"{_type(op)}{{{', '.join(f'{value:#x}' for value in op.param)}}}"

    def _lane(self, op: Op, args: list[str]) -> str:
        return f"{args[0]}[{op.param}]"

    def _gather(self, op: Op, args: list[str]) -> str:
        memory, low = op.param
        row = op.args[0]
        table = f"S + {memory.offset}"
        bits = container(memory.width)
        whole = f"V{op.lanes}x{bits}"
        if bits == 32 and memory.pitch == 4 and memory.rows <= op.lanes:
            text = f"look_up({table}, {args[0]})"
        else:
            text = f"gather({table}, {memory.pitch}u, {self._converted(row, args[0], f'V{op.lanes}x32')}, ({whole} *)0)"
        if low:
            text = f"({text} >> {low})"
        if op.width != memory.width - low:
            text = f"({text} & {_ones(op.width)})"
        return text if whole == _type(op) else f"convert<{_type(op)}>({text})"

    def _reaches_end(self, op: Op) -> bool:
        """Whether what a load takes reaches to the end of a word, above which there are zeros."""
        owner = op.reads[0] if isinstance(op.reads, tuple) else op.reads
        bit = op.param[0]
        if isinstance(owner, Memory):
            return owner.width <= 64 and bit - 8 * owner.offset + op.width == owner.width
        return bit - 8 * owner.offset + op.width == owner.width

    def _load(self, op: Op, args: list[str]) -> str:
        bit, pitch, stride = op.param
        if op.lanes:
            element, kind = stride, f"V{op.lanes}x{stride}"
        else:
            element = 32 if bit % 32 + op.width <= 32 else 64
            kind = {32: "W", 64: "D"}[element]
        low = bit % element
        address = f"S + {(bit - low) // 8}"
        if args:
            address += f" + D({args[0]}) * {pitch}"
        text = f"load<{kind}>({address})"
        if low:
            text = f"({text} >> {low})"
        if low + op.width != element and not self._reaches_end(op):
            mask = _ones(op.width) if element == 64 else f"{(1 << op.width) - 1:#x}"
            text = f"({text} & {mask})"
        if kind == _type(op):
            return text
        return f"convert<{_type(op)}>({text})" if op.lanes else f"{_type(op)}({text})"


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


def _looked_at(op: Op) -> tuple[object, ...]:
    if op.reads is None:
        return ()
    return op.reads if isinstance(op.reads, tuple) else (op.reads,)


@dataclass
class _Group:
    """Stores with one guard, at edges of one clock."""

    guard: Op | None
    roots: list[Root] = field(default_factory=list)

    @property
    def ops(self) -> list[Op]:
        """What the stores need, without the guard."""
        return [op for root in self.roots for op in _inputs_of(root)]


def _readers_first(items: Sequence[Sequence[Root]]) -> list[int]:
    """Order in which what reads a word comes before what writes it, as far as there is one."""
    readers: dict[int, list[int]] = defaultdict(list)
    for number, roots in enumerate(items):
        ops = [op for root in roots for op in _inputs_of(root)]
        for owner in {id(owner) for op in _below(ops) for owner in _looked_at(op)}:
            readers[owner].append(number)
    order: list[int] = []
    entered: set[int] = set()
    for start in range(len(items)):
        stack: list[tuple[int, Iterator[int]]] = []

        def enter(number: int, stack: list[tuple[int, Iterator[int]]]) -> None:
            entered.add(number)
            before = [reader for root in items[number] for target in root.targets for reader in readers[id(target)]]
            stack.append((number, iter(before)))

        if start not in entered:
            enter(start, stack)
        while stack:
            number, before = stack[-1]
            following = next((reader for reader in before if reader not in entered), None)
            if following is None:
                stack.pop()
                order.append(number)
            else:
                enter(following, stack)
    return order


class _Edge:
    """Body of the clock edge: all is computed from the state before it.

    What one clock alone needs is computed only if it ticks, what one group of stores alone needs only if its guard is 1. A
    store waits for the end of the function if something that reads what it changes comes after it.
    """

    def __init__(self, clocks: Sequence[str], roots: Sequence[Root]) -> None:
        self._scope = _Scope()
        self._writer = _Writer(self._scope)
        self._late: list[tuple[Root, int]] = []
        """Stores that wait, each with the number of the block that it is in."""
        self._blocks = 0
        self._groups = _grouped(clocks, roots)
        self._users: dict[int, set[tuple[str, int]]] = defaultdict(set)
        self._pending: dict[int, set[int]] = defaultdict(set)
        for clock, groups in self._groups.items():
            for number, group in enumerate(groups):
                guards = [] if group.guard is None else [group.guard]
                for op in _below(group.ops):
                    self._users[id(op)].add((clock, number))
                for op in _below(guards):
                    self._users[id(op)].add((clock, -1))
        every = [op for groups in self._groups.values() for group in groups for op in (*group.ops, group.guard) if op is not None]
        for op in _below(every):
            for owner in _looked_at(op):
                self._pending[id(owner)].add(id(op))
        for clock, groups in self._groups.items():
            ticks = f"clocks & {1 << clocks.index(clock):#x}" if len(clocks) > 1 else ""
            self._clock(clock, groups, [ticks] if ticks else [])

    def lines(self) -> list[str]:
        """The body."""
        after = []
        before = [f"bool reached{block} = false;" for block in sorted({block for _, block in self._late if block})]
        for number, (root, block) in enumerate(self._late):
            before.append(f"{_type(root.value)} late{number};")
            if root.address is not None:
                before.append(f"{_type(root.address)} row{number};")
            text = _store(root, f"late{number}", None if root.address is None else f"row{number}")
            after.append(f"if (reached{block}) {text}" if block else text)
        return [*before, *self._scope.lines, *after]

    def _clock(self, clock: str, groups: Sequence[_Group], conditions: list[str]) -> None:
        everything = [op for group in groups for op in (*group.ops, *([] if group.guard is None else [group.guard]))]
        self._write_shared(everything, lambda users: any(other != clock for other, _ in users))
        with self._block(conditions):
            for number, group in enumerate(groups):
                self._write_shared(group.ops, lambda users, own=(clock, number): users != {own})
                guard = [] if group.guard is None else [self._name(group.guard)]
                with self._block(guard):
                    self._blocks += 1
                    block = self._blocks if conditions or guard else 0
                    for at in _readers_first([[root] for root in group.roots]):
                        self._root(group.roots[at], block)

    def _name(self, op: Op) -> str:
        """Name of an operation, and whoever waited for its loads may go on."""
        before = len(self._scope.names)
        name = self._writer.name(op)
        if len(self._scope.names) > before:
            fresh = list(self._scope.names)[before:]
            for waiting in self._pending.values():
                waiting.difference_update(fresh)
        return name

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
                self._name(op)
            else:
                stack.extend(reversed(op.args))

    @contextmanager
    def _block(self, conditions: list[str]) -> Iterator[None]:
        if not conditions:
            yield
            return
        outer = dict(self._scope.names)
        self._scope.lines.append(f"if ({_all(conditions)}) {{")
        yield
        self._scope.lines.append("}")
        self._scope.names.clear()
        self._scope.names.update(outer)

    def _root(self, root: Root, block: int) -> None:
        value = self._name(root.value)
        address = None if root.address is None else self._name(root.address)
        if any(self._pending[id(target)] for target in root.targets):
            number = len(self._late)
            if block and (not self._late or self._late[-1][1] != block):
                self._scope.lines.append(f"reached{block} = true;")
            self._late.append((root, block))
            self._scope.lines.append(f"late{number} = {value};")
            if address is not None:
                self._scope.lines.append(f"row{number} = {address};")
        else:
            self._scope.lines.append(_store(root, value, address))


def _all(conditions: Sequence[str]) -> str:
    return conditions[0] if len(conditions) == 1 else " && ".join(f"({condition})" for condition in conditions)


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
    kind = _type(root.value)
    place = f"S + {root.offset}" + (f" + D({address}) * {root.pitch}" if address is not None else "")
    return f"store<{kind}>({place}, {value});"


# The class ----------------------------------------------------------------------------------------------------------------
def _member(width: int) -> str:
    for bits in (8, 16, 32, 64):
        if width <= bits:
            return f"uint{bits}_t"
    return f"Words<{-(-width // 32)}>"


def emit_header(unit: Unit, layout: Layout) -> str:
    """``Vdut.h``: a class with the ports of the unit, as Verilator makes them."""
    ports = [*unit.clocks, *unit.inputs, *unit.outputs]
    if odd := [port for port in ports if not re.fullmatch(r"[A-Za-z_]\w*", port)]:
        raise UnsupportedError(f"ports {', '.join(odd)}")
    lines = ["#pragma once", "#include <cstdint>", "template <unsigned count> struct Words {", "uint32_t words[count];"]
    lines += ["uint32_t &operator[](unsigned n) { return words[n]; }", "};", "class Vdut {", "public:"]
    lines += [f"uint8_t {clock} = 0;" for clock in unit.clocks]
    lines += [f"{_member(unit.widths[port])} {port}{{}};" for port in (*unit.inputs, *unit.outputs)]
    lines += ["Vdut();", "// With a clock that has risen: the edge. Else: outputs follow state and inputs.", "void eval();"]
    lines += ["void final() {}", "private:", "void edge(unsigned clocks);", "void edge_in_reset(unsigned clocks);"]
    lines += ["void outputs();", "unsigned before_ = 0;"]
    lines += [f"alignas(64) unsigned char state_[{layout.size}] = {{}};", "};"]
    return "\n".join(lines) + "\n"


def emit_edge(unit: Unit, name: str, roots: Sequence[Root]) -> str:
    """A file with one of the functions for a clock edge."""
    lines = [f"// {unit.name}: {unit.cells} cells", '#include "Vdut.h"', '#include "lanes.hpp"', "using namespace lutra::vector;"]
    lines += [f"void Vdut::{name}(const unsigned clocks) {{", "B *const S = state_;", *_Edge(unit.clocks, roots).lines(), "}"]
    return "\n".join(lines) + "\n"


def emit_rest(unit: Unit, resets: Sequence[Slot], outputs: dict[str, list[Op]]) -> str:
    """The other functions of the class."""
    lines = ["void Vdut::outputs() {", "const B *const S = state_;", *_outputs(unit, outputs), "}"]
    lines += ["void Vdut::eval() {", "B *const S = state_;"]
    for port, slots in unit.inputs.items():
        width = unit.widths[port]
        if width <= 64:
            lines.append(f"store<{'W' if width <= 32 else 'D'}>(S + {slots[0].offset}, {port});")
        else:
            lines.append(f"std::memcpy(S + {slots[0].offset}, &{port}, {4 * -(-width // 32)});")
    ticking = " | ".join(f"unsigned({clock}) << {number}" for number, clock in enumerate(unit.clocks))
    lines += [f"const unsigned now = {ticking}, rising = now & ~before_;", "before_ = now;", "if (!rising) outputs();"]
    if resets:
        lines.append(f"else if ({' | '.join(f'load<W>(S + {slot.offset})' for slot in resets)}) edge_in_reset(rising);")
    lines += ["else edge(rising);", "}", "Vdut::Vdut() {", "B *const S = state_;", *_initial(unit), "outputs();", "}"]
    return "\n".join(lines) + "\n"


def _outputs(unit: Unit, outputs: dict[str, list[Op]]) -> list[str]:
    scope = _Scope()
    writer = _Writer(scope)
    for port, ops in outputs.items():
        if unit.widths[port] <= 64:
            scope.lines.append(f"{port} = {writer.name(ops[0])};")
        else:
            for word, op in enumerate(ops):
                value = writer.name(op)
                scope.lines.append(f"store<{_type(op)}>((B *)&{port} + {8 * word}, {value});")
    return scope.lines


def _initial(unit: Unit) -> list[str]:
    lines = [
        f"store<{'W' if container(register.slot.width) == 32 else 'D'}>(S + {register.slot.offset}, {register.init:#x}ull);"
        for register in unit.registers
        if register.init
    ]
    for number, memory in enumerate(unit.memories):
        if not memory.init:
            continue
        words = [value >> low & (1 << width) - 1 for value in memory.init for low, width in words_of(memory.width)]
        per_row = len(words_of(memory.width))
        kind = "W" if memory.width <= 32 else "D"
        rows = f"S + {memory.offset} + row * {memory.pitch}, init{number} + row * {per_row}, {per_row} * sizeof({kind})"
        lines.append(f"static const {kind} init{number}[] = {{{', '.join(f'{word:#x}' for word in words)}}};")
        lines.append(f"for (unsigned row = 0; row < {len(memory.init)}; ++row) std::memcpy({rows});")
    return lines
