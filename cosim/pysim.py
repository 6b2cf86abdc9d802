"""Helpers for tests in Amaranth's own simulator: sources, sinks, stalls, stream rules, watchdog.

A test reads as follows; the component is simulated until every process has ended::

    got: list[int] = []
    cycles = run(
        dut,
        source(dut.i_x, items, periodic(3, 1)),
        sink(dut.o_y, got, count=len(items), stalls=geometric(rng, 0.5)),
        max_cycles=2_000,
    )
    assert got == expected

``run`` watches each stream port of the component on the way: a beat once offered must stay offered,
unchanged, until it is taken (Amaranth's stream rules), and no stream may offer anything after the
last process has ended. Everything is sampled at the clock edge, so processes do not race.
"""

import inspect
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any

from amaranth.hdl import ClockDomain, Module, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.sim import Simulator

__all__ = [
    "STALLS",
    "AxiMemory",
    "AxiRuleError",
    "SimTimeoutError",
    "Stalls",
    "StreamRuleError",
    "WaitValid",
    "check_rules",
    "drive",
    "geometric",
    "no_stalls",
    "payload_of",
    "periodic",
    "run",
    "sink",
    "source",
    "stall_matrix",
    "streams_of",
]

Process = Callable[[Any], Coroutine[Any, Any, None]]


class SimTimeoutError(AssertionError):
    """The component did not finish within ``max_cycles``."""


class StreamRuleError(AssertionError):
    """A stream port broke a transfer rule, or offered a beat nobody expected."""


# 1. stall patterns: an iterator of booleans, one per cycle; True means "stand still in this cycle"

Stalls = Iterable[bool]


def no_stalls() -> Iterator[bool]:
    """Never stand still."""
    while True:
        yield False


def periodic(on: int = 3, off: int = 1) -> Iterator[bool]:
    """``on`` working cycles, then ``off`` idle ones, for ever (rate ``on / (on + off)``)."""
    if on < 1 or off < 0:
        raise ValueError(f"periodic stalls need on >= 1 and off >= 0, not on={on}, off={off}")
    while True:
        for _ in range(on):
            yield False
        for _ in range(off):
            yield True


def geometric(rng: random.Random, probability: float = 0.5) -> Iterator[bool]:
    """Each cycle is idle with ``probability``, drawn from ``rng`` (seed it: tests must repeat)."""
    if not 0 <= probability < 1:
        raise ValueError(f"stall probability must be in [0, 1), not {probability}")
    while True:
        yield rng.random() < probability


class WaitValid:
    """A sink pattern: ready only after valid was seen (proves valid waits for nobody)."""

    def __iter__(self) -> Iterator[bool]:
        return no_stalls()


#: Name -> pattern maker (takes a ``random.Random``); the columns of the stall matrix of a test.
STALLS: Mapping[str, Callable[[random.Random], Stalls]] = {
    "none": lambda _rng: no_stalls(),
    "periodic": lambda _rng: periodic(3, 1),
    "geometric": lambda rng: geometric(rng, 0.5),
}


def stall_matrix(
    seed: int | str = 0,
) -> dict[str, tuple[Callable[[], Stalls], Callable[[], Stalls]]]:
    """The stall matrix {none, in, out, both} x {periodic, geometric} and "sink waits for valid".

    Maps a name (a good test id) to (make input stalls, make output stalls).
    """
    rng = random.Random(seed)
    matrix: dict[str, tuple[Callable[[], Stalls], Callable[[], Stalls]]] = {
        "none": (no_stalls, no_stalls),
        "sink-waits-for-valid": (no_stalls, WaitValid),
    }
    for kind in ("periodic", "geometric"):

        def make(kind: str = kind) -> Stalls:
            return STALLS[kind](rng)

        matrix |= {
            f"in-{kind}": (make, no_stalls),
            f"out-{kind}": (no_stalls, make),
            f"both-{kind}": (make, make),
        }
    return matrix


# 2. processes


async def _until(ctx: Any, condition: Any) -> None:
    """Tick until a clock edge sees ``condition`` (``until`` would warn when a run is cut short)."""
    seen = 0
    while not seen:
        _clk, _rst, seen = await ctx.tick().sample(condition)


