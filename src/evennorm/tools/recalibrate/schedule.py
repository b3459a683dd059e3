"""Plan which statistics of a model can be taken in the same pass.

A normalization depends on those before it, whose statistics are settled first. Those that depend on each other (a
layer that is called twice, the second time after itself) are settled together, by repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evennorm.models.program import Call, Key


@dataclass(frozen=True)
class Stage:
    """Normalizations whose statistics are taken in one pass over the data."""

    paths: tuple[str, ...]
    calls: tuple[int, ...]
    """The calls whose values are needed, and those that make these normalizations, in order."""
    stops: tuple[int, ...]
    """Calls among these that need not be finished: nothing after them is needed."""
    repeated: tuple[str, ...] = ()
    """Paths among `paths` that depend on themselves."""


def stages(calls: Sequence[Call], made: Sequence[Sequence[str]]) -> list[Stage]:
    """Return the stages of a model, in order.

    Args:
        calls: of the model.
        made: for each of them the normalizations that it calls, in their order.

    Example:
        >>> def call(name, *inputs):
        ...     return Call(name, inputs, (name,), lambda values: ())
        >>> network = [call("a", "x"), call("b", "x"), call("add", "a", "b"), call("c", "add")]
        >>> [stage.paths for stage in stages(network, [["a"], ["b"], [], ["c"]])]
        [('a', 'b'), ('c',)]
    """
    behind = _ancestors(calls)
    depends = _dependencies(behind, made)
    level: dict[str, int] = {}

    def level_of(path: str) -> int:
        if path not in level:
            together = {path} | {other for other in depends[path] if path in depends[other]}
            before = set().union(*(depends[each] for each in together)) - together
            found = 1 + max((level_of(each) for each in sorted(before)), default=-1)
            level.update(dict.fromkeys(together, found))
        return level[path]

    order = list(dict.fromkeys(path for paths in made for path in paths))
    for path in order:
        level_of(path)
    return [
        _stage([path for path in order if level[path] == number], behind, made, depends)
        for number in sorted(set(level.values()))
    ]


def _stage(paths: list[str], behind: list[set[int]], made: Sequence[Sequence[str]], depends: dict[str, set[str]]) -> Stage:
    wanted = set(paths)
    makers = {i for i, called in enumerate(made) if wanted & set(called)}
    needed = set().union(*(behind[i] for i in makers))
    repeated = tuple(path for path in paths if path in depends[path])
    return Stage(tuple(paths), tuple(sorted(makers | needed)), tuple(sorted(makers - needed)), repeated)


def _ancestors(calls: Sequence[Call]) -> list[set[int]]:
    """Return the calls that each call's inputs depend on."""
    maker: dict[Key, int] = {}
    found: list[set[int]] = []
    for i, call in enumerate(calls):
        direct = {maker[key] for key in call.inputs if key in maker}
        found.append(direct.union(*(found[j] for j in direct)))
        maker.update(dict.fromkeys(call.outputs, i))
    return found


def _dependencies(behind: list[set[int]], made: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    """Return the normalizations whose statistics the inputs of each depend on; itself too where it is called after
    itself."""
    depends: dict[str, set[str]] = {}
    for i, called in enumerate(made):
        before = set().union(*(made[j] for j in behind[i]))
        for number, path in enumerate(called):
            depends.setdefault(path, set()).update(before, called[:number])
    changed = True
    while changed:
        changed = False
        for found in depends.values():
            more = set().union(*(depends[path] for path in found)) - found
            changed |= bool(more)
            found |= more
    return depends
