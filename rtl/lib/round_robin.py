"""Round-robin arbiter."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["RoundRobin"]


class RoundRobin(wiring.Component):
    """Grant one of ``n`` requests, the one after the last granted first.

    Function
        ``o_grant`` (one bit a requester) and ``o_index`` name the first request after the last
        grant, in the circle 0 .. n-1. With ``i_next`` = 1 that grant counts as used.
    Timing
        Combinational from ``i_request``; the turn moves at the clock edge.
    Cost
        Two priority chains of ``n`` bits.
    Twins
        Test: ``tests/test_bus.py``.
    """

    i_request: Signal
    i_next: Signal
    o_grant: Signal
    o_index: Signal

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"an arbiter needs at least 1 requester, not {n}")
        self._n = n
        super().__init__(
            {
                "i_request": In(n),
                "i_next": In(1),
                "o_grant": Out(n),
                "o_index": Out(range(n)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        n = self._n
        after = Signal(n)  # mask of the requesters behind the last granted one
        behind = Signal(n)
        chosen = Signal(n)
        m.d.comb += [
            behind.eq(self.i_request & after),
            chosen.eq(Mux(behind.any(), behind, self.i_request)),
            self.o_grant.eq(chosen & ~(chosen - 1)),  # lowest set bit
        ]
        for index in range(n):
            with m.If(self.o_grant[index]):
                m.d.comb += self.o_index.eq(index)
        with m.If(self.i_next & self.i_request.any()):
            m.d.sync += after.eq(
                Cat(self.o_grant[:index].any() if index else 0 for index in range(n))
            )
        return m