def payload_of(value: Any) -> Any:
    """A sampled payload as plain Python: int, dict of a struct, list of an array."""
    if isinstance(value, data.Const):
        layout = value.shape()
        if isinstance(layout, data.ArrayLayout):
            return [payload_of(value[i]) for i in range(layout.length)]
        return {str(name): payload_of(value[name]) for name, _field in layout}
    return value


def source(port: Any, items: Iterable[Any], stalls: Stalls | None = None) -> Process:
    """Send ``items`` (ints, or dicts for struct payloads) into a stream port, in order.

    In an idle cycle ``valid`` is low and the payload is left as it was.
    """

    async def process(ctx: Any) -> None:
        pattern = iter(no_stalls() if stalls is None else stalls)
        for item in items:
            while next(pattern):
                ctx.set(port.valid, 0)
                await ctx.tick()
            ctx.set(port.payload, item)
            ctx.set(port.valid, 1)
            await _until(ctx, port.ready)
        ctx.set(port.valid, 0)

    return process


def sink(
    port: Any,
    received: list[Any],
    *,
    count: int | None = None,
    until: Callable[[Any], bool] | None = None,
    stalls: Stalls | None = None,
) -> Process:
    """Append the payloads of a stream port to ``received``, as `payload_of` shows them.

    Ends after ``count`` beats, or after the beat for which ``until(payload)`` is true; exactly one
    of the two must be given. With ``stalls=WaitValid()`` ready is high only after valid was seen.
    """
    if (count is None) == (until is None):
        raise ValueError("a sink needs either count or until")

    async def process(ctx: Any) -> None:
        pattern = iter(no_stalls() if stalls is None else stalls)
        after_valid = isinstance(stalls, WaitValid)
        taken = 0
        while taken != count:
            if after_valid:
                ctx.set(port.ready, 0)
                await _until(ctx, port.valid)
                ready = True
            else:
                ready = not next(pattern)
            ctx.set(port.ready, int(ready))
            _clk, _rst, valid, payload = await ctx.tick().sample(port.valid, port.payload)
            if ready and valid:
                received.append(payload_of(payload))
                taken += 1
                if until is not None and until(received[-1]):
                    break
        ctx.set(port.ready, 0)

    return process


def drive(signal: Any, values: Iterable[int]) -> Process:
    """Set a plain input to one value a cycle; it keeps the last one."""

    async def process(ctx: Any) -> None:
        for value in values:
            ctx.set(signal, value)
            await ctx.tick()

    return process


# 3. observation


def streams_of(interface: Any) -> dict[str, tuple[wiring.Flow, Any]]:
    """Every stream port of a component: name -> (flow as the component declares it, port)."""
    found: dict[str, tuple[wiring.Flow, Any]] = {}

    def visit(path: str, signature: Any, flow: wiring.Flow, obj: Any) -> None:
        if isinstance(obj, Sequence) and not isinstance(obj, Value):
            for index, element in enumerate(obj):
                visit(f"{path}[{index}]", signature, flow, element)
        elif isinstance(signature, stream.Signature):
            found[path] = (flow, obj)
        elif isinstance(signature, wiring.FlippedSignature) and isinstance(
            signature.flip(), stream.Signature
        ):
            found[path] = (flow.flip(), obj)
        else:
            for name, member in signature.members.items():
                if member.is_signature:
                    inner = member.flow if flow is wiring.Out else member.flow.flip()
                    # Member.signature of an In() member is flipped already: undo, the flow says it
                    sub = member.signature
                    if member.flow is wiring.In:
                        sub = sub.flip()
                    visit(f"{path}.{name}" if path else name, sub, inner, getattr(obj, name))

    visit("", interface.signature, wiring.Out, interface)
    return found


