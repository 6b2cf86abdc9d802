"""Signatures that units share: memory ports, DMA clients, and the payloads between units.

Each signature is written from the side of the unit that uses the port (the unit has it as ``Out``).
"""

from amaranth import signed, unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out, Signature

from spec.config import LANES

ROW_ADDR_BITS = 16
"""Address of a row of 8 words in the vector memory or of 8 bytes in the query buffer."""

TOKEN_BITS = 6
HEAD_BITS = 8

VectorRow = data.ArrayLayout(unsigned(32), LANES)
"""One row of the vector memory: 8 FP32, lane 0 lowest."""

VectorRead = Signature({"addr": Out(ROW_ADDR_BITS), "en": Out(1), "data": In(VectorRow)})
"""``data`` shows row ``addr`` in the cycle after one with ``en``, and holds while ``en`` is low."""

VectorWrite = Signature({"addr": Out(ROW_ADDR_BITS), "en": Out(1), "data": Out(VectorRow)})
"""Row ``addr`` is written at the end of a cycle with ``en``."""



def activation_write(bits: int) -> Signature:
    """8 activations of so many bits (lane 0 lowest): inputs 8*row .. 8*row+7 of a token of the activation tile."""
    return Signature(
        {"en": Out(1), "token": Out(TOKEN_BITS), "row": Out(ROW_ADDR_BITS), "data": Out(LANES * bits)}
    )


ActivationWrite = activation_write(8)
"""8 int8 activations."""

ScaleWrite = Signature({"en": Out(1), "token": Out(TOKEN_BITS), "data": Out(32)})
"""FP32 activation scale of a token of the activation tile."""

GroupScaleWrite = Signature({"en": Out(1), "token": Out(TOKEN_BITS), "group": Out(ROW_ADDR_BITS), "data": Out(16)})
"""bfloat16 scale of inputs 32*group .. 32*group+31 of a token of the activation tile (group engines). It comes before or
with the first `ActivationWrite` of its group; that of group 0 begins a token."""

RopeWrite = Signature({"en": Out(1), "token": Out(TOKEN_BITS), "row": Out(ROW_ADDR_BITS), "data": Out(VectorRow)})
"""cos, sin of 4 pairs (cos0, sin0, .., cos3, sin3): pairs 4*row .. 4*row+3 of the position of that token."""

QueryWrite = Signature(
    {
        "en": Out(1),
        "row": Out(ROW_ADDR_BITS),
        "data": Out(64),
        "scale_en": Out(1),
        "token": Out(TOKEN_BITS),
        "head": Out(HEAD_BITS),
        "scale": Out(32),
    }
)
"""8 int8 of a query (query-buffer row = dst + token*dst_stride + head*head_beats + beat), and the FP32 scale of (token, head)."""


def matmul_beat(sum_bits: int) -> data.StructLayout:
    """8 consecutive output rows of a token: sums of an engine with accumulators of ``sum_bits``.

    An operation yields ``row_blocks*outputs/8`` beats a token: ternary engines those of one token after the other, group
    engines for each row block those of each token.
    """
    return data.StructLayout({"sums": data.ArrayLayout(signed(sum_bits), LANES), "token": TOKEN_BITS})


MatmulBeat = matmul_beat(32)
"""Of the ternary engine."""

KvBeat = data.StructLayout({"data": 64, "value": 1, "token": TOKEN_BITS, "head": HEAD_BITS, "last": 1, "scale": 32})
"""8 int8 (int4: sign-extended) of one head of K (value=0) or V (value=1), beats in order; ``scale`` is valid with ``last``."""

LogitsBeat = data.StructLayout({"data": VectorRow, "beat": 24})
"""Logits of vocabulary rows 8*beat .. 8*beat+7."""


def dma_command(addr_bits: int) -> data.StructLayout:
    """Read or write ``beats`` beats from byte address ``addr`` on, which is a multiple of the beat's bytes."""
    return data.StructLayout({"addr": addr_bits, "beats": 24})


def dma_beat(data_bits: int) -> data.StructLayout:
    """One beat of a read; ``last`` of its command."""
    return data.StructLayout({"data": data_bits, "last": 1})


def write_beat(data_bits: int) -> data.StructLayout:
    """One beat of a write with byte strobes."""
    return data.StructLayout({"data": data_bits, "strb": data_bits // 8})


def read_client(addr_bits: int, data_bits: int) -> Signature:
    """A client of the read DMA. It gives a command only when it will accept all its beats without waiting for another client."""
    return Signature(
        {
            "cmd": Out(stream.Signature(dma_command(addr_bits))),
            "beat": In(stream.Signature(dma_beat(data_bits))),
        }
    )


def write_client(addr_bits: int, data_bits: int) -> Signature:
    """A client of the write DMA: each command is followed by its beats."""
    return Signature(
        {
            "cmd": Out(stream.Signature(dma_command(addr_bits))),
            "beat": Out(stream.Signature(write_beat(data_bits))),
        }
    )
