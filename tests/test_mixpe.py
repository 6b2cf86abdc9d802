"""MixPE: golden against exact sums, RTL against exact sums, cycle by cycle; on Verilator."""

from cosim.nibble_core_tests import NibbleCoreTests
from golden import mixpe
from rtl.mixpe import MixPe
from spec.config import GroupEngine


class TestMixPe(NibbleCoreTests):
    engine = GroupEngine.MIXPE
    core = MixPe
    group_sums = staticmethod(mixpe.group_sums)
