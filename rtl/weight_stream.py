"""Parser of the weight stream: norm weights and scales to a queue, dense trits decoded into the lookup ring."""

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from rtl.dense_decode import PAIR_BITS, DenseDecoder, PairDecoder
from rtl.lib.fifo import StreamFifo
from rtl.lookup_ring import CODE_BITS, LookupRing, ring_read
from spec.config import TlmmConfig
from spec.layout import BYTES_PER_CELL, ROWS_PER_SUPERBEAT, STREAM_MAGIC, SegmentKind

__all__ = ["WeightStream"]

_HEADER_BITS = 128


class WeightStream(wiring.Component):
    """Turns beats of the weight port into AUX beats and lookup rows.

    Function
        Segments as spec/layout.py has them. Beat j of row A of a superbeat fills bank j of the next row r of the ring,
        B that of r + 1, C that of r + 2, and with C the pairs give bank j of r + 3 (D, a cycle later) and r + 4 (E,
        two cycles later). As beats go to consecutive banks and there are at least 3, no bank gets two rows in one cycle.
        Padding rows are written but never shown: the next superbeat overwrites them.
    Streams
        ``i_beat``: beats of the weight port, in. ``o_aux``: payload beats of AUX segments, out.
        ``read``: lookup rows, see `ring_read`.
    Handshake
        ``i_beat.ready`` depends on registers only. A superbeat starts when 5 rows of the ring are free, and then runs
        without waiting. AUX beats wait only for their queue (``aux_beats`` rounded up to a power of two).
        ``o_error`` (bad magic, kind or length, or an illegal byte) stays, and stops the input, until ``i_clear``, which
        drops everything inside.
    Timing
        One beat a cycle. A row can be read 3 (A, B, C), 4 (D) or 5 (E) cycles after its last beat was taken.
    Twins
        golden/layout.py; test: tests/test_weight_stream.py.
    """

    i_beat: stream.Interface
    o_aux: stream.Interface
    read: wiring.FlippedInterface
    i_clear: Signal
    o_error: Signal

    def __init__(self, cfg: TlmmConfig, *, weight_bytes: int, aux_beats: int) -> None:
        if cfg.cells % weight_bytes or cfg.cells // weight_bytes < 3:
            raise ValueError(f"cells must be a multiple of {weight_bytes} bytes a beat, at least 3 times: {cfg.cells}")
        self._cfg = cfg
        self._bytes = weight_bytes
        self._banks = cfg.cells // weight_bytes
        self._aux_depth = 1 << max(1, ceil_log2(aux_beats))
        super().__init__(
            {
                "i_beat": In(stream.Signature(8 * weight_bytes)),
                "o_aux": Out(stream.Signature(8 * weight_bytes)),
                "read": In(ring_read(self._banks, CODE_BITS * weight_bytes)),
                "i_clear": In(1),
                "o_error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        size, banks = self._bytes, self._banks
        m.submodules.aux_queue = aux = StreamFifo(8 * size, depth=self._aux_depth, buffered=True)
        m.submodules.ring = ring = LookupRing(rows=self._cfg.ring_rows, banks=banks, bank_bits=CODE_BITS * size)
        connect(m, flipped(self.read), ring.read)
        connect(m, aux.o_data, flipped(self.o_aux))
        m.d.comb += [aux.i_clear.eq(self.i_clear), ring.i_clear.eq(self.i_clear)]

        # 1. segments
        beat = self.i_beat.payload
        in_aux, in_trits = Signal(), Signal()  # neither: a header comes next
        beats_left, rows_left = Signal(32), Signal(32)
        bank, kind = Signal(range(banks)), Signal(range(BYTES_PER_CELL))  # of the next beat; kind: A, B, C
        row = Signal(range(self._cfg.ring_rows))  # ring row of the next beat
        top = Signal.like(row)  # row A of this superbeat
        first = Signal()  # the next beat begins a superbeat
        real = Signal(range(ROWS_PER_SUPERBEAT + 1))  # rows of this superbeat that are no padding
        last_bank, last_beat, taken, decode = Signal(), Signal(), Signal(), Signal()
        bad_header, bad_length = Signal(), Signal()
        m.d.comb += [
            first.eq((bank == 0) & (kind == 0)),
            real.eq(Mux(rows_left < ROWS_PER_SUPERBEAT, rows_left, ROWS_PER_SUPERBEAT)),
            last_bank.eq(bank == banks - 1),
            last_beat.eq(beats_left == 1),
            taken.eq(self.i_beat.valid & self.i_beat.ready),
            decode.eq(taken & in_trits),
            aux.i_data.payload.eq(beat),
            aux.i_data.valid.eq(self.i_beat.valid & in_aux & ~self.o_error),
            self.i_beat.ready.eq(~self.o_error & Mux(in_aux, aux.i_data.ready, ~in_trits | ~first | ring.o_space)),
            ring.i_take.eq(Mux(decode & first, real, 0)),
        ]
        magic, word_kind, word_beats, word_rows = (beat[i : i + 32] for i in range(0, _HEADER_BITS, 32))
        is_aux, is_trits = word_kind == SegmentKind.AUX, word_kind == SegmentKind.TRITS
        with m.If(taken & (in_aux | in_trits)):
            m.d.sync += beats_left.eq(beats_left - 1)
            with m.If(last_beat):
                m.d.sync += [in_aux.eq(0), in_trits.eq(0)]
        with m.If(taken & ~in_aux & ~in_trits):
            m.d.comb += bad_header.eq(
                (magic != STREAM_MAGIC) | ~(is_aux | is_trits) | (is_trits & ((word_beats == 0) | (word_rows == 0)))
            )
            m.d.sync += [
                in_aux.eq(is_aux & (word_beats != 0)),
                in_trits.eq(is_trits),
                beats_left.eq(word_beats),
                rows_left.eq(word_rows),
            ]

        # 2. where the beat goes
        with m.If(decode):
            m.d.sync += bank.eq(Mux(last_bank, 0, bank + 1))
            with m.If(last_bank):
                m.d.sync += [kind.eq(kind + 1), row.eq(ring.next_row(row))]
                with m.If(kind == BYTES_PER_CELL - 1):
                    m.d.sync += [
                        kind.eq(0),
                        row.eq(ring.next_row(top, real)),
                        top.eq(ring.next_row(top, real)),
                        rows_left.eq(rows_left - real),
                    ]
            # a segment ends with a superbeat, and that one holds its last rows
            ends = last_bank & (kind == BYTES_PER_CELL - 1)
            m.d.comb += bad_length.eq(last_beat != (ends & (rows_left <= ROWS_PER_SUPERBEAT)))

        # 3. decode: codes and pairs of the beat, one cycle after it was taken
        m.submodules.dense = dense = DenseDecoder(size)
        codes = Signal(CODE_BITS * size, reset_less=True)
        pairs = Signal(PAIR_BITS * size, reset_less=True)
        illegal = Signal()
        abc = _Step(ring.i_write[0].addr.shape().width, banks)
        m.d.comb += dense.i_bytes.eq(beat)
        m.d.sync += [abc.valid.eq(decode), illegal.eq(decode & dense.o_illegal)]
        with m.If(decode):
            m.d.sync += [codes.eq(dense.o_codes), pairs.eq(dense.o_pairs)]
            m.d.sync += [abc.bank.eq(bank), abc.row.eq(row), abc.last.eq(last_bank), abc.shown.eq(kind < real)]
        kind_in, real_in = Signal.like(kind), Signal.like(real)
        with m.If(decode):
            m.d.sync += [kind_in.eq(kind), real_in.eq(real)]

        # 4. pairs of rows A and B wait for those of C
        waiting = []
        for name, number in (("pairs_a", 0), ("pairs_b", 1)):
            m.submodules[name] = memory = Memory(shape=PAIR_BITS * size, depth=banks, init=[])
            write, read = memory.write_port(), memory.read_port(domain="comb")
            m.d.comb += [
                write.en.eq(abc.valid & (kind_in == number)),
                write.addr.eq(abc.bank),
                write.data.eq(pairs),
                read.addr.eq(abc.bank),
            ]
            waiting.append(read.data)
        m.submodules.pair_d = pair_d = PairDecoder(size, high=False)
        m.submodules.pair_e = pair_e = PairDecoder(size, high=True)
        codes_d, codes_e, codes_e_late = (
            Signal(CODE_BITS * size, name=name, reset_less=True) for name in ("codes_d", "codes_e", "codes_e_late")
        )
        d = _Step(len(row), banks)
        e = _Step(len(row), banks)
        has_e = Signal()
        m.d.comb += [
            pair_d.i_pairs.eq(waiting[0]),
            pair_e.i_pairs.eq(waiting[1]),
            pair_d.i_trits.eq(pairs),
            pair_e.i_trits.eq(pairs),
        ]
        third = Signal()
        m.d.comb += third.eq(abc.valid & (kind_in == BYTES_PER_CELL - 1))
        m.d.sync += [d.valid.eq(third), e.valid.eq(d.valid)]
        with m.If(third):
            m.d.sync += [codes_d.eq(pair_d.o_codes), codes_e.eq(pair_e.o_codes)]
            m.d.sync += [d.bank.eq(abc.bank), d.last.eq(abc.last), d.row.eq(ring.next_row(abc.row))]
            m.d.sync += [d.shown.eq(real_in > 3), has_e.eq(real_in > 4)]
        with m.If(d.valid):
            m.d.sync += codes_e_late.eq(codes_e)
            m.d.sync += [e.bank.eq(d.bank), e.last.eq(d.last), e.row.eq(ring.next_row(d.row)), e.shown.eq(has_e)]

        # 5. write the banks, report complete rows
        for b, port in enumerate(ring.i_write):
            m.d.comb += [
                port.en.eq((abc.valid & (abc.bank == b)) | (d.valid & (d.bank == b)) | (e.valid & (e.bank == b))),
                port.addr.eq(abc.row),
                port.data.eq(codes),
            ]
            with m.If(d.valid & (d.bank == b)):
                m.d.comb += [port.addr.eq(d.row), port.data.eq(codes_d)]
            with m.Elif(e.valid & (e.bank == b)):
                m.d.comb += [port.addr.eq(e.row), port.data.eq(codes_e_late)]
        m.d.comb += ring.i_done.eq(abc.done() | d.done() | e.done())

        # 6. errors, clear
        m.d.sync += self.o_error.eq(self.o_error | bad_header | bad_length | illegal)
        with m.If(self.i_clear):
            m.d.sync += [self.o_error.eq(0), in_aux.eq(0), in_trits.eq(0), bank.eq(0), kind.eq(0), row.eq(0), top.eq(0)]
            m.d.sync += [illegal.eq(0), abc.valid.eq(0), d.valid.eq(0), e.valid.eq(0)]
        return m


class _Step:
    """Place of the row part that is written in this cycle."""

    def __init__(self, row_bits: int, banks: int) -> None:
        self.valid = Signal()
        self.bank = Signal(range(banks))
        self.row = Signal(row_bits)
        self.last = Signal()  # bank of the row
        self.shown = Signal()  # the row is no padding

    def done(self) -> Value:
        """The row is complete with this write."""
        return self.valid & self.last & self.shown
