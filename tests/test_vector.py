"""The simulator that is made of a netlist: random machines against Amaranth's own simulator, devices against Verilator."""

import ctypes
import operator
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from amaranth.hdl import Array, Cat, ClockDomain, Const, Module, Mux, Signal, Value, signed
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out
from amaranth.sim import Simulator

import cosim.rtl_device
from cosim.cpp_build import build_cpp
from cosim.generate import netlist
from cosim.random_model import TINY_GROUPED, random_group_checkpoint
from cosim.rtl_device import RtlTransport
from cosim.vector.compile import COLD_FILES, compile_design
from cosim.vector.expression import UnsupportedError
from cosim.vector.layout import lay_out
from cosim.vector.netlist import read_unit
from cosim.vector.pack import pack_edge
from host_driver.device import Device
from host_driver.image import compile_checkpoint, memory_image
from host_driver.transport import open_device
from spec.config import AcceleratorConfig
from spec.presets import PRESETS

pytestmark = pytest.mark.cosim

HARNESS = Path(__file__).resolve().parent.parent / "cosim" / "harness" / "vector_bench.cpp"
X_BITS, Y_BITS = 512, 1536
CYCLES = 200

PROCESSORS = {"native": (), "AVX2": ("-march=haswell",), "SSE2": ("-march=x86-64",)}
"""Vectors of 512 bits in one register, in two, in four: what is written for one processor must be right on the others."""


Body = Callable[[Module, Value], Sequence[Value]]
"""Fills a module that sees x, and gives the parts of y."""


