"""Define what a check looks at and what it says: the subject, rules with their permanent codes, findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from evennorm import notebook
from evennorm.models.network import Network, Step

if TYPE_CHECKING:
    from evennorm.tools.check.measure import Measurements


LEVELS = ("error", "warning", "note")
"""Levels, the worst first."""


@dataclass(frozen=True)
class Subject:
    """A network, and what is known about its training."""

    network: Network
    batch_size: int | None = None
    """Samples of a training batch, of all replicas together."""
    replicas: int = 1
    steps: int | None = None
    """Training steps so far; None: those that the optimizer or the layers have counted."""
    measurements: Measurements | None = None


@dataclass(frozen=True)
class Finding:
    """Something about one layer that looks wrong."""

    code: str
    name: str
    """The rule's name: "bias-before-norm"."""
    level: str
    """"error", "warning" or "note"."""
    layer: str
    """The layer's path in the model; "" for the whole model."""
    what: str
    why: str
    remedy: str
    fixable: bool = False
    """Whether --fix can fix it, some only with data."""

    def as_dict(self) -> dict[str, object]:
        return {field: getattr(self, field) for field in self.__dataclass_fields__}

    def _repr_html_(self) -> str:
        lines = [f"{self.layer or 'the model'}: {self.what}", self.why, f"What to do: {self.remedy}"]
        return notebook.titled(f"{self.code} {self.level} ({self.name})", notebook.paragraphs(lines))


@dataclass(frozen=True)
class Rule:
    """One mistake that a subject can show."""

    code: str
    """Permanent: it never means anything else."""
    name: str
    level: str
    title: str
    """One line: what the mistake is."""
    why: str
    """Why it matters, in one sentence."""
    search: Callable[[Subject], Iterator[Found]]
    fixable: bool = False

    def findings(self, subject: Subject) -> Iterator[Finding]:
        for found in self.search(subject):
            yield Finding(
                self.code,
                self.name,
                found.level or self.level,
                found.layer,
                found.what,
                found.why or self.why,
                found.remedy,
                self.fixable,
            )


@dataclass(frozen=True)
class Found:
    """What a rule's search yields: the part of a finding that differs from layer to layer."""

    layer: str
    what: str
    remedy: str
    why: str = ""
    level: str = ""


Search = Callable[[Subject], Iterator[Found]]


def rule(code: str, name: str, level: str, title: str, why: str, fixable: bool = False) -> Callable[[Search], Rule]:
    """Make a rule of the function that searches for it."""
    return lambda search: Rule(code, name, level, title, why, search, fixable)


def grouped(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Yield findings of one code and one level together, in the order of codes, errors first."""
    key = lambda finding: (finding.code, LEVELS.index(finding.level))  # noqa: E731
    for _, group in groupby(sorted(findings, key=key), key=key):
        yield list(group)


def counted(findings: Iterable[Finding]) -> dict[str, int]:
    """Return how many findings there are of each level that occurs, errors first."""
    levels = [finding.level for finding in findings]
    return {level: levels.count(level) for level in LEVELS if level in levels}


def in_words(findings: Iterable[Finding]) -> str:
    """Return how many there are of each level: "1 error, 2 notes"."""
    counts = (f"{number:,} {level}{'' if number == 1 else 's'}" for level, number in counted(findings).items())
    return ", ".join(counts) or "Nothing looks wrong."


def html_table(findings: Iterable[Finding]) -> str:
    """Return a table for a notebook, with a row for each finding."""
    head = ("code", "level", "layer", "what", "what to do")
    return notebook.table(head, [(f.code, f.level, f.layer or "the model", f.what, f.remedy) for f in findings])


def each_layer(network: Network) -> Iterator[Step]:
    """Yield every layer of batch normalization, at its first call."""
    seen: set[str] = set()
    for step in network.batch_norms():
        if step.layer not in seen:
            seen.add(step.layer)
            yield step


def written(network: Network, decay: float) -> str:
    """Return `decay` as the momentum argument of the network's framework."""
    return f"momentum={decay if network.framework != 'torch' else 1 - decay:.4g}"


def channels(indices: list[int], total: int) -> str:
    """Format some channels: "3 of 64 channels (0, 5, 9)"."""
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"{len(indices):,} of {total:,} channels ({shown})" if len(indices) < total else f"all {total:,} channels"
