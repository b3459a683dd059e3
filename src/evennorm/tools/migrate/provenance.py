"""Determine which release and backend wrote a file, and how that is known."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from evennorm.errors import ArgumentError, InputError
from evennorm.tools.migrate.records import OldFile, OldLayer, OldModel

RELEASES = tuple((1, minor, patch) for minor, last in ((0, 8), (1, 2), (2, 2)) for patch in range(last + 1))
"""All releases of Keras 1."""

Version = tuple[int, int, int]


class Fourth(Enum):
    """The meaning of a batch normalization's fourth weight, and how that Keras used it."""

    STANDARD_DEVIATION = "a standard deviation s, used as s + epsilon"
    VARIANCE_EPSILON_OUTSIDE = "a variance v, used as sqrt(v) + epsilon"
    VARIANCE = "a variance v, used as sqrt(v + epsilon)"


def fourth_weight(version: Version, theano: bool) -> Fourth:
    """Return the meaning of the fourth weight, by release and backend.

    Example:
        >>> fourth_weight((1, 0, 6), theano=True), fourth_weight((1, 0, 6), theano=False)
        (<Fourth.STANDARD_DEVIATION: 'a standard deviation s, used as s + epsilon'>,
         <Fourth.VARIANCE: 'a variance v, used as sqrt(v + epsilon)'>)
    """
    if version <= (1, 0, 5) or (version == (1, 0, 6) and theano):
        return Fourth.STANDARD_DEVIATION
    if version == (1, 0, 7) and theano:
        return Fourth.VARIANCE_EPSILON_OUTSIDE
    return Fourth.VARIANCE


class UnsaidError(InputError):
    """A question that only the author of a file can answer."""

    def __init__(self, question: str, missing: str, answer: str):
        super().__init__(f"{question}; {answer}")
        self.question, self.missing = question, missing
        """`missing` is backend or release."""


@dataclass(frozen=True)
class Provenance:
    """Who wrote a file, as far as it can be known."""

    releases: tuple[Version, ...]
    """The releases that may have written it; for Keras 2 and tf.keras exactly one, or (2, 0, 0) where it does not say."""
    backend: str | None
    """theano, tensorflow or cntk; None where nothing tells."""
    said: str | None = None
    """The version as the file or the user gave it."""
    evidence: tuple[str, ...] = field(default_factory=tuple)
    """One sentence for each thing that was concluded rather than read."""

    @property
    def major(self) -> int:
        return self.releases[0][0]

    @property
    def theano(self) -> bool:
        return self.backend == "theano"

    def text(self) -> str:
        """Return the releases and the backend in words."""
        if self.said:
            release = self.said
        elif self.major > 1:
            release = "2"
        else:
            first, last = (".".join(map(str, x)) for x in (self.releases[0], self.releases[-1]))
            release = first if first == last else f"{first} to {last}"
        return f"Keras {release} on {self.backend or 'an unknown backend'}"

    def fourth(self) -> set[Fourth]:
        """Return all meanings that the fourth weight may have."""
        if self.major > 1:
            return {Fourth.VARIANCE}
        backends = [self.theano] if self.backend else [True, False]
        return {fourth_weight(version, theano) for version in self.releases for theano in backends}


def written_by(text: str) -> tuple[Version | None, str | None]:
    """Parse the user's statement, as in "keras==1.0.4,theano"; either half may be missing.

    Raises:
        ArgumentError: a version or a backend that is none.

    Example:
        >>> written_by("keras==1.0.4,theano"), written_by("tensorflow")
        (((1, 0, 4), 'theano'), (None, 'tensorflow'))
    """
    version: Version | None = None
    backend: str | None = None
    for part in (part.strip().lower() for part in text.split(",")):
        if part in ("theano", "tensorflow", "cntk"):
            backend = part
            continue
        found = re.fullmatch(r"(?:tf\.)?(?:keras)?\s*(?:==)?\s*(\d+)\.(\d+)(?:\.(\d+))?", part)
        release = tuple(int(x or 0) for x in found.groups()) if found else None
        if release is None or release[0] not in (1, 2) or (release[0] == 1 and release not in RELEASES):
            raise ArgumentError(
                "--written-by takes a release of Keras 1 or 2, a backend (theano, tensorflow, cntk), or both, as in "
                f"keras==1.0.4,theano; received {text!r}"
            )
        version = release  # type: ignore[assignment]
        backend = "tensorflow" if part.startswith("tf.") else backend
    return version, backend