class _Monitor:
    """Checks valid/payload hold of a set of streams, cycle by cycle."""

    def __init__(self, streams: Mapping[str, Any]) -> None:
        self.names = list(streams)
        self.signals: list[Any] = []
        for port in streams.values():
            self.signals += [
                Value.cast(port.valid),
                Value.cast(port.ready),
                Value.cast(port.payload),
            ]
        self.pending: dict[str, int] = {}
        self.state: dict[str, tuple[int, int]] = {}

    def step(self, values: Sequence[int], *, excused: bool, cycle: int) -> None:
        for index, name in enumerate(self.names):
            valid, ready, payload = values[3 * index : 3 * index + 3]
            self.state[name] = (valid, ready)
            if name in self.pending and not excused:
                if not valid:
                    raise StreamRuleError(f"{name}: valid fell before a transfer in cycle {cycle}")
                if payload != self.pending[name]:
                    raise StreamRuleError(
                        f"{name}: payload changed before a transfer in cycle {cycle}: "
                        f"{self.pending[name]:#x} -> {payload:#x}"
                    )
            if valid and not ready:
                self.pending[name] = payload
            else:
                self.pending.pop(name, None)

    def stuck(self) -> str:
        stuck = [name for name, state in self.state.items() if state == (1, 0)]
        starved = [name for name, state in self.state.items() if state == (0, 1)]
        return f"offered but not taken: {stuck or 'none'}; waited for: {starved or 'none'}"


def check_rules(**ports: Any) -> Process:
    """A background process that checks the stream rules on ports that ``run`` cannot see itself.

    For streams inside a larger test bench: ``run(..., background=[check_rules(mid=a.o_y)])``.
    """
    monitor = _Monitor(ports)

    async def process(ctx: Any) -> None:
        cycle = 0
        while True:
            _clk, _rst, *values = await ctx.tick().sample(*monitor.signals)
            monitor.step(values, excused=False, cycle=cycle)
            cycle += 1

    return process


# 4. memory behind an AXI4 manager


class AxiRuleError(AssertionError):
    """A manager broke a rule of AXI4."""


