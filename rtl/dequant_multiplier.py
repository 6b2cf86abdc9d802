"""The baseline of both papers: every weight is dequantised in the loop, then multiplied."""

from amaranth.hdl import Module, Mux, Signal, Value, signed
from amaranth.lib.wiring import In

from rtl.group_core import NIBBLE, ROW_BITS, GroupCore
from rtl.group_dequant import EXPONENT_BITS, HALF_BITS, Half, scale_rows
from spec.config import ALIGN_BITS, K_GROUP, GroupMatmulConfig

__all__ = ["DequantMultiplier"]

_WEIGHT = 16
"""|15 m_s + m_z| <= 16 * 2047, and a sign."""

_WAYS = 8
"""Products of a partial sum."""


class DequantMultiplier(GroupCore):
    """Multiplies activations by weights that are scaled one by one, so that no dequantisation is left behind the sum.

    Function
        ``o_sums[j] = sum_i (s_j q_ji + z_j) x_i`` with ``s = m_s << align_bits >> (E - e_s)``, z likewise, shifts rounding
        down: in place of V of docs/numerics.md section 3b, in units of ``2^(E - 25 - align_bits)``. Equal to
        ``2^(align_bits - 8) V`` where no shift drops a bit.
    Ports
        Those of `GroupCore`; besides, ``i_scales``: the block's scale row, scale of output j at bits 16j, minimum at bits
        ``16 * (lanes + j)``; ``i_exponent``: E. Both hold from the first row of a pass to the last. ``i_sum_acts`` is not used.
    Timing
        Latency 4: scales are aligned, weights dequantised, multiplied, added up. A row a cycle.
    Numbers
        Weights of 16 + align_bits bits, as a nibble of 8-bit codes too; sums of 32 + align_bits. Exact but for the alignment.
    Cost
        8 * lanes products of (12 + align_bits) x 4 bits with an addition, and of (16 + align_bits) x 8 bits, and a register
        a weight between them. Two shifters an output: not one a weight, which is as cheap as the in-loop way can be.
    Twins
        golden/dequant_multiplier.py; test: tests/test_dequant_multiplier.py.

    Parameters
    ----------
    cfg
        Of a 4-bit engine: ``dequant_lanes = lanes / 4``.
    align_bits
        Bits below those of a scale of exponent E that aligned scales keep: 0 gives weights of 16 bits, 8 those of 3b.
    """

    latency = 4

    i_scales: Signal
    i_exponent: Signal

    def __init__(self, cfg: GroupMatmulConfig, *, align_bits: int = 0) -> None:
        if not 0 <= align_bits <= ALIGN_BITS:
            raise ValueError(f"align_bits must be between 0 and {ALIGN_BITS}, not {align_bits}")
        if cfg.slices != NIBBLE:
            raise ValueError(f"nibbles need dequant_lanes = lanes / 4, not {cfg.dequant_lanes} of {cfg.lanes}")
        self.align_bits = align_bits
        ports = {"i_scales": In(8 * cfg.row_bytes), "i_exponent": In(EXPONENT_BITS)}
        super().__init__(cfg, ports=ports)

    @property
    def sum_bits(self) -> int:
        """Bits of a sum of 32 activations times aligned weights."""
        return 2 * _WEIGHT + self.align_bits

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = range(self.cfg.dequant_lanes)
        # stage n works on what the registers of stage n - 1 hold
        valid, wide, row = [self.i_valid], [self.i_bits == 8], [self.i_row]
        for n in range(1, self.latency):
            valid.append(Signal(name=f"valid_{n}"))
            wide.append(Signal(name=f"wide_{n}", reset_less=True))
            row.append(Signal(ROW_BITS, name=f"row_{n}", reset_less=True))
            m.d.sync += valid[n].eq(valid[n - 1])
            with m.If(valid[n - 1]):
                m.d.sync += [wide[n].eq(wide[n - 1]), row[n].eq(row[n - 1])]

        # 0. align the scales of the row's outputs; a high nibble has no minimum
        part, high = Mux(wide[0], row[0][1:], row[0]), wide[0] & ~row[0][0]
        halves = Signal(32 * self.cfg.dequant_lanes)
        m.d.comb += halves.eq(scale_rows(self.cfg, self.i_scales, part))
        codes = Signal.like(self.i_codes, reset_less=True)
        acts = [Signal(8 * K_GROUP, name=f"acts_{n}", reset_less=True) for n in range(2)]
        scales = [Signal(signed(HALF_BITS + self.align_bits), name=f"scale_{j}", reset_less=True) for j in lanes]
        minima = [Signal.like(scale, name=f"minimum_{j}", reset_less=True) for j, scale in enumerate(scales)]
        with m.If(valid[0]):
            m.d.sync += [codes.eq(self.i_codes), acts[0].eq(self.i_acts)]
            for j in lanes:
                scale, minimum = (self._align(halves[16 * n :][:16]) for n in (j, len(lanes) + j))
                m.d.sync += [scales[j].eq(scale), minima[j].eq(Mux(high, 0, minimum))]

        # 1. dequantise every weight; packed nibbles are q - 8
        weights: list[list[Signal]] = []
        for j in lanes:
            weights.append([])
            for i in range(K_GROUP):
                nibble = codes[NIBBLE * (K_GROUP * j + i) :][:NIBBLE] ^ (1 << (NIBBLE - 1))
                weight = Signal(signed(_WEIGHT + self.align_bits), name=f"weight_{j}_{i}", reset_less=True)
                with m.If(valid[1]):
                    m.d.sync += weight.eq(scales[j] * nibble + minima[j])
                weights[j].append(weight)
        with m.If(valid[1]):
            m.d.sync += acts[1].eq(acts[0])

        # 2. multiply, add up eight  (slice, 32) -> (slice, 4)
        values = [acts[1][8 * i :][:8].as_signed() for i in range(K_GROUP)]
        partial: list[list[Signal]] = []
        for j in lanes:
            products = [weight * x for weight, x in zip(weights[j], values, strict=True)]
            bits = signed(_WEIGHT + self.align_bits + 10)  # |w x| < 2^(22 + align_bits), and eight of them
            partial.append([Signal(bits, name=f"partial_{j}_{c}", reset_less=True) for c in range(K_GROUP // _WAYS)])
            with m.If(valid[2]):
                for c, total in enumerate(partial[j]):
                    m.d.sync += total.eq(sum(products[_WAYS * c :][:_WAYS]))

        # 3. the row's sum; the low nibbles meet the high ones
        completes = Signal()
        m.d.comb += completes.eq(valid[3] & (~wide[3] | row[3][0]))
        m.d.sync += self.o_valid.eq(completes)
        with m.If(completes):
            m.d.sync += self.o_slice.eq(Mux(wide[3], row[3][1:], row[3]))
        for j in lanes:
            total = Signal(signed(_WEIGHT + self.align_bits + 12), name=f"total_{j}")
            before = Signal.like(total, name=f"high_{j}", reset_less=True)
            m.d.comb += total.eq(sum(partial[j]))
            with m.If(valid[3]):
                m.d.sync += [
                    before.eq(Mux(wide[3] & ~row[3][0], total, 0)),
                    self.o_sums[j].eq((before << NIBBLE) + total),
                ]
        return m

    def _align(self, bits: Value) -> Value:
        """``m << align_bits >> (E - e)`` of an FP16."""
        half = Half(bits)
        return (half.significand << self.align_bits) >> (self.i_exponent - half.exponent)[:EXPONENT_BITS]
