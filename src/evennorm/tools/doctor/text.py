"""Write a diagnosis as one screen of text."""

from __future__ import annotations

from collections.abc import Iterator

from evennorm.tools.doctor import Diagnosis, Framework, Part

_KERNELS = {"cpu": "compiled", "triton": "Triton", "reference": "plain"}

_PLAIN = "plain: the framework's own operations. At inference JAX and TensorFlow fuse these themselves."


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield the lines, problems last.

    Example:
        >>> from evennorm.tools.doctor import Diagnosis, Framework
        >>> numpy = Framework("numpy", "2.4.6", rows=({"device": "CPU", "training": {"float32": "cpu"}, "inference": {}},))
        >>> print(*lines(Diagnosis("1.0", "3.12.1", "Linux", "AMD EPYC", 2, "avx2", 2, (numpy,))), sep="\\n")
        evennorm 1.0, Python 3.12.1, Linux
        AMD EPYC, 2 cores: kernels for avx2, 2 threads
        <BLANKLINE>
        framework  version  device  training  inference
        numpy      2.4.6    CPU     compiled
        <BLANKLINE>
        Compiled kernels run in every installed framework.
    """
    d = diagnosis
    yield f"evennorm {d.evennorm}, Python {d.python}, {d.platform}"
    speed = "no compiled kernels" if d.instruction_set is None else f"kernels for {d.instruction_set}, {d.threads} threads"
    yield f"{d.processor}, {d.cores} cores: {speed}"
    yield ""
    rows = [row for framework in d.frameworks for row in _rows(framework)]
    yield from _table(("framework", "version", "device", "training", "inference"), rows)
    if any("plain" in cell for row in rows for cell in row[3:]):
        yield _PLAIN
    if d.parts:
        yield ""
        yield from _table(("compiled part", "for", "state"), [(part.name, part.serves, _state(part)) for part in d.parts])
    yield ""
    for framework in d.frameworks:
        yield from (f"note: {framework.name}: {why}. {_sentence(remedy)}" for why, remedy in framework.notes)
    if d.served:
        yield "Compiled kernels run in every installed framework."
    for framework in d.frameworks:
        yield from (f"problem: {framework.name}: {why}. {_sentence(remedy)}" for why, remedy in framework.problems)


def _rows(framework: Framework) -> Iterator[tuple[str, ...]]:
    name, version = framework.name, framework.version
    if version is None:
        yield name, "-", "not installed", "", ""
    elif framework.rows:
        for row in framework.rows:
            yield name, version, row["device"], _served(row["training"]), _served(row["inference"])
    elif framework.problems:
        yield name, version, "fails, see below", "", ""
    else:
        yield name, version, f"as {framework.backend}" if framework.backend else "can be imported", "", ""


def _served(kernels: dict[str, str]) -> str:
    """Return the kernel, by dtype where they differ."""
    dtypes: dict[str, list[str]] = {}
    for dtype, kernel in kernels.items():
        dtypes.setdefault(_KERNELS.get(kernel, kernel), []).append(dtype)
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{kernel} ({' '.join(names)})" for kernel, names in dtypes.items())


def _state(part: Part) -> str:
    if not part.built:
        return "not built"
    return "built" if part.problem is None else "fails, see below"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _sentence(remedy: str) -> str:
    return f"{remedy[:1].upper()}{remedy[1:]}."
