"""A unit under the assumption that its resets are 0, as they are in nearly every cycle."""

from collections import Counter
from dataclasses import replace

from cosim.vector.expression import Node
from cosim.vector.netlist import Slot, Unit

__all__ = ["resets_of", "without"]

FEWEST = 8
"""Registers that a flag must overrule to count as a reset."""


def resets_of(unit: Unit) -> list[Slot]:
    """Flags, of the inputs or registers, that come before all else in what many registers become."""
    found: Counter[int] = Counter()
    slots: dict[int, Slot] = {}
    for register in unit.registers:
        node = register.next
        while node.op == "mux" and node.args[0].op == "slot" and node.args[1].op == "const":
            slot = node.args[0].param
            slots[id(slot)] = slot
            found[id(slot)] += 1
            node = node.args[2]
    return [slots[key] for key, count in found.items() if count >= FEWEST]


def without(unit: Unit, flags: list[Slot]) -> Unit:
    """The unit while ``flags`` are 0: the same state, shorter expressions."""
    x = unit.expressions
    zero = {id(slot) for slot in flags}
    done: dict[int, Node] = {}

    def shorter(node: Node) -> Node:
        if id(node) not in done:
            if node.op == "slot" and id(node.param) in zero:
                done[id(node)] = x.const(0, node.width)
            else:
                args = [shorter(arg) for arg in node.args]
                same = all(new is old for new, old in zip(args, node.args, strict=True))
                done[id(node)] = node if same else x.again(node, args)
        return done[id(node)]

    return replace(
        unit,
        registers=[replace(register, next=shorter(register.next)) for register in unit.registers],
        writes=[
            replace(write, enable=shorter(write.enable), address=shorter(write.address), data=shorter(write.data))
            for write in unit.writes
        ],
    )
