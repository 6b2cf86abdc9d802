"""What the cells of a netlist compute, as expressions of their operands (Yosys's internal cell library)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cosim.vector.expression import WORD, Expressions, Node, UnsupportedError

__all__ = ["Bit", "Cell", "CellReader", "words_of"]

Bit = int | str
"""Number of a net, or a constant: ``0``, ``1``, ``x``."""

MOST_INDEX_BITS = 6
"""Of a choice that is looked for among the parts of a signal."""

MOST_STEPS = 256
"""Of a shift of more than 64 bits: parts that it can give."""


def words_of(width: int) -> list[tuple[int, int]]:
    """(first bit, bits) of the words of a signal."""
    return [(low, min(WORD, width - low)) for low in range(0, width, WORD)]


@dataclass
class Cell:
    """A cell of Yosys's library, with the nets of its ports."""

    kind: str
    parameters: dict[str, str]
    nets: dict[str, list[Bit]]
    name: str
    init: str = ""
    """Of a register, lowest bit first."""
    slices: dict[tuple[int, int], Node] = field(default_factory=dict)

    def number(self, name: str) -> int:
        """A parameter."""
        return int(self.parameters[name], 2)

    @cached_property
    def is_signed(self) -> bool:
        """Whether the operands are extended by their signs."""
        return self.number("A_SIGNED") == 1 and ("B_SIGNED" not in self.parameters or self.number("B_SIGNED") == 1)


