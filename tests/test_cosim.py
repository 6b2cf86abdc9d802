"""The simulator around the RTL: a small design of our own AXI masters moves data through the DRAM model."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

import cosim.verilate
from cosim.generate import verilog
from cosim.rtl_device import RtlTransport, open_device
from cosim.simulator import (
    ProtocolError,
    Reason,
    SimulationError,
    Simulator,
    build_simulator,
)
from host_driver.errors import BuildError, InvalidRequest
from rtl.bus.axi import Axi4LiteSignature, Axi4ReadSignature, Axi4Signature
from rtl.bus.csr_bank import CsrBank
from rtl.bus.reader import BurstReader
from rtl.bus.writer import BurstWriter
from spec.config import DramConfig
from spec.csr import STATUS, Register

pytestmark = pytest.mark.cosim

WEIGHT_BITS, DATA_BITS = 512, 128
WEIGHT_BYTES, DATA_BYTES = WEIGHT_BITS // 8, DATA_BITS // 8
MEMORY = 1 << 20
DRAM = DramConfig(bytes_per_cycle=1024, latency_cycles=20)
"""So fast that only latency and the ports count."""

START, ELAPSED, SUM, ERRORS, TAMPER = 0x40, 0x44, 0x48, 0x4C, 0x50
W_ADDR, W_BEATS, SOURCE, TARGET, BEATS = 0x54, 0x58, 0x5C, 0x60, 0x64
REGISTERS = (
    STATUS,
    Register("start", START, "w1", "starts"),
    Register("elapsed", ELAPSED, "ro", "cycles from start until all is idle"),
    Register("sum", SUM, "ro", "sum of the 32-bit words read by the weight port"),
    Register("errors", ERRORS, "ro", "weight read, data read, data write failed"),
    Register("tamper", TAMPER, "rw", "which rule to break"),
    Register("w_addr", W_ADDR, "rw", "where the weight port reads"),
    Register("w_beats", W_BEATS, "rw", "beats to read"),
    Register("source", SOURCE, "rw", "where the data port reads"),
    Register("target", TARGET, "rw", "where the data port writes what it read"),
    Register("beats", BEATS, "rw", "beats to move"),
)

TAMPERINGS = {
    "weight port AR: valid was withdrawn before ready": 1,
    "weight port AR: payload changed before ready": 2,
    "weight port AR: address .* is not aligned": 3,
    "data port AR: burst of 17 beats at .* crosses 4 KiB": 4,
    "data port AW: burst type 0 is not INCR": 5,
    "data port W: WLAST is 0 where 1 is due": 6,
    "data port W: data without an address": 7,
    "data port W: payload changed before ready": 8,
    "data port AW: size 0 is not the full width 4": 9,
}
"""Message of the rule, and the value of `tamper` that breaks it."""


class Mover(wiring.Component):
    """Reads and sums on the weight port while it copies on the data port; obeys or breaks the bus rules."""

    def __init__(self) -> None:
        super().__init__(
            {
                "s_axil": In(Axi4LiteSignature(addr_bits=12, data_bits=32)),
                "m_axi_w": Out(Axi4ReadSignature(addr_bits=40, data_bits=WEIGHT_BITS)),
                "m_axi_d": Out(Axi4Signature(addr_bits=40, data_bits=DATA_BITS)),
                "irq": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.bank = bank = CsrBank(REGISTERS)
        wiring.connect(m, wiring.flipped(self.s_axil), bank.s_axil)

        m.submodules.weight = weight = BurstReader(data_bits=WEIGHT_BITS, max_outstanding=8, fifo_beats=128)
        m.submodules.read = read = BurstReader(data_bits=DATA_BITS, max_outstanding=8, fifo_beats=128)
        m.submodules.write = write = BurstWriter(data_bits=DATA_BITS, max_outstanding=8)
        busy = Signal()
        pending = Signal()  # start was given, the units do not show it yet
        m.d.comb += [
            weight.i_cmd.valid.eq(bank.start_stb),
            weight.i_cmd.p.addr.eq(bank.w_addr),
            weight.i_cmd.p.beats.eq(bank.w_beats),
            read.i_cmd.valid.eq(bank.start_stb),
            read.i_cmd.p.addr.eq(bank.source),
            read.i_cmd.p.beats.eq(bank.beats),
            write.i_cmd.valid.eq(bank.start_stb),
            write.i_cmd.p.addr.eq(bank.target),
            write.i_cmd.p.beats.eq(bank.beats),
            weight.o_data.ready.eq(1),
            write.i_data.valid.eq(read.o_data.valid),
            write.i_data.p.data.eq(read.o_data.p.data),
            write.i_data.p.strb.eq(-1),
            read.o_data.ready.eq(write.i_data.ready),
            bank.status.eq(busy | bank.start_stb | pending),
            bank.errors.eq(Cat(weight.o_error, read.o_error, write.o_error)),
            self.irq.eq(~busy & ~pending & (bank.elapsed != 0)),
        ]
        m.d.sync += pending.eq(bank.start_stb)
        with m.If(bank.start_stb):
            m.d.sync += [busy.eq(1), bank.elapsed.eq(0), bank.sum.eq(0)]
        with m.Elif(busy):
            m.d.sync += bank.elapsed.eq(bank.elapsed + 1)
            with m.If(~pending & weight.o_idle & read.o_idle & write.o_idle):
                m.d.sync += busy.eq(0)
            with m.If(weight.o_data.valid):
                m.d.sync += bank.sum.eq(bank.sum + sum(weight.o_data.p.data.word_select(i, 32) for i in range(16)))

        # the bus, with a rule broken on request
        wiring.connect(m, weight.m_axi, wiring.flipped(self.m_axi_w))
        data_port = self.m_axi_d
        for port in (read.m_axi, write.m_axi):
            for name, member in port.signature.members.items():
                ours, theirs = getattr(port, name), getattr(data_port, name)
                m.d.comb += theirs.eq(ours) if member.flow is Out else ours.eq(theirs)
        toggle = Signal()
        m.d.sync += toggle.eq(~toggle)
        w = self.m_axi_w
        for value, statement in {
            1: w.arvalid.eq(weight.m_axi.arvalid & toggle),
            2: w.araddr.eq(weight.m_axi.araddr ^ toggle << 12),
            3: w.araddr.eq(weight.m_axi.araddr | 4),
            4: data_port.arlen.eq(read.m_axi.arlen + 1),
            5: data_port.awburst.eq(0),
            6: data_port.wlast.eq(0),
            7: data_port.awvalid.eq(0),
            8: data_port.wdata.eq(write.m_axi.wdata ^ toggle),
            9: data_port.awsize.eq(0),
        }.items():
            with m.If(bank.tamper == value):
                m.d.comb += statement
        # tamper 7 lets the writer believe that its address was taken
        m.d.comb += write.m_axi.awready.eq(Mux(bank.tamper == 7, 1, data_port.awready))
        return m


@pytest.fixture(scope="session")
def design() -> str:
    """Verilog of the mover."""
    return verilog(Mover(), "lutra")


@pytest.fixture(scope="session")
def library(design: str) -> Path:
    """The mover, built once."""
    return build_simulator(design)


MakeSimulator = Callable[..., Simulator]


@pytest.fixture
def simulator(library: Path) -> Iterator[MakeSimulator]:
    """Makes simulators and closes them."""
    made: list[Simulator] = []

    def make(dram: DramConfig = DRAM, **options: float) -> Simulator:
        made.append(Simulator(library, memory_bytes=MEMORY, dram=dram, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def fill(sim: Simulator, rng: random.Random) -> bytes:
    """Random bytes in all of the memory."""
    data = rng.randbytes(MEMORY)
    sim.mem_write(0, data)
    return data


def start(
    sim: Simulator, *, w_addr: int = 0, w_beats: int = 0, source: int = 0, target: int = 0, beats: int = 0
) -> None:
    """Programs and starts the mover."""
    for offset, value in ((W_ADDR, w_addr), (W_BEATS, w_beats), (SOURCE, source), (TARGET, target), (BEATS, beats)):
        assert sim.csr_write(offset, value) == 0
    assert sim.csr_write(START, 1) == 0


def finish(sim: Simulator, max_cycles: int = 200_000) -> int:
    """Runs to the end; the cycles it took."""
    assert sim.run(max_cycles) is Reason.IRQ
    return sim.csr_read(ELAPSED)[0]


def word_sum(data: bytes) -> int:
    """What the weight port sums."""
    return sum(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)) & 0xFFFFFFFF


def check_move(sim: Simulator, rng: random.Random) -> None:
    """A copy and a sum at odd places give what plain Python gives, and the counters say what was moved."""
    image = bytearray(fill(sim, rng))
    before = sim.counters()
    w_addr, w_beats = 0x2C0, 259
    source, target, beats = 0x41230, 0x9FE50, 517
    start(sim, w_addr=w_addr, w_beats=w_beats, source=source, target=target, beats=beats)
    finish(sim)
    size = beats * DATA_BYTES
    image[target : target + size] = image[source : source + size]
    assert sim.mem_read(0, MEMORY) == image
    assert sim.csr_read(SUM)[0] == word_sum(image[w_addr : w_addr + w_beats * WEIGHT_BYTES])
    assert sim.csr_read(ERRORS)[0] == 0
    weight, data = sim.counters()
    assert weight.read_bytes - before[0].read_bytes == w_beats * WEIGHT_BYTES
    assert (weight.write_bytes, weight.write_bursts) == (0, 0)
    assert data.read_bytes - before[1].read_bytes == size
    assert data.write_bytes - before[1].write_bytes == size


# 1. data

def test_moves_data(simulator: MakeSimulator, rng: random.Random) -> None:
    sim = simulator()
    check_move(sim, rng)
    check_move(sim, rng)


@pytest.mark.parametrize("stall_probability", [0.1, 0.5, 0.9])
def test_moves_data_through_stalls(simulator: MakeSimulator, rng: random.Random, stall_probability: float) -> None:
    check_move(simulator(stall_probability=stall_probability, stall_seed=rng.getrandbits(64)), rng)


def test_moves_data_with_all_limits_tight(simulator: MakeSimulator, rng: random.Random) -> None:
    dram = DramConfig(bytes_per_cycle=7.3, latency_cycles=1, refresh_interval_cycles=101, refresh_cycles=37)
    check_move(simulator(dram, stall_probability=0.3, stall_seed=5, max_reads=1, max_writes=1), rng)


def test_stalls_repeat_by_seed(simulator: MakeSimulator) -> None:
    cycles = []
    for seed in (3, 3, 4):
        sim = simulator(stall_probability=0.5, stall_seed=seed)
        start(sim, w_beats=100, target=0x8000, beats=100)
        cycles.append(finish(sim))
    assert cycles[0] == cycles[1] != cycles[2]


# 2. time

def test_latency_is_counted_in_cycles(simulator: MakeSimulator) -> None:
    """One beat more of latency is one cycle more of a read, and a copy pays it three times: read, and write answer."""
    took = {}
    for latency in (1, 2, 51):
        dram = dataclasses.replace(DRAM, latency_cycles=latency)
        sim = simulator(dram)
        start(sim, w_beats=1)
        read = finish(sim)
        start(sim, target=0x8000, beats=1)
        took[latency] = (read, finish(sim))
    assert took[2][0] - took[1][0] == 1
    assert took[51][0] - took[1][0] == 50
    assert took[51][1] - took[1][1] == 100


@pytest.mark.parametrize("bytes_per_cycle", [64, 61.6, 24, 9.7])
def test_weight_port_gets_the_bandwidth(simulator: MakeSimulator, bytes_per_cycle: float) -> None:
    sim = simulator(DramConfig(bytes_per_cycle=bytes_per_cycle, latency_cycles=40))
    beats = 4000
    start(sim, w_beats=beats)
    took = finish(sim) - 40
    assert took == pytest.approx(beats * WEIGHT_BYTES / bytes_per_cycle, rel=0.02)


@pytest.mark.parametrize("bytes_per_cycle", [40, 24])
def test_ports_share_the_bandwidth(simulator: MakeSimulator, bytes_per_cycle: float) -> None:
    """All bytes of both ports together take bytes / bandwidth cycles, and none is starved."""
    sim = simulator(DramConfig(bytes_per_cycle=bytes_per_cycle, latency_cycles=10))
    w_beats = beats = 3000  # turns are taken beat by beat, so all end together
    start(sim, w_beats=w_beats, target=0x80000, beats=beats)
    took = finish(sim) - 30
    assert took == pytest.approx((w_beats * WEIGHT_BYTES + 2 * beats * DATA_BYTES) / bytes_per_cycle, rel=0.02)


def test_refresh_takes_its_share(simulator: MakeSimulator) -> None:
    dram = DramConfig(bytes_per_cycle=32, latency_cycles=10, refresh_interval_cycles=500, refresh_cycles=100)
    sim = simulator(dram)
    beats = 4000
    start(sim, w_beats=beats)
    took = finish(sim) - 10
    assert took == pytest.approx(beats * WEIGHT_BYTES / 32 / 0.8, rel=0.02)


def test_reads_in_flight_are_limited(simulator: MakeSimulator) -> None:
    """With one burst in flight each burst of 16 beats pays the whole latency."""
    dram = dataclasses.replace(DRAM, latency_cycles=100)
    sim = simulator(dram, max_reads=1)
    start(sim, w_beats=16 * 50)
    one = finish(sim)
    assert one == pytest.approx(50 * (100 + 16), rel=0.05)


# 3. errors of the memory

def test_injected_error_is_answered_and_ends(simulator: MakeSimulator, rng: random.Random) -> None:
    sim = simulator()
    for inject, errors in ((0x1000, 0b001), (0x40000, 0b010), (0x80000, 0b100)):
        sim.reset()
        image = fill(sim, rng)
        sim.inject_errors(inject, inject + 1)
        start(sim, w_addr=0xC00, w_beats=40, source=0x3FFC0, target=0x7FF80, beats=20)
        finish(sim)
        assert sim.csr_read(ERRORS)[0] == errors
        copied = bytearray(image[0x3FFC0 : 0x3FFC0 + 20 * DATA_BYTES])
        if inject == 0x40000:  # what cannot be read is zero
            copied[0x40 : 0x40 + DATA_BYTES] = bytes(DATA_BYTES)
        if inject == 0x80000:  # what cannot be written stays
            copied[0x80 : 0x80 + DATA_BYTES] = image[0x80000 : 0x80000 + DATA_BYTES]
        assert sim.mem_read(0x7FF80, len(copied)) == copied
    sim.reset()
    sim.inject_errors(0, 0)
    check_move(sim, rng)


def test_addresses_beyond_the_memory_are_errors(simulator: MakeSimulator) -> None:
    sim = simulator()
    start(sim, w_addr=MEMORY - WEIGHT_BYTES, w_beats=1)
    finish(sim)
    assert sim.csr_read(ERRORS)[0] == 0
    start(sim, w_addr=MEMORY - WEIGHT_BYTES, w_beats=2, source=MEMORY, target=MEMORY - DATA_BYTES, beats=2)
    finish(sim)
    assert sim.csr_read(ERRORS)[0] == 0b111


def test_back_door_checks_its_range(simulator: MakeSimulator) -> None:
    sim = simulator()
    for address, size in ((MEMORY - 3, 4), (-1, 1), (2**63, 1)):
        with pytest.raises(SimulationError, match=rf"{size} bytes at -?0x[0-9a-f]+ are not inside"):
            sim.mem_read(address, size)
        with pytest.raises(SimulationError, match="are not inside the memory of 1048576 bytes"):
            sim.mem_write(address, bytes(size))
    sim.close()
    with pytest.raises(SimulationError, match="closed"):
        sim.mem_read(0, 1)


# 4. rules of the bus

@pytest.mark.parametrize("message", TAMPERINGS)
def test_broken_rule_is_found(simulator: MakeSimulator, message: str) -> None:
    sim = simulator(stall_probability=0.5)
    assert sim.csr_write(TAMPER, TAMPERINGS[message]) == 0

    def start_and_run() -> None:  # a rule may be broken already while the start is written
        start(sim, w_beats=64, source=0xF00, target=0x8F00, beats=64)
        sim.run(20_000)

    with pytest.raises(ProtocolError, match=f"cycle [0-9]+, {message}"):
        start_and_run()
    sim.reset()
    assert sim.violation == ""
    start(sim, w_beats=64, source=0xF00, target=0x8F00, beats=64)
    assert sim.run(20_000) is Reason.IRQ


def test_register_errors_and_cycle_budget(simulator: MakeSimulator) -> None:
    sim = simulator()
    assert sim.csr_read(0x800)[1] == 2
    assert sim.csr_write(SUM, 1) == 2
    start(sim, w_beats=5000)
    before = sim.cycle
    assert sim.run(1000) is Reason.BUDGET
    assert sim.cycle - before == 1000
    assert not sim.irq
    finish(sim)
    assert sim.irq


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dram": DramConfig(bytes_per_cycle=0, latency_cycles=1)}, "bytes_per_cycle must be positive, not 0"),
        ({"dram": DramConfig(bytes_per_cycle=1, latency_cycles=0)}, "latency_cycles must be at least 1, not 0"),
        (
            {"dram": DramConfig(bytes_per_cycle=1, latency_cycles=1, refresh_interval_cycles=5, refresh_cycles=5)},
            "refresh_cycles must be below refresh_interval_cycles: 5 of 5",
        ),
        ({"stall_probability": 1.0}, r"stall_probability must be in \[0, 1\), not 1.0"),
        ({"max_reads": 0}, "max_reads and max_writes must be positive: 0, 32"),
    ],
)
def test_impossible_memory_is_refused(simulator: MakeSimulator, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulator(**options)


# 5. the driver's transport

def test_transport_waits_for_the_device(simulator: MakeSimulator, rng: random.Random) -> None:
    sim = simulator()
    transport = RtlTransport(sim)
    assert transport.memory_bytes == MEMORY
    assert transport.wait(10) is True  # nothing was started
    transport.write_mem(0, rng.randbytes(MEMORY))
    for offset, value in ((W_BEATS, 16_000), (SOURCE, 0x1000), (TARGET, 0x80000), (BEATS, 5)):
        transport.write32(offset, value)
        assert transport.read32(offset) == value
    transport.write32(START, 1)
    seen: list[int] = []
    before, waited = sim.cycle, transport.cycles
    assert transport.wait(60, seen.append) is True
    assert transport.cycles - waited == sim.cycle - before > 16_000
    assert transport.wall_s > 0
    assert seen == sorted(seen)
    assert seen
    assert transport.read32(SUM) == word_sum(transport.read_mem(0, 16_000 * WEIGHT_BYTES))
    assert transport.read_mem(0x80000, 80) == transport.read_mem(0x1000, 80)


def test_transport_gives_up_in_time(simulator: MakeSimulator) -> None:
    transport = RtlTransport(simulator(DramConfig(bytes_per_cycle=0.01, latency_cycles=1)))
    transport.write32(W_BEATS, 16_000)
    transport.write32(START, 1)
    assert transport.wait(0.0) is False
    assert transport.wait(0.3) is False
    assert transport.wall_s >= 0.3


def test_transport_says_what_is_wrong(simulator: MakeSimulator) -> None:
    transport = RtlTransport(simulator())
    with pytest.raises(SimulationError, match="register 0x800 cannot be read: bus response 2"):
        transport.read32(0x800)
    with pytest.raises(SimulationError, match="register 0x048 cannot be written: bus response 2"):
        transport.write32(SUM, 1)
    with pytest.raises(SimulationError, match="register 0x054 takes 32 bits, not 0x100000000"):
        transport.write32(W_ADDR, 1 << 32)


def test_open_device_refuses_before_it_builds() -> None:
    with pytest.raises(InvalidRequest, match="there is no preset 'huge'; choose one of: kv260, sim, test"):
        open_device("huge", 1 << 20)
    with pytest.raises(InvalidRequest, match=r"dram takes bytes_per_cycle, .*, not speed"):
        open_device("test", 1 << 20, dram={"speed": 1})


# 6. builds

TINY = """
module lutra(input clk, input rst, output reg [{top}:0] count);
  always @(posedge clk) count <= rst ? 0 : count + 1;
