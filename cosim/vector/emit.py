"""The C++ class of a unit: its ports, its state, what the simulator calls."""

import re
from collections.abc import Sequence

from cosim.vector.cells import words_of
from cosim.vector.edge import edge_lines
from cosim.vector.expression import UnsupportedError
from cosim.vector.layout import Layout
from cosim.vector.netlist import Slot, Unit
from cosim.vector.pack import Op, Root
from cosim.vector.text import Writer, c_type, word_type

__all__ = ["emit_edge", "emit_header", "emit_rest"]


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
    lines += [f"void Vdut::{name}(const unsigned clocks) {{", "B *const S = state_;", *edge_lines(unit.clocks, roots), "}"]
    return "\n".join(lines) + "\n"


def emit_rest(unit: Unit, resets: Sequence[Slot], outputs: dict[str, list[Op]]) -> str:
    """The other functions of the class."""
    lines = ["void Vdut::outputs() {", "const B *const S = state_;", *_outputs(unit, outputs), "}"]
    lines += ["void Vdut::eval() {", "B *const S = state_;"]
    for port, slots in unit.inputs.items():
        width = unit.widths[port]
        if width <= 64:
            lines.append(f"store<{word_type(width)}>(S + {slots[0].offset}, {port});")
        else:
            lines.append(f"std::memcpy(S + {slots[0].offset}, &{port}, {4 * -(-width // 32)});")
    ticking = " | ".join(f"unsigned({clock}) << {number}" for number, clock in enumerate(unit.clocks))
    lines += [f"const unsigned now = {ticking}, rising = now & ~before_;", "before_ = now;", "if (!rising) outputs();"]
    if resets:
        lines.append(f"else if ({' | '.join(f'load<W>(S + {slot.offset})' for slot in resets)}) edge_in_reset(rising);")
    lines += ["else edge(rising);", "}", "Vdut::Vdut() {", "B *const S = state_;", *_initial(unit), "outputs();", "}"]
    return "\n".join(lines) + "\n"


def _outputs(unit: Unit, outputs: dict[str, list[Op]]) -> list[str]:
    writer = Writer()
    for port, ops in outputs.items():
        for word, op in enumerate(ops):
            value = writer.name(op)
            wide = f"store<{c_type(op)}>((B *)&{port} + {8 * word}, {value});"
            writer.lines.append(wide if unit.widths[port] > 64 else f"{port} = {value};")
    return writer.lines


def _initial(unit: Unit) -> list[str]:
    lines = [
        f"store<{word_type(register.slot.width)}>(S + {register.slot.offset}, {register.init:#x}ull);"
        for register in unit.registers
        if register.init
    ]
    for number, memory in enumerate(unit.memories):
        if not memory.init:
            continue
        words = [value >> low & (1 << width) - 1 for value in memory.init for low, width in words_of(memory.width)]
        per_row = len(words_of(memory.width))
        kind = word_type(memory.width)
        rows = f"S + {memory.offset} + row * {memory.pitch}, init{number} + row * {per_row}, {per_row} * sizeof({kind})"
        lines.append(f"static const {kind} init{number}[] = {{{', '.join(f'{word:#x}' for word in words)}}};")
        lines.append(f"for (unsigned row = 0; row < {len(memory.init)}; ++row) std::memcpy({rows});")
    return lines
