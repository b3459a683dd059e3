"""The page that puts evennorm beside other libraries: its trials tell right from wrong, and it is whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import comparison  # noqa: E402
from _layers import EPSILON, Torch  # noqa: E402


class InNumpy:
    """A layer that computes in float64, and lets a batch that is not finite or empty do what `broken` says."""

    name, kind = "in NumPy", dict

    def __init__(self, broken: str = "skip") -> None:
        self.broken, self.mean, self.variance = broken, np.zeros(comparison.CHANNELS), np.ones(comparison.CHANNELS)

    def train(self, x: np.ndarray, mask: Any = None) -> np.ndarray:
        good = x.size > 0 and bool(np.isfinite(x).all())
        if not good and self.broken == "refuse":
            raise ValueError
        values = x[mask] if mask is not None and self.broken != "ignore" else x.reshape(-1, x.shape[-1])
        mean, variance = (values.astype(np.float64).sum(0) / max(len(values), 1), values.astype(np.float64).var(0))
        if good or self.broken == "follow":
            self.mean, self.variance = 0.9 * self.mean + 0.1 * mean, 0.9 * self.variance + 0.1 * variance
        return (x - mean) / np.sqrt(variance + EPSILON)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean, self.variance


@pytest.mark.parametrize(
    ("broken", "word"), [("skip", "skipped"), ("follow", "NaN for good"), ("refuse", "refused: ValueError")]
)
def test_what_a_broken_batch_does(broken: str, word: str) -> None:
    assert comparison.nan_batch(lambda: InNumpy(broken)) == word


def test_what_one_row_and_a_mask_do() -> None:
    assert comparison.one_value(InNumpy) == "follow it"
    assert comparison.masked(InNumpy) == "yes"
    assert comparison.masked(lambda: InNumpy("ignore")) == "wrong"
    assert comparison.error(InNumpy) < 1e-10


def test_torch_and_evennorm_on_torch() -> None:
    ours, theirs = (comparison.measure(lambda ours=ours: Torch(ours)) for ours in (True, False))
    assert ours["error"] < 1e-6
    assert (ours["nan"], ours["empty"], ours["mask"], ours["residual"]) == ("skipped", "skipped", "yes", "yes")
    assert (theirs["nan"], theirs["empty"], theirs["mask"], theirs["residual"]) == ("NaN for good", "skipped", "no", "no")
    assert (round(ours["alone"], 1), round(theirs["alone"], 1)) == (1.0, 2.0)


def test_the_page_is_of_this_script() -> None:
    """Its words are; the figures are those of the machine that it names."""
    text = (ROOT / "docs" / "comparison.md").read_text()
    for words in (comparison.HEAD, *(words for words, _ in comparison.SECTIONS), comparison.BY_HAND):
        assert words.strip("\n") in text
    rows = [line.split(" | ")[0].strip("| ") for line in text.split("## What a layer takes")[0].splitlines() if "| " in line]
    assert {
        "evennorm.torch",
        "torch.nn",
        "Keras on JAX",
        "Flax nnx",
        "Flax linen",
        "Haiku",
        "Equinox",
        "evennorm.haiku",
        "evennorm.equinox",
    } <= set(rows)
