"""Both GPU paths' model walk, on the CPU: the plain one against the float meaning, the packed one against the exact integers."""

from collections.abc import Callable

import pytest
import torch

from cosim.random_model import TINY, TINY_GROUPED, TINY_PLAIN, random_checkpoint, random_group_checkpoint
from golden.model import FloatModel, GoldenModel
from gpu.accounting import step_bytes, step_macs
from gpu.baseline import CpuBaseline, GpuBaseline, PackedGpuBaseline
from gpu.packed_model import PackedModel
from gpu.plain_model import PlainModel
from gpu.roofline import Roofline
from gpu.tuning import Choice, tuned
from host_driver.weights import Checkpoint

CPU = torch.device("cpu")
NO_GPU = not torch.cuda.is_available()
DEVICE = CPU if NO_GPU else torch.device("cuda")
IDS = [3, 77, 12, 150, 9, 42, 7]


@pytest.mark.parametrize(
    "make",
    [
        lambda: random_checkpoint(TINY, seed=2),  # sub-norms, SiLU, one KV head
        lambda: random_checkpoint(TINY_PLAIN, seed=3),  # ReLU2, two KV heads
        lambda: random_group_checkpoint(TINY_GROUPED, seed=4),
    ],
    ids=["ternary", "plain", "grouped"],
)
def test_plain_path_means_the_checkpoint(make: Callable[[], Checkpoint]) -> None:
    """Prefill in one and in two pieces, then decode: float32 everywhere, so close to float64 on the same weights."""
    checkpoint = make()
    exact = FloatModel(checkpoint).logits(IDS).float()
    scale = exact.abs().max()
    whole = PlainModel(checkpoint, 32, device=CPU, dtype=torch.float32)
    whole.step(IDS, 0)
    assert (whole.logits() - exact[-1]).abs().max() <= 1e-4 * scale
    pieces = PlainModel(checkpoint, 32, device=CPU, dtype=torch.float32)
    for first, last in ((0, 3), (3, 5), (5, 6), (6, 7)):
        pieces.step(IDS[first:last], first)
        assert (pieces.logits() - exact[last - 1]).abs().max() <= 1e-4 * scale
        assert pieces.token() == int(exact[last - 1].argmax())


def test_half_precision_stays_near() -> None:
    """BF16 weights and activations carry 8 bits: a few percent of the logits' range."""
    checkpoint = random_checkpoint(TINY, seed=2)
    exact = FloatModel(checkpoint).logits(IDS).float()
    model = PlainModel(checkpoint, 32, device=CPU, dtype=torch.bfloat16)
    model.step(IDS, 0)
    assert (model.logits() - exact[-1]).abs().max() <= 0.1 * exact.abs().max()


@pytest.mark.parametrize("model", ["plain", "packed"])
def test_sequence_beyond_the_cache_is_refused(model: str) -> None:
    checkpoint = random_checkpoint(TINY, seed=2)
    walk = (
        PlainModel(checkpoint, 16, device=CPU, dtype=torch.float32)
        if model == "plain"
        else PackedModel(checkpoint, 16, device=CPU)
    )
    with pytest.raises(ValueError, match="positions up to 16 need more than the 16 slots of the cache"):
        walk.step([1, 2], 15)


def test_packed_path_follows_the_exact_integers() -> None:
    """Ternary: golden has the same integers; float order and FP16 softmax weights may flip a rounding here and there.

    Wrong scales, offsets, rotations or masks would show at the size of the logits themselves (standard deviation 0.7).
    """
    checkpoint = random_checkpoint(TINY, seed=2)
    golden, packed = GoldenModel(checkpoint, slots=32), PackedModel(checkpoint, 32, device=DEVICE)
    for ids, position in ((IDS[:4], 0), (IDS[4:5], 4)):
        exact = golden.step(ids, position)[-1]
        packed.step(ids, position)
        assert (packed.logits() - exact).abs().max() <= 0.1 * exact.std()
        assert packed.token() == int(exact.argmax())


