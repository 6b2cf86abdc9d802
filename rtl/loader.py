"""Loader: embedding rows (step 1) and RoPE rows (for step 4) from memory."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lib.delay import Delay
from rtl.lib.fifo import StreamFifo
from rtl.lib.fp_convert import HalfToFp, IntToFp
from rtl.lib.fp_mul import FpMul
from rtl.lib.ops import op_layout
from rtl.lib.ports import ROW_ADDR_BITS, TOKEN_BITS, RopeWrite, VectorWrite, read_client
from spec.config import K_GROUP, LANES
from spec.descriptors import Opcode
from spec.layout import embed_header_words

WORD_BITS = 64


class Loader(wiring.Component):
    """Read one row a token: an embedding row (int8 times its scale) or the cosines and sines of a position.

    Function
        EMBED, for each token m: ``vector[dst + m*dst_stride + i] = fmul(float(row.q[8i .. 8i+7]), row.scale)``; with
        `op.grouped` the scale is that of the 32 values, ``row.scale[i / 4]``.
        ROPE, for each token m: ``rope[m, i] = table[position + m][8i .. 8i+7]``.
    Streams
        ``i_embed``, ``i_rope``: operations (one at a time; EMBED first when both wait). ``read``: one command a token,
        given ahead of the beats.
    Handshake
        ``o_token_index`` selects the token id that ``i_token`` shows in the same cycle. An id of ``vocab`` or more raises
        ``o_bad_token`` for a cycle, and nothing more happens until reset.
    Timing
        8 int8 (EMBED) or 2 FP32 (ROPE) a cycle.
    Numbers
        docs/numerics.md section 4.
    Parameters
        ``max_grouped``: longest row with a scale for each 32 values; 0: there are none. Rows of both tables begin and
        end with beats of ``data_bits``: `row_bytes`, and 4 head_dim, are multiples of a beat's bytes.
    Twins
        golden/execute.py; tests/test_loader.py.
    """

    i_embed: stream.Interface
    i_rope: stream.Interface
    read: wiring.PureInterface
    vector: wiring.PureInterface
    rope: wiring.PureInterface
    o_token_index: Signal
    i_token: Signal
    o_bad_token: Signal
    o_busy: Signal

    def __init__(self, *, addr_bits: int, data_bits: int, max_grouped: int = 0) -> None:
        if data_bits not in (64, 128, 256, 512, 1024):
            raise ValueError(f"data_bits must be 64, 128, 256, 512 or 1024, not {data_bits}")
        self._max_grouped = max_grouped
        self._addr_bits = addr_bits
        self._data_bits = data_bits
        super().__init__(
            {
                "i_embed": In(stream.Signature(op_layout(Opcode.EMBED))),
                "i_rope": In(stream.Signature(op_layout(Opcode.ROPE))),
                "read": Out(read_client(addr_bits, data_bits)),
                "vector": Out(VectorWrite),
                "rope": Out(RopeWrite),
                "o_token_index": Out(TOKEN_BITS),
                "i_token": In(32),
                "o_bad_token": Out(1),
                "o_busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beat_bytes = self._data_bits // 8

        # 1. the operation, in one form for both: row address = base + number * stride
        active, embed = Signal(), Signal()
        base, stride = Signal(self._addr_bits), Signal(24)
        first_position, tokens = Signal(24), Signal(TOKEN_BITS)
        row_beats, dst, dst_stride = Signal(16), Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS)
        vocab, header_words = Signal(32), Signal(8)
        commands_left, rows_left = Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        m.d.comb += [
            self.o_busy.eq(active),
            self.i_embed.ready.eq(~active),
            self.i_rope.ready.eq(~active & ~self.i_embed.valid),
        ]
        op = Signal(op_layout(Opcode.EMBED))
        m.d.comb += op.eq(self.i_embed.payload)
        with m.If(self.i_embed.valid & ~active):
            m.d.sync += [
                active.eq(1), embed.eq(1), base.eq(op.address), stride.eq(op.row_bytes), row_beats.eq(op.row_beats),
                dst.eq(op.dst), dst_stride.eq(op.dst_stride), vocab.eq(op.vocab), header_words.eq(op.header_words),
                tokens.eq(op.tokens), commands_left.eq(op.tokens), rows_left.eq(op.tokens),
            ]
        with m.Elif(self.i_rope.valid & ~active):
            rope_op = self.i_rope.p
            m.d.sync += [
                active.eq(1), embed.eq(0), base.eq(rope_op.address), stride.eq(rope_op.row_beats << 5),
                row_beats.eq(rope_op.row_beats), first_position.eq(rope_op.position),
                tokens.eq(rope_op.tokens), commands_left.eq(rope_op.tokens), rows_left.eq(rope_op.tokens),
            ]

        # 2. commands: an address takes two cycles (multiply, then offer)
        command = self.read.cmd
        number, address = Signal(32), Signal(self._addr_bits)
        m.d.comb += [
            self.o_token_index.eq(tokens - commands_left),
            number.eq(Mux(embed, self.i_token, first_position + self.o_token_index)),
        ]
        bad = Signal()
        m.d.comb += bad.eq(embed & (self.i_token >= vocab))
        halted = Signal()
        offered = Signal()
        m.d.comb += [
            command.valid.eq(offered),
            command.p.addr.eq(address),
            command.p.beats.eq(
                Mux(embed, stride, row_beats << (LANES * 4).bit_length() - 1) >> (beat_bytes.bit_length() - 1)
            ),
        ]
        with m.If(offered & command.ready):
            m.d.sync += [offered.eq(0), commands_left.eq(commands_left - 1)]
        with m.Elif(active & ~offered & (commands_left != 0) & ~halted):
            m.d.sync += [address.eq(base + number * stride), offered.eq(~bad), halted.eq(bad)]
            m.d.comb += self.o_bad_token.eq(bad)

        # 3. beats -> words of 64 bits
        words_per_beat = self._data_bits // WORD_BITS
        m.submodules.beats = beats = StreamFifo(data.StructLayout({"data": self._data_bits, "last": 1}), depth=2)
        wiring.connect(m, wiring.flipped(self.read.beat), beats.i_data)
        word, word_valid, word_last = Signal(WORD_BITS), Signal(), Signal()
        index = Signal(range(max(words_per_beat, 2)))
        end_of_beat = Signal()
        m.d.comb += [
            end_of_beat.eq(index == words_per_beat - 1),
            word_valid.eq(beats.o_data.valid),
            word.eq(beats.o_data.p.data.word_select(index, WORD_BITS) if words_per_beat > 1 else beats.o_data.p.data),
            word_last.eq(end_of_beat & beats.o_data.p.last),
            beats.o_data.ready.eq(end_of_beat),
        ]
        with m.If(word_valid):
            m.d.sync += index.eq(Mux(end_of_beat, 0, index + 1))

        # 4. words of a row: EMBED header (scales), then one row of 8 int8 a word; ROPE four words a row of 8 FP32
        position = Signal(18)  # word number in the row
        row_base = Signal(ROW_ADDR_BITS)
        scale = Signal(32)
        with m.If(word_valid):
            m.d.sync += position.eq(Mux(word_last, 0, position + 1))
            with m.If(position == 0):
                m.d.sync += scale.eq(word[:32])
            with m.If(word_last):
                m.d.sync += [rows_left.eq(rows_left - 1), row_base.eq(row_base + dst_stride)]
        with m.If(~active):
            m.d.sync += [row_base.eq(Mux(self.i_embed.valid, op.dst, 0)), position.eq(0)]

        # 5. EMBED: int8 -> float -> times scale
        body = Signal(18)
        m.d.comb += body.eq(position - header_words)
        emit = Signal()
        m.d.comb += emit.eq(embed & word_valid & (position >= header_words) & (body < row_beats))
        lane_scale, late = scale, 0  # the scale of the word, so many cycles after it
        if self._max_grouped:
            grouped, row_scale = Signal(), Signal(32)
            with m.If(self.i_embed.valid & ~active):
                m.d.sync += grouped.eq(op.grouped)
            m.d.sync += row_scale.eq(scale)
            in_header = embed & word_valid & (position < header_words)
            lane_scale = Mux(grouped, self._group_scale(m, word, in_header, position, body), row_scale)
            late = HalfToFp.latency
        latency = 0
        for lane in range(LANES):
            m.submodules[f"float_{lane}"] = to_float = IntToFp(8)
            m.submodules[f"scale_{lane}"] = times = FpMul()
            latency = to_float.latency + times.latency
            m.submodules[f"scale_delay_{lane}"] = scale_delay = Delay(32, to_float.latency - late)
            m.d.comb += [
                to_float.en.eq(1), times.en.eq(1), scale_delay.en.eq(1),
                to_float.x.eq(word.word_select(lane, 8).as_signed()), scale_delay.i.eq(lane_scale),
                times.a.eq(to_float.y), times.b.eq(scale_delay.o), self.vector.data[lane].eq(times.y),
            ]
        m.submodules.target = target = Delay(data.StructLayout({"addr": ROW_ADDR_BITS, "en": 1}), latency, reset=True)
        m.d.comb += [
            target.en.eq(1),
            target.i.addr.eq(row_base + body[:ROW_ADDR_BITS]),
            target.i.en.eq(emit),
            self.vector.addr.eq(target.o.addr),
            self.vector.en.eq(target.o.en),
        ]

        # 6. ROPE: collect four words
        held = Signal(192)
        with m.If(word_valid):
            m.d.sync += held.eq(Cat(held[WORD_BITS:], word))
        m.d.comb += [
            self.rope.en.eq(~embed & word_valid & (position[:2] == 3)),
            self.rope.token.eq(tokens - rows_left),
            self.rope.row.eq(position >> 2),
            self.rope.data.eq(Cat(held, word)),
        ]

        # 7. end: all rows came, and the pipeline is empty
        drain = Signal(range(latency + 2))
        with m.If(active & (rows_left == 0)):
            m.d.sync += drain.eq(drain + 1)
            with m.If(drain == latency):
                m.d.sync += [active.eq(0), drain.eq(0)]
        return m

    def _group_scale(self, m: Module, word: Value, in_header: Value, position: Value, body: Value) -> Signal:
        """FP32 scale of the 32 values that body word ``body`` belongs to, a cycle later; header words hold 4 FP16 scales."""
        m.submodules.header = header = Memory(shape=WORD_BITS, depth=embed_header_words(self._max_grouped), init=[])
        write, read = header.write_port(), header.read_port(domain="comb")
        m.submodules.half = half = HalfToFp()
        group = body >> (K_GROUP // LANES).bit_length() - 1
        m.d.comb += [
            write.en.eq(in_header),
            write.addr.eq(position),
            write.data.eq(word),
            read.addr.eq(group >> 2),
            half.en.eq(1),
            half.x.eq(read.data.word_select(group[:2], WORD_BITS // 4)),
        ]
        return half.y
