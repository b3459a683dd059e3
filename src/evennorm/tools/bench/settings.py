"""Check what the user asked for, and keep it in one record that another process can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.bench.cases import PASSES, Case, checked, checked_counts
from evennorm.tools.bench.contestants import ENGINES


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured.

    Args:
        engine: one of ENGINES.
        cases: the arrays.
        passes: some of "forward" and "both".
        families: other layers, by their families; None for all that there are.
        threads: how many the engine may use.
        rounds: of each case and pass; None to choose by time.
        each_alone: whether to measure a second time, every contestant in a process of its own.

    Raises:
        InputError: a value outside its range, named.
    """

    engine: str
    cases: tuple[Case, ...]
    passes: tuple[str, ...] = ("forward", "both")
    families: tuple[str, ...] | None = None
    threads: int = 1
    rounds: int | None = None
    each_alone: bool = False

    def __post_init__(self) -> None:
        checked("engine", (self.engine,), ENGINES)
        checked("passes", self.passes, PASSES)
        checked_counts(threads=self.threads, rounds=self.rounds)
        if not self.cases:
            raise InputError("one or more cases; received none")
        for case in self.cases:
            if len(case.shape) < 2:
                raise InputError(f"a shape has a batch and a channel axis; received {case.shape}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings from what `as_dict` gave, perhaps read from JSON.

        Example:
            >>> settings = Settings("torch", (Case((8, 16)),))
            >>> Settings.from_dict(settings.as_dict()) == settings
            True
        """
        cases = tuple(Case(**{**case, "shape": tuple(case["shape"])}) for case in values["cases"])
        families = values["families"]
        families = None if families is None else tuple(families)
        return cls(**{**values, "cases": cases, "passes": tuple(values["passes"]), "families": families})

    def one_case(self, case: Case) -> Settings:
        return replace(self, cases=(case,))
