"""Quantises heads of query, key or value vectors to int8 or int4, each with its own scale."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.delay import Delay
from rtl.lib.fifo import StreamFifo
from rtl.lib.fp_convert import FpToInt8
from rtl.lib.fp_mul import FpMul
from rtl.lib.ports import HEAD_BITS, VectorRow
from rtl.lib.quant import AbsMax, QuantScale
from spec.config import LANES

HeadBeat = data.StructLayout({"data": 8 * LANES, "last": 1, "scale": 32})
"""8 int8 of a head (int4: sign-extended); `last` of its head, with which `scale` is valid."""

_READ = 1
_LATENCY = _READ + FpMul.latency + FpToInt8.latency

_WAIT = AbsMax.latency + QuantScale.latency + 1
"""Cycles from a head's last beat to the read of its first: its factors, and a place in their queue."""

_HEADS = 1 << _WAIT.bit_length()
"""Heads that may be inside: heads of a single beat need one a cycle of the wait."""


class HeadQuant(Component):
    """Collect a head, find its largest magnitude, then multiply, round and emit it while the next ones come in.

    Function
        Per head of `i_head_beats` beats: ``(c, s) = quant_params(max |t|)``, ``q = int8(t * c)``, scale s. With `i_int4`
        c is so much smaller that q lies in [-7, 7].

    Streams
        i_data, in: `VectorRow`, beats of the heads in order. o_data, out: `HeadBeat`, as many beats.

    Handshake
        i_data.ready depends on registers only. i_head_beats, i_int4: constant while anything is inside.

    Timing
        The first beat of a head comes out 16 cycles after its last beat went in; without stalls one beat a cycle goes
        in and comes out.

    Numbers
        docs/numerics.md section 1.

    Cost
        8 lanes of `FpMul` and `FpToInt8`, `QuantScale`, `AbsMax`, a memory of the longest head and 11 beats.

    Twins
        golden/epilogue.py `quantise_heads`, tests/test_epilogue.py.
    """

    i_data: stream.Interface
    o_data: stream.Interface
    i_head_beats: Signal
    i_int4: Signal

    def __init__(self, *, max_head_beats: int) -> None:
        self._rows_log2 = (max_head_beats + _WAIT).bit_length()
        super().__init__(
            {
                "i_head_beats": In(HEAD_BITS),
                "i_int4": In(1),
                "i_data": In(stream.Signature(VectorRow)),
                "o_data": Out(stream.Signature(HeadBeat)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = 1 << self._rows_log2

        # 1. collect: rows in a ring
        m.submodules.ring = ring = Memory(shape=VectorRow, depth=rows, init=[])
        write, read = ring.write_port(), ring.read_port()
        used, heads = Signal(range(rows + 1)), Signal(range(_HEADS + 1))
        tail, head = Signal(self._rows_log2), Signal(self._rows_log2)
        fill_beat, emit_beat = Signal(HEAD_BITS), Signal(HEAD_BITS)
        push, pop, pushed_head, popped_head = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            self.i_data.ready.eq((used != rows) & (heads != _HEADS)),
            push.eq(self.i_data.valid & self.i_data.ready),
            pushed_head.eq(push & (fill_beat == self.i_head_beats - 1)),
            write.addr.eq(tail),
            write.data.eq(self.i_data.payload),
            write.en.eq(push),
        ]
        m.d.sync += [
            tail.eq(tail + push),
            head.eq(head + pop),
            used.eq(used + push - pop),
            heads.eq(heads + pushed_head - popped_head),
        ]
        with m.If(push):
            m.d.sync += fill_beat.eq(Mux(pushed_head, 0, fill_beat + 1))

        # 2. factors of the complete heads, in a queue
        m.submodules.absmax = absmax = AbsMax()
        m.submodules.params = params = QuantScale()
        m.submodules.complete = complete = Delay(1, AbsMax.latency + QuantScale.latency, reset=True)
        m.submodules.factors = factors = StreamFifo(data.StructLayout({"c": 32, "s": 32}), depth=_HEADS)
        m.d.comb += [
            absmax.en.eq(1),
            absmax.valid.eq(push),
            absmax.first.eq(fill_beat == 0),
            absmax.t.eq(self.i_data.payload),
            params.en.eq(1),
            params.a.eq(absmax.a),
            params.int4.eq(self.i_int4),
            complete.en.eq(1),
            complete.i.eq(pushed_head),
            factors.i_data.valid.eq(complete.o),  # `heads` keeps the queue from overflowing
            factors.i_data.payload.c.eq(params.c),
            factors.i_data.payload.s.eq(params.s),
        ]

        # 3. emit: one pipeline that stands while its last stage is not taken
        en = Signal()
        c = Signal(32, reset_less=True)
        m.submodules.scale_delay = scale = Delay(32, _LATENCY)
        m.submodules.flags_delay = flags = Delay(2, _LATENCY, reset=True)
        m.d.comb += [
            en.eq(~self.o_data.valid | self.o_data.ready),
            pop.eq(factors.o_data.valid & en),
            popped_head.eq(pop & (emit_beat == self.i_head_beats - 1)),
            factors.o_data.ready.eq(popped_head),
            read.addr.eq(head),
            read.en.eq(en),
            scale.en.eq(en),
            scale.i.eq(factors.o_data.payload.s),
            flags.en.eq(en),
            flags.i.eq(Cat(pop, popped_head)),
            self.o_data.valid.eq(flags.o[0]),
            self.o_data.payload.last.eq(flags.o[1]),
            self.o_data.payload.scale.eq(scale.o),
        ]
        with m.If(en):
            m.d.sync += c.eq(factors.o_data.payload.c)
        with m.If(pop):
            m.d.sync += emit_beat.eq(Mux(popped_head, 0, emit_beat + 1))
        for lane in range(LANES):
            m.submodules[f"mul_{lane}"] = mul = FpMul()
            m.submodules[f"int8_{lane}"] = int8 = FpToInt8()
            m.d.comb += [
                mul.en.eq(en),
                int8.en.eq(en),
                mul.a.eq(read.data[lane]),
                mul.b.eq(c),
                int8.x.eq(mul.y),
                self.o_data.payload.data.word_select(lane, 8).eq(int8.y),
            ]
        return m