def provenance(
    file: OldFile | None, model: OldModel, stated: str | None, word: str | None = None, configured: bool = True
) -> Provenance:
    """Return what is known about a file's origin.

    Args:
        file: the file that the weights are in.
        stated: the version that the configuration gives, as JSON architectures do.
        word: what the user says, as in "keras==1.0.4,theano"; it counts more than anything else.
        configured: whether the model is described by the old Keras, so that its arguments are evidence.
    """
    said_version, said_backend = written_by(word) if word is not None else (None, None)
    evidence: list[str] = []
    in_file = file.version if file else None
    text = ".".join(map(str, said_version)) if said_version else (in_file or stated)
    releases = _releases(file, model, text, evidence, configured)
    backend = said_backend or _backend(file, model, releases, evidence)
    return Provenance(releases, backend, text, tuple(evidence))


def _releases(
    file: OldFile | None, model: OldModel, text: str | None, evidence: list[str], configured: bool
) -> tuple[Version, ...]:
    if text is not None:
        numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
        if numbers:
            return (tuple(int(x or 0) for x in numbers.groups()),)  # type: ignore[return-value]
    layers = list(model.leaves())
    names = [name for weights in (file.weights if file else ()) for name in weights.names]
    if any("moving_variance" in name or re.search(r"/(kernel|bias|gamma|embeddings)(:\d+)?$", name) for name in names):
        evidence.append("weights have the names that Keras 2 gave them")
        return ((2, 0, 0),)
    if not configured:
        return RELEASES
    if any("kernel_initializer" in layer.config and layer.kind == layer.written for layer in layers) and not any(
        "running_" in name for name in names
    ):
        evidence.append("arguments have the names that Keras 2 gave them")
        return ((2, 0, 0),)
    return _by_batch_normalization(layers, evidence)


def _by_batch_normalization(layers: list[OldLayer], evidence: list[str]) -> tuple[Version, ...]:
    """Return the releases of Keras 1 whose configurations look like these."""
    releases = list(RELEASES)
    dense = [x for x in layers if x.kind == "Dense" and x.written == "Dense"]
    if any("use_bias" not in x.config for x in dense):
        releases = [x for x in releases if x <= (1, 0, 1)]
        evidence.append("Dense has no argument bias: up to 1.0.1")
    norms = [x for x in layers if x.kind == "BatchNormalization"]
    if not norms:
        return tuple(releases)
    if any("gamma_regularizer" in x.config for x in norms):
        releases = [x for x in releases if x >= (1, 1, 0)]
        evidence.append("BatchNormalization has the argument gamma_regularizer: from 1.1.0")
    else:
        releases = [x for x in releases if x < (1, 1, 0)]
        evidence.append("BatchNormalization has no argument gamma_regularizer: up to 1.0.8")
    pairs = {(float(x.config.get("epsilon", 0)), float(x.config.get("momentum", 0))) for x in norms}
    if len(pairs) == 1:
        epsilon, momentum = pairs.pop()
        left = [x for x in releases if (epsilon, momentum) == _defaults(x)]
        if left:
            releases = left
            shown = " to ".join(dict.fromkeys(".".join(map(str, x)) for x in (left[0], left[-1])))
            evidence.append(f"epsilon {epsilon:g} and momentum {momentum:g} are the defaults of {shown}")
    return tuple(releases)


def _defaults(version: Version) -> tuple[float, float]:
    """Return epsilon and momentum of a BatchNormalization without arguments."""
    epsilon = 1e-6 if version <= (1, 0, 7) else 1e-5 if version <= (1, 1, 2) else 1e-3
    return epsilon, 0.9 if version <= (1, 0, 6) else 0.99


def _backend(file: OldFile | None, model: OldModel, releases: Iterable[Version], evidence: list[str]) -> str | None:
    if file is None:
        return None
    if file.backend:
        return file.backend
    base = os.path.basename(file.path).lower()
    for mark, backend in (("th_kernels", "theano"), ("tf_kernels", "tensorflow")):
        if mark in base:
            evidence.append(f"the file's name says {mark}: kernels as {backend} has them")
            return backend
    names = [name for weights in file.weights for name in weights.names if not re.fullmatch(r"param_\d+", name)]
    if any(re.search(r":\d+$", name) for name in names):
        evidence.append('names of weights end in ":0": written on tensorflow')
        return "tensorflow"
    if any(layer.kind == "SeparableConv2D" for layer in model.leaves()):
        evidence.append("SeparableConvolution2D ran on tensorflow only")
        return "tensorflow"
    if names:
        evidence.append('names of weights do not end in ":0": written on theano')
        return "theano"
    return None
