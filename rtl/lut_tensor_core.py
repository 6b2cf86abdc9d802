"""LUT Tensor Core: group sums by table lookups on bit planes, any of 1, 2, 3, 4 or 8 of them."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib.memory import Memory

from rtl.group_core import GroupCore
from spec.config import K_GROUP, GroupMatmulConfig

__all__ = ["LutTensorCore", "TABLES", "TABLE_K"]

TABLE_K = 4
"""Activations of a table."""

TABLES = K_GROUP // TABLE_K

_ENTRY_BITS = 10
"""A sum of up to four activations of [-127, 127], biased."""

_WAYS = 4
"""Summands of the first adder stage."""


class LutTensorCore(GroupCore):
    """Tables of 4 activations, looked up with the bits of one weight plane a cycle (Mo et al., ISCA 2025).

    Function
        A plane is a row: ``U_b = sum_i q_b[i] x_i``, planes from the highest: ``S = 2 S + U_b``.
        With q' = 2q - (2^B - 1) (equations 1-3) the bits of a plane mean +-1: ``U_b = (P_b + A) / 2``, where
        ``P_b = sum_t +-T_t[index]`` and T has 8 entries, as T[~w] = -T[w] (equation 5); the row holds index and sign
        (equation 6). The 8 entries of a table and A have the parity p of their activations' sum, so that halves are
        stored: T = 2h + p, -T = 2(~h + 1 - p) + p, and ``U_b = c + sum_t +-h`` with ``c = (A + sum_t p_t) / 2``. c enters
        once: the sums start from c instead of 0, which makes c * 2^B of it, and c is taken off S at the end.
        ``full_table``: 16 entries a table, the sums of the activations whose bit is set; neither sign nor c.
    Ports, Handshake
        See rtl/group_core.py.
    Timing
        Tables are built in the cycle of a pass's first row, and looked up in the next. Latency 3, 4 with signs.
    Numbers
        Entries are stored biased, as unsigned numbers: sums need no sign extension.
    Cost
        A row of 32 * lanes bits, 8 tables of registers, 8 * lanes multiplexers of 8 (16) entries of 9 (10) bits.
    Twins
        golden/lut_tensor_core.py; test: tests/test_lut_tensor_core.py.
    """

    def __init__(self, cfg: GroupMatmulConfig) -> None:
        self.latency = 3 if cfg.full_table else 4
        super().__init__(cfg)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self.cfg
        full, entry_bits = cfg.full_table, self._entry_bits

        # 0. the row, while its tables are built
        codes = Signal(K_GROUP * cfg.lanes, reset_less=True)
        valid, first, last = (Signal(3, name=name) for name in ("valid", "first", "last"))  # by stage
        m.d.sync += [
            valid.eq(Cat(self.i_valid, valid)),
            first.eq(Cat(self.i_first, first)),
            last.eq(Cat(self.i_valid & self.i_last, last)),
        ]
        with m.If(self.i_valid):
            m.d.sync += codes.eq(self.i_codes)
        tables = self._tables(m)
        odd = self._parities(m)

        # 1. look up, add up four  (lanes, tables) -> (lanes, 2)
        partial = []
        for q in range(cfg.lanes):
            summands: list[Value] = []
            for t in range(TABLES):
                code = codes[TABLE_K * (TABLES * q + t) :][:TABLE_K]
                port = tables[t].read_port(domain="comb")
                if full:
                    m.d.comb += port.addr.eq(code)
                    summands.append(port.data)
                else:
                    m.d.comb += port.addr.eq(code[:-1])
                    inverted = Mux(code[-1], ~Const(0, entry_bits), 0)
                    summands.append((port.data ^ inverted) + (code[-1] & ~odd[t]))
            sums = [Signal(entry_bits + 2, name=f"partial_{q}_{h}", reset_less=True) for h in range(TABLES // _WAYS)]
            with m.If(valid[0]):
                for h, total in enumerate(sums):
                    m.d.sync += total.eq(sum(summands[_WAYS * h :][:_WAYS], Const(0, entry_bits + 2))[: entry_bits + 2])
            partial.append(sums)

        # 2. add the plane to twice the planes before; the last makes room for the next pass
        start: Value = Const(0)
        offset = Signal.like(self.i_sum_acts, reset_less=True)  # c of the pass that leaves
        if not full:
            half = Signal.like(self.i_sum_acts, reset_less=True)  # c
            sum_acts = Signal.like(self.i_sum_acts, reset_less=True)
            with m.If(self.i_valid & self.i_first):
                m.d.sync += sum_acts.eq(self.i_sum_acts)
            with m.If(valid[0] & first[0]):
                m.d.sync += half.eq((sum_acts + sum(odd, Const(0, 4))) >> 1)
            with m.If(last[1]):
                m.d.sync += offset.eq(half)
            start = half
        done = [Signal(cfg.sum_bits, name=f"done_{q}", reset_less=True) for q in range(cfg.lanes)]
        for q, sums in enumerate(partial):
            acc = Signal(cfg.sum_bits, name=f"acc_{q}", reset_less=True)
            bits = entry_bits + 3
            plane = sum(sums, Const(0, bits))[:bits]
            plane = Cat(plane[:-1], ~plane[-1]).as_signed()  # less the bias, half of the range
            total = Signal(cfg.sum_bits, name=f"total_{q}")
            m.d.comb += total.eq((Mux(first[1], start, acc.as_signed()) << 1) + plane)
            with m.If(valid[1]):
                m.d.sync += acc.eq(total)
            with m.If(last[1]):
                m.d.sync += done[q].eq(total)

        # 3. slices leave
        slice_valid = Signal()
        slice_number = Signal.like(self.o_slice)
        end = Signal()
        m.d.comb += end.eq(slice_number == cfg.slices - 1)
        m.d.sync += slice_valid.eq(last[1] | (slice_valid & ~end))
        with m.If(slice_valid):
            m.d.sync += slice_number.eq(Mux(end, 0, slice_number + 1))
            with m.If(~last[1]):
                for q in range(cfg.lanes - cfg.dequant_lanes):
                    m.d.sync += done[q].eq(done[q + cfg.dequant_lanes])
        if full:
            m.d.comb += [self.o_valid.eq(slice_valid), self.o_slice.eq(slice_number)]
            m.d.comb += [port.eq(total.as_signed()) for port, total in zip(self.o_sums, done, strict=False)]
        else:
            m.d.sync += [self.o_valid.eq(slice_valid), self.o_slice.eq(slice_number)]
            with m.If(slice_valid):
                m.d.sync += [port.eq(total.as_signed() - offset) for port, total in zip(self.o_sums, done, strict=False)]
        return m

    def _tables(self, m: Module) -> list[Memory]:
        """Tables that are rewritten whole with the first row of a pass, each with a write port an entry."""
        bits = self._entry_bits
        tables = []
        for t in range(TABLES):
            entries = self._entries(t)
            m.submodules[f"table_{t}"] = table = Memory(shape=bits, depth=len(entries), init=[])
            for address, entry in enumerate(entries):
                port = table.write_port()
                m.d.comb += [
                    port.en.eq(self.i_valid & self.i_first),
                    port.addr.eq(address),
                    port.data.eq(entry + (1 << (bits - 1))),
                ]
            tables.append(table)
        return tables

    @property
    def _entry_bits(self) -> int:
        return _ENTRY_BITS - (not self.cfg.full_table)

    def _entries(self, t: int) -> list[Value]:
        """What table t holds of the activations at the port, signed, in `_entry_bits`."""
        full = self.cfg.full_table
        x = [self.i_acts[8 * (TABLE_K * t + i) :][:8].as_signed() for i in range(TABLE_K)]
        entries = []
        for address in range(16 if full else 8):
            negative = address >> 3
            bits = [address >> i & 1 ^ negative for i in range(3)] + [negative]
            if full:
                entries.append(sum((value for bit, value in zip(bits, x, strict=True) if bit), Const(0, self._entry_bits)))
            else:
                pair = [x[1] if bits[1] else -x[1], x[0] if bits[0] else -x[0]]
                entries.append(((x[2] if bits[2] else -x[2]) - x[3] + pair[0] + pair[1]) >> 1)
        return entries

    def _parities(self, m: Module) -> Value:
        """p of each table."""
        odd = Signal(TABLES, reset_less=True)
        if not self.cfg.full_table:
            with m.If(self.i_valid & self.i_first):
                lowest = Cat(self.i_acts[8 * i] for i in range(K_GROUP))
                m.d.sync += odd.eq(Cat(lowest[TABLE_K * t :][:TABLE_K].xor() for t in range(TABLES)))
        return odd
