"""Say by which number runs are compared: its name, which direction is better, and how it is written.

Records hold the metric's own value. Where one value is held against another, `score` makes higher better.
"""

from __future__ import annotations

from dataclasses import dataclass

from evennorm.errors import ArgumentError

TASKS = ("classification", "multilabel", "regression")
DEFAULT_METRICS = {
    "classification": "accuracy",
    "multilabel": "binary_accuracy",
    "regression": "mean_absolute_error",
}
ALIASES = {
    "mae": "mean_absolute_error",
    "mse": "mean_squared_error",
    "rmse": "root_mean_squared_error",
    "r2": "r2_score",
    "acc": "accuracy",
}
LOWER_IS_BETTER = ("error", "loss", "entropy", "divergence", "hinge", "false_", "poisson", "cosh", "hamming_distance")
HIGHER_IS_BETTER = (
    *("accuracy", "auc", "auroc", "precision", "recall", "f1", "fbeta", "iou", "jaccard", "r2", "explained_variance"),
    *("similarity", "sensitivity", "specificity", "kappa", "matthews", "corrcoef", "concordance", "true_"),
)


@dataclass(frozen=True)
class Metric:
    """The metric that runs are judged by."""

    name: str
    higher: bool = True
    """Whether a higher value is better."""

    @property
    def is_share(self) -> bool:
        """Whether it is a share of right answers, shown in percent and its differences in percentage points."""
        return self.name.endswith("accuracy")

    @property
    def title(self) -> str:
        """The name in words: "mean absolute error"."""
        return self.name.replace("_", " ")

    @property
    def short(self) -> str:
        """The name for the head of a column: "MAE"."""
        return {name: alias.upper() for alias, name in ALIASES.items() if alias != "acc"}.get(self.name, self.title)

    @property
    def better(self) -> str:
        """The adjective for the better one of two."""
        return "above" if self.higher else "below"

    def score(self, value: float) -> float:
        """Return a score that is better where it is higher."""
        return value if self.higher else -value

    def step(self, samples: int) -> float:
        """Return what one test sample is worth, the least spread that is assumed between repeats; 0 where it is not
        known."""
        return 1 / samples if self.is_share else 0.0

    def text(self, value: float | None) -> str:
        """Format a value, or a difference, without its unit.

        Example:
            >>> Metric("accuracy").text(0.9667), Metric("mean_absolute_error", higher=False).text(0.03217)
            ('96.7', '0.0322')
        """
        if self.is_share:
            return f"{100 * (value or 0):.1f}"
        return rounded(value or 0, 3)

    @property
    def unit(self) -> str:
        """The unit of a difference, with a leading space: " points" for accuracies, else nothing."""
        return " points" if self.is_share else ""

    def inside(self, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        """Return an interval cut to the values that the metric can take."""
        return ends if ends is None or not self.is_share else (max(ends[0], 0.0), min(ends[1], 1.0))


def rounded(value: float, digits: int) -> str:
    """Format a value by so many significant digits, as a plain number up to a million.

    Example:
        >>> rounded(148.3, 2), rounded(0.04, 3)
        ('150', '0.04')
    """
    return f"{float(f'{value:.{digits}g}'):g}"


def metric_named(name: str) -> Metric:
    """Return the metric of a name, with its direction: a known one, or said by `:min` or `:max` after the name.

    Raises:
        ArgumentError: which direction is better is not known.

    Example:
        >>> metric_named("mae"), metric_named("my_cost:min").higher
        (Metric(name='mean_absolute_error', higher=False), False)
    """
    plain, _, direction = name.partition(":")
    plain = ALIASES.get(plain.lower(), plain)
    if direction in ("min", "max"):
        return Metric(plain, direction == "max")
    low = plain.lower()
    if not direction and any(word in low for word in LOWER_IS_BETTER):
        return Metric(plain, False)
    if not direction and any(word in low for word in HIGHER_IS_BETTER):
        return Metric(plain)
    raise ArgumentError(
        f"whether higher or lower is better is not known of the metric {name!r}; write {plain}:max or {plain}:min"
    )
