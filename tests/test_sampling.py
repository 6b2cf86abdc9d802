"""Sampling: the distribution is the stated one, filters keep what they say, a seed repeats."""

import numpy as np
import pytest

from cosim.checkpoint_folder import byte_tokenizer
from host_driver.errors import InvalidRequest
from host_driver.sampling import Sampler, SamplingConfig, probabilities
from host_driver.tokenizer import TextStream, TextTokenizer

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], dtype=np.float64)).astype(np.float32)


def test_temperature_1_gives_the_softmax() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, SamplingConfig(temperature=1)), np.exp(LOGITS), rtol=1e-6)


def test_temperature_sharpens_by_powers() -> None:
    powered = np.exp(LOGITS.astype(np.float64)) ** 2
    np.testing.assert_allclose(
        probabilities(LOGITS, SamplingConfig(temperature=0.5)), powered / powered.sum(), rtol=1e-6
    )


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_most_likely(top_k: int, kept: list[int]) -> None:
    result = probabilities(LOGITS, SamplingConfig(temperature=1, top_k=top_k))
    assert np.flatnonzero(result).tolist() == kept
    assert result.sum() == pytest.approx(1)
    assert result[1] / result[kept[-1]] == pytest.approx(0.4 / float(np.exp(LOGITS[kept[-1]])), rel=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    result = probabilities(LOGITS, SamplingConfig(temperature=1, top_p=top_p))
    assert np.flatnonzero(result).tolist() == kept
    assert result.sum() == pytest.approx(1)


def test_top_p_counts_what_top_k_left() -> None:
    result = probabilities(LOGITS, SamplingConfig(temperature=1, top_k=2, top_p=0.62))
    assert np.flatnonzero(result).tolist() == [1, 3]  # 0.4 / 0.65 = 0.615 alone is not enough
    result = probabilities(LOGITS, SamplingConfig(temperature=1, top_k=2, top_p=0.61))
    assert np.flatnonzero(result).tolist() == [1]


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingConfig(temperature=1, seed=5))
    draws = np.bincount([sampler.sample(LOGITS) for _ in range(20_000)], minlength=5)
    expected = 20_000 * np.exp(LOGITS.astype(np.float64))
    chi_square = float(((draws - expected) ** 2 / expected).sum())
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001; the seed makes the draws fixed


def test_same_seed_same_tokens_and_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=1.3, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    sampler = Sampler(SamplingConfig())
    assert sampler.sample(np.array([1, 3, 2, 3], dtype=np.float32)) == 1


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([-1e30, 3e38, -3e38], dtype=np.float32)
    assert probabilities(logits, SamplingConfig(temperature=0.01)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, not nan"),
        ({"temperature": 1, "top_k": -1}, r"top-k must be 0 \(off\) or more, not -1"),
        ({"temperature": 1, "top_p": 0.0}, "top-p must be above 0 and at most 1, not 0"),
        ({"temperature": 1, "top_p": 1.5}, "top-p must be above 0 and at most 1, not 1.5"),
        ({"temperature": 1, "seed": -3}, "seed must be 0 or more, not -3"),
        ({"top_k": 5}, "top-k and top-p need a temperature above 0: at 0 the largest logit always wins"),
    ],
)
def test_option_out_of_range_is_refused(config: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}$"):
        SamplingConfig(**config)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "text", ["plain text", "naïve café — “quotes”", "日本語と emoji 🦦🦦 end", "\n\ttabs  and   spaces "]
)
@pytest.mark.parametrize("bos_id", [None, 7])
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(text: str, bos_id: int | None) -> None:
    tokenizer = TextTokenizer(byte_tokenizer(), bos_id=bos_id)
    prompt = tokenizer.encode("Once upon ")
    assert (prompt[0] == 7) == (bos_id is not None)
    ids = TextTokenizer(byte_tokenizer(), bos_id=None).encode(text * 5)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text * 5


def test_unfinished_character_shows_at_the_end() -> None:
    tokenizer = TextTokenizer(byte_tokenizer(), bos_id=None)
    ids = tokenizer.encode("a🦦")
    stream = TextStream(tokenizer, tokenizer.encode("x"))
    assert [stream.add(token) for token in ids[:-1]] == ["a", "", "", ""]
    assert stream.end() == "\ufffd"
