"""Keep the times of whole training steps, compare them, and write them to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.atomic import write_text
from evennorm.tools.bench.cases import checked_counts
from evennorm.tools.bench.contestants import OURS
from evennorm.tools.bench.network_cases import NetworkCase
from evennorm.tools.bench.rows import quartiles
from evennorm.tools.spread import Median, ratio

FORMAT = "evennorm bench networks 1"
"""Format of the JSON file."""

EAGER, WITHOUT = "torch eager", "without normalization"
COMPILED, OURS_COMPILED = "torch.compile", "evennorm, torch.compile"

COMPARED = {EAGER: OURS, COMPILED: OURS_COMPILED}
"""Which contestant of torch's is compared with which of ours."""


@dataclass(frozen=True)
class Step:
    """The training steps of one contestant: zero_grad, forward pass, loss, backward pass and the optimizer's step.

    Args:
        network: what was trained.
        contestant: by whose normalization.
        milliseconds: of one step, a sample per round; on a GPU by its own clock.
        host: on a GPU, the milliseconds until the host has handed a step over; empty on a CPU, where they are the same.
        first: seconds of the very first step.
        memory: bytes: on a CPU those that autograd keeps for the backward pass, on a GPU the peak of a step.
        reason: why nothing was measured.
    """

    network: NetworkCase
    contestant: str
    milliseconds: tuple[float, ...] = ()
    host: tuple[float, ...] = ()
    first: float | None = None
    memory: int | None = None
    reason: str | None = None

    @property
    def median(self) -> float:
        return median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.milliseconds)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.milliseconds:
            found["median"] = round(self.median, 5)
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Step:
        """Make a step from what `as_dict` gave, perhaps read from JSON."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        samples = {name: tuple(known[name]) for name in ("milliseconds", "host")}
        return cls(**{**known, **samples, "network": NetworkCase(**known["network"])})


class Steps:
    """All steps of a benchmark, to be compared within each network.

    Example:
        >>> case = NetworkCase("mlp", 16)
        >>> times = {"torch eager": (4.0, 8.0), "evennorm": (2.0, 4.0), "without normalization": (1.0, 2.0)}
        >>> steps = Steps(Step(case, name, samples) for name, samples in times.items())
        >>> theirs, ours, _ = steps.of(case)
        >>> steps.ratio(theirs), steps.share(theirs), steps.share(ours)
        (2.0, 0.75, 0.5)
    """

    def __init__(self, steps: Iterable[Step]):
        self.all = tuple(steps)
        self._by_name = {(step.network, step.contestant): step for step in self.all}

    @property
    def networks(self) -> list[NetworkCase]:
        return list(dict.fromkeys(step.network for step in self.all))

    def of(self, network: NetworkCase) -> list[Step]:
        return [step for step in self.all if step.network == network]

    def get(self, network: NetworkCase, contestant: str) -> Step | None:
        return self._by_name.get((network, contestant))

    def ratio(self, step: Step) -> float | None:
        """Return how many times as long as ours it takes, as the median over the rounds; None for ours, and where none is
        compared."""
        ours = self._by_name.get((step.network, COMPARED.get(step.contestant, "")))
        return None if ours is None else self._median(step, ours, lambda theirs, ours: theirs / ours)

    def spread(self, step: Step) -> Median | None:
        """Return the same ratio with its interval."""
        ours = self._by_name.get((step.network, COMPARED.get(step.contestant, "")))
        if ours is None or not step.milliseconds or len(step.milliseconds) != len(ours.milliseconds):
            return None
        return ratio(step.milliseconds, ours.milliseconds)

    def shares(self, step: Step) -> Median | None:
        """Return `share` with its interval."""
        without = self._by_name.get((step.network, WITHOUT))
        if self.share(step) is None or without is None:
            return None
        return Median.of([1 - rest / whole for whole, rest in zip(step.milliseconds, without.milliseconds, strict=False)])

    def share(self, step: Step) -> float | None:
        """Return the part of an eager step that its normalization takes, from the step without it: the median over the
        rounds."""
        without = self._by_name.get((step.network, WITHOUT))
        if without is None or step.contestant not in (EAGER, OURS):
            return None
        return self._median(step, without, lambda whole, rest: 1 - rest / whole)

    @staticmethod
    def _median(one: Step, other: Step, compare: Any) -> float | None:
        if not one.milliseconds or not other.milliseconds:
            return None
        return median(map(compare, one.milliseconds, other.milliseconds))


@dataclass(frozen=True)
class NetworkSettings:
    """Everything that decides what is measured.

    Args:
        networks: what trains.
        compiled: whether torch.compile takes part.
        threads: how many torch and evennorm may use.
        rounds: of each network; None to choose by time.

    Raises:
        InputError: a value outside its range, named.
    """

    networks: tuple[NetworkCase, ...]
    compiled: bool = False
    threads: int = 1
    rounds: int | None = None

    def __post_init__(self) -> None:
        checked_counts(threads=self.threads, rounds=self.rounds)
        if not self.networks:
            raise InputError("one or more networks; received none")

    @property
    def contestants(self) -> list[str]:
        """The contestants, in the order of tables."""
        return [EAGER, OURS, WITHOUT] + [COMPILED, OURS_COMPILED] * self.compiled

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSettings:
        """Make settings from what `as_dict` gave, perhaps read from JSON.

        Example:
            >>> settings = NetworkSettings((NetworkCase("mlp", 16),), rounds=3)
            >>> NetworkSettings.from_dict(settings.as_dict()) == settings
            True
        """
        return cls(**{**values, "networks": tuple(NetworkCase(**case) for case in values["networks"])})


@dataclass(frozen=True)
class NetworkBenchmark:
    """What was measured on a CPU, with everything that the figures depend on.

    `fused` has for each network what `evennorm.torch.convert` computes together with its normalizations, and how often.
    """

    settings: NetworkSettings
    environment: Mapping[str, Any]
    measured: tuple[Step, ...]
    fused: Mapping[str, Mapping[str, int]]

    @property
    def steps(self) -> Steps:
        return Steps(self.measured)

    def as_dict(self) -> dict[str, Any]:
        """Return the benchmark as JSON data."""
        steps = self.steps
        return {
            "format": FORMAT,
            "settings": self.settings.as_dict(),
            "environment": dict(self.environment),
            "fused": {network: dict(found) for network, found in self.fused.items()},
            "summaries": [
                {
                    "network": str(step.network),
                    "contestant": step.contestant,
                    "times ours": _rounded(steps.ratio(step)),
                    "share": _rounded(steps.share(step)),
                }
                for step in steps.all
            ],
            "steps": [step.as_dict() for step in steps.all],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkBenchmark:
        """Make a benchmark from what `as_dict` gave, perhaps read from JSON; summaries are computed from the steps.

        Raises:
            InputError: it is something else.
        """
        if values.get("format") != FORMAT:
            raise InputError(
                f"a file of evennorm bench --network has the format {FORMAT!r}; received {values.get('format')!r}"
            )
        return cls(
            NetworkSettings.from_dict(values["settings"]),
            values["environment"],
            tuple(Step.from_dict(step) for step in values["steps"]),
            values["fused"],
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `read` reads; each step is on one line.

        Raises:
            InputError: the file cannot be written.
        """
        values = self.as_dict()
        steps = ",\n".join(f"  {json.dumps(step)}" for step in values.pop("steps"))
        head = json.dumps(values, indent=1)
        write_text(path, f'{head[:-2]},\n "steps": [\n{steps}\n ]\n}}\n')


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def read(path: str | os.PathLike[str]) -> NetworkBenchmark:
    """Read the benchmark that `NetworkBenchmark.write` wrote.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        return NetworkBenchmark.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no result of evennorm bench --network: {error}") from error


def in_words(fused: Mapping[str, int]) -> str:
    """Describe what `convert` found in a network, as a sentence.

    Example:
        >>> in_words({"relu": 33, "add + relu": 16, "": 4})
        'convert: 53 normalizations, of which 33 with relu, 16 with add + relu, 4 alone'
    """
    parts = [f"{count} {f'with {steps}' if steps else 'alone'}" for steps, count in fused.items()]
    return f"convert: {sum(fused.values())} normalizations, of which {', '.join(parts)}"
