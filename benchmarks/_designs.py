"""Simulate designs for adding repeats, and ways to choose a learning rate; write both tables into docs/compare.md.

    python benchmarks/_designs.py

Differences of pairs are normal with spread 1, six pairs are held together, 20 repeats at most. Needs NumPy and SciPy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _docs_figures import replaced

from evennorm.tools.compare.confidence import looks_until, quantile
from evennorm.tools.compare.statistics import pair_confidence

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compare.md"
PAIRS = 6
LOOKS = looks_until(20)
STUDIES = 20_000
OTHER_SHARES = (0.15, 0.10, 0.15, 0.20, 0.40)
PRIOR = 10.0
"""Variance of the mixture's prior over the standardized difference; of 1, 4, 10, 30 and 100 it does well throughout."""


def statistics(differences: np.ndarray, look: int) -> np.ndarray:
    """Student's t, without its sign, of the first `look` columns."""
    first = differences[:, :look]
    return np.abs(first.mean(axis=1)) / (first.std(axis=1, ddof=1) / look**0.5)


def correlated(random: np.random.Generator, error: float) -> dict[int, float]:
    """Limits that spend the other shares exactly, found by simulation without a difference."""
    null = random.normal(size=(1_000_000, LOOKS[-1])).astype("float32")
    alive, limits = np.ones(len(null), bool), {}
    for look, share in zip(LOOKS, OTHER_SHARES, strict=True):
        t = statistics(null, look)
        limits[look] = float(np.sort(t[alive])[-int(error * share * len(null)) - 1])
        alive &= t <= limits[look]
    return limits


def mixture(look: int, error: float) -> float:
    """The limit of the scale-invariant Gaussian mixture (Lai 1976; Wang & Ramdas 2023) after so many repeats."""

    def evidence(t: float) -> float:
        ratio = np.log1p(t * t / (look - 1)) - np.log1p(t * t / ((look - 1) * (1 + look * PRIOR)))
        return float(look / 2 * ratio - np.log1p(look * PRIOR) / 2)

    low, high = 0.0, 1e6
    if evidence(high) < -np.log(error):
        return np.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if evidence(middle) < -np.log(error) else (low, middle)
    return high


def table_of_designs(random: np.random.Generator) -> list[str]:
    error = 0.05 / PAIRS
    designs = {
        "5 fixed": {5: quantile(pair_confidence(PAIRS), 4)},
        "20 fixed": {20: quantile(pair_confidence(PAIRS), 19)},
        "this design": {look: quantile(pair_confidence(PAIRS, look), look - 1) for look in LOOKS},
        "correlation of looks used": correlated(random, error),
        "mixture": {look: mixture(look, error) for look in LOOKS},
    }
    lines = [f"| difference | {' | '.join(designs)} |", "| ---: |" + " ---: |" * len(designs)]
    for effect in (0, 0.5, 1, 1.5, 2, 3, 5, 8):
        drawn = random.normal(effect, 1, (STUDIES, LOOKS[-1]))
        cells = []
        for limits in designs.values():
            shown, repeats = np.zeros(STUDIES, bool), np.full(STUDIES, float(max(limits)))
            for look, limit in limits.items():
                now = ~shown & (statistics(drawn, look) > limit)
                repeats[now] = look
                shown |= now
            cells.append(f"{100 * shown.mean():.1f} %, {repeats.mean():.1f}")
        lines.append(f"| {effect:g} | {' | '.join(cells)} |")
    return lines


def table_of_choices(random: np.random.Generator) -> list[str]:
    """False claims for a pair of placements of one true accuracy, by the way in which each one's rate is chosen."""
    lines = [
        "| rates, luck shared by validation and test | each repeat by the others, 20 fixed | one for all, 20 fixed "
        "| one for all, this design |",
        "| --- | ---: | ---: | ---: |",
    ]
    for first, second in ((2, 2), (1, 2), (1, 6)):
        for shared in (0.0, 0.5, 0.9):
            placements = [_runs(random, rates, shared) for rates in (first, second)]
            found = [_false(placements, others, looks) for others, looks in ((True, 0), (False, 0), (False, 1))]
            cells = " | ".join(f"{100 * share:.1f} %" for share in found)
            lines.append(f"| {first} equal and {second} equal, {100 * shared:.0f} % | {cells} |")
    return lines


def _runs(random: np.random.Generator, rates: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    run, test, validation = random.normal(size=(3, STUDIES, rates, LOOKS[-1]))
    return tuple(shared**0.5 * run + (1 - shared) ** 0.5 * part for part in (test, validation))


def _false(placements: list[tuple[np.ndarray, np.ndarray]], by_the_others: bool, sequential: int) -> float:
    shown = np.zeros(STUDIES, bool)
    for look in LOOKS if sequential else LOOKS[-1:]:
        scores = []
        for test, validation in placements:
            values = validation[..., :look]
            total = values.sum(axis=-1, keepdims=True)
            chosen = (total - values if by_the_others else np.broadcast_to(total, values.shape)).argmax(axis=1)
            scores.append(np.take_along_axis(test[..., :look], chosen[:, None], axis=1)[:, 0])
        confidence = pair_confidence(1, look if sequential else None)
        shown |= statistics(scores[0] - scores[1], look) > quantile(confidence, look - 1)
    return float(shown.mean())


def main() -> None:
    """Simulates both and rewrites their blocks."""
    random = np.random.default_rng(0)
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("designs", table_of_designs(random)), ("choices", table_of_choices(random))):
        print("\n".join(lines), end="\n\n")
        text = replaced(text, name, "\n".join(["", *lines, ""]), PAGE.name)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