def test_packed_path_of_groups_stays_near_the_float_meaning() -> None:
    """int8 activations with a scale for each 32, 4-bit weights, a tied 8-bit head: a few percent of the logits."""
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=4)
    exact = FloatModel(checkpoint).logits(IDS[:5]).float()
    packed = PackedModel(checkpoint, 32, device=DEVICE)
    packed.step(IDS[:4], 0)
    assert (packed.logits() - exact[3]).abs().max() <= 0.15 * exact[3].std()
    packed.step(IDS[4:5], 4)
    assert (packed.logits() - exact[4]).abs().max() <= 0.15 * exact[4].std()
    assert packed.layer_bytes < 0.85 * TINY_GROUPED.linear_weights  # 5 bits a weight, and rows of 96 padded to 128


def test_bytes_and_operations_of_a_step() -> None:
    """TINY: 2 layers, 1 KV head of 24, vocabulary 301; float32 K and V of a slot are 192 bytes."""
    size = step_bytes(
        TINY, weights=1000, head=100, slot_bytes=192, row_bytes=352, tokens=3, position=5, heads=1
    )
    assert (size.weights, size.head) == (1000, 100)
    assert size.kv == 2 * 192 * (8 + 3)
    assert size.activations == 3 * 352 + 4 * 301
    assert size.total == 1000 + 100 + size.kv + size.activations
    attention = 2 * 2 * 72 * (6 + 7 + 8)
    assert step_macs(TINY, tokens=3, position=5, heads=1) == 3 * TINY.linear_weights + 301 * 88 + attention
    baseline = CpuBaseline(random_checkpoint(TINY), 16)
    assert baseline.bytes_of(1, 0, 1).weights == 4 * TINY.linear_weights
    assert baseline.macs_of(1, 0, 0) == TINY.linear_weights + 2 * 2 * 72


def test_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    ceiling = Roofline(bytes_per_s=100.0, macs_per_s=1000.0)
    assert ceiling.seconds(size=50, macs=10) == 0.5
    assert ceiling.seconds(size=50, macs=2000) == 2.0


def test_tuner_takes_the_largest_tiling_without_a_card() -> None:
    options = [Choice(rows=rows, columns=8, split=1, warps=1, stages=1) for rows in (4, 16, 8)]
    assert tuned("a key of this test", lambda: options, Choice.__repr__, CPU) == options[1]


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("factory", [GpuBaseline, PackedGpuBaseline])
def test_without_a_gpu_a_baseline_says_so(factory: type[GpuBaseline]) -> None:
    with pytest.raises(RuntimeError, match=f"device '{factory.name}' needs a CUDA GPU, and this machine has none"):
        factory.check()
    with pytest.raises(RuntimeError, match="use --device cpu"):
        factory(random_checkpoint(TINY), 16)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
@pytest.mark.parametrize("grouped", [False, True])
def test_gpu_paths_agree_with_the_cpu(grouped: bool) -> None:
    """Graphs, tensor cores and dp4a give what the float meaning gives, up to number formats; replays move on by themselves."""
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=4) if grouped else random_checkpoint(TINY, seed=2)
    exact = FloatModel(checkpoint).logits(IDS).float()
    cuda = torch.device("cuda")
    for walk in (
        PlainModel(checkpoint, 64, device=cuda, dtype=torch.float32),
        PlainModel(checkpoint, 64, device=cuda, dtype=torch.bfloat16),
        PlainModel(checkpoint, 64, device=cuda, dtype=torch.bfloat16, compiled=True),
        PackedModel(checkpoint, 64, device=cuda),
    ):
        walk.step(IDS[:4], 0)
        for place in range(4, len(IDS)):
            walk.step(IDS[place : place + 1], place)
            assert (walk.logits() - exact[place]).abs().max() <= 0.2 * exact[place].std()
