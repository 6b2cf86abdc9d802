"""Two buffers of accumulators: one is added to while the results of the other leave."""

from amaranth.hdl import Array, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.group_dequant import TERM_BITS
from rtl.lib.ports import TOKEN_BITS, matmul_beat
from spec.config import LANES, GroupMatmulConfig

__all__ = ["GroupAccumulators", "sum_place"]

BUFFERS = 2


def sum_place(cfg: GroupMatmulConfig) -> data.StructLayout:
    """Where terms are added: row ``(buffer*tokens + token)*slices + slice``; ``first``, ``last`` group of the row."""
    return data.StructLayout({"row": range(BUFFERS * cfg.tokens * cfg.slices), "first": 1, "last": 1})


class GroupAccumulators(wiring.Component):
    """Adds terms to rows of ``dequant_lanes`` sums, and emits a row block's rows from the first one that is complete.

    Function
        ``acc[row] = (0 if first else acc[row]) + terms``; the term of the last group completes a row. Complete rows leave as
        beats of 8 sums, in the order of their completion: for token, for slice.
    Ports
        ``i_begin``: a row block of ``i_tokens`` tokens takes the buffer ``o_buffer`` (only with ``o_room``); all its rows
        must be completed in order. ``i_valid``, ``i_place`` (`sum_place`), ``i_terms``. ``o_y``: `matmul_beat` of
        ``acc_bits``. ``o_busy``: a buffer is taken or a beat waits. ``i_clear`` drops all.
    Timing
        A row a cycle in, also the same row again. A row that is completed in cycle t leaves from t + 3 on, 8 sums a cycle.
    Numbers
        ``acc_bits`` cannot overflow.
    Cost
        ``dequant_lanes`` memories of ``2 * tokens * slices`` words of ``acc_bits``, distributed RAM with two read ports;
        a register of 8 sums.
    Twins
        golden/group_dequant.py `accumulate`; test: tests/test_group_matmul.py.
    """

    i_begin: Signal
    i_tokens: Signal
    o_room: Signal
    o_buffer: Signal
    i_valid: Signal
    i_place: data.View
    i_terms: list[Signal]
    o_y: stream.Interface
    o_busy: Signal
    i_clear: Signal

    def __init__(self, cfg: GroupMatmulConfig) -> None:
        if cfg.acc_bits > TERM_BITS:
            raise ValueError(f"accumulators have at most {TERM_BITS} bits, max_k = {cfg.max_k} needs {cfg.acc_bits}: lower max_k")
        self._cfg = cfg
        super().__init__(
            {
                "i_begin": In(1),
                "i_tokens": In(range(cfg.tokens + 1)),
                "o_room": Out(1),
                "o_buffer": Out(1),
                "i_valid": In(1),
                "i_place": In(sum_place(cfg)),
                "i_terms": In(signed(TERM_BITS)).array(cfg.dequant_lanes),
                "o_y": Out(stream.Signature(matmul_beat(cfg.acc_bits))),
                "o_busy": Out(1),
                "i_clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self._cfg
        rows = BUFFERS * cfg.tokens * cfg.slices

        # 1. buffers: taken by a row block, given back when its last row is fetched
        begin_buffer, leave_buffer = Signal(), Signal()
        taken = Signal(range(BUFFERS + 1))
        given_back = Signal()
        tokens_of = Array(Signal(range(cfg.tokens + 1), name=f"tokens_{n}", reset_less=True) for n in range(BUFFERS))
        m.d.comb += [self.o_room.eq(taken != BUFFERS), self.o_buffer.eq(begin_buffer)]
        m.d.sync += taken.eq(taken + self.i_begin - given_back)
        with m.If(self.i_begin):
            m.d.sync += [tokens_of[begin_buffer].eq(self.i_tokens), begin_buffer.eq(~begin_buffer)]

        # 2. rows that are complete leave in order
        waiting = Signal(range(rows + 1))
        have, fetch, row_taken = Signal(), Signal(), Signal()
        row = Signal(range(rows))  # next to fetch
        token, part = Signal(range(max(2, cfg.tokens))), Signal(range(max(2, cfg.slices)))
        leaving_token = Signal(TOKEN_BITS)
        last_part, last_token = Signal(), Signal()
        m.d.comb += [
            fetch.eq((waiting != 0) & (~have | row_taken)),
            last_part.eq(part == cfg.slices - 1),
            last_token.eq(token == tokens_of[leave_buffer] - 1),
            given_back.eq(fetch & last_part & last_token),
        ]
        m.d.sync += waiting.eq(waiting + (self.i_valid & self.i_place.last) - fetch)
        with m.If(fetch):
            m.d.sync += [have.eq(1), leaving_token.eq(token), row.eq(row + 1)]
            m.d.sync += part.eq(Mux(last_part, 0, part + 1))
            with m.If(last_part):
                m.d.sync += token.eq(Mux(last_token, 0, token + 1))
                with m.If(last_token):
                    m.d.sync += leave_buffer.eq(~leave_buffer)
                    m.d.sync += row.eq(Mux(leave_buffer, 0, cfg.tokens * cfg.slices))
        with m.Elif(row_taken):
            m.d.sync += have.eq(0)

        # 3. sums, a memory a lane
        beats = cfg.dequant_lanes // LANES
        leaving = []
        for lane in range(cfg.dequant_lanes):
            m.submodules[f"sums_{lane}"] = memory = Memory(shape=cfg.acc_bits, depth=rows, init=[])
            write, old, out = memory.write_port(), memory.read_port(domain="comb"), memory.read_port()
            m.d.comb += [
                old.addr.eq(self.i_place.row),
                write.en.eq(self.i_valid),
                write.addr.eq(self.i_place.row),
                write.data.eq(Mux(self.i_place.first, 0, old.data) + self.i_terms[lane][: cfg.acc_bits]),
                out.en.eq(fetch),
                out.addr.eq(row),
            ]
            leaving.append(out.data)

        # 4. a row leaves by the output register, 8 sums a beat
        beat = Signal(range(max(2, beats)))
        load = Signal()
        m.d.comb += [
            load.eq(have & (~self.o_y.valid | self.o_y.ready)),
            row_taken.eq(load & (beat == beats - 1)),
            self.o_busy.eq((taken != 0) | have | self.o_y.valid),
        ]
        with m.If(load):
            m.d.sync += [self.o_y.valid.eq(1), self.o_y.payload.token.eq(leaving_token), beat.eq(Mux(row_taken, 0, beat + 1))]
            for lane in range(LANES):
                sums = Array(leaving[LANES * number + lane] for number in range(beats))
                m.d.sync += self.o_y.payload.sums[lane].eq(sums[beat])
        with m.Elif(self.o_y.ready):
            m.d.sync += self.o_y.valid.eq(0)

        with m.If(self.i_clear):
            m.d.sync += [taken.eq(0), waiting.eq(0), have.eq(0), begin_buffer.eq(0), leave_buffer.eq(0)]
            m.d.sync += [row.eq(0), token.eq(0), part.eq(0), beat.eq(0), self.o_y.valid.eq(0)]
        return m
