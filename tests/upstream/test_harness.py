"""The harness itself: pytest collects every case of Keras's file, on our layer, and a stale deviation is found out."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path

import keras.src.layers.normalization.batch_normalization_test as upstream
import pytest
from keras.src import layers

from evennorm.keras import BatchNormalization
from tests.upstream import test_keras_layer

HERE = Path(__file__).parent

A_FILE_OF_TWO = """
import unittest


class TestBatchNormalization(unittest.TestCase):
    def test_agrees(self):
        pass

    def test_differs(self):
        self.fail()
"""


def cases_in_source(source: str, class_name: str, names: dict) -> list[str]:
    """The cases a class stands for: its test methods, numbered where `parameterized.product` multiplies them."""
    (body,) = [n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name]
    cases = []
    for method in body:
        if not (isinstance(method, ast.FunctionDef) and method.name.startswith("test")):
            continue
        decorators = [d for d in method.decorator_list if isinstance(d, ast.Call)]
        assert all(ast.unparse(d.func) == "parameterized.product" and not d.args for d in decorators), ast.unparse(method)
        if decorators:
            values = [eval(ast.unparse(k.value), names) for d in decorators for k in d.keywords]
            cases += [f"{method.name}{i}" for i in range(math.prod(map(len, values)))]
        else:
            cases.append(method.name)
    return cases


def test_every_case_of_the_file_is_collected(request: pytest.FixtureRequest) -> None:
    written = cases_in_source(inspect.getsource(upstream), "BatchNormalizationTest", dict(vars(upstream)))
    module = pytest.Module.from_parent(request.session, path=HERE / "test_keras_layer.py")
    (ours,) = module.collect()
    assert sorted(case.name for case in ours.collect()) == sorted(written)
    assert len(written) >= 33  # of Keras 3.15, the least that is supported


def test_a_new_case_would_be_counted() -> None:
    source = """
class Cases:
    @parameterized.product(a=(1, 2), b=sizes)
    def test_many(self, a, b): ...

    @pytest.mark.slow
    def test_one(self): ...

    def helper(self): ...
"""
    found = cases_in_source(source, "Cases", {"sizes": (3, 4)})
    assert found == ["test_many0", "test_many1", "test_many2", "test_many3", "test_one"]


def test_only_the_test_file_sees_our_layer() -> None:
    assert test_keras_layer.TestBatchNormalization.__mro__[1] is upstream.BatchNormalizationTest
    assert upstream.layers.BatchNormalization is BatchNormalization
    assert layers.BatchNormalization is not BatchNormalization
    assert layers.BatchNormalization.__module__.startswith("keras.")


@pytest.fixture
def run_with(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs the harness, on jax, over a file in which one case agrees and one differs, with the given rows."""

    def run(*rows: str, select: str = "") -> pytest.RunResult:
        folder = pytester.mkpydir("tests") / "upstream"
        folder.mkdir()
        for name in ("__init__.py", "conftest.py", "deviations.py"):
            (folder / name).write_text((HERE / name).read_text())
        (folder / "deviations.toml").write_text("".join(f"[[deviation]]\n{row}\n" for row in rows))
        (folder / "test_keras_layer.py").write_text(A_FILE_OF_TWO)
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", f"tests/upstream/test_keras_layer.py{select}")

    return run


@pytest.mark.parametrize(
    ("rows", "outcomes"),
    [
        ([], {"passed": 1, "failed": 1}),
        (['test = "test_differs"\nreason = "on purpose"'], {"passed": 1, "xfailed": 1}),
        (['test = "test_differs"\nengines = ["jax"]\nreason = "on purpose"'], {"passed": 1, "xfailed": 1}),
        (['test = "test_differs"\nengines = ["torch"]\nreason = "only there"'], {"passed": 1, "failed": 1}),
        (['test = "test_agrees"\nreason = "no longer true"'], {"failed": 2}),
    ],
    ids=["none", "listed", "listed for this engine", "listed for another engine", "stale"],
)
def test_deviations(run_with, rows: list[str], outcomes: dict[str, int]) -> None:
    run_with(*rows).assert_outcomes(**outcomes)


def test_one_case_alone(run_with) -> None:
    """The rows of the cases that were not asked for are no error."""
    result = run_with('test = "test_differs"\nreason = "on purpose"', select="::TestBatchNormalization::test_agrees")
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('test = "test_gone"\nreason = "once"', "*lists 'test_gone', which is no case of Keras's test file; remove the row"),
        ('test = "test_differs"', "*a row has test, reason and, if not for all, engines; received*"),
        ('test = "test_differs"\nreason = "so"\nengine = "jax"', "*a row has test, reason and, if not for all, engines*"),
        ('test = "test_differs"\nreason = "so"\nengines = ["jaxx"]', "*received ?'jaxx'? for 'test_differs'"),
    ],
    ids=["no such case", "no reason", "unknown key", "unknown engine"],
)
def test_a_row_that_cannot_be(run_with, row: str, message: str) -> None:
    result = run_with(row)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
