"""Legal ranges of descriptor fields that depend on the build: beyond them a descriptor is illegal on that device."""

from spec.config import HEAD_PLANES, LANES, AcceleratorConfig, TlmmConfig
from spec.descriptors import Opcode
from spec.layout import embed_header_words


def field_limits(config: AcceleratorConfig) -> dict[tuple[Opcode, str], int]:
    """Largest legal value of (opcode, field) on a device of that config, where the field's width allows more."""
    matmul = config.matmul
    if isinstance(matmul, TlmmConfig):
        engine = {(Opcode.MATMUL, "planes"): HEAD_PLANES, (Opcode.MATMUL, "row_blocks"): matmul.acc_rows}
    else:
        engine = {(Opcode.MATMUL, "row_scale"): 0}
    return {
        (Opcode.EMBED, "grouped"): int(config.grouped),
        (Opcode.EMBED, "header_words"): embed_header_words(config.max_vector),
        (Opcode.ROPE, "row_beats"): config.attention.max_head_dim // LANES,
        (Opcode.NORM, "beats"): config.max_vector // LANES,
        (Opcode.NORM, "src"): config.vector_rows - 1,
        **engine,
        (Opcode.MATMUL, "channels"): int(config.max_channels > 0),
        (Opcode.MATMUL, "k_blocks"): matmul.max_k_blocks,
        (Opcode.MATMUL, "head_beats"): config.attention.max_head_dim // LANES,
        (Opcode.ATTEND, "head_beats"): config.attention.max_head_dim // LANES,
        (Opcode.ATTEND, "dst"): config.vector_rows - 1,
        (Opcode.EMBED, "dst"): config.vector_rows - 1,
    }
