"""Legal ranges of descriptor fields that depend on the build: beyond them a descriptor is illegal on that device."""

from spec.config import LANES, AcceleratorConfig
from spec.descriptors import Opcode


def field_limits(config: AcceleratorConfig) -> dict[tuple[Opcode, str], int]:
    """Largest legal value of (opcode, field) on a device of that config, where the field's width allows more."""
    return {
        (Opcode.ROPE, "row_beats"): config.attention.max_head_dim // LANES,
        (Opcode.NORM, "beats"): config.max_vector // LANES,
        (Opcode.NORM, "src"): config.vector_rows - 1,
        (Opcode.MATMUL, "k_blocks"): config.tlmm.max_k_blocks,
        (Opcode.MATMUL, "row_blocks"): config.tlmm.acc_rows,
        (Opcode.MATMUL, "head_beats"): config.attention.max_head_dim // LANES,
        (Opcode.ATTEND, "head_beats"): config.attention.max_head_dim // LANES,
        (Opcode.ATTEND, "dst"): config.vector_rows - 1,
        (Opcode.EMBED, "dst"): config.vector_rows - 1,
    }
