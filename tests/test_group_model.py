"""Group-quantised models on golden: packer, compiler and device against the model that reads the weights directly."""

import numpy as np
import pytest
import torch

from cosim.random_model import TINY_GROUPED, random_checkpoint, random_group_checkpoint, random_groups
from golden import group_dequant, lut_tensor_core, mixpe, multiplier
from golden.layout import unpack_groups
from golden.linear import half_bits
from golden.model import FloatModel, GoldenModel
from golden.norm import norm_float, norm_quantise_groups
from host_driver.device import Device
from host_driver.errors import InvalidRequest
from host_driver.group_pack import groups_payload_bytes, matrix_exponent, pack_groups
from host_driver.image import compile_checkpoint, memory_image
from host_driver.pack import segment
from host_driver.transport import open_device
from spec.config import K_GROUP, AcceleratorConfig, GroupMatmulConfig
from spec.layout import SegmentKind
from spec.presets import TEST, TEST_LUT, TEST_MIXPE, TEST_MULTIPLIER

ENGINES = [TEST_LUT, TEST_MIXPE, TEST_MULTIPLIER]


def engine(preset: AcceleratorConfig) -> GroupMatmulConfig:
    assert isinstance(preset.matmul, GroupMatmulConfig)
    return preset.matmul


@pytest.mark.parametrize("preset", ENGINES, ids=lambda preset: preset.name)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_packed_matrix_gives_back_every_number(preset: AcceleratorConfig, bits: int, group: int) -> None:
    matrix = random_groups(np.random.default_rng(bits), (50, 128), bits=bits, group=group)
    cfg = engine(preset)
    if bits not in cfg.weight_bits:
        with pytest.raises(ValueError, match="takes weights of"):
            pack_groups(matrix, cfg)
        return
    payload = pack_groups(matrix, cfg)
    assert payload.size == groups_payload_bytes(50, 128, bits, cfg)
    memory = segment(SegmentKind.GROUPS, payload, beat_bytes=preset.bus.weight_bytes, rows=bits)
    back = unpack_groups(memory, preset, 4, 2, bits, matrix_exponent(matrix))
    np.testing.assert_array_equal(back.codes[:50].numpy(), matrix.codes)
    assert not back.codes[50:].any() and not back.scale[50:].any() and not back.minimum[50:].any()
    for part, halves in ((back.scale, matrix.scale), (back.minimum, matrix.minimum)):
        np.testing.assert_array_equal(part[:50].numpy(), half_bits(halves, group // K_GROUP).numpy())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("codes", ["random", "zero", "largest"])
@pytest.mark.parametrize("x", ["random", "most", "least", "zero", "one hot"])
def test_engines_agree_on_the_sum_of_a_group(bits: int, codes: str, x: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    top = (1 << bits) - 1
    w = torch.randint(0, top + 1, (24, K_GROUP), dtype=torch.uint8, generator=generator)
    w = {"random": w, "zero": w * 0, "largest": torch.full_like(w, top)}[codes]
    a = torch.randint(-127, 128, (5, K_GROUP), dtype=torch.int8, generator=generator)
    hot = torch.zeros_like(a)
    hot[:, 7] = -127
    a = {"random": a, "most": torch.full_like(a, 127), "least": torch.full_like(a, -127), "zero": a * 0, "one hot": hot}[x]
    want = (a.to(torch.int64)[:, None] * w.to(torch.int64)[None]).sum(-1)
    sums = [lut_tensor_core.group_sums(a, w, bits), group_dequant.group_sums(a, w.T[None].to(torch.float32))[0]]
    if bits in (4, 8):
        sums += [mixpe.group_sums(a, w, bits), multiplier.group_sums(a, w, bits)]
    for found in sums:
        assert torch.equal(found.to(torch.int64), want)


def test_group_scales_never_clip_and_bound_the_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 192, generator=generator) * torch.exp(3 * torch.randn(7, 192, generator=generator))
    x[0] = 0
    x[1, 32:64] = 0
    x[2, 5] = 3e6
    q, d, scale = norm_quantise_groups(x, None, 0.0, 0.0)
    significand, field, top = group_dequant.act_parts(d)
    step = significand.double() * torch.exp2((field - top).double()) * scale.double()[:, None]
    error = (q.double() * step.repeat_interleave(K_GROUP, 1) - x.double()).abs()
    assert (error <= 0.5 * (1 + 1e-6) * step.repeat_interleave(K_GROUP, 1)).all()
    absmax = x.unflatten(-1, (-1, K_GROUP)).abs().amax(-1).double()
    assert (127 * step >= absmax * (1 - 1e-6)).all() and (127 * step <= absmax * (1 + 2**-7 + 1e-6)).all()
    gamma = torch.rand(192, generator=generator) + 0.5
    q, d, scale = norm_quantise_groups(x, gamma, torch.tensor(np.float32(1 / 192)), torch.tensor(np.float32(1e-5)))
    significand, field, top = group_dequant.act_parts(d)
    step = significand.double() * torch.exp2((field - top).double()) * scale.double()[:, None]
    error = (q.double() * step.repeat_interleave(K_GROUP, 1) - norm_float(x, gamma, 1e-5)).abs()
    assert (error <= 0.5 * (1 + 1e-4) * step.repeat_interleave(K_GROUP, 1)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_accumulator_is_within_its_bound(bits: int, spread: float) -> None:
    rng = np.random.default_rng(bits)
    matrix = random_groups(rng, (40, 256), bits=bits)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(6, 256, generator=generator) * torch.exp(spread * torch.randn(6, 256, generator=generator))
    q, d, scale = norm_quantise_groups(x, None, 0.0, 0.0)
    exponent = matrix_exponent(matrix)
    halves = [half_bits(part, 1) for part in (matrix.scale, matrix.minimum)]
    weights = group_dequant.GroupWeights(torch.tensor(matrix.codes), *halves, bits, exponent)
    acc = group_dequant.accumulate(q, d, weights)
    assert int(acc.abs().max()).bit_length() < engine(TEST_LUT).acc_bits
    found = acc.double() * group_dequant.weight_scale(exponent).double() * scale.double()[:, None]
    error = (found - group_dequant.matmul_float(q, d, scale, weights)).abs()
    assert (error <= group_dequant.bound(d, scale, exponent) * (1 + 1e-9)).all()


@pytest.mark.parametrize("preset", ENGINES, ids=lambda preset: preset.name)
def test_golden_device_computes_the_model(preset: AcceleratorConfig) -> None:
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=5)
    compiled = compile_checkpoint(checkpoint, preset, slots=32)
    device = Device(open_device("golden", preset.name, compiled.memory.limit), preset)
    device.load(compiled, memory_image(compiled, checkpoint))
    golden = GoldenModel(checkpoint, compiled.slots)
    prompt = [3, 200, 17, 228, 5]
    for position in range(0, len(prompt), compiled.tile):
        ids = prompt[position : position + compiled.tile]
        head = position + compiled.tile >= len(prompt)
        result = device.run_step(ids, position, head=head, logits=head)
        want = golden.step(ids, position)
    for position in range(len(prompt), 12):
        assert result.logits is not None
        np.testing.assert_array_equal(result.logits.view(np.uint32), want[0].numpy().view(np.uint32))
        result = device.run_step([result.tokens[0]], position, head=True, logits=True)
        want = golden.step([int(want[0].argmax())], position)


def test_golden_model_is_near_its_float_meaning() -> None:
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=2, bits=8)
    ids = [9, 4, 77, 150, 3, 220, 8]
    got = GoldenModel(checkpoint, 16).step(ids, 0, all_logits=True).double()
    want = FloatModel(checkpoint).logits(ids)
    assert float((got - want).abs().max()) < 0.03 * float(want.abs().max())


def test_ternary_and_grouped_models_need_their_presets() -> None:
    with pytest.raises(InvalidRequest, match=r"group-quantised.*presets for them: test_lut"):
        compile_checkpoint(random_group_checkpoint(TINY_GROUPED), TEST)
    with pytest.raises(InvalidRequest, match=r"ternary.*presets for them: test, sim"):
        compile_checkpoint(random_checkpoint(TINY_GROUPED), TEST_LUT)
    with pytest.raises(InvalidRequest, match="3 bits, engine mixpe of preset 'test_mixpe' takes 4, 8"):
        compile_checkpoint(random_group_checkpoint(TINY_GROUPED, bits=3), TEST_MIXPE)
