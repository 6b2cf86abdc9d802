"""From logits to the next token: greedy, temperature, top-k, top-p. A seed makes it repeatable."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from host_driver.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Temperature 0 is greedy, which the device does by itself. Filters apply in the order top-k, top-p."""

    temperature: float = 0.0
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InvalidRequest(f"temperature must be 0 or more, not {self.temperature:g}")
        if self.top_k < 0:
            raise InvalidRequest(f"top-k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top-p must be above 0 and at most 1, not {self.top_p:g}")
        if self.seed is not None and self.seed < 0:
            raise InvalidRequest(f"seed must be 0 or more, not {self.seed}")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise InvalidRequest("top-k and top-p need a temperature above 0: at 0 the largest logit always wins")

    @property
    def greedy(self) -> bool:
        """No chance involved: the device's argmax is the answer."""
        return self.temperature == 0


def probabilities(logits: NDArray[np.float32], config: SamplingConfig) -> NDArray[np.float64]:
    """(vocab,) probabilities after temperature and filters; of equal logits the lower id counts as the larger."""
    order = np.argsort(-logits, kind="stable")
    if config.top_k:
        order = order[: config.top_k]
    scaled = logits[order].astype(np.float64) / config.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if config.top_p < 1:
        # the smallest set of most likely tokens that reaches top_p: all before whom it is not yet reached
        kept = np.cumsum(weights) - weights < config.top_p
        order, weights = order[kept], weights[kept] / weights[kept].sum()
    result = np.zeros(len(logits))
    result[order] = weights
    return result


class Sampler:
    """Draws tokens. Two samplers of one seed draw the same tokens from the same logits."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._rng = np.random.default_rng(config.seed)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token; greedy takes the largest logit, the lowest id on a tie."""
        if self.config.greedy:
            return int(np.argmax(logits))
        return int(self._rng.choice(len(logits), p=probabilities(logits, self.config)))
