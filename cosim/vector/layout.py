"""Where the words of a unit lie in memory: those of equal lanes side by side, so that one load or store takes them all."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from cosim.vector.cells import words_of
from cosim.vector.netlist import Memory, Slot, Unit

__all__ = ["Layout", "container", "lay_out"]

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""

LANES = 16
"""Of the widest vector: families are padded to a multiple, so that whole vectors may be moved."""

FEWEST = 3
"""Words that make a family."""

FEW_READS = 2
"""A memory that is read at more addresses is a table for many lanes: it lies alone, so that a vector can look up in it."""


@dataclass(frozen=True)
class Layout:
    """Families of the registers, each word by its place; the bytes of all."""

    families: list[list[Slot]]
    size: int


def container(width: int) -> int:
    """Bits of the machine word that holds a word."""
    return 32 if width <= 32 else 64


def lay_out(unit: Unit) -> Layout:
    """Sets the offsets of all slots and memories of a unit."""
    size = 0

    def take(count: int, alignment: int) -> int:
        nonlocal size
        begin = -(-size // alignment) * alignment
        size = begin + count
        return begin

    def place(family: list[Slot], *, wide: bool) -> None:
        step = 8 if wide or container(family[0].width) == 64 else 4
        many = len(family) >= FEWEST
        padded = -(-len(family) // LANES) * LANES if many else len(family)
        begin = take(step * padded, ALIGNMENT if many else step)
        for number, slot in enumerate(family):
            slot.offset = begin + step * number

    registers = [register.slot for register in unit.registers]
    families = []
    for slots in (registers, [slot for port in unit.inputs.values() for slot in port]):
        for wide, found in _slot_families(slots):
            place(found, wide=wide)
            if slots is registers:
                families.append(found)
    addresses: dict[int, set[int]] = defaultdict(set)
    for node in unit.expressions.nodes():
        if node.op == "read":
            addresses[id(node.param[0])].add(id(node.args[0]))
    tables = [memory for memory in unit.memories if len(addresses[id(memory)]) > FEW_READS]
    others = [memory for memory in unit.memories if len(addresses[id(memory)]) <= FEW_READS]
    for memories in (*([table] for table in tables), *_memory_families(others)):
        first = memories[0]
        step = container(first.width) // 8 * len(words_of(first.width))
        lanes = len(memories) if len(memories) < FEWEST else -(-len(memories) // LANES) * LANES
        pitch = step * lanes
        begin = take(pitch * first.rows + ALIGNMENT, ALIGNMENT)  # a vector of the last row may reach beyond it
        for number, memory in enumerate(memories):
            memory.offset, memory.pitch = begin + step * number, pitch
    return Layout(families, take(ALIGNMENT, ALIGNMENT))


def _slot_families(slots: Iterable[Slot]) -> list[tuple[bool, list[Slot]]]:
    """Slots by family, in the order of their lanes; whether they are the words of one wide signal."""
    wide: dict[str, list[Slot]] = defaultdict(list)
    narrow = []
    for slot in slots:
        if slot.name.endswith("]"):
            wide[slot.name[: slot.name.rindex("[")]].append(slot)
        else:
            narrow.append(slot)
    named = _families([(slot.name, slot.width, slot) for slot in narrow])
    return [(True, words) for words in wide.values()] + [(False, family) for family in named]


def _memory_families(memories: Iterable[Memory]) -> list[list[Memory]]:
    return _families([(memory.name, (memory.width, memory.rows), memory) for memory in memories])


def _families(items: Iterable[tuple[str, Hashable, Any]]) -> list[list[Any]]:
    """Items whose names differ in one number only, ordered by it. Of several numbers that one counts that varies most."""
    groups: dict[Hashable, list[tuple[tuple[int, ...], Any]]] = defaultdict(list)
    for name, kind, item in items:
        pieces = re.split(r"(\d+)", name)
        groups[tuple(pieces[::2]), kind].append((tuple(map(int, pieces[1::2])), item))
    families: dict[Hashable, list[tuple[int, Any]]] = defaultdict(list)
    for key, members in groups.items():
        places = range(len(members[0][0]))
        lane = max(places, key=lambda at: len({numbers[at] for numbers, _ in members}), default=None)
        for numbers, item in members:
            if lane is None:
                families[key, None].append((0, item))
            else:
                rest = numbers[:lane] + numbers[lane + 1 :]
                families[key, rest].append((numbers[lane], item))
    return [[item for _, item in sorted(members, key=lambda entry: entry[0])] for members in families.values()]
