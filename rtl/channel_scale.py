"""Q and K behind RoPE, channel by channel: an offset and a power of two, so that int4 has steps of the right size."""

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.aux_buffer import AuxBuffer
from rtl.lib.delay import Delay
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_convert import HalfToFp
from rtl.lib.fp_shift import FpShift
from rtl.lib.ports import ROW_ADDR_BITS, VectorRow
from spec.config import LANES

_READ = 1
_WORD = data.StructLayout({"offset": 16, "shift": 8, "zero": 8})


class ChannelScale(Component):
    """Eight channels of a head a cycle, each with its own static offset and shift.

    Function
        ``y = (x + offset) * 2**shift``. `i_start` forgets the words and takes those of `i_rows` rows from the stream.

    Streams
        i_aux, in, `weight_bits`: the words of spec/layout.py ("Channels."), 8 a row, ``ceil(32 * i_rows / weight_bytes)``
        beats a load, taken one a cycle while a load is under way.

    Ports
        i_rows, In(16): constant while loading. o_done, Out(1): no load is under way. en, In(1): the pipeline advances.
        x, In(8 x 32); beat, In(16): the row of x, `lead` edges earlier. y, Out(8 x 32), `latency` edges after x.

    Timing
        One beat an enabled edge, latency 5, lead 2.

    Numbers
        docs/numerics.md section 4.

    Cost
        8 lanes of `HalfToFp`, `FpAdd` and `FpShift`: no multiplier; 32 * max_channels bits of words.

    Twins
        golden/epilogue.py `channels`, tests/test_epilogue.py.
    """

    latency = FpAdd.latency + FpShift.latency
    lead = _READ + HalfToFp.latency
    i_aux: stream.Interface
    i_start: Signal
    i_rows: Signal
    o_done: Signal
    en: Signal
    beat: Signal
    x: data.View
    y: data.View

    def __init__(self, *, weight_bits: int, max_channels: int) -> None:
        self._weight_bits = weight_bits
        self._max_channels = max_channels
        super().__init__(
            {
                "i_aux": In(stream.Signature(weight_bits)),
                "i_start": In(1),
                "i_rows": In(ROW_ADDR_BITS),
                "o_done": Out(1),
                "en": In(1),
                "beat": In(ROW_ADDR_BITS),
                "x": In(VectorRow),
                "y": Out(VectorRow),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.words = words = AuxBuffer(
            weight_bits=self._weight_bits, row_bits=_WORD.size * LANES, max_rows=self._max_channels // LANES
        )
        m.d.comb += [
            words.i_aux.payload.eq(self.i_aux.payload),
            words.i_aux.valid.eq(self.i_aux.valid),
            self.i_aux.ready.eq(words.i_aux.ready),
            words.i_start.eq(self.i_start),
            words.i_rows.eq(self.i_rows),
            self.o_done.eq(words.o_done),
            words.i_row.eq(self.beat),
            words.i_en.eq(self.en),
        ]
        for lane in range(LANES):
            word = data.View(_WORD, words.o_data.word_select(lane, _WORD.size))
            m.submodules[f"half_{lane}"] = half = HalfToFp()
            m.submodules[f"centre_{lane}"] = centre = FpAdd()
            m.submodules[f"scale_{lane}"] = scale = FpShift()
            m.submodules[f"shift_delay_{lane}"] = shift = Delay(8, HalfToFp.latency + FpAdd.latency)
            m.d.comb += [unit.en.eq(self.en) for unit in (half, centre, scale, shift)]
            m.d.comb += [
                half.x.eq(word.offset),
                shift.i.eq(word.shift),
                centre.a.eq(self.x[lane]),
                centre.b.eq(half.y),
                scale.a.eq(centre.y),
                scale.b.eq(shift.o),
                self.y[lane].eq(scale.y),
            ]
        return m
