"""Fixtures and rules of every test."""

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

SEED = pytest.StashKey[int]()

# Triton decides when a kernel is defined who runs it: without a card, its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lutra")
    group.addoption("--seed", type=int, help="seed of the fixture `rng`, to repeat a failure")
    group.addoption(
        "--no-skips",
        action="store_true",
        help="a skipped test fails (CI: a missing tool is no excuse); tests marked `gpu` may still skip",
    )


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers seeded from the test's name, so that each test has its own and repeats it."""
    seed = request.config.getoption("--seed")
    if seed is None:
        seed = zlib.crc32(request.node.nodeid.encode())
    request.node.stash[SEED] = seed
    return random.Random(seed)


@pytest.fixture
def numbers(rng: random.Random) -> np.random.Generator:
    """The same as numpy has them."""
    return np.random.default_rng(rng.getrandbits(64))


@pytest.fixture
def generator(rng: random.Random) -> torch.Generator:
    """The same as PyTorch has them."""
    return torch.Generator().manual_seed(rng.getrandbits(48))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and SEED in item.stash:
        report.sections.append(("rng", f"repeat with --seed {item.stash[SEED]}"))
    strict = item.config.getoption("--no-skips") and item.get_closest_marker("gpu") is None
    if strict and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which --no-skips forbids: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if report.skipped and collector.config.getoption("--no-skips"):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, which --no-skips forbids: {report.longrepr}"
    return report
