"""The harness itself: it runs every case there is, on our layer, and a stale deviation is found out."""

import ast
import inspect
from pathlib import Path

import keras.src.layers.normalization.batch_normalization_test as upstream
import pytest
from keras import layers

from evennorm.keras import BatchNormalization
from tests.upstream import test_keras_layer


def test_every_case_of_the_file_is_collected() -> None:
    """Counted from the source: each test method, times the products of its parameters, which absl turns into methods."""
    (cases,) = [
        node
        for node in ast.parse(inspect.getsource(upstream)).body
        if isinstance(node, ast.ClassDef) and node.name == "BatchNormalizationTest"
    ]
    written = [node.name for node in cases.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    collected = [name for name in dir(test_keras_layer.TestBatchNormalization) if name.startswith("test_")]
    assert len(written) >= 10
    assert {name.rstrip("0123456789") for name in collected} >= set(written)
    assert len(collected) >= 33


def test_only_the_test_file_sees_our_layer() -> None:
    assert upstream.layers.BatchNormalization is BatchNormalization
    assert layers.BatchNormalization is not BatchNormalization


@pytest.mark.parametrize(
    ("row", "outcomes"),
    [
        ('test = "test_differs"\nreason = "on purpose"', {"xfailed": 1, "passed": 1}),
        ('test = "test_agrees"\nreason = "no longer true"', {"failed": 2}),
        ('test = "test_differs"\nengines = ["torch"]\nreason = "only there"', {"failed": 1, "passed": 1}),
    ],
    ids=["listed", "stale", "of another engine"],
)
def test_deviations(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, row: str, outcomes: dict) -> None:
    source = Path(__file__).with_name("conftest.py").read_text()
    source = source.replace("tests/upstream/test_keras_layer.py", "test_keras_layer.py")
    pytester.makeconftest(source)
    pytester.path.joinpath("deviations.toml").write_text(f"[[deviation]]\n{row}\n")
    pytester.makepyfile(test_keras_layer="def test_differs():\n    assert False\n\n\ndef test_agrees():\n    pass\n")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(**outcomes)


def test_a_row_without_a_case(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text().replace("tests/upstream/", ""))
    pytester.path.joinpath("deviations.toml").write_text('[[deviation]]\ntest = "test_gone"\nreason = "once"\n')
    pytester.makepyfile(test_keras_layer="def test_agrees():\n    pass\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*lists 'test_gone'*remove the row*"])
