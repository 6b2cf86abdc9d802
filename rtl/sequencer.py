"""Sequencer: takes descriptors in order and gives each to its unit when what it waits for is idle."""

from amaranth import unsigned
from amaranth.hdl import Cat, Module, Mux, Signal, ValueLike
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.descriptor_fetch import INDEX_BITS, FetchedDescriptor
from rtl.lib.ops import op_fields, op_layout
from rtl.lib.ports import TOKEN_BITS
from spec.csr import OUT_TOKENS
from spec.descriptors import DESCRIPTOR_BYTES, UNIT_OF, Epilogue, Opcode, Unit, fields_of
from spec.faults import FaultCode

GeneratedWrite = wiring.Signature(
    {"en": Out(1), "index": Out(range(OUT_TOKENS)), "token": Out(32), "cycle": Out(64)}
)
"""A generated token and the cycle counter at the end of its step."""

FaultReport = data.StructLayout(
    {"code": unsigned(8), "tag": unsigned(24), "address": unsigned(64), "index": unsigned(INDEX_BITS)}
)
"""What stopped the device; tag and index are of the descriptor that it is laid to."""


class Sequencer(wiring.Component):
    """Run a program: issue its descriptors, repeat it for generated tokens, stop on break points and faults.

    Function
        A descriptor issues when no unit of its ``wait`` mask is busy and its unit takes it (docs/isa.md). At END, when
        ``i_repeat`` asks for more tokens and the argmax is not ``i_stop_token``, the program runs again on the argmax at
        the next position.
    Streams
        ``i_descriptor`` from DescriptorFetch; one operation stream a unit. A MATMUL goes to engine and epilogue, and to
        the KV writer when its epilogue is KEY or VALUE.
    Timing
        One descriptor in 2 cycles.
    """

    def __init__(self, *, tile_tokens: int, limits: dict[tuple[Opcode, str], int]) -> None:
        self._tile_tokens = tile_tokens
        self._limits = limits
        ops = {
            "o_stream": Opcode.STREAM, "o_rope": Opcode.ROPE, "o_embed": Opcode.EMBED, "o_norm": Opcode.NORM,
            "o_matmul": Opcode.MATMUL, "o_epilogue": Opcode.MATMUL, "o_kv": Opcode.MATMUL, "o_attend": Opcode.ATTEND,
        }
        super().__init__(
            {name: Out(stream.Signature(op_layout(opcode))) for name, opcode in ops.items()}
            | {
                # program
                "i_descriptor": In(stream.Signature(FetchedDescriptor)),
                "o_fetch": Out(1),
                "i_fetch_idle": In(1),
                # registers
                "i_start": In(1),
                "i_resume": In(1),
                "i_program": In(64),
                "i_position": In(32),
                "i_token_count": In(32),
                "i_cache_slots": In(32),
                "i_repeat": In(32),
                "i_stop_token": In(32),
                "i_break_at": In(32),
                "i_watchdog": In(32),
                # units
                "i_busy": In(len(Unit)),
                "i_argmax": In(32),
                "i_progress": In(1),
                "i_cycle": In(64),
                "i_fault": In(1),
                "i_fault_code": In(FaultCode),
                "i_fault_address": In(64),
                # state
                "o_running": Out(1),
                "o_done": Out(1),
                "o_paused": Out(1),
                "o_fault": Out(1),
                "o_report": Out(FaultReport),
                "o_index": Out(INDEX_BITS),
                "o_feedback": Out(1),
                "o_feedback_token": Out(32),
                "o_generated": Out(32),
                "generated": Out(GeneratedWrite),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        position, tokens = Signal(24), Signal(TOKEN_BITS)
        descriptor = self.i_descriptor
        words = descriptor.p.words
        opcode = words[:4]
        tag = words[32 * 15 :][:24]
        wait = words[4 : 4 + len(Unit)]

        # 1. is the descriptor legal?
        legal = Signal()
        by_opcode = []
        for candidate in Opcode:
            checks = [opcode == candidate]
            for field in fields_of(candidate):
                value = words[32 * field.word + field.lsb :][: field.width]
                limit = self._limits.get((candidate, field.name), field.limit)
                if field.name != "opcode" and field.minimum:
                    checks.append(value >= field.minimum)
                if field.name != "opcode" and limit < (1 << field.width) - 1:
                    checks.append(value <= limit)
            by_opcode.append(Cat(checks).all())
        m.d.comb += legal.eq(Cat(by_opcode).any())

        # 2. to whom it goes; a MATMUL to several
        epilogue = words[16:20]
        to_kv = (epilogue == Epilogue.KEY) | (epilogue == Epilogue.VALUE)
        targets = {
            Opcode.STREAM: [(self.o_stream, 1)],
            Opcode.ROPE: [(self.o_rope, 1)],
            Opcode.EMBED: [(self.o_embed, 1)],
            Opcode.NORM: [(self.o_norm, 1)],
            Opcode.MATMUL: [(self.o_matmul, 1), (self.o_epilogue, 1), (self.o_kv, to_kv)],
            Opcode.ATTEND: [(self.o_attend, 1)],
        }
        assert targets.keys() == UNIT_OF.keys()
        issue, last_handed = Signal(), Signal()
        handed_all = []
        for candidate, ports in targets.items():
            for number, (port, wanted) in enumerate(ports):
                handed = Signal(name=f"handed_{candidate.name}_{number}")
                for name, value in op_fields(candidate, words).items():
                    m.d.comb += port.payload[name].eq(value)
                m.d.comb += [
                    port.payload.position.eq(position),
                    port.payload.tokens.eq(tokens),
                    port.valid.eq(issue & (opcode == candidate) & wanted & ~handed),
                ]
                handed_all.append((opcode != candidate) | ~wanted | handed | port.ready)
                with m.If(last_handed):
                    m.d.sync += handed.eq(0)
                with m.Elif(port.valid & port.ready):
                    m.d.sync += handed.eq(1)
        m.d.comb += last_handed.eq(issue & Cat(handed_all).all())

        # 3. faults: the first one counts
        report = self.o_report
        fault, fault_code, fault_address = Signal(), Signal(FaultCode), Signal(64)

        def raise_fault(code: ValueLike, address: ValueLike) -> None:
            m.d.comb += [fault.eq(1), fault_code.eq(code), fault_address.eq(address)]

        idle_cycles = Signal(32)
        m.d.sync += idle_cycles.eq(Mux(self.i_progress | ~self.o_running, 0, idle_cycles + 1))
        ever_paused_here = Signal()
        saw_logits = Signal()
        issued_tag, issued_index = Signal(24), Signal(INDEX_BITS)  # of the operation that a unit's fault belongs to
        generated = Signal(32)
        m.d.comb += [
            self.o_index.eq(descriptor.p.index),
            self.o_generated.eq(generated),
            self.generated.index.eq(generated),
            self.generated.token.eq(self.i_argmax),
            self.generated.cycle.eq(self.i_cycle),
        ]

        # 4. run
        with m.FSM(name="run"):
            with m.State("IDLE"):
                with m.If(self.i_start):
                    m.d.sync += [
                        position.eq(self.i_position), tokens.eq(self.i_token_count), self.o_done.eq(0),
                        self.o_feedback.eq(0), generated.eq(0), saw_logits.eq(0), ever_paused_here.eq(0),
                        self.o_running.eq(1),
                    ]
                    with m.If(
                        (self.i_token_count == 0)
                        | (self.i_token_count > self._tile_tokens)
                        | (self.i_position + self.i_token_count > self.i_cache_slots)
                    ):
                        raise_fault(FaultCode.POSITION, self.i_position)
                    m.next = "FETCH"
            with m.State("FETCH"):
                with m.If(self.i_fetch_idle & ~self.o_fault):
                    m.d.comb += self.o_fetch.eq(1)
                    m.next = "LOOK"
            with m.State("LOOK"):
                with m.If(descriptor.valid & ~self.o_fault):
                    with m.If(self.o_paused):  # whatever `break_at` becomes meanwhile
                        with m.If(self.i_resume):
                            m.d.sync += [ever_paused_here.eq(1), self.o_paused.eq(0)]
                    with m.Elif((descriptor.p.index == self.i_break_at) & ~ever_paused_here):
                        m.d.sync += self.o_paused.eq(self.i_busy == 0)
                    with m.Elif(~legal):
                        raise_fault(
                            FaultCode.ILLEGAL_DESCRIPTOR,
                            self.i_program + (descriptor.p.index << (DESCRIPTOR_BYTES.bit_length() - 1)),
                        )
                    with m.Elif((self.i_busy & wait) == 0):
                        m.next = "ISSUE"
            with m.State("ISSUE"):
                with m.If(self.o_fault):
                    pass  # stay until reset
                with m.Elif(opcode == Opcode.END):
                    m.d.comb += descriptor.ready.eq(1)
                    m.d.sync += ever_paused_here.eq(0)
                    more = (generated + 1 < self.i_repeat) & (self.i_argmax != self.i_stop_token)
                    with m.If(saw_logits):
                        m.d.comb += self.generated.en.eq(generated < OUT_TOKENS)
                        m.d.sync += [generated.eq(generated + 1), saw_logits.eq(0)]
                    with m.If(saw_logits & more & (position + tokens < self.i_cache_slots)):
                        m.d.sync += [
                            self.o_feedback.eq(1), self.o_feedback_token.eq(self.i_argmax),
                            position.eq(position + tokens), tokens.eq(1),
                        ]
                        m.next = "FETCH"
                    with m.Else():
                        m.d.sync += [self.o_done.eq(1), self.o_running.eq(0)]
                        m.next = "IDLE"
                with m.Else():
                    m.d.comb += issue.eq(1)
                    with m.If(last_handed):
                        m.d.comb += descriptor.ready.eq(1)
                        m.d.sync += [
                            ever_paused_here.eq(0), issued_tag.eq(tag), issued_index.eq(descriptor.p.index),
                        ]
                        with m.If((opcode == Opcode.MATMUL) & (epilogue == Epilogue.LOGITS)):
                            m.d.sync += saw_logits.eq(1)
                        m.next = "LOOK"

        # 5. a fault of a unit, or of the run itself, stops everything until reset
        with m.If(self.o_running & self.i_fault):
            raise_fault(self.i_fault_code, self.i_fault_address)
        with m.Elif(self.o_running & (self.i_watchdog != 0) & (idle_cycles >= self.i_watchdog) & ~self.o_paused):
            raise_fault(FaultCode.WATCHDOG, 0)
        with m.If(fault & ~self.o_fault):
            m.d.sync += [
                self.o_fault.eq(1), self.o_running.eq(0), self.o_paused.eq(0), self.o_done.eq(0),
                report.code.eq(fault_code), report.address.eq(fault_address),
                report.tag.eq(Mux(self.i_fault, issued_tag, tag)),
                report.index.eq(Mux(self.i_fault, issued_index, descriptor.p.index)),
            ]
        return m
