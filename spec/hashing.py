"""The hash by which driver and device know that they speak of the same registers, descriptors, layout and build."""

from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import sha256

from spec import approx, config, csr, descriptors, faults, layout
from spec.config import AcceleratorConfig

HASH_BITS = 64

_NOT_HASHED = ("name", "clock_hz")
"""Fields of the accelerator's config that change no bit of the hardware's behaviour towards the driver."""

_ENUMS = (
    descriptors.Opcode,
    descriptors.Unit,
    descriptors.Epilogue,
    faults.FaultCode,
    faults.DebugSpace,
    layout.SegmentKind,
)


def _canonical(value: object) -> object:
    """Plain tuples, strings and numbers of a spec object, without prose (`doc`) and fields marked ``hashed=False``."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}={value.value}"
    if is_dataclass(value) and not isinstance(value, type):
        kept = [f.name for f in fields(value) if f.name != "doc" and f.metadata.get("hashed", True)]
        return (type(value).__name__, *((name, _canonical(getattr(value, name))) for name in kept))
    if isinstance(value, dict):
        return tuple((_canonical(key), _canonical(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_canonical(item) for item in value)
    return value


def _constants(module: object) -> tuple[tuple[str, object], ...]:
    """Public upper-case numbers of a module, by name."""
    named = vars(module).items()
    return tuple(sorted((name, value) for name, value in named if name.isupper() and isinstance(value, int)))


def spec_hash(accelerator: AcceleratorConfig) -> int:
    """First 64 bits of the SHA-256 of the spec and of all that shapes this build: not its name, clock, DRAM model."""
    build = [
        (f.name, _canonical(getattr(accelerator, f.name)))
        for f in fields(accelerator)
        if f.name not in _NOT_HASHED and f.metadata.get("hashed", True)
    ]
    contract = (
        [_canonical(list(enum)) for enum in _ENUMS],
        [_constants(module) for module in (config, csr, descriptors, layout, approx)],
        _canonical(csr.REGISTERS),
        tuple(name for name, _ in csr.COUNTERS),
        _canonical(descriptors.COMMON),
        _canonical(descriptors.FIELDS),
        [table.words for table in (approx.exp2_table(), approx.recip_table(), approx.rsqrt_table())],
        build,
    )
    return int.from_bytes(sha256(repr(contract).encode()).digest()[: HASH_BITS // 8], "big")