class AxiMemory:
    """AXI4 memory for managers in Amaranth's simulator, with a judge for what they send.

    ``run(dut, ..., background=[memory.reads(dut.m_axi)])``, and ``memory.writes(port)`` likewise.
    Bursts are answered in order, each ``latency`` cycles after its address (reads) or its last beat
    (writes) at the earliest, one beat a cycle, several bursts in flight. ``errors`` holds byte ranges
    that answer SLVERR. Every burst is checked: INCR, full beats, no 4 KiB crossing, WLAST in its
    place, payloads held while they wait. ``read_bursts`` and ``write_bursts`` list (address, beats);
    ``read_beats`` and ``responses`` count the beats read and the write responses that were taken.

    Parameters
    ----------
    contents
        The memory from address ``base`` on; writes change it.
    latency
        Cycles, or a function that draws them for each burst.
    stalls
        Channel name ("ar", "r", "aw", "w", "b") -> stall pattern of the memory's side.
    max_bursts
        Addresses the memory holds before it withholds ready.
    """

    def __init__(
        self,
        contents: bytearray,
        *,
        base: int = 0,
        latency: int | Callable[[], int] = 0,
        stalls: Mapping[str, Stalls] | None = None,
        errors: Sequence[range] = (),
        max_bursts: int = 64,
    ) -> None:
        self.contents = contents
        self.base = base
        self.errors = errors
        self.max_bursts = max_bursts
        self.read_bursts: list[tuple[int, int]] = []
        self.write_bursts: list[tuple[int, int]] = []
        self.read_beats = 0
        self.responses = 0
        self._latency = latency
        given = {} if stalls is None else stalls
        self._stalls = {
            channel: iter(given.get(channel, no_stalls())) for channel in ("ar", "r", "aw", "w", "b")
        }

    def _delay(self) -> int:
        return self._latency() if callable(self._latency) else self._latency

    def _fails(self, address: int, size: int) -> bool:
        return any(bad.start < address + size and address < bad.stop for bad in self.errors)

    def _place(self, address: int, size: int) -> slice:
        start = address - self.base
        if not 0 <= start <= len(self.contents) - size:
            raise AxiRuleError(f"address {address:#x} is outside the memory")
        return slice(start, start + size)

    def _check_burst(self, name: str, address: int, length: int, size: int, kind: int, beat: int):
        if kind != 1 or 1 << size != beat:
            raise AxiRuleError(f"{name}: only INCR bursts of full beats are expected")
        if address % beat:
            raise AxiRuleError(f"{name}: address {address:#x} is not a multiple of the beat")
        if address % 4096 + length * beat > 4096:
            raise AxiRuleError(f"{name}: {length} beats from {address:#x} cross a 4 KiB boundary")

    def reads(self, port: Any) -> Process:
        """The memory's side of the read channels."""
        beat = len(port.rdata) // 8
        held = _Hold("AR", [port.arvalid, port.arready, port.araddr, port.arlen])

        async def process(ctx: Any) -> None:
            bursts: list[tuple[int, int, int]] = []  # due cycle, address, beats
            sent = 0  # beats of the first burst
            valid = ready = 0
            cycle = 0
            while True:
                _clk, _rst, arvalid, _ready, addr, length, size, kind, rready = await ctx.tick().sample(
                    *held.signals, port.arsize, port.arburst, port.rready
                )
                held.step(arvalid, ready, addr, length)
                cycle += 1
                if arvalid and ready:
                    self._check_burst("AR", addr, length + 1, size, kind, beat)
                    self.read_bursts.append((addr, length + 1))
                    bursts.append((cycle + self._delay(), addr, length + 1))
                if valid and rready:
                    valid = 0
                    sent += 1
                    self.read_beats += 1
                    if sent == bursts[0][2]:
                        bursts.pop(0)
                        sent = 0
                stall = next(self._stalls["r"])
                if not valid and bursts and bursts[0][0] <= cycle and not stall:
                    address = bursts[0][1] + sent * beat
                    word = self.contents[self._place(address, beat)]
                    valid = 1
                    ctx.set(port.rdata, int.from_bytes(word, "little"))
                    ctx.set(port.rresp, 2 if self._fails(address, beat) else 0)
                    ctx.set(port.rlast, int(sent == bursts[0][2] - 1))
                ctx.set(port.rvalid, valid)
                ready = int(not next(self._stalls["ar"]) and len(bursts) < self.max_bursts)
                ctx.set(port.arready, ready)

        return process

    def writes(self, port: Any) -> Process:
        """The memory's side of the write channels."""
        beat = len(port.wdata) // 8
        held_aw = _Hold("AW", [port.awvalid, port.awready, port.awaddr, port.awlen])
        held_w = _Hold("W", [port.wvalid, port.wready, port.wdata, port.wstrb, port.wlast])

        async def process(ctx: Any) -> None:
            bursts: list[tuple[int, int]] = []  # address, beats
            beats: list[tuple[int, int, int]] = []  # data, strobes, last
            answers: list[tuple[int, int]] = []  # due cycle, response
            aw_ready = w_ready = valid = 0
            cycle = 0
            while True:
                _clk, _rst, awvalid, _r, addr, length, wvalid, _r, word, strb, last, *rest = (
                    await ctx.tick().sample(
                        *held_aw.signals, *held_w.signals, port.awsize, port.awburst, port.bready
                    )
                )
                size, kind, bready = rest
                held_aw.step(awvalid, aw_ready, addr, length)
                held_w.step(wvalid, w_ready, word, strb, last)
                cycle += 1
                if awvalid and aw_ready:
                    self._check_burst("AW", addr, length + 1, size, kind, beat)
                    self.write_bursts.append((addr, length + 1))
                    bursts.append((addr, length + 1))
                if wvalid and w_ready:
                    beats.append((word, strb, last))
                if bursts and len(beats) >= bursts[0][1]:
                    address, count = bursts.pop(0)
                    answers.append((cycle + self._delay(), self._store(address, beats[:count], beat)))
                    del beats[:count]
                if valid and bready:
                    valid = 0
                    self.responses += 1
                stall = next(self._stalls["b"])
                if not valid and answers and answers[0][0] <= cycle and not stall:
                    valid = 1
                    ctx.set(port.bresp, answers.pop(0)[1])
                ctx.set(port.bvalid, valid)
                aw_ready = int(not next(self._stalls["aw"]) and len(bursts) < self.max_bursts)
                w_ready = int(not next(self._stalls["w"]))
                ctx.set(port.awready, aw_ready)
                ctx.set(port.wready, w_ready)

        return process

    def _store(self, address: int, beats: Sequence[tuple[int, int, int]], beat: int) -> int:
        response = 0
        for index, (word, strb, last) in enumerate(beats):
            if last != (index == len(beats) - 1):
                raise AxiRuleError(f"W: WLAST is {last} in beat {index} of {len(beats)}")
            here = address + index * beat
            if self._fails(here, beat):
                response = 2
                continue
            place = self._place(here, beat)
            for lane, byte in enumerate(word.to_bytes(beat, "little")):
                if strb >> lane & 1:
                    self.contents[place.start + lane] = byte
        return response


