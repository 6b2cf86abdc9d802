"""The ternary engine without tables, to compare with: each weight passes, negates or drops its activation (TeLLMe's M1)."""

from amaranth.hdl import Cat, Module, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from spec.config import TlmmConfig

_WAYS = 4
"""Summands of a pipeline stage, as in the adder tree of rtl/tlmm_tables.py."""


class TernarySelect(wiring.Component):
    """``outputs`` sums of ``k_block`` activations times trits.

    Function
        ``o_sums[q] = sum_i w[q, i] x[i]``, w two bits a weight: non-zero, negative.
    Numbers
        A negation is an inversion and a carry into the first adder: the well-written form, not the naive one.
    Timing
        One row a cycle; a register behind every four summands.
    """

    def __init__(self, cfg: TlmmConfig) -> None:
        self._cfg = cfg
        super().__init__(
            {
                "i_valid": In(1),
                "i_acts": In(8 * cfg.k_block),
                "i_weights": In(2 * cfg.k_block * cfg.outputs),
                "o_sums": Out(signed(cfg.entry_bits + 8)).array(cfg.outputs),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self._cfg
        for q in range(cfg.outputs):
            weights = self.i_weights[2 * cfg.k_block * q :][: 2 * cfg.k_block]
            summands: list[Value] = []
            carries: list[Value] = []
            for i in range(cfg.k_block):
                live, negative = weights[2 * i], weights[2 * i + 1]
                x = self.i_acts[8 * i :][:8]
                wide = Cat(x, x[-1])  # -(-128) needs 9 bits
                summands.append(((wide & live.replicate(9)) ^ negative.replicate(9)).as_signed())
                carries.append(negative)
            stage = 0
            while len(summands) > 1:
                following: list[Value] = []
                groups = [summands[at : at + _WAYS] for at in range(0, len(summands), _WAYS)]
                for number, group in enumerate(groups):
                    parts: list[Value] = list(group)
                    if stage == 0:
                        parts += carries[_WAYS * number :][:_WAYS]
                    total = Signal(signed(11 + 2 * stage), name=f"sum_{q}_{stage}_{number}", reset_less=True)
                    with m.If(self.i_valid):
                        m.d.sync += total.eq(sum(parts))
                    following.append(total)
                summands, stage = following, stage + 1
            m.d.comb += self.o_sums[q].eq(summands[0])
        return m
