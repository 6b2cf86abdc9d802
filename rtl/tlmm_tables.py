"""Lookup tables of the ternary engine: pipelined fill of a double buffer, lookups of all lanes, adder tree."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lookup_ring import CODE_BITS
from spec.config import GROUP, TlmmConfig, ceil_div
from spec.layout import index_code

__all__ = ["LookupTables", "fill_order", "tree_stages"]

_TREE_WAYS = 4
"""Summands of one pipeline stage of the adder tree: two levels of two-input adders."""

_LAST_SUMMANDS = 2
"""Partial sums a lane that are left to the accumulator's adder."""

_BIAS = 512
"""Entries are stored as unsigned value + 512: sums need no sign extension, and ~entry is that of -value, less 1."""

Trits = tuple[int, int, int]


def fill_order(full_table: bool) -> list[Trits]:
    """Trits of the entries in the order of the fill; each differs from the one before by one step in one trit.

    The one before the first is zero. 27 entries, or the 14 of value t0 + 3*t1 + 9*t2 >= 0.
    """
    wanted = [(a, b, c) for c in (0, 1, -1) for b in (0, 1, -1) for a in (0, 1, -1)]
    if not full_table:
        wanted = [trits for trits in wanted if _value(trits) >= 0]

    def extend(path: list[Trits]) -> list[Trits] | None:
        if len(path) == len(wanted):
            return path
        before = path[-1] if path else (0, 0, 0)
        for trits in wanted:
            if trits not in path and sum(abs(a - b) for a, b in zip(before, trits, strict=True)) == 1:
                found = extend([*path, trits])
                if found:
                    return found
        return None

    order = extend([])
    if order is None:
        raise AssertionError("no order of the fill")
    return order


def _value(trits: Trits) -> int:
    return trits[0] + 3 * trits[1] + 9 * trits[2]


def tree_stages(tables: int) -> int:
    """Pipeline stages from the lookup to at most 2 partial sums a lane; the lookup is part of the first."""
    stages, left = 1, ceil_div(tables, _TREE_WAYS)
    while left > _LAST_SUMMANDS:
        stages, left = stages + 1, ceil_div(left, _TREE_WAYS)
    return stages


def partial_sums(tables: int) -> int:
    """Partial sums a lane after the tree: 1 or 2."""
    return ceil_div(tables, _TREE_WAYS ** tree_stages(tables))


