"""Softmax stage of the attention engine: running maximum, rescale factor and weights of an item."""

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.attention_items import BANKS, SLOT_BITS, AttentionSizes, ItemQueue, awake, delayed
from rtl.lib.delay import Delay
from rtl.lib.fp import fp_max
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_approx import FpExp
from rtl.lib.fp_mul import FpMul
from spec.config import KEY_BLOCK

__all__ = ["ONE", "AttentionSoftmax"]

ONE = 0x3F80_0000
_MINUS_INF = 0xFF80_0000

_BANK_BITS = (BANKS - 1).bit_length()


class AttentionSoftmax(wiring.Component):
    """Turn the scores of an item into weights.

    Function
        ``m' = max(m, max_j s_j)``, ``e = exp(m - m')``, ``p_j = exp(s_j - m')``, ``w_j = p_j * sv_j``; m' replaces the
        row's m. A finishing item takes the row's m along.
    Streams
        ``i_item`` in, ``o_item`` out: the same items when their numbers can be read, in the same cycle as the address:
        ``p_data``, ``w_data`` of ``weight_addr`` = (slot, bank); ``e_data`` of bank ``e_addr``; ``m_data`` of bank
        ``m_addr`` (finishing items). ``o_same``: one bit a bank, e is 1.0. ``o_bank``: bank of the item at ``o_item``.
        p_j and m' are all that a consumer of softmax weights needs: a side channel taps them here.
    Timing
        count + 3 cycles an item; the last weight is readable 14 cycles after the last subtraction.
    Cost
        1 FP32 adder, 1 exp, 1 FP32 multiplier for all slots; m of every row.
    Twins
        golden/attention.py, tests/test_attention.py.
    """

    i_item: stream.Interface
    o_item: stream.Interface
    i_bank: Signal
    score_addr: Signal
    score_data: Signal
    max_addr: Signal
    max_data: Signal
    scale_addr: Signal
    scale_data: Signal
    state_en: Signal
    state_row: Signal
    state_m: Signal
    weight_addr: Signal
    p_data: Signal
    w_data: Signal
    e_addr: Signal
    e_data: Signal
    m_addr: Signal
    m_data: Signal
    o_same: Signal
    o_bank: Signal

    def __init__(self, sizes: AttentionSizes) -> None:
        self._sizes = sizes
        buffer_bits = sizes.item()["buffer"].width
        super().__init__(
            {
                "i_item": In(stream.Signature(sizes.item())),
                "o_item": Out(stream.Signature(sizes.item())),
                "i_bank": In(_BANK_BITS),
                "score_addr": Out(SLOT_BITS + _BANK_BITS),
                "score_data": In(32),
                "max_addr": Out(_BANK_BITS),
                "max_data": In(32),
                "scale_addr": Out(buffer_bits + SLOT_BITS),
                "scale_data": In(32),
                "state_en": In(1),
                "state_row": In(sizes.row_bits),
                "state_m": In(32),
                "weight_addr": In(SLOT_BITS + _BANK_BITS),
                "p_data": Out(32),
                "w_data": Out(32),
                "e_addr": In(_BANK_BITS),
                "e_data": Out(32),
                "m_addr": In(_BANK_BITS),
                "m_data": Out(32),
                "o_same": Out(BANKS),
                "o_bank": Out(_BANK_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sizes, item = self._sizes, self.i_item
        m.submodules.queue = queue = ItemQueue(sizes)
        wiring.connect(m, queue.o_item, wiring.flipped(self.o_item))

        # 1. sequence of an item: READ m and the block's maximum, MAX, then e and the slots through one pipeline
        m.submodules.row_m = row_m = Memory(shape=32, depth=sizes.config.max_rows, init=[])
        m_write = row_m.write_port()
        m_read = row_m.read_port(domain="comb")
        m_old = Signal(32)
        m_new = Signal(32)
        block_max = Signal(32)
        slot = Signal(SLOT_BITS)
        issue = Signal()  # a subtraction
        issue_e = Signal()  # it is m - m'
        item_end = Signal()
        finish_m = Signal()
        m.d.comb += [
            m_read.addr.eq(item.p.row),
            self.max_addr.eq(self.i_bank),
            self.score_addr.eq(Cat(slot, self.i_bank)),
            item.ready.eq(item_end),
            queue.i_item.valid.eq(item_end),
            queue.i_item.payload.eq(item.payload),
            self.o_bank.eq(queue.o_pop_bank),
            m_write.addr.eq(Mux(self.state_en, self.state_row, item.p.row)),
            m_write.data.eq(Mux(self.state_en, self.state_m, m_new)),
            m_write.en.eq(self.state_en | issue_e),
        ]
        with m.FSM(init="READ"):
            with m.State("READ"), m.If(item.valid & queue.i_item.ready):
                m.d.sync += [m_old.eq(Mux(item.p.first, _MINUS_INF, m_read.data)), block_max.eq(self.max_data)]
                m.next = "MAX"
            with m.State("MAX"):
                m.d.sync += m_new.eq(fp_max(m, m_old, block_max))
                m.next = "RESCALE"
                with m.If(item.p.finish):
                    m.d.comb += [finish_m.eq(1), item_end.eq(1)]
                    m.next = "READ"
            with m.State("RESCALE"):
                m.d.comb += [issue.eq(1), issue_e.eq(1)]
                m.next = "SLOTS"
            with m.State("SLOTS"):
                m.d.comb += issue.eq(1)
                m.d.sync += slot.eq(slot + 1)
                with m.If(slot + 1 == item.p.count):
                    m.d.comb += item_end.eq(1)
                    m.d.sync += slot.eq(0)
                    m.next = "READ"

        # 2. p = exp(s - m'), w = p * sv
        m.submodules.difference = difference = FpAdd(sub=True)
        m.submodules.exp = exp = FpExp()
        m.submodules.times_v = times_v = FpMul()
        m.submodules.p_delay = p_delay = Delay(32, FpMul.latency)
        at_p = FpAdd.latency + FpExp.latency
        at_w = at_p + FpMul.latency
        enable = awake(m, issue, at_w)
        for unit in (difference, exp, times_v, p_delay):
            m.d.comb += unit.en.eq(enable)
        place = Cat(slot, queue.o_push_bank)  # where the weight goes
        marks_p = delayed(m, "marks_p", Cat(issue & ~issue_e, issue_e, place), at_p, unsigned(2 + len(place)))
        marks_w = delayed(m, "marks_w", marks_p, at_w - at_p)
        m.d.comb += [
            difference.a.eq(Mux(issue_e, m_old, self.score_data)),
            difference.b.eq(m_new),
            exp.x.eq(difference.y),
            self.scale_addr.eq(delayed(m, "scale_place", Cat(slot, item.p.buffer), at_p - 1)),
            times_v.a.eq(exp.y),
            times_v.b.eq(self.scale_data),
            p_delay.i.eq(exp.y),
            queue.i_done.eq(delayed(m, "done", item_end, at_w)),
        ]

        # 3. store
        m.submodules.weights = weights = Memory(shape=64, depth=KEY_BLOCK * BANKS, init=[])
        weight_write = weights.write_port()
        weight_read = weights.read_port(domain="comb")
        m.submodules.factors = factors = Memory(shape=32, depth=BANKS, init=[])
        e_write = factors.write_port()
        e_read = factors.read_port(domain="comb")
        m.submodules.finished_m = finished_m = Memory(shape=32, depth=BANKS, init=[])
        finished_write = finished_m.write_port()
        finished_read = finished_m.read_port(domain="comb")
        e_bank = marks_p[2 + SLOT_BITS :]
        m.d.comb += [
            weight_write.addr.eq(marks_w[2:]),
            weight_write.data.eq(Cat(p_delay.o, times_v.y)),
            weight_write.en.eq(marks_w[0]),
            weight_read.addr.eq(self.weight_addr),
            Cat(self.p_data, self.w_data).eq(weight_read.data),
            e_write.addr.eq(e_bank),
            e_write.data.eq(exp.y),
            e_write.en.eq(marks_p[1]),
            e_read.addr.eq(self.e_addr),
            self.e_data.eq(e_read.data),
            finished_write.addr.eq(queue.o_push_bank),
            finished_write.data.eq(m_old),
            finished_write.en.eq(finish_m),
            finished_read.addr.eq(self.m_addr),
            self.m_data.eq(finished_read.data),
        ]
        with m.If(marks_p[1]):
            m.d.sync += self.o_same.bit_select(e_bank, 1).eq(exp.y == ONE)
        return m
