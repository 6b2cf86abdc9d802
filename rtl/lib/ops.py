"""Descriptor fields as hardware structs: what a unit gets when the sequencer issues an operation."""

from amaranth import unsigned
from amaranth.hdl import Value
from amaranth.lib import data

from spec.descriptors import FIELDS, Opcode

RUNTIME = {"position": unsigned(24), "tokens": unsigned(6)}
"""Register values that travel with an operation: position of the step's first token, tokens of the step."""


def op_layout(opcode: Opcode) -> data.StructLayout:
    """Fields of the opcode by name, without opcode, wait and tag, then ``position`` and ``tokens``."""
    return data.StructLayout({field.name: unsigned(field.width) for field in FIELDS[opcode]} | RUNTIME)


def op_fields(opcode: Opcode, words: Value) -> dict[str, Value]:
    """Slices of a 512-bit descriptor, by field name."""
    return {field.name: words[32 * field.word + field.lsb :][: field.width] for field in FIELDS[opcode]}