class LookupTables(wiring.Component):
    """``tables`` tables of three activations each, and ``outputs`` lanes that add up one entry of every table.

    Function
        ``sum of o_sums[q] = sum_t entry_t[code[q*tables + t]]`` with ``entry_t[code(v)] = t0*x0 + t1*x1 + t2*x2`` for
        the activations x of table t. ``full_table``: 27 entries addressed by the code; else 14 addressed by its
        magnitude, and a negation.
    Streams
        ``i_block``: the activations of the tables of the next pass, lowest first.
    Handshake
        ``o_ready``: tables are filled; a row may be issued, of which ``i_codes`` arrive in the next cycle, with
        ``i_valid``. ``i_release`` with the issue of the last row of a pass: the next set is used from then on.
    Timing
        Fill: ``fill_cycles`` from one block to the next, ready 1 cycle later, in the shadow of the pass before. Sums:
        `tree_stages` cycles after ``i_valid``, one row a cycle.
    Numbers
        Entries of 10 bits; nothing overflows.
    Cost
        A memory of 2 x 32 (or 2 x 16) x 10 bits a table with ``outputs`` read ports (distributed RAM).
    Twins
        golden/tlmm.py `tlmm_tables`, `tlmm_lookup`; test: tests/test_tlmm.py.
    """

    i_block: stream.Interface
    i_release: Signal
    i_clear: Signal
    o_ready: Signal
    i_valid: Signal
    i_codes: list[Signal]
    o_sums: list[list[Signal]]

    def __init__(self, cfg: TlmmConfig, *, banks: int) -> None:
        self._cfg = cfg
        self._banks = banks
        self._sum_bits = cfg.entry_bits + 2 * tree_stages(cfg.tables)
        super().__init__(
            {
                "i_block": In(stream.Signature(8 * cfg.k_block)),
                "i_release": In(1),
                "i_clear": In(1),
                "o_ready": Out(1),
                "i_valid": In(1),
                "i_codes": In(CODE_BITS * cfg.cells // banks).array(banks),
                "o_sums": Out(signed(self._sum_bits)).array(cfg.outputs, partial_sums(cfg.tables)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self._cfg
        self._fill(m)
        tables = [m.submodules[f"table_{t}"] for t in range(cfg.tables)]

        # 3. look up  (outputs, tables)
        using, using_now = Signal(), Signal()  # set of the row being issued, of the row looked up
        m.d.sync += [using.eq(using ^ self.i_release), using_now.eq(using)]
        with m.If(self.i_clear):
            m.d.sync += using.eq(0)
        per_bank = cfg.cells // self._banks
        lanes: list[list[Value]] = []
        for q in range(cfg.outputs):
            summands = []
            for t, table in enumerate(tables):
                bank, place = divmod(q * cfg.tables + t, per_bank)
                code = self.i_codes[bank][CODE_BITS * place :][:CODE_BITS]
                port = table.read_port(domain="comb")
                if cfg.full_table:
                    m.d.comb += port.addr.eq(Cat(code, using_now))
                    summands.append(port.data)
                else:
                    m.d.comb += port.addr.eq(Cat(code[:-1], using_now))
                    inverted = Mux(code[-1], ~Const(0, cfg.entry_bits), 0)
                    summands.append((port.data ^ inverted) + code[-1])
            lanes.append(summands)

        # 4. add up  (outputs, tables) -> (outputs, 1 or 2), four at a time
        valid, bias = self.i_valid, _BIAS
        for stage in range(tree_stages(cfg.tables)):
            width = cfg.entry_bits + 2 * (stage + 1)
            following: list[list[Value]] = []
            for q, summands in enumerate(lanes):
                groups = [summands[i : i + _TREE_WAYS] for i in range(0, len(summands), _TREE_WAYS)]
                sums = [Signal(width, name=f"sum_{stage}_{q}_{g}", reset_less=True) for g in range(len(groups))]
                with m.If(valid):
                    for total, group in zip(sums, groups, strict=True):
                        # a short group gets the bias of its missing members: every sum has the same
                        missing = [Const(bias * (_TREE_WAYS - len(group)))] if len(group) < _TREE_WAYS else []
                        m.d.sync += total.eq(sum([*group, *missing], Const(0, width))[:width])
                following.append(list(sums))
            lanes, bias = following, _TREE_WAYS * bias
            following_valid = Signal(name=f"valid_{stage}")
            m.d.sync += following_valid.eq(valid)
            valid = following_valid
        for q, sums in enumerate(lanes):
            for port, total in zip(self.o_sums[q], sums, strict=True):
                m.d.comb += port.eq(Cat(total[:-1], ~total[-1]).as_signed())  # less the bias, half of the range
        return m

    def _fill(self, m: Module) -> None:
        cfg = self._cfg
        order = fill_order(cfg.full_table)

        # 1. which set is filled, which are ready
        filling, last_step, start = Signal(), Signal(), Signal()
        step = Signal(range(len(order)))
        filled_set = Signal()
        claimed, ready = Signal(2), Signal(2)  # sets that are filled or being filled; that are ready
        m.d.comb += [
            last_step.eq(filling & (step == len(order) - 1)),
            # the first write comes two cycles later: after the lookup of the row that is issued now
            self.i_block.ready.eq((~filling | last_step) & ((claimed != 2) | self.i_release)),
            start.eq(self.i_block.valid & self.i_block.ready),
            self.o_ready.eq(ready != 0),
        ]
        m.d.sync += [
            claimed.eq(claimed + start - self.i_release),
            ready.eq(ready + last_step - self.i_release),
            filling.eq(start | (filling & ~last_step)),
        ]
        with m.If(filling):
            m.d.sync += step.eq(step + 1)
        with m.If(start):
            m.d.sync += [step.eq(0), filled_set.eq(~filled_set)]

        # 2. fill: one step of one trit a cycle, in all tables
        bits = 8 * cfg.tables
        activations = [Signal(bits, name=f"x{i}", reset_less=True) for i in range(GROUP)]
        with m.If(start):
            for i, x in enumerate(activations):
                lanes = [self.i_block.payload[8 * k :][:8] for k in range(i, cfg.k_block, GROUP)]
                m.d.sync += x.eq(Cat(lanes))
        steps = []
        before: Trits = (0, 0, 0)
        for trits in order:
            change = [a - b for a, b in zip(trits, before, strict=True)]
            which = next(i for i in range(GROUP) if change[i])
            steps.append(index_code(_value(trits)) | which << CODE_BITS | (change[which] < 0) << CODE_BITS + 2)
            before = trits
        m.submodules.order = rom = Memory(shape=CODE_BITS + 3, depth=1 << (len(order) - 1).bit_length(), init=steps)
        now = rom.read_port(domain="comb")
        m.d.comb += now.addr.eq(step)
        code, which, negative = now.data[:CODE_BITS], now.data[CODE_BITS:][:2], now.data[-1]
        chosen = Signal(bits)
        m.d.comb += chosen.eq(
            Mux(which[1], activations[2], Mux(which[0], activations[1], activations[0])) ^ negative.replicate(bits)
        )
        write_en = Signal()
        address = Signal(CODE_BITS + cfg.full_table)
        m.d.sync += write_en.eq(filling)
        with m.If(filling):
            m.d.sync += address.eq(Cat(code[: CODE_BITS - (not cfg.full_table)], ~filled_set))
        for t in range(cfg.tables):
            m.submodules[f"table_{t}"] = table = Memory(shape=cfg.entry_bits, depth=1 << len(address), init=[])
            entry = Signal(cfg.entry_bits, name=f"entry_{t}", reset_less=True)
            with m.If(filling):
                base = Mux(step == 0, _BIAS, entry)
                m.d.sync += entry.eq(base + chosen[8 * t :][:8].as_signed() + negative)
            write = table.write_port()
            m.d.comb += [write.en.eq(write_en), write.addr.eq(address), write.data.eq(entry)]
        with m.If(self.i_clear):
            m.d.sync += [filling.eq(0), claimed.eq(0), ready.eq(0), filled_set.eq(0), write_en.eq(0)]