endmodule
"""
TINY_HARNESS = """
#include <stdexcept>
#include "Vdut.h"
void vl_fatal(const char *, int, const char *, const char *message) { throw std::runtime_error(message); }
extern "C" int width() { return 8 * sizeof(Vdut::count); }
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A harness in a folder of its own, and an empty cache that knows the run-time library."""
    real = cosim.verilate.cache_folder()
    cache = tmp_path / "cache"
    cache.mkdir()
    for runtime in real.glob("runtime-*"):
        if runtime.is_dir() and not runtime.name.endswith(".partial"):
            (cache / runtime.name).symlink_to(runtime)
    monkeypatch.setenv("LUTRA_CACHE", str(cache))
    harness = tmp_path / "harness" / "tiny.cpp"
    harness.parent.mkdir()
    harness.write_text(TINY_HARNESS)
    return harness


def test_a_build_is_reused_until_something_changes(library: Path, tiny: Path) -> None:
    first = cosim.verilate.build("lutra", TINY.format(top=7), [tiny])
    stamp = first.stat().st_mtime_ns
    assert cosim.verilate.build("lutra", TINY.format(top=7), [tiny]) == first
    assert first.stat().st_mtime_ns == stamp
    (tiny.parent / "other.hpp").write_text("// a header that the harness could include\n")
    second = cosim.verilate.build("lutra", TINY.format(top=7), [tiny])
    assert len({first, second, cosim.verilate.build("lutra", TINY.format(top=15), [tiny])}) == 3


def test_concurrent_builds_share_one_result(library: Path, tiny: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: cosim.verilate.build("lutra", TINY.format(top=3), [tiny]), range(3)))
    assert len(set(results)) == 1
    made = [path.name for path in cosim.verilate.cache_folder().iterdir() if path.name.startswith("lutra-")]
    assert sorted(made) == sorted([results[0].parent.name, results[0].parent.name + ".lock"])


def test_a_failed_build_is_one_line_with_a_log(library: Path, tiny: Path) -> None:
    with pytest.raises(BuildError, match=r"^the Verilator failed \(exit status 1\): see \S+\.log$") as caught:
        cosim.verilate.build("lutra", "module lutra(input clk); nonsense endmodule", [tiny])
    assert "syntax error" in Path(str(caught.value).split("see ")[1]).read_text()
    tiny.write_text("#error on purpose\n")
    with pytest.raises(BuildError, match=r"^the C\+\+ compiler failed .* see \S+\.log$") as caught:
        cosim.verilate.build("lutra", TINY.format(top=1), [tiny])
    assert "on purpose" in Path(str(caught.value).split("see ")[1]).read_text()
    assert not list(cosim.verilate.cache_folder().glob("*.partial"))


def test_a_missing_compiler_is_named(library: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"^the C\+\+ compiler no-such-compiler is missing: apt-get install g\+\+"):
        cosim.verilate.build("lutra", TINY.format(top=1), [tiny])


def test_an_unusable_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTRA_CACHE", "/dev/null/cache")
    with pytest.raises(BuildError, match="LUTRA_CACHE=/dev/null/cache cannot be written"):
        cosim.verilate.cache_folder()


def test_traces_are_windows(design: str, library: Path, tmp_path: Path) -> None:
    """Waveforms hold the asked cycles only, and a build without them says so."""
    plain = Simulator(library, memory_bytes=MEMORY, dram=DRAM)
    with pytest.raises(SimulationError, match="a device without `trace`"):
        plain.trace(tmp_path / "none.vcd")
    plain.close()
    traced = Simulator(build_simulator(design, trace=True), memory_bytes=MEMORY, dram=DRAM)
    traced.trace(tmp_path / "window.vcd", first=100, end=110)
    traced.run(200)
    traced.close()
    text = (tmp_path / "window.vcd").read_text()
    times = [int(line[1:]) for line in text.splitlines() if line.startswith("#")]
    assert times[0] == 200
    assert times[-1] == 219
    assert "m_axi_w_arvalid" in text