class Machine(Component):
    """Registers of equal lanes between the ports x (512 bits) and y (1,536 bits)."""

    def __init__(self, body: Body) -> None:
        self._body = body
        super().__init__({"x": In(X_BITS), "y": Out(Y_BITS)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.y.eq(Cat(self._body(m, self.x)))
        return m


def simulated(machine: Machine, inputs: list[int], resets: list[int]) -> list[int]:
    """y before each clock edge, by Amaranth's simulator."""
    top = Module()
    got: list[int] = []
    top.domains.sync = domain = ClockDomain()
    top.submodules.machine = machine

    async def bench(ctx: Any) -> None:
        for x, reset in zip(inputs, resets, strict=True):
            ctx.set(machine.x, x)
            ctx.set(domain.rst, reset)
            await ctx.delay(0)
            got.append(ctx.get(machine.y))
            await ctx.tick()

    simulator = Simulator(top)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return got


def compiled(machine: Machine, inputs: list[int], resets: list[int], flags: tuple[str, ...]) -> list[int]:
    """The same, by the compiled machine."""
    files = compile_design(netlist(machine, "machine"), "machine")
    library = ctypes.CDLL(str(build_cpp("machine", files, [HARNESS], compile_flags=flags, cold=COLD_FILES)))
    library.bench_create.restype = ctypes.c_void_p
    top = ctypes.c_void_p(library.bench_create())
    x = b"".join(value.to_bytes(X_BITS // 8, "little") for value in inputs)
    y = ctypes.create_string_buffer(Y_BITS // 8 * len(inputs))
    library.bench_run(top, x, bytes(resets), y, len(inputs))
    library.bench_destroy(top)
    return [int.from_bytes(y.raw[at : at + Y_BITS // 8], "little") for at in range(0, len(y.raw), Y_BITS // 8)]




def check(rng: random.Random, body: Body, processor: str = "native", *, reset: bool = True) -> None:
    """Random inputs, with all 0 and all 1 among them, and resets."""
    inputs = [rng.choice([rng.getrandbits(X_BITS), rng.getrandbits(X_BITS), 0, (1 << X_BITS) - 1]) for _ in range(CYCLES)]
    resets = [int(reset and rng.random() < 0.02) for _ in range(CYCLES)]
    want = simulated(Machine(body), inputs, resets)
    got = compiled(Machine(body), inputs, resets, PROCESSORS[processor])
    assert got == want


# Random machines ----------------------------------------------------------------------------------------------------------
def expression(rng: random.Random, leaves: list[Value], depth: int) -> Value:
    """A random function, the same for every lane that draws from an equal generator."""
    if depth == 0:
        return rng.choice(leaves)
    kind = rng.choice(("add", "sub", "mul", "bits", "shift", "compare", "mux", "part", "join", "reduce", "sign", "constant"))
    a, b = (expression(rng, leaves, depth - 1) for _ in range(2))
    match kind:
        case "add":
            return (a + b)[: rng.randint(1, min(64, len(a + b)))]
        case "sub":
            return (a - b)[: rng.randint(1, min(64, len(a - b)))]
        case "mul":
            return (a[:32] * b[:32])[:64]
        case "bits":
            return rng.choice((lambda: a & b, lambda: a | b, lambda: a ^ b, lambda: ~a))()
        case "shift":
            by = b[: rng.randint(1, 7)]
            return rng.choice((lambda: (a << b[:4])[:64], lambda: a >> by, lambda: (a.as_signed() >> by)[:64]))()
        case "compare":
            signs = rng.choice((lambda v: v, lambda v: v.as_signed()))
            compare = rng.choice((operator.lt, operator.eq, operator.ge, operator.ne, operator.gt, operator.le))
            return compare(signs(a), signs(b))
        case "mux":
            return Mux(expression(rng, leaves, depth - 1).any(), a, b)
        case "part":
            low = rng.randrange(len(a))
            return a[low : low + rng.randint(1, 40)]
        case "join":
            return Cat(a, b)[: rng.randint(1, 64)]
        case "reduce":
            return rng.choice((a.any(), a.all(), a.xor()))
        case "sign":
            return Cat(a[:30], a[:30][-1].replicate(rng.randint(1, 30)))
        case _:
            return a ^ Const(rng.getrandbits(len(a)), len(a))


def random_lanes(rng: random.Random) -> Body:
    """Lanes of a pipeline of two registers that also see their neighbours, some with enables and resets."""
    lanes, seed = rng.choice((3, 8, 11, 16, 21)), rng.getrandbits(64)
    widths = [rng.choice((1, 5, 12, 21, 32, 33, 48, 64)) for _ in range(2)]
    reset_less = rng.choice((True, False))
    stride = rng.choice((8, 16, 21))

    def body(m: Module, x: Value) -> list[Value]:
        first = [Signal(widths[0], name=f"first_{n}", reset_less=reset_less, init=3 & (1 << widths[0]) - 1) for n in range(lanes)]
        second = [Signal(widths[1], name=f"second_{n}", reset_less=reset_less) for n in range(lanes)]
        for n in range(lanes):
            same = random.Random(seed)
            low = stride * n
            own: list[Value] = [x[low : low + 8], x[low : low + stride], first[n], second[n], first[(n + 1) % lanes], x[500:]]
            own += [Const(n, 5)]
            value, other = (expression(same, own, 3) for _ in range(2))
            with m.If(x[511]):
                m.d.sync += first[n].eq(value)
            with m.Elif(x[510]):
                m.d.sync += first[n].eq(other)
            m.d.sync += second[n].eq(expression(same, own, 3))
        return [*first, *second]

    return body


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 133])  # 133 compares signed words of more than 32 bits
def test_random_lanes(rng: random.Random, number: int, processor: str) -> None:
    check(random.Random(number), random_lanes(random.Random(number)), processor)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_tables(rng: random.Random, processor: str) -> None:
    """A table for all lanes that is rewritten at run time, small enough for a register or not; and one that never changes."""

    def body(m: Module, x: Value) -> list[Value]:
        results: list[Value] = []
        for name, depth, width in (("small", 16, 10), ("medium", 8, 30), ("large", 64, 40)):
            m.submodules[name] = memory = Memory(shape=width, depth=depth, init=range(1, depth))
            write = memory.write_port()
            m.d.comb += [write.en.eq(x[0]), write.addr.eq(x[1:9]), write.data.eq(x[9:])]
            for lane in range(8):
                m.submodules[f"{name}_rom_{lane}"] = rom = Memory(shape=width, depth=depth, init=[n * n for n in range(depth)])
                read, constant = memory.read_port(domain="comb"), rom.read_port(domain="comb")
                m.d.comb += [read.addr.eq(x[60 + 6 * lane :]), constant.addr.eq(x[60 + 6 * lane :])]
                sum_ = Signal(20, name=f"{name}_sum_{lane}")
                m.d.sync += sum_.eq(sum_ + read.data + constant.data[:20])
                results.append(sum_)
        return results

    check(rng, body, processor)


def test_memory_of_each_lane(rng: random.Random) -> None:
    """A row of equal memories: read at once, read into a register, added to; of narrow, of wide words; wider than a word.

    Without resets: Amaranth's simulator resets the register of a read port, its RTLIL does not.
    """

    def body(m: Module, x: Value) -> list[Value]:
        results: list[Value] = []
        for width, lanes in ((12, 8), (56, 8), (20, 5), (130, 1)):
            for lane in range(lanes):
                m.submodules[f"rows{width}_{lane}"] = memory = Memory(shape=width, depth=8, init=[1, 2])
                write, now, later = memory.write_port(), memory.read_port(domain="comb"), memory.read_port()
                m.d.comb += [
                    now.addr.eq(x[:3]),
                    later.addr.eq(x[3:6]),
                    later.en.eq(x[6]),
                    write.en.eq(x[7]),
                    write.addr.eq(x[:3]),
                    write.data.eq(now.data + x[8 + 12 * lane :][:16] + later.data),
                ]
                seen = Signal(8, name=f"seen{width}_{lane}")
                m.d.sync += seen.eq(now.data ^ later.data[-8:])
                results += [seen, later.data[:16]]
        return results

    check(rng, body, reset=False)


def test_wide_signals(rng: random.Random) -> None:
    """Registers wider than a word: held, chosen, shifted by parts, compared, a row of lanes out of them."""

    def body(m: Module, x: Value) -> list[Value]:
        wide, chosen, narrow = Signal(300), Signal(512), [Signal(16, name=f"narrow_{n}") for n in range(16)]
        with m.If(x[0]):
            m.d.sync += wide.eq(x[7:])
        with m.Elif(x[1]):
            m.d.sync += wide.eq(Cat(wide[64:], x[:30]))
        m.d.sync += chosen.eq(Array(x[64 * n :] for n in range(4))[x[2:4]])
        parts = [chosen.word_select(x[4:6], 128), (chosen >> Cat(Const(0, 4), x[6:9]))[:200]]
        for n, port in enumerate(narrow):
            m.d.sync += port.eq(Mux(wide[:100] == x[:100], chosen[32 * n :][:16], wide[16 * n :][:16] + port))
        sums = [(wide[:150] + x[:140])[:151], (wide.as_signed() - x[300:420].as_signed())[:130]]
        return [wide, *parts, *sums, *narrow, wide.any(), wide.all(), wide.xor(), wide[1:90] != x[3:92]]

    check(rng, body)


def test_choices_and_signs(rng: random.Random) -> None:
    """A choice by lane among more than two, signed products, shifts beyond the word."""

    def body(m: Module, x: Value) -> list[Value]:
        results: list[Value] = []
        for n in range(12):
            own = x[32 * n :][:32]
            product, moved = Signal(signed(60), name=f"product_{n}"), Signal(signed(40), name=f"moved_{n}")
            picked = Signal(9, name=f"picked_{n}")
            m.d.sync += [
                product.eq(own[:16].as_signed() * own[16:].as_signed() + product),
                moved.eq(product >> own[:6]),
                picked.eq(Array([own[:9], own[9:18], own[3:12], picked + 1, picked ^ own[:9]])[own[29:]]),
            ]
            results += [product[-20:], moved[:20], picked]
        return results

    check(rng, body)


def test_a_state_machine_and_its_counters(rng: random.Random) -> None:
    """What has no lanes."""

    def body(m: Module, x: Value) -> list[Value]:
        count, total = Signal(20), Signal(70)
        with m.FSM() as fsm:
            for state in range(5):
                with m.State(f"S{state}"):
                    m.d.sync += count.eq(count + state)
                    with m.If(x[state]):
                        m.next = f"S{(3 * state + 1) % 5}"
                    with m.Elif(x[9]):
                        m.d.sync += total.eq(Cat(total[1:], x[10]))
        return [count, total, Cat(fsm.ongoing(f"S{state}") for state in range(5))]

    check(rng, body)


def test_lanes_become_vectors() -> None:
    """Sixteen adders are one addition, and the table of all is looked up in a register."""

    def body(m: Module, x: Value) -> list[Value]:
        m.submodules.table = table = Memory(shape=10, depth=16, init=range(16))
        write = table.write_port()
        m.d.comb += [write.en.eq(x[0]), write.addr.eq(x[:4]), write.data.eq(x[4:])]
        sums = [Signal(12, name=f"sum_{n}", reset_less=True) for n in range(16)]
        for n, port in enumerate(sums):
            read = table.read_port(domain="comb")
            m.d.comb += read.addr.eq(x[32 * n :][:4])
            m.d.sync += port.eq(port + read.data)
        return sums

    modules = netlist(Machine(body), "machine")
    unit = read_unit(modules, "machine")
    roots = pack_edge(unit, lay_out(unit))
    assert sorted(root.value.lanes for root in roots) == [0, 16]
    source = compile_design(modules, "machine")["Vdut.cpp"]
    assert source.count("look_up<1>(") == 1 and "gather(" not in source


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda _, x: [x[:80] * x[80:160]], id="product"),
        pytest.param(lambda _, x: [x[:100].as_signed() >> Cat(Const(0, 4), x[100:103])], id="signed shift"),
    ],
)
def test_what_is_not_compiled_is_refused(body: Body) -> None:
    """Of more than 64 bits."""
    with pytest.raises(UnsupportedError, match="bits"):
        compile_design(netlist(Machine(body), "machine"), "machine")


def test_verilator_steps_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A device that has such a product is still simulated; one line says by whom."""

    def refuse(_config: AcceleratorConfig) -> dict[str, str]:
        raise UnsupportedError("mul of 80 bits")

    monkeypatch.setattr(cosim.rtl_device, "compiled_accelerator", refuse)
    monkeypatch.setattr(cosim.rtl_device, "build_simulator", lambda verilog, trace: (len(verilog) > 0, trace))
    assert cosim.rtl_device.build("test_lut") == (True, False)
    assert capsys.readouterr().err == (
        "note: cosim/vector does not compile mul of 80 bits: Verilator simulates the device, more slowly\n"
    )


# Devices ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stalls", [0.0, 0.3], ids=["free", "stalled"])
def test_device_in_step_with_verilator(rng: random.Random, stalls: float) -> None:
    """The same cycles, counters, sleeping units, logits and memory, step by step."""
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=4, bits=4)
    config = PRESETS["test_lut"]
    compiled_model = compile_checkpoint(checkpoint, config, slots=32)
    limit = compiled_model.memory.limit
    devices = [
        Device(open_device("rtl", "test_lut", limit, stall_probability=stalls, verilator=verilator), config)
        for verilator in (False, True)
    ]
    for device in devices:
        device.load(compiled_model, memory_image(compiled_model, checkpoint))
    prompt = [rng.randrange(TINY_GROUPED.vocab) for _ in range(compiled_model.tile)]
    for ids, position in ((prompt, 0), ([5], len(prompt)), ([9], len(prompt) + 1)):
        got, want = (device.run_step(ids, position, head=True, logits=True) for device in devices)
        assert got.logits is not None and want.logits is not None
        assert got.tokens == want.tokens and got.logits.tobytes() == want.logits.tobytes()
        assert got.counters == want.counters
        transports = [device.transport for device in devices]
        assert all(isinstance(transport, RtlTransport) for transport in transports)
        ours, verilators = (transport.simulator for transport in transports)  # pyright: ignore[reportAttributeAccessIssue]
        assert ours.cycle == verilators.cycle and ours.awake() == verilators.awake()
        assert ours.counters() == verilators.counters()
        assert ours.mem_read(0, limit) == verilators.mem_read(0, limit)
