"""What make test leaves to make test-all: never a pair of values, and never in silence."""

from itertools import combinations

import pytest

from tests.grids import mostly, pairwise

VALUES = {"a": [1, 2, 3], "b": "uvwx", "c": [None, True], "d": [0.5, 1.5]}


def run(rows: list) -> list[tuple]:
    return [row.values for row in rows if not row.marks]


def test_every_pair_runs_in_few_rows() -> None:
    names, rows = pairwise(**VALUES)
    assert names == ("a", "b", "c", "d")
    assert len({row.values for row in rows}) == len(rows) == 3 * 4 * 2 * 2
    for (i, first), (j, second) in combinations(enumerate(VALUES.values()), 2):
        assert {(row[i], row[j]) for row in run(rows)} == {(x, y) for x in first for y in second}
    assert len(run(rows)) <= 16


def test_rows_that_are_chosen() -> None:
    names, rows = mostly(lambda a, b: a != b, "a, b", [(1, 1), (1, 2)])
    assert (names, run(rows)) == ("a, b", [(1, 2)])
    assert [row.id for row in rows] == ["1-1", "1-2"]


def test_the_others_are_counted(pytester: pytest.Pytester, pytestconfig: pytest.Config) -> None:
    """As deselected, by the options that pyproject.toml gives."""
    pytester.makepyprojecttoml(
        f"[tool.pytest.ini_options]\naddopts = {pytestconfig.getini('addopts')!r}\nmarkers = ['exhaustive']"
    )
    pytester.makepyfile(
        "import pytest\n@pytest.mark.parametrize('x', [1, pytest.param(2, marks=pytest.mark.exhaustive)])\ndef test(x): pass"
    )
    run = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    run.stdout.fnmatch_lines(["*1 passed, 1 deselected*"])
    everything = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-m", "")
    everything.assert_outcomes(passed=2)
