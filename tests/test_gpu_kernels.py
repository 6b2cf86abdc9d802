"""The packed kernels in Triton's interpreter (on a card where there is one): integer sums exact, final floats within a bound."""

import numpy as np
import pytest
import torch
from torch import Tensor

from golden import tlmm
from gpu import half, lookup
from gpu.gemm import gemm
from gpu.gemv import gemv, sums_like
from gpu.kv_attention import KvCache, append, attend
from gpu.packing import PLANE, TRITS_KIND, PackedMatrix, Scaling, pack
from gpu.plain_model import rope_angles, turn
from gpu.quantise import RELU2, SILU, Activations, quantise
from gpu.tuning import Choice
from host_driver.weights import GroupMatrix, RowMatrix, TernaryMatrix
from spec.config import ModelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTPUTS, INPUTS = 21, 416  # ragged: no multiple of a tile; 416 is 13 groups of 32
DATA = ("random", "largest", "alternating", "zeros", "one hot")
U = 2.0**-24
"""Unit roundoff of binary32."""

Matrix = TernaryMatrix | RowMatrix | GroupMatrix


def group_matrix(rng: np.random.Generator, bits: int, group: int, inputs: int = INPUTS, *, extreme: bool = False) -> GroupMatrix:
    """Random codes, or all codes the largest; scales of both signs."""
    shape = (OUTPUTS, inputs // group)
    codes = rng.integers(0, 1 << bits, (OUTPUTS, inputs), dtype=np.uint8)
    return GroupMatrix(
        codes=np.full_like(codes, (1 << bits) - 1) if extreme else codes,
        scale=rng.uniform(-1, 1, shape).astype(np.float16), minimum=rng.uniform(-2, 2, shape).astype(np.float16),
        bits=bits, group=group,
    )  # fmt: skip


def matrix_of(form: str, *, extreme: bool = False) -> Matrix:
    """A matrix of one of the FORMS."""
    rng = np.random.default_rng(len(form))
    if form in ("ternary", "trits"):
        values = rng.integers(-1, 2, (OUTPUTS, INPUTS)).astype(np.int8)
        signs = np.where(np.arange(OUTPUTS)[:, None] % 2, 1, -1) * np.ones_like(values)
        return TernaryMatrix(values=signs.astype(np.int8) if extreme else values, scale=0.7)
    if form == "rows":
        values = rng.integers(-121, 122, (OUTPUTS, INPUTS)).astype(np.int8)
        scale = rng.uniform(0, 1, OUTPUTS).astype(np.float16)
        return RowMatrix(values=np.full_like(values, 121) if extreme else values, scale=scale)
    bits, group = (int(part) for part in form.removeprefix("w").split("g"))
    return group_matrix(rng, bits, group, INPUTS // group * group, extreme=extreme)


FORMS = ("ternary", "trits", "rows", "w1g32", "w2g32", "w3g32", "w4g32", "w4g64", "w4g128", "w8g32")


def integers(matrix: Matrix) -> Tensor:
    """The weights' integers, int64."""
    return torch.from_numpy((matrix.codes if isinstance(matrix, GroupMatrix) else matrix.values).astype(np.int64))


def data(kinds: tuple[str, ...], inputs: int) -> Tensor:
    """int8 activations of each kind: (kinds, inputs)."""
    rng = np.random.default_rng(7)
    made = {
        "random": rng.integers(-127, 128, inputs),
        "largest": np.full(inputs, 127),
        "alternating": np.where(np.arange(inputs) % 2, -127, 127),
        "zeros": np.zeros(inputs),
        "one hot": np.where(np.arange(inputs) == inputs - 1, -127, 0),
    }
    return torch.from_numpy(np.stack([made[kind] for kind in kinds]).astype(np.int8))


def activations(q: Tensor, w: PackedMatrix) -> Activations:
    """Given integers as activations, with scales that differ from place to place."""
    grouped = w.scaling is Scaling.GROUP
    padded = torch.nn.functional.pad(q, (0, w.padded - q.shape[1]))
    sums = padded.to(torch.int32).unflatten(1, (-1, PLANE)).sum(-1, dtype=torch.int32)
    scale = torch.rand(sums.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    if not grouped:
        sums, scale = sums.sum(1, dtype=torch.int32), scale[:, 0].contiguous()
    return Activations(q=padded.to(DEVICE), scale=scale.to(DEVICE), sums=sums.to(DEVICE), grouped=grouped)


def exact_sums(matrix: Matrix, q: Tensor) -> Tensor:
    """Integer sums, by golden's ternary matmul where the weights are ternary: (tokens, outputs[, groups])."""
    weights = integers(matrix)
    if isinstance(matrix, TernaryMatrix):
        return tlmm.matmul(q, weights.to(torch.int8)[None])
    if isinstance(matrix, RowMatrix):
        return (q.to(torch.int64) @ weights.T).to(torch.int32)
    products = weights[None].unflatten(-1, (-1, PLANE)) * q.to(torch.int64)[:, None].unflatten(-1, (-1, PLANE))
    return products.sum(-1).to(torch.int32)


def meaning(matrix: Matrix, q: Tensor, a: Activations, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Results in float64 from the exact sums, and how far binary32 may be away: both (tokens, outputs).

    Matrix and row scales: a conversion and two products, each within U. Groups: five roundings a term at most, and an
    addition for each of the terms in whatever order.
    """
    scale = a.scale.cpu().double()
    if isinstance(matrix, TernaryMatrix):
        y = sums.double() * float(np.float32(matrix.scale)) * scale[:, None]
        return y, 4 * U * y.abs()
    if isinstance(matrix, RowMatrix):
        y = sums.double() * torch.from_numpy(matrix.scale.astype(np.float64)) * scale[:, None]
        return y, 4 * U * y.abs()
    groups = q.shape[1] // PLANE
    step = PLANE * groups // matrix.scale.shape[1] // PLANE
    s, z = (torch.from_numpy(part.astype(np.float64)).repeat_interleave(step, 1) for part in (matrix.scale, matrix.minimum))
    total = q.double().unflatten(1, (-1, PLANE)).sum(-1)[:, None]  # (tokens, 1, groups)
    scale = scale[:, None, :groups]
    first, second = s * sums.double() * scale, z * total * scale
    return (first + second).sum(-1), (groups + 8) * U * (first.abs() + second.abs()).sum(-1)


@pytest.mark.parametrize("form", FORMS)
def test_packing_keeps_every_code(form: str) -> None:
    matrix = matrix_of(form)
    w = pack(matrix, trits=form == "trits")
    inputs = matrix.shape[1]
    found = w.codes() + w.offset
    assert torch.equal(found[:, :inputs].long(), integers(matrix))
    assert w.padded >= inputs and w.padded % PLANE == 0
    assert (w.bits == TRITS_KIND) == (form == "trits")


def test_every_byte_of_five_trits_unpacks() -> None:
    places = np.arange(243)
    digits = np.stack([places // 3**i % 3 for i in range(5)], axis=1) - 1  # (243, 5)
    values = np.repeat(digits[:, :, None], PLANE, axis=2).reshape(243, -1).astype(np.int8)
    w = pack(TernaryMatrix(values=values, scale=1.0), trits=True)
    assert torch.equal(w.codes() - 1, torch.from_numpy(values).int())
    assert w.words.shape == (243, 8)


def test_matrices_of_two_kinds_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="different kinds"):
        pack(matrix_of("ternary"), matrix_of("rows"))
    with pytest.raises(ValueError, match="different groups or widths"):
        pack(matrix_of("w4g32"), matrix_of("w2g32"))


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("form", FORMS)
def test_gemm_sums_are_exact_and_results_within_their_bound(form: str, extreme: bool) -> None:
    """All kinds of activations at once, as the tokens of a batch; the K of the extreme ones in three parts."""
    matrix = matrix_of(form, extreme=extreme)
    w = pack(matrix, trits=form == "trits", device=DEVICE)
    q = data(DATA, matrix.shape[1])
    a = activations(q, w)
    choice = Choice(rows=32, columns=16, split=3 if extreme else 1, depth=1 if extreme else 2, warps=4, stages=2)
    sums = sums_like(w, len(DATA), DEVICE).fill_(-1)
    y = gemm(a, w, sums=sums, choice=choice).cpu()
    expected = exact_sums(matrix, q)
    assert torch.equal(sums.cpu(), expected)
    exact, bound = meaning(matrix, q, a, expected)
    assert ((y.double() - exact).abs() <= bound).all()
    assert not y[DATA.index("zeros")].any()


@pytest.mark.parametrize(("kind", "split"), [("random", 1), ("alternating", 2)])
@pytest.mark.parametrize("form", FORMS)
def test_gemv_sums_are_exact_and_results_within_their_bound(form: str, kind: str, split: int) -> None:
    matrix = matrix_of(form, extreme=kind != "random")
    w = pack(matrix, trits=form == "trits", device=DEVICE)
    q = data((kind,), matrix.shape[1])
    a = activations(q, w)
    sums = sums_like(w, 1, DEVICE).fill_(-1)
    y = gemv(a, w, sums=sums, choice=Choice(rows=16, columns=4, split=split, warps=1, stages=2)).cpu()
    expected = exact_sums(matrix, q)
    assert torch.equal(sums.cpu(), expected)
    exact, bound = meaning(matrix, q, a, expected)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("split", [1, 2])
def test_residual_is_added_once(split: int) -> None:
    for form in ("ternary", "w4g32"):
        matrix = matrix_of(form)
        w = pack(matrix, device=DEVICE)
        a = activations(data(("random",), matrix.shape[1]), w)
        choice = Choice(rows=32, columns=16 if split == 1 else 2, split=split, warps=1, stages=2)
        residual = torch.arange(OUTPUTS, dtype=torch.float32, device=DEVICE)[None] * 64
        for product in (gemv, gemm) if form == "ternary" else (gemm,):
            option = choice if product is gemv else Choice(rows=32, columns=16, split=split, warps=4, stages=2)
            plain = product(a, w, choice=option)
            assert torch.equal(product(a, w, choice=option, residual=residual), plain + residual)


def test_stacked_ternary_matrices_keep_their_own_scales() -> None:
    first, second = matrix_of("ternary"), matrix_of("ternary", extreme=True)
    second = TernaryMatrix(values=second.values, scale=0.31)
    w = pack(first, second, device=DEVICE)
    a = activations(data(DATA, INPUTS), w)
    y = gemm(a, w, choice=Choice(rows=64, columns=16, split=1, warps=4, stages=2)).cpu()
    for part, matrix in zip(y.split(OUTPUTS, dim=1), (first, second)):
        sums = exact_sums(matrix, data(DATA, INPUTS))
        exact, bound = meaning(matrix, data(DATA, INPUTS), a, sums)
        assert ((part.double() - exact).abs() <= bound).all()


def test_activations_that_do_not_belong_are_refused() -> None:
    w = pack(matrix_of("w4g32"))
    short = Activations(q=torch.zeros(1, 32, dtype=torch.int8), scale=torch.ones(1), sums=torch.zeros(1).int(), grouped=False)
    with pytest.raises(ValueError, match="a group matrix of 448 padded inputs takes activations of that length"):
        gemv(short, w)
    two = activations(data(("random", "zeros"), INPUTS), w)
    with pytest.raises(ValueError, match="a GEMV takes one token, not 2"):
        gemv(two, w)


@pytest.mark.parametrize("split", [1, 3])
def test_table_lookup_gives_the_same_sums(split: int) -> None:
    for extreme in (False, True):
        matrix = matrix_of("ternary", extreme=extreme)
        assert isinstance(matrix, TernaryMatrix)
        w = lookup.pack_lookup(matrix, DEVICE)
        q = data(("alternating" if extreme else "random",), INPUTS)
        a = activations(q, w.packed)
        sums = torch.empty(1, OUTPUTS, dtype=torch.int32, device=DEVICE)
        choice = Choice(rows=32, columns=16, split=split, warps=4, stages=1)
        y = lookup.lookup_gemv(a, w, sums=sums, choice=choice).cpu()
        expected = exact_sums(matrix, q)
        assert torch.equal(sums.cpu(), expected)
        exact, bound = meaning(matrix, q, a, expected)
        assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("form", ["w4g32", "w4g64", "w2g32"])
def test_half_activations_within_their_bound(form: str, tokens: int) -> None:
    """GEMV: products and sums in binary32. GEMM: a weight is rounded to FP16 twice, its sums are binary32 too."""
    matrix = matrix_of(form)
    assert isinstance(matrix, GroupMatrix)
    w = pack(matrix, device=DEVICE)
    inputs = matrix.shape[1]
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(3)).half()
    for split in (1, 2):
        if tokens == 1:
            choice = Choice(rows=32, columns=2, split=split, warps=1, stages=2)
        else:
            choice = Choice(rows=32, columns=16, split=split, warps=4, stages=2)
        y = half.half_matmul(half.prepare_half(x.to(DEVICE), w), w, choice=choice).cpu()
        step = inputs // matrix.scale.shape[1]
        s, z = (torch.from_numpy(part.astype(np.float64)).repeat_interleave(step, 1) for part in (matrix.scale, matrix.minimum))
        code_part = s * integers(matrix).double()
        size = x.double().abs() @ (code_part.abs() + z.abs()).T
        bound = (inputs + 8) * U * size + (0 if tokens == 1 else 2.0**-10 * size)
        assert ((y.double() - x.double() @ (code_part + z).T).abs() <= bound).all()


def test_half_activations_refuse_other_matrices() -> None:
    with pytest.raises(ValueError, match="codes of at most 4 bits, not 2 bits and matrix scales"):
        half.half_matmul(torch.zeros(1, 416, dtype=torch.float16), pack(matrix_of("ternary")))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("gate", [0, SILU, RELU2])
def test_quantise_norms_gates_and_rounds(grouped: bool, gate: int) -> None:
    """Against float64: an integer is at most half a step, and what binary32 adds to it, from the value it stands for."""
    generator = torch.Generator().manual_seed(5)
    tokens, inputs, padded = 4, 104, 160
    x = torch.randn(tokens, inputs * (2 if gate else 1), generator=generator) * torch.tensor([[1.0], [1e-4], [300.0], [0.0]])
    gain = torch.rand(inputs, generator=generator) + 0.5
    a = quantise(x.to(DEVICE), padded, grouped=grouped, gain=gain.to(DEVICE), eps=1e-5, gate=gate)
    t = x.double()
    if gate:
        first, second = t.chunk(2, dim=1)
        t = (first / (1 + torch.exp(-first)) if gate == SILU else torch.relu(first) ** 2) * second
    t = t * torch.rsqrt((t * t).mean(1, keepdim=True) + 1e-5) * gain.double()
    t = torch.nn.functional.pad(t, (0, padded - inputs)).unflatten(1, (-1, PLANE))
    largest = t.abs().amax(-1) if grouped else t.abs().amax((1, 2))
    q, scale = a.q.cpu().unflatten(1, (-1, PLANE)), a.scale.cpu().double()
    torch.testing.assert_close(scale, largest / 127, rtol=2e-6, atol=0)
    step = scale[..., None] if grouped else scale[:, None, None]
    assert ((q.double() * step - t).abs() <= (0.5 + 1e-3) * step).all()
    assert q.abs().max() == 127 and not q[3].any() and not a.q.cpu()[:, inputs:].any()
    sums = q.int().sum(-1)
    assert torch.equal(a.sums.cpu(), (sums if grouped else sums.sum(1)).int())


MODEL = ModelConfig(name="a", vocab=8, hidden=8, layers=2, heads=6, kv_heads=2, head_dim=24, ffn=8, max_positions=256)


def cache_and_queries(tokens: int, before: int) -> tuple[KvCache, Tensor, Tensor, Tensor, Tensor]:
    """A cache with random tokens in layer 1, and the int8 queries of the last ones."""
    generator = torch.Generator().manual_seed(before)
    cos, sin = rope_angles(MODEL, 256)
    cache = KvCache.empty(MODEL, 256, DEVICE)
    qkv = torch.randn(before + tokens, (MODEL.heads + 2 * MODEL.kv_heads) * MODEL.head_dim, generator=generator)
    q = q_scale = start = qkv
    for first, last in ((0, before), (before, before + tokens)):
        if first < last:
            start = torch.tensor([first], dtype=torch.int32, device=DEVICE)
            q, q_scale = append(MODEL, qkv[first:last].to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), start, cache, 1)
    return cache, q, q_scale, start, qkv


def test_append_turns_quantises_and_stores() -> None:
    cache, q, q_scale, _, qkv = cache_and_queries(3, before=2)
    cos, sin = rope_angles(MODEL, 256)
    heads = qkv.unflatten(1, (-1, MODEL.head_dim))
    turned = turn(heads, cos[:5], sin[:5])
    places = slice(0, 5)
    for found, scale, wanted in (
        (q.cpu(), q_scale.cpu(), turned[2:, :6]),
        (cache.k[1, :, places].transpose(0, 1).cpu(), cache.k_scale[1, :, places].T.cpu(), turned[:, 6:8]),
        (cache.v[1, :, places].transpose(0, 1).cpu(), cache.v_scale[1, :, places].T.cpu(), heads[:, 8:]),
    ):
        torch.testing.assert_close(scale, wanted.abs().amax(-1) / 127, rtol=1e-6, atol=0)
        assert ((found * scale[..., None] - wanted).abs() <= (0.5 + 1e-3) * scale[..., None]).all()
        assert (found.abs().amax(-1) == 127).all()
    assert not cache.k[0].any() and not cache.k[1, :, 5:].any() and not cache.v_scale[1, :, 5:].any()


@pytest.mark.parametrize(("tokens", "before", "split"), [(1, 0, 1), (1, 150, 1), (1, 150, 4), (1, 3, 4), (7, 70, 1)])
def test_attention_over_the_cache_within_its_bound(tokens: int, before: int, split: int) -> None:
    """FP16 softmax weights: 2^-11 each, and as much again for exp2 and the sums."""
    cache, q, q_scale, start, _ = cache_and_queries(tokens, before)
    out = attend(MODEL, q, q_scale, start, cache, 1, split=split).cpu().double().unflatten(1, (MODEL.heads, -1))
    queries = q.cpu().double() * q_scale.cpu().double()[..., None]
    keys, values = (
        (part[1].cpu().double() * scale[1].cpu().double()[..., None]).repeat_interleave(MODEL.group, dim=0)
        for part, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    scores = torch.einsum("thd,hsd->ths", queries, keys) * MODEL.head_dim**-0.5
    hidden = torch.arange(256)[None] > before + torch.arange(tokens)[:, None]
    p = torch.softmax(scores.masked_fill(hidden[:, None], float("-inf")), dim=-1)
    bound = 2.0**-10 * torch.einsum("ths,hsd->thd", p, values.abs()) + 1e-6
    assert ((out - torch.einsum("ths,hsd->thd", p, values)).abs() <= bound).all()
