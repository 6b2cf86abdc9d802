"""Multiplier engine: golden against exact sums, RTL against exact sums, cycle by cycle; on Verilator."""

from cosim.nibble_core_tests import NibbleCoreTests
from golden import multiplier
from rtl.multiplier import MultiplierCore
from spec.config import GroupEngine


class TestMultiplier(NibbleCoreTests):
    engine = GroupEngine.MULTIPLIER
    core = MultiplierCore
    group_sums = staticmethod(multiplier.group_sums)