class CellReader(ABC):
    """Expressions of combinational cells. How nets become expressions is the subclass's."""

    _x: Expressions

    @abstractmethod
    def _value(self, bits: Sequence[Bit]) -> Node:
        """Up to 64 nets as a word."""

    @abstractmethod
    def _signal_place(self, bits: Sequence[Bit]) -> tuple[object, int] | None:
        """Signal of the state or the inputs, and its first bit, if the nets are bits of one in a row."""

    def _part(self, words: list[tuple[Node, int]], low: int, width: int) -> Node:
        """Bits out of words with their first bits."""
        parts = []
        for node, at in words:
            first, end = max(low, at), min(low + width, at + node.width)
            if first < end:
                parts.append(self._x.slice(node, first - at, end - first))
        return self._x.concat(parts)

    def _extended(self, bits: Sequence[Bit], signed: bool, low: int, width: int) -> Node:
        """Bits ``low`` and on of an operand that goes on with its sign or zeros."""
        kept = bits[low : low + width]
        if not kept:
            return self._x.sext(self._value(bits[-1:]), width) if signed else self._x.const(0, width)
        value = self._value(kept)
        return self._x.sext(value, width) if signed else self._x.zext(value, width)

    def _operand(self, cell: Cell, port: str, low: int, width: int, *, signed: bool | None = None) -> Node:
        return self._extended(cell.nets[port], cell.is_signed if signed is None else signed, low, width)

    def cell_value(self, cell: Cell, low: int, width: int) -> Node:
        """Bits of a cell's output."""
        x, kind, full = self._x, cell.kind, len(cell.nets.get("Y", ()))
        if kind in ("$and", "$or", "$xor", "$not"):
            return x.bitwise(kind[1:], *(self._operand(cell, port, low, width) for port in ("A", "B") if port in cell.nets))
        if kind in ("$add", "$sub", "$neg") and low + width > WORD:
            return self._part(self._wide_sum(cell, low + width), low, width)
        if kind in ("$add", "$sub", "$mul", "$neg"):
            whole = full if full <= WORD else low + width
            a = x.const(0, whole) if kind == "$neg" else self._operand(cell, "A", 0, whole)
            b = self._operand(cell, "A" if kind == "$neg" else "B", 0, whole)
            return x.slice(x.arithmetic("sub" if kind == "$neg" else kind[1:], a, b), low, width)
        if kind in ("$mux", "$pmux"):
            return self._mux(cell, low, width)
        if kind in ("$eq", "$ne", "$lt", "$le", "$gt", "$ge"):
            return self._bool(self._compare(cell), low, width)
        if kind in ("$logic_not", "$reduce_bool", "$reduce_or", "$reduce_and", "$reduce_xor", "$logic_and", "$logic_or"):
            return self._bool(self._reduce(cell), low, width)
        if kind in ("$shl", "$shr", "$sshr", "$sshl"):
            return self._shift(cell, low, width)
        if kind in ("$shift", "$shiftx"):
            return self._choose(cell, low, width)
        raise UnsupportedError(f"cell {kind}")

    def _wide_sum(self, cell: Cell, bits: int) -> list[tuple[Node, int]]:
        """Words of a sum or difference with their first bits, a carry from each to the next."""
        x, minus = self._x, cell.kind != "$add"
        words, carry = [], x.const(minus, 1)
        for low, width in words_of(bits):
            a = x.const(0, width) if cell.kind == "$neg" else self._operand(cell, "A", low, width)
            b = self._operand(cell, "A" if cell.kind == "$neg" else "B", low, width)
            part = x.arithmetic("add", a, x.bitwise("not", b) if minus else b)
            whole = x.arithmetic("add", part, x.zext(carry, width))
            carry = x.bitwise("or", x.compare("ltu", part, a), x.compare("ltu", whole, part))
            words.append((whole, low))
        return words

    def _bool(self, value: Node, low: int, width: int) -> Node:
        return self._x.slice(self._x.zext(value, low + width), low, width) if low + width > 1 else value

    def _mux(self, cell: Cell, low: int, width: int) -> Node:
        x, full = self._x, cell.number("WIDTH")
        # narrow ones whole, so that users of several of their bits share them
        first, bits = (0, full) if full <= WORD else (low, width)
        if cell.kind == "$pmux" and (chosen := self._chosen_part(cell, first, bits)) is not None:
            return x.slice(chosen, low - first, width)
        value = self._value(cell.nets["A"][first : first + bits])
        for number, condition in reversed(list(enumerate(cell.nets["S"]))):
            base = number * full + first
            value = x.mux(self._value([condition]), self._value(cell.nets["B"][base : base + bits]), value)
        return x.slice(value, low - first, width)

    def _chosen_part(self, cell: Cell, first: int, bits: int) -> Node | None:
        """A switch over parts of one signal that lie at equal distances, by their number."""
        x, full = self._x, cell.number("WIDTH")
        conditions = [self._value([net]) for net in cell.nets["S"]]
        index = conditions[0].args[0] if conditions[0].op == "eq" else None
        if index is None or index.width > MOST_INDEX_BITS:
            return None
        if any(one.op != "eq" or one.args[0] is not index or one.args[1].op != "const" for one in conditions):
            return None
        parts = [cell.nets["A"][first : first + bits]] * (1 << index.width)
        for number, one in reversed(list(enumerate(conditions))):
            parts[one.args[1].param] = cell.nets["B"][number * full + first :][:bits]
        places = []
        for part in parts:
            if (place := self._signal_place(part)) is None:
                return None
            places.append(place)
        step = places[1][1] - places[0][1]
        if any(place != (places[0][0], places[0][1] + n * step) for n, place in enumerate(places)):
            return None
        return x.select(index, [self._value(part) for part in parts])

    def _compare(self, cell: Cell) -> Node:
        x, kind = self._x, cell.kind
        bits = max(len(cell.nets["A"]), len(cell.nets["B"]))
        if kind in ("$eq", "$ne"):
            same = x.const(1, 1)
            for low, width in words_of(bits):
                same = x.bitwise("and", same, x.compare("eq", *(self._operand(cell, port, low, width) for port in "AB")))
            return x.bitwise("not", same) if kind == "$ne" else same
        a, b = (self._operand(cell, port, 0, bits) for port in "AB")
        if kind in ("$gt", "$le"):
            a, b = b, a
        less = x.compare("lts" if cell.is_signed else "ltu", a, b)
        return x.bitwise("not", less) if kind in ("$le", "$ge") else less

    def _reduce(self, cell: Cell) -> Node:
        x, kind = self._x, cell.kind

        def words(port: str) -> list[Node]:
            return [self._value(cell.nets[port][low : low + width]) for low, width in words_of(len(cell.nets[port]))]

        def joined(op: str, parts: list[Node]) -> Node:
            value = parts[0]
            for part in parts[1:]:
                value = x.bitwise(op, value, part)
            return value

        if kind == "$reduce_and":
            return joined("and", [x.compare("eq", word, x.const(word.mask, word.width)) for word in words("A")])
        if kind == "$reduce_xor":
            return joined("xor", [x.parity(word) for word in words("A")])
        a = joined("or", [x.any(word) for word in words("A")])
        if kind == "$logic_not":
            return x.bitwise("not", a)
        if kind in ("$logic_and", "$logic_or"):
            return x.bitwise(kind[7:], a, joined("or", [x.any(word) for word in words("B")]))
        return a

    def _shift(self, cell: Cell, low: int, width: int) -> Node:
        x, signed = self._x, cell.number("A_SIGNED") == 1
        full, bits = len(cell.nets["Y"]), len(cell.nets["A"])
        amount = self._value(cell.nets["B"])
        if cell.kind in ("$shl", "$sshl"):
            whole = full if full <= WORD else low + width
            return x.slice(x.shift("shl", self._operand(cell, "A", 0, whole, signed=signed), amount), low, width)
        whole = max(full, bits)
        arithmetic = "sshr" if cell.kind == "$sshr" and signed else "shr"
        if whole > WORD and signed:
            raise UnsupportedError(f"{cell.kind} of {whole} bits with a sign")
        if whole > WORD:
            return self._stepped(cell, cell.nets["A"], amount, low, width)
        return x.slice(x.shift(arithmetic, self._operand(cell, "A", 0, whole, signed=signed), amount), low, width)

    def _choose(self, cell: Cell, low: int, width: int) -> Node:
        """``A`` from bit ``B`` on: one of its parts, where the lowest bits of B are constant 0."""
        if "B_SIGNED" in cell.parameters and cell.number("B_SIGNED"):
            raise UnsupportedError("a shift by a signed amount")
        return self._stepped(cell, cell.nets["A"], self._value(cell.nets["B"]), low, width)

    def _stepped(self, cell: Cell, bits: Sequence[Bit], amount: Node, low: int, width: int) -> Node:
        x = self._x
        zeros = 0
        if amount.op == "zext":
            amount = amount.args[0]
        while zeros < amount.width and (bit := x.slice(amount, zeros, 1)).op == "const" and bit.param == 0:
            zeros += 1
        if zeros == amount.width:
            return self._extended(bits, False, low, width)
        index, step = x.slice(amount, zeros, amount.width - zeros), 1 << zeros
        count = min(1 << min(index.width, 12), -(-(len(bits) - low) // step))
        if count <= 0:
            return x.const(0, width)
        if step == 1 and len(bits) <= WORD:
            return x.slice(x.shift("shr", x.zext(self._value(bits), max(len(bits), low + width)), amount), low, width)
        if count > MOST_STEPS:
            raise UnsupportedError(f"{cell.kind} of {len(bits)} bits in {count} steps")
        return x.select(index, [self._extended(bits, False, number * step + low, width) for number in range(count)])