class _Hold:
    """Valid and payload of an AXI channel must hold until ready."""

    def __init__(self, name: str, signals: list[Any]) -> None:
        self.name = name
        self.signals = signals
        self.pending: tuple[int, ...] | None = None

    def step(self, valid: int, ready: int, *payload: int) -> None:
        if self.pending is not None and (not valid or payload != self.pending):
            raise AxiRuleError(f"{self.name}: valid or payload changed before a transfer")
        self.pending = payload if valid and not ready else None


# 5. the run


def run(
    dut: Any,
    *processes: Process,
    max_cycles: int,
    background: Iterable[Process] = (),
    idle_cycles: int = 16,
    check: bool = True,
    excuse: Any = None,
    ports: Any = None,
) -> int:
    """Simulate ``dut`` until every process has ended; return the number of cycles that took.

    Parameters
    ----------
    processes
        ``async def process(ctx)``; the run ends when all have ended.
    max_cycles
        Watchdog. Beyond it `SimTimeoutError` names the cycle and the streams that stand still.
    background
        Processes that run along for ever (memories, monitors).
    idle_cycles
        After the end all output streams are made ready, and none may offer a beat for this many
        cycles. 0 switches that off.
    check
        Check the stream rules on every stream port of ``ports``.
    excuse
        Signal: in the cycle after it is 1 offered beats may vanish (a clear input).
    ports
        Component whose stream ports are watched, ``dut`` itself if not given. For test benches
        that wrap the component under test in a plain `Module`.
    """
    top = Module()
    top.domains.sync = ClockDomain()
    top.submodules.dut = dut
    watched = dut if ports is None else ports
    streams = streams_of(watched) if hasattr(watched, "signature") else {}
    outputs = {name: port for name, (flow, port) in streams.items() if flow is wiring.Out}
    monitor = _Monitor({name: port for name, (_flow, port) in streams.items()})
    excuse_signal = Signal() if excuse is None else excuse
    ended = 0
    cycles = 0

    def wrapped(process: Process) -> Process:
        async def body(ctx: Any) -> None:
            nonlocal ended
            await process(ctx)
            ended += 1

        return body

    async def supervise(ctx: Any) -> None:
        nonlocal cycles
        idle = 0
        excused = False
        while ended < len(processes) or idle < idle_cycles:
            if ended == len(processes):
                if idle == 0:
                    for port in outputs.values():
                        if isinstance(port.ready, Signal):
                            ctx.set(port.ready, 1)
                idle += 1
            else:
                cycles += 1
                if cycles > max_cycles:
                    raise SimTimeoutError(
                        f"simulation timed out after {max_cycles} cycles, {ended} of "
                        f"{len(processes)} processes ended; {monitor.stuck()}"
                    )
            _clk, _rst, clear, *values = await ctx.tick().sample(excuse_signal, *monitor.signals)
            if check:
                monitor.step(values, excused=excused, cycle=cycles)
            excused = bool(clear)
            if idle:
                extra = [
                    name for name, state in monitor.state.items() if name in outputs and state[0]
                ]
                if extra:
                    raise StreamRuleError(f"beats offered after the end of the test: {extra}")

    simulator = Simulator(top)
    simulator.add_clock(1e-6)
    for process in processes:
        if not inspect.iscoroutinefunction(process):
            raise TypeError(f"a process must be an async function of ctx, not {process!r}")
        simulator.add_testbench(wrapped(process))
    for process in background:
        simulator.add_testbench(process, background=True)
    simulator.add_testbench(supervise)
    simulator.run()
    return cycles
