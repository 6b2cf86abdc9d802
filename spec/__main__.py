"""``python -m spec``: print the register and descriptor tables of docs/isa.md; ``--write FILE`` puts them there."""

import sys
from pathlib import Path

from spec.csr import COUNTERS, REGISTERS, Register
from spec.descriptors import COMMON, FIELDS, UNIT_OF, Epilogue, OpField, Unit
from spec.faults import DebugSpace, FaultCode

BEGIN = "<!-- begin: python -m spec -->"
END = "<!-- end: python -m spec -->"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _register_rows(register: Register) -> list[list[str]]:
    offset = f"`{register.offset:#05x}`" + (f" x {register.count}" if register.count > 1 else "")
    rows = [[offset, f"`{register.name}`", register.access, f"`{register.reset:#x}`", register.doc]]
    for field in register.fields:
        bits = f"[{field.lsb + field.width - 1}:{field.lsb}]" if field.width > 1 else f"[{field.lsb}]"
        rows.append(["", f"`{field.name}` {bits}", "", "", field.doc])
    return rows


def _field_row(field: OpField) -> list[str]:
    first = 32 * field.word + field.lsb
    last = first + field.width - 1
    legal = f"{field.minimum} to {field.limit}" if field.minimum or field.maximum is not None else ""
    word, end = divmod(first, 32)[0], divmod(last, 32)
    bits = f"{word}[{end[1]}:{field.lsb}]" if end[0] == word else f"{word}[31:{field.lsb}], {end[0]}[{end[1]}:0]"
    return [f"`{field.name}`", bits, legal, field.doc]


def _enum_rows(members: type[Epilogue] | type[FaultCode] | type[DebugSpace]) -> list[list[str]]:
    return [[str(int(member)), f"`{member.name}`"] for member in members]


def tables() -> str:
    """All tables, as Markdown."""
    lines = ["## Registers", "", "Words of 32 bits behind AXI4-Lite, by byte offset. Any other offset answers SLVERR.", ""]
    lines += _table(
        ["offset", "register", "access", "reset", "meaning"], [row for register in REGISTERS for row in _register_rows(register)]
    )
    lines += ["### Counters", ""]
    lines += _table(["number", "counter", "counts"], [[str(i), f"`{name}`", doc] for i, (name, doc) in enumerate(COUNTERS)])
    lines += ["### Fault codes", ""] + _table(["code", "fault"], _enum_rows(FaultCode))
    lines += ["### Debug spaces", ""] + _table(["space", "memory"], _enum_rows(DebugSpace))
    lines += ["## Descriptors", "", "Bits as word[high:low] of the 16 words.", "", "Every descriptor has:", ""]
    head = ["field", "bits", "legal", "meaning"]
    lines += _table(head, [_field_row(field) for field in COMMON])
    lines += ["Bits of the `wait` mask:", ""] + _table(["bit", "unit"], [[str(int(unit)), f"`{unit.name}`"] for unit in Unit])
    for opcode, fields in FIELDS.items():
        unit = f", unit {UNIT_OF[opcode].name}" if opcode in UNIT_OF else ""
        lines += [f"### {int(opcode)}: {opcode.name}{unit}", ""]
        lines += _table(head, [_field_row(field) for field in fields]) if fields else ["No further fields.", ""]
    lines += ["### Epilogues of MATMUL", ""] + _table(["number", "epilogue"], _enum_rows(Epilogue))
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Entry point."""
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        path = Path(sys.argv[2])
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        path.write_text(before + BEGIN + "\n" + tables() + END + after, encoding="utf-8")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
