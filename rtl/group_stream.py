"""Parser of a group engine's weight stream: norm weights to a queue, code rows and scale rows to rings."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from rtl.lib.fifo import StreamFifo
from rtl.lookup_ring import LookupRing, ring_read
from spec.config import GroupMatmulConfig
from spec.layout import STREAM_MAGIC, SegmentKind

__all__ = ["GroupStream", "scale_read"]

_HEADER_BITS = 128


def scale_read(row_bits: int) -> wiring.Signature:
    """Reader's side of the scale rows (the engine has it as ``Out``).

    ``en``: take the next row; ``data`` shows it in the next cycle and holds until the next ``en``. The scales of a block
    are there from the first cycle on in which one of its code rows is valid.
    """
    return wiring.Signature({"en": Out(1), "data": In(row_bits)})


def scale_rows(cfg: GroupMatmulConfig) -> int:
    """Scale rows that are buffered: one to a block, while a block of 4-bit weights has 4 code rows."""
    return max(4, cfg.ring_rows // 4)


class GroupStream(wiring.Component):
    """Turns beats of the weight port into AUX beats, scale rows and code rows.

    Function
        Segments as spec/layout.py has them ("Groups."). Beat j of a row fills bank j of the next row of its ring.
    Streams
        ``i_beat``: beats of the weight port, in. ``o_aux``: payload beats of AUX segments, out.
        ``codes``: code rows of ``32 * lanes`` bits, see `ring_read`, as one bank. ``scales``: see `scale_read`.
    Handshake
        ``i_beat.ready`` depends on registers only: a row starts when its ring has room for it. AUX beats wait only for
        their queue (``aux_beats`` rounded up to a power of two). A block that is read again must fit in the ring.
        ``o_error`` (bad magic, kind, bits or length) stays, and stops the input, until ``i_clear``, which drops
        everything inside.
    Timing
        One beat a cycle. A row can be read in the cycle after its last beat was taken.
    Cost
        ``ring_rows`` code rows and `scale_rows` scale rows in block RAM, a bank a beat.
    Twins
        golden/layout.py; test: tests/test_group_stream.py.
    """

    i_beat: stream.Interface
    o_aux: stream.Interface
    codes: wiring.FlippedInterface
    scales: wiring.FlippedInterface
    i_clear: Signal
    o_error: Signal

    def __init__(self, cfg: GroupMatmulConfig, *, weight_bytes: int, aux_beats: int) -> None:
        if cfg.row_bytes % weight_bytes:
            raise ValueError(f"a row of {cfg.row_bytes} bytes must be a multiple of {weight_bytes} bytes a beat")
        self._cfg = cfg
        self._bytes = weight_bytes
        self._banks = cfg.row_bytes // weight_bytes
        self._aux_depth = 1 << max(1, ceil_log2(aux_beats))
        super().__init__(
            {
                "i_beat": In(stream.Signature(8 * weight_bytes)),
                "o_aux": Out(stream.Signature(8 * weight_bytes)),
                "codes": In(ring_read(1, 8 * cfg.row_bytes)),
                "scales": In(scale_read(8 * cfg.row_bytes)),
                "i_clear": In(1),
                "o_error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg, banks, beat_bits = self._cfg, self._banks, 8 * self._bytes
        m.submodules.aux_queue = aux = StreamFifo(beat_bits, depth=self._aux_depth, buffered=True)
        m.submodules.code_ring = codes = LookupRing(rows=cfg.ring_rows, banks=banks, bank_bits=beat_bits, claim=1)
        m.submodules.scale_ring = scales = LookupRing(rows=scale_rows(cfg), banks=banks, bank_bits=beat_bits, claim=1)
        connect(m, aux.o_data, flipped(self.o_aux))
        m.d.comb += [unit.i_clear.eq(self.i_clear) for unit in (aux, codes, scales)]

        # 1. segments
        beat = self.i_beat.payload
        in_aux, in_groups = Signal(), Signal()  # neither: a header comes next
        beats_left = Signal(32)
        bits = Signal(range(max(cfg.weight_bits) + 1))
        row, bank = Signal.like(bits), Signal(range(max(banks, 2)))  # of the next beat; row 0 of a block: its scales
        is_scale, first_bank, last_bank, last_row, last_beat = Signal(), Signal(), Signal(), Signal(), Signal()
        taken, store = Signal(), Signal()
        m.d.comb += [
            is_scale.eq(row == 0),
            first_bank.eq(bank == 0),
            last_bank.eq(bank == banks - 1),
            last_row.eq(row == bits),
            last_beat.eq(beats_left == 1),
            taken.eq(self.i_beat.valid & self.i_beat.ready),
            store.eq(taken & in_groups),
            aux.i_data.payload.eq(beat),
            aux.i_data.valid.eq(self.i_beat.valid & in_aux & ~self.o_error),
            self.i_beat.ready.eq(
                ~self.o_error
                & Mux(
                    in_aux,
                    aux.i_data.ready,
                    ~in_groups | ~first_bank | Mux(is_scale, scales.o_space, codes.o_space),
                )
            ),
        ]
        magic, word_kind, word_beats, word_bits = (beat[i : i + 32] for i in range(0, _HEADER_BITS, 32))
        is_aux, is_groups = word_kind == SegmentKind.AUX, word_kind == SegmentKind.GROUPS
        known_bits = Cat(word_bits == width for width in cfg.weight_bits).any()
        bad_header, bad_length = Signal(), Signal()
        with m.If(taken & (in_aux | in_groups)):
            m.d.sync += beats_left.eq(beats_left - 1)
            with m.If(last_beat):
                m.d.sync += [in_aux.eq(0), in_groups.eq(0)]
        with m.If(taken & ~in_aux & ~in_groups):
            m.d.comb += bad_header.eq(
                (magic != STREAM_MAGIC) | ~(is_aux | is_groups) | (is_groups & ((word_beats == 0) | ~known_bits))
            )
            m.d.sync += [
                in_aux.eq(is_aux & (word_beats != 0)),
                in_groups.eq(is_groups),
                beats_left.eq(word_beats),
                bits.eq(word_bits),
            ]

        # 2. where the beat goes: a segment ends with a block
        with m.If(store):
            m.d.sync += bank.eq(Mux(last_bank, 0, bank + 1))
            with m.If(last_bank):
                m.d.sync += row.eq(Mux(last_row, 0, row + 1))
            m.d.comb += bad_length.eq(last_beat & ~(last_bank & last_row))
        for ring, chosen in ((scales, is_scale), (codes, ~is_scale)):
            here = store & chosen
            place = Signal.like(ring.i_write[0].addr, name="scale_place" if ring is scales else "code_place")
            with m.If(here & last_bank):
                m.d.sync += place.eq(ring.next_row(place))
            with m.If(self.i_clear):
                m.d.sync += place.eq(0)
            m.d.comb += [ring.i_take.eq(here & first_bank), ring.i_done.eq(here & last_bank)]
            for number, port in enumerate(ring.i_write):
                m.d.comb += [port.en.eq(here & (bank == number)), port.addr.eq(place), port.data.eq(beat)]

        # 3. readers
        m.d.comb += [
            self.codes.valid.eq(codes.read.valid),
            codes.read.en.eq(self.codes.en),
            codes.read.free.eq(self.codes.free),
            codes.read.rewind.eq(self.codes.rewind),
            self.codes.data[0].eq(Cat(codes.read.data)),
            scales.read.en.eq(self.scales.en),
            scales.read.free.eq(1),
            self.scales.data.eq(Cat(scales.read.data)),
        ]

        # 4. errors, clear
        m.d.sync += self.o_error.eq(self.o_error | bad_header | bad_length)
        with m.If(self.i_clear):
            m.d.sync += [self.o_error.eq(0), in_aux.eq(0), in_groups.eq(0), row.eq(0), bank.eq(0)]
        return m
