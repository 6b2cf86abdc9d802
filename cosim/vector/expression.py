"""Expressions of a netlist: unsigned words of at most 64 bits, each distinct one made once, simplified as they are made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["WORD", "Expressions", "Node", "UnsupportedError"]

WORD = 64
"""Bits of the widest expression. Wider signals are taken apart where they are used."""


class UnsupportedError(Exception):
    """A netlist has something that cosim/vector does not compile."""


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """A word: ``width`` bits, the bits above are 0.

    ``op`` is one of
    ``const`` (param: value), ``slot`` (param: a `Slot` of the state or the inputs), ``read`` (arg: address; param: memory,
    first bit), ``slice`` (param: lowest bit), ``concat`` (lowest first), ``sext``, ``zext``, ``not``, ``and``, ``or``,
    ``xor``, ``add``, ``sub``, ``mul``, ``eq``, ``ltu``, ``lts``, ``shl``, ``shr``, ``sshr``, ``mux`` (condition, if 1, if 0),
    ``parity`` and ``select`` (index, then what each of its values gives; 0 beyond).
    All but ``concat``, ``slice``, extensions, shifts, comparisons, ``mux`` and ``select`` have operands of their own width.
    """

    op: str
    width: int
    args: tuple["Node", ...] = ()
    param: Any = None

    @property
    def mask(self) -> int:
        """Ones in all bits."""
        return (1 << self.width) - 1


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) & 1 else value


@dataclass
class Expressions:
    """Makes nodes. Equal ones are the same object; constants are folded, and what bits pass through unchanged vanishes."""

    _nodes: dict[Any, Node] = field(default_factory=dict)

    def make(self, op: str, width: int, args: Sequence[Node] = (), param: Any = None) -> Node:
        """A node as it stands."""
        if not 0 < width <= WORD:
            raise UnsupportedError(f"{op} of {width} bits")
        key = (op, width, tuple(map(id, args)), param)
        if key not in self._nodes:
            self._nodes[key] = Node(op, width, tuple(args), param)
        return self._nodes[key]

    def const(self, value: int, width: int) -> Node:
        """A constant."""
        return self.make("const", width, (), value & ((1 << width) - 1))

    def nodes(self) -> Iterable[Node]:
        """All that were made."""
        return self._nodes.values()

    # Wiring -----------------------------------------------------------------------------------------------------------
    def slice(self, x: Node, low: int, width: int) -> Node:
        """Bits ``low`` and on."""
        if low == 0 and width == x.width:
            return x
        if x.op == "const":
            return self.const(x.param >> low, width)
        if x.op == "slice":
            return self.slice(x.args[0], x.param + low, width)
        if x.op in ("zext", "sext"):
            inner = x.args[0]
            if low + width <= inner.width:
                return self.slice(inner, low, width)
            if x.op == "zext" and low >= inner.width:
                return self.const(0, width)
            if low == 0:
                return self.make(x.op, width, (inner,))
            if x.op == "sext" and low >= inner.width:
                return self.sext(self.slice(inner, inner.width - 1, 1), width)
            if x.op == "sext" and low < inner.width:
                return self.sext(self.slice(inner, low, inner.width - low), width)
        if x.op == "concat":
            parts, at = [], 0
            for part in x.args:
                first, end = max(low, at), min(low + width, at + part.width)
                if first < end:
                    parts.append(self.slice(part, first - at, end - first))
                at += part.width
            return self.concat(parts)
        if x.op in ("and", "or", "xor", "not") and any(arg.op in ("concat", "const", "zext", "sext") for arg in x.args):
            return self.bitwise(x.op, *(self.slice(arg, low, width) for arg in x.args))
        if low == 0 and x.width > WORD // 2 >= width and x.op in ("add", "sub", "and", "or", "xor", "not", "mul"):
            return self.arithmetic(x.op, *(self.slice(arg, 0, width) for arg in x.args))
        if x.op == "mux" and any(arg.op in ("concat", "const", "zext") for arg in x.args[1:]):
            return self.mux(x.args[0], self.slice(x.args[1], low, width), self.slice(x.args[2], low, width))
        return self.make("slice", width, (x,), low)

    def concat(self, parts: Iterable[Node]) -> Node:
        """Joins words, lowest first."""
        flat: list[Node] = []
        for part in parts:
            for piece in part.args if part.op == "concat" else (part,):
                merged = self._merged(flat[-1], piece) if flat else None
                if merged is None:
                    flat.append(piece)
                else:
                    flat[-1] = merged
        if len(flat) == 1:
            return flat[0]
        width = sum(part.width for part in flat)
        if flat[-1].op == "const" and flat[-1].param == 0:
            return self.zext(self.concat(flat[:-1]), width)
        if len(flat) == 2 and self._repeats_sign(flat[0], flat[1]):
            return self.sext(flat[0], width)
        return self.make("concat", width, flat)

    def _merged(self, low: Node, high: Node) -> Node | None:
        """One node for two neighbours, where there is one."""
        if low.op == high.op == "const" and low.width + high.width <= WORD:
            return self.const(low.param | high.param << low.width, low.width + high.width)
        if low.op == high.op == "slice" and low.args == high.args and low.param + low.width == high.param:
            return self.slice(low.args[0], low.param, low.width + high.width)
        return None

    def _repeats_sign(self, low: Node, high: Node) -> bool:
        bit = high.args[0] if high.op == "sext" and high.args[0].width == 1 else high if high.width == 1 else None
        return bit is not None and low.width > 1 and self.slice(low, low.width - 1, 1) is bit

    def zext(self, x: Node, width: int) -> Node:
        """Zeros above."""
        if x.width == width:
            return x
        if x.op == "const":
            return self.const(x.param, width)
        return self.make("zext", width, (x.args[0] if x.op == "zext" else x,))

    def sext(self, x: Node, width: int) -> Node:
        """The highest bit again above."""
        if x.width == width:
            return x
        if x.op == "const":
            return self.const(_signed(x.param, x.width), width)
        if x.op == "zext":
            return self.zext(x, width)
        return self.make("sext", width, (x.args[0] if x.op == "sext" else x,))

    def again(self, node: Node, args: Sequence[Node]) -> Node:
        """The same function of other operands, simplified anew."""
        match node.op:
            case "slice":
                return self.slice(args[0], node.param, node.width)
            case "concat":
                return self.concat(args)
            case "zext":
                return self.zext(args[0], node.width)
            case "sext":
                return self.sext(args[0], node.width)
            case "and" | "or" | "xor" | "not" | "add" | "sub" | "mul":
                return self.arithmetic(node.op, *args)
            case "eq" | "ltu" | "lts":
                return self.compare(node.op, *args)
            case "shl" | "shr" | "sshr":
                return self.shift(node.op, *args)
            case "mux":
                return self.mux(*args)
            case "parity":
                return self.parity(args[0])
            case "select":
                return self.select(args[0], args[1:])
            case _:
                return self.make(node.op, node.width, args, node.param)

    # Functions --------------------------------------------------------------------------------------------------------
    def bitwise(self, op: str, *args: Node) -> Node:
        """``and``, ``or``, ``xor``, ``not``."""
        width = args[0].width
        ones = (1 << width) - 1
        if op == "not":
            (x,) = args
            if x.op == "not":
                return x.args[0]
            return self.const(~x.param, width) if x.op == "const" else self.make("not", width, args)
        a, b = args
        if a.op == "const":
            a, b = b, a
        if b.op == "const":
            if a.op == "const":
                return self.const({"and": a.param & b.param, "or": a.param | b.param, "xor": a.param ^ b.param}[op], width)
            if b.param == 0:
                return b if op == "and" else a
            if b.param == ones:
                return {"and": a, "or": b}.get(op) or self.bitwise("not", a)
        if a is b:
            return self.const(0, width) if op == "xor" else a
        return self.make(op, width, (a, b))

    def arithmetic(self, op: str, *args: Node) -> Node:
        """``add``, ``sub``, ``mul``, or a bitwise function."""
        if op in ("and", "or", "xor", "not"):
            return self.bitwise(op, *args)
        a, b = args
        width = a.width
        if a.op == b.op == "const":
            return self.const({"add": a.param + b.param, "sub": a.param - b.param, "mul": a.param * b.param}[op], width)
        if op != "sub" and a.op == "const":
            a, b = b, a
        if b.op == "const" and b.param == 0:
            return b if op == "mul" else a
        if b.op == "const" and b.param == 1 and op == "mul":
            return a
        if b.op == "const" and op == "mul" and b.param & (b.param - 1) == 0:
            return self.shift("shl", a, self.const(b.param.bit_length() - 1, 7))
        return self.make(op, width, (a, b))

    def compare(self, op: str, a: Node, b: Node) -> Node:
        """``eq``, ``ltu``, ``lts``: one bit."""
        if a is b:
            return self.const(op == "eq", 1)
        if a.op == b.op == "const":
            if op == "lts":
                return self.const(_signed(a.param, a.width) < _signed(b.param, b.width), 1)
            return self.const(a.param == b.param if op == "eq" else a.param < b.param, 1)
        if op == "eq" and a.op == "const":
            a, b = b, a
        if op == "eq" and a.width == 1 and b.op == "const":
            return a if b.param else self.bitwise("not", a)
        if op == "eq" and b.op == "const" and a.op in ("zext", "sext"):
            inner = a.args[0]
            again = inner.mask & b.param
            same = again == b.param if a.op == "zext" else self.sext(self.const(again, inner.width), a.width).param == b.param
            return self.compare("eq", inner, self.const(again, inner.width)) if same else self.const(0, 1)
        return self.make(op, 1, (a, b))

    def any(self, x: Node) -> Node:
        """Whether a bit is set."""
        return self.bitwise("not", self.compare("eq", x, self.const(0, x.width)))

    def shift(self, op: str, x: Node, amount: Node) -> Node:
        """``shl``, ``shr``, ``sshr`` by any amount."""
        if amount.op == "const":
            by, width = amount.param, x.width
            if by == 0:
                return x
            if op == "shl":
                if by >= width:
                    return self.const(0, width)
                return self.concat([self.const(0, by), self.slice(x, 0, width - by)])
            if by >= width:
                return self.const(0, width) if op == "shr" else self.sext(self.slice(x, width - 1, 1), width)
            kept = self.slice(x, by, width - by)
            return self.zext(kept, width) if op == "shr" else self.sext(kept, width)
        if x.op == "const" and x.param == 0:
            return x
        return self.make(op, x.width, (x, amount))

    def mux(self, condition: Node, one: Node, zero: Node) -> Node:
        """``one`` where the condition is 1."""
        if condition.op == "const":
            return one if condition.param else zero
        if condition.op == "not":
            return self.mux(condition.args[0], zero, one)
        if one is zero:
            return one
        if one.width == 1:
            inverse = self.bitwise("not", condition)
            if one.op == "const":
                return self.bitwise("or", condition, zero) if one.param else self.bitwise("and", inverse, zero)
            if zero.op == "const":
                return self.bitwise("or", inverse, one) if zero.param else self.bitwise("and", condition, one)
        return self.make("mux", one.width, (condition, one, zero))

    def parity(self, x: Node) -> Node:
        """Exclusive or of all bits."""
        return x if x.width == 1 else self.make("parity", 1, (x,))

    def select(self, index: Node, alternatives: Sequence[Node]) -> Node:
        """``alternatives[index]``, or 0 beyond."""
        if index.op == "const":
            return alternatives[index.param] if index.param < len(alternatives) else self.const(0, alternatives[0].width)
        if all(one is alternatives[0] for one in alternatives) and len(alternatives) == 1 << index.width:
            return alternatives[0]
        return self.make("select", alternatives[0].width, (index, *alternatives))
