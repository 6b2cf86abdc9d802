"""Machine operations as C++ expressions (`lanes.hpp` has the functions that they call)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cosim.vector.layout import container
from cosim.vector.pack import Op

__all__ = ["Writer", "c_type", "word_type"]


def word_type(width: int) -> str:
    """Type of the machine word for so many bits."""
    return {32: "W", 64: "D"}[container(width)]


def c_type(op: Op) -> str:
    """Type of an operation's result: a machine word, or a vector of them."""
    return f"V{op.lanes}x{container(op.width)}" if op.lanes else word_type(op.width)


MOST_REGISTERS = 2
"""That one instruction can look up in."""

BITWISE = {"and": "&", "or": "|", "xor": "^"}


def _number(value: int, width: int) -> str:
    return f"{value:#x}{'u' if width <= 32 else 'ull'}"


def _ones(width: int) -> str:
    return _number((1 << width) - 1, width)


@dataclass
class Writer:
    """Lines of a function, with the names of what is computed in it; an operation is written when it is asked for."""

    lines: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    """Of the operations that are in scope."""
    on_write: Callable[[Op], None] = lambda _op: None
    """Told of each operation that is written."""
    _count: int = 0
    _most: dict[int, int] = field(default_factory=dict)
    """Largest value of an operation, by what its operands can be."""

    def name(self, op: Op) -> str:
        """What an operation is called; its lines, operands first, are written if they are not yet."""
        stack = [op]
        while stack:
            top = stack[-1]
            missing = [] if id(top) in self.names else [arg for arg in top.args if id(arg) not in self.names]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if id(top) not in self.names:
                self._write(top)
        return self.names[id(op)]

    def _write(self, op: Op) -> None:
        self._most[id(op)] = min((1 << op.width) - 1, self._bound(op, [self._most[id(arg)] for arg in op.args]))
        if op.name == "const":
            self.names[id(op)] = f"{c_type(op)}({_number(op.param, op.width)})"
        else:
            text = self._text(op, [self.names[id(arg)] for arg in op.args])
            self.names[id(op)] = f"t{self._count}"
            self.lines.append(f"const {c_type(op)} t{self._count} = {text};")
            self._count += 1
        self.on_write(op)

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
        name, own = op.name, c_type(op)
        if special := getattr(self, f"_{name}", None):
            return special(op, args)
        if name in BITWISE:
            return f"{args[0]} {BITWISE[name]} {args[1]}"
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
        sign = _number(1 << (op.width - 1), op.width)
        return f"(({text} ^ {sign}) - {sign})"

    def _converted(self, op: Op, text: str, to: str) -> str:
        own = c_type(op)
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
        return self._cut(op, f"left({args[0]}, {self._converted(op.args[1], args[1], c_type(op))})")

    def _shr(self, op: Op, args: list[str]) -> str:
        return f"right({args[0]}, {self._converted(op.args[1], args[1], c_type(op))})"

    def _sshr(self, op: Op, args: list[str]) -> str:
        by = self._converted(op.args[1], args[1], c_type(op))
        return self._cut(op, f"right_signed({self._signed(op.args[0], args[0])}, {by})")

    def _sext(self, op: Op, args: list[str]) -> str:
        inner = op.args[0]
        text = self._converted(inner, args[0], c_type(op))
        sign = _number(1 << (inner.width - 1), op.width)
        if inner.width == 1:
            return self._cut(op, f"{c_type(op)}{{}} - {text}")
        return self._cut(op, f"({text} ^ {sign}) - {sign}")

    def _slice(self, op: Op, args: list[str]) -> str:
        inner = op.args[0]
        if isinstance(op.param, tuple):
            lows = ", ".join(map(str, op.param))
            text = f"({args[0]} >> {c_type(inner)}{{{lows}}})"
        else:
            text = f"({args[0]} >> {op.param})" if op.param else args[0]
            if self._most[id(inner)] >> op.param < 1 << op.width:
                return self._converted(inner, text, c_type(op))
            if op.param + op.width == container(inner.width) or (op.param + op.width == inner.width and op.param):
                return self._converted(inner, text, c_type(op))
        if op.width == 32 and container(inner.width) == 64:
            return self._converted(inner, text, c_type(op))
        return self._converted(inner, f"({text} & {_ones(op.width)})", c_type(op))

    def _concat(self, op: Op, args: list[str]) -> str:
        pieces, at = [], 0
        for arg, text in zip(op.args, args, strict=True):
            wide = self._converted(arg, text, c_type(op))
            pieces.append(f"({wide} << {at})" if at else wide)
            at += arg.width
        return " | ".join(pieces)

    def _select(self, op: Op, args: list[str]) -> str:
        index, *alternatives = args
        own = c_type(op)
        if op.lanes:
            text = f"{own}{{}}"
            for number, alternative in enumerate(alternatives):
                text = f"pick(equal({index}, splat<{c_type(op.args[0])}>({number}u)), {alternative}, {text})"
            return text
        text = f"{own}(0)"
        for number, alternative in reversed(list(enumerate(alternatives))):
            text = f"{index} == {number} ? {alternative} : {text}"
        return text

    def _build(self, op: Op, args: list[str]) -> str:
        return f"{c_type(op)}{{{', '.join(args)}}}"

    def _constants(self, op: Op, _args: list[str]) -> str:
        return f"{c_type(op)}{{{', '.join(f'{value:#x}' for value in op.param)}}}"

    def _lane(self, op: Op, args: list[str]) -> str:
        return f"{args[0]}[{op.param}]"

    def _gather(self, op: Op, args: list[str]) -> str:
        memory, low = op.param
        row = op.args[0]
        table, bits = f"S + {memory.offset}", container(memory.width)
        whole = f"V{op.lanes}x{bits}"
        index = f"{self._converted(row, args[0], f'V{op.lanes}x32')}, ({whole} *)0"
        registers = -(-memory.rows // op.lanes)
        if memory.pitch == bits // 8 and registers <= MOST_REGISTERS:
            text = f"look_up<{registers}>({table}, {index})"
        else:
            text = f"gather({table}, {memory.pitch}u, {index})"
        if low:
            text = f"({text} >> {low})"
        if op.width != memory.width - low:
            text = f"({text} & {_ones(op.width)})"
        return text if whole == c_type(op) else f"convert<{c_type(op)}>({text})"

    def _load(self, op: Op, args: list[str]) -> str:
        bit, pitch, stride, reaches_end = op.param
        if op.lanes:
            element, kind = stride, f"V{op.lanes}x{stride}"
        else:
            element = 32 if bit % 32 + op.width <= 32 else 64
            kind = word_type(element)
        low = bit % element
        address = f"S + {(bit - low) // 8}"
        if args:
            address += f" + D({args[0]}) * {pitch}"
        text = f"load<{kind}>({address})"
        if low:
            text = f"({text} >> {low})"
        if low + op.width != element and not reaches_end:
            mask = _ones(op.width) if element == 64 else f"{(1 << op.width) - 1:#x}"
            text = f"({text} & {mask})"
        if kind == c_type(op):
            return text
        return f"convert<{c_type(op)}>({text})" if op.lanes else f"{c_type(op)}({text})"
