"""`evennorm explain` as users meet it: the record, the command, its page in the documentation."""

import json
import re
import shlex
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner

from evennorm import ShapeError
from evennorm.cli import main
from evennorm.tools.explain import explain
from evennorm.tools.explain.drawing import draw

DOCS = Path(__file__).parents[2] / "docs"


def command(*arguments):
    plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner(env=plain).invoke(main, ["explain", *arguments], prog_name="evennorm")


EXAMPLES = [
    # shape, axis, shape of the example
    ((32, 28, 28, 3), -1, (2, 2, 2, 2)),
    ((32, 3, 28, 28), 1, (2, 2, 2, 2)),
    ((None, 1024), -1, (6, 2)),
    ((8, 16, 128), 1, (3, 2, 3)),
    ((None, 8, 8, 64), (1, 3), (3, 2, 3, 2)),
    ((4, 2, 3, 3, 5), -1, (2, 2, 2, 1, 2)),
    ((1, 10), -1, (1, 2)),
    ((5,), 0, (2,)),
    ((2, 1), -1, (2, 1)),
]


@pytest.mark.parametrize(("shape", "axis", "small"), EXAMPLES)
def test_the_worked_example_is_what_numpy_computes(shape, axis, small):
    explanation = explain(shape, axis)
    example = explanation.example
    x = eval(example.code, {"np": np})
    assert x.shape == example.shape == small
    reduced = explanation.geometry.reduced
    mean, variance = x.mean(axis=reduced, keepdims=True), x.var(axis=reduced, keepdims=True)
    normalized = (x - mean) / np.sqrt(variance + example.epsilon)
    first = tuple(0 if a in explanation.geometry.axis else slice(None) for a in range(x.ndim))
    assert list(example.values) == x[first].ravel().tolist()
    assert example.mean == pytest.approx(mean.flat[0], abs=1e-14)
    assert example.variance == pytest.approx(variance.flat[0], abs=1e-13)
    np.testing.assert_allclose(example.normalized, normalized[first].ravel(), atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 28, 28, 3), (2,) * 40])
def test_no_example_where_numpy_has_no_such_array(shape):
    explanation = explain(shape)
    assert explanation.example is None
    assert "Worked example" not in explanation.text()
    assert json.loads(json.dumps(explanation.as_dict()))["example"] is None


def test_the_record_in_python():
    explanation = explain([None, 28, 28, 3], -1)
    assert explanation.as_dict() == {
        "shape": [None, 28, 28, 3],
        "axis": [3],
        "reduced_axes": [0, 1, 2],
        "outer": None,
        "channel": 3,
        "inner": 1,
        "count": None,
        "count_text": "? x 28 x 28 = 784 per sample",
        "variance_relative_error": None,
        "groups": 3,
        "parameters": [
            {"name": "gamma", "shape": [3], "size": 3, "trainable": True},
            {"name": "beta", "shape": [3], "size": 3, "trainable": True},
            {"name": "moving_mean", "shape": [3], "size": 3, "trainable": False},
            {"name": "moving_variance", "shape": [3], "size": 3, "trainable": False},
        ],
        "trainable": 6,
        "non_trainable": 6,
        "data_format": {
            "name": "channels-last images",
            "roles": ["batch", "height", "width", "channel"],
            "channel_axis": 3,
            "certainty": "clear",
            "reason": "height and width are equal, 28; 3 channels are usual",
        },
        "findings": [],
        "example": {
            "shape": [2, 2, 2, 2],
            "axis": [3],
            "epsilon": 0.001,
            "code": "((7 * np.arange(16.0) + 3) % 10).reshape(2, 2, 2, 2)",
            "values": [3.0, 7.0, 1.0, 5.0, 9.0, 3.0, 7.0, 1.0],
            "mean": 4.5,
            "variance": 7.75,
            "normalized": pytest.approx([(v - 4.5) / np.sqrt(7.751) for v in (3, 7, 1, 5, 9, 3, 7, 1)], abs=1e-13),
        },
    }


@pytest.mark.parametrize("axis", [["--axis", "-1"], ["--axis=-1"], ["--axis", "3"], ["--axis", "(3,)"], []])
@pytest.mark.parametrize("shape", ["32,28,28,3", "(32, 28, 28, 3)", "[32, 28, 28, 3]", " 32, 28 ,28,3"])
def test_ways_to_ask(shape, axis):
    result = command("--shape", shape, *axis)
    assert result.exit_code == 0
    assert result.stdout == explain((32, 28, 28, 3), -1).text() + "\n"


@pytest.mark.parametrize("shape", ["?,8,8,64", "(None, 8, 8, 64)"])
@pytest.mark.parametrize("axis", ["1,3", "-1,-3", "(1, 3)"])
def test_unknown_sizes_and_several_axes(shape, axis):
    result = command("--shape", shape, "--axis", axis)
    assert result.exit_code == 1
    assert result.stdout == explain((None, 8, 8, 64), (1, 3)).text() + "\n"


def test_findings_exit_with_1():
    result = command("--shape", "32,3,28,28")
    assert result.exit_code == 1
    assert "Warning [spatial-axis]" in result.stdout
    assert result.stderr == ""


def test_json_is_one_object():
    result = command("--shape", "32,3,28,28", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == explain((32, 3, 28, 28)).as_dict() | {"svg": None}


def test_svg(tmp_path):
    target = tmp_path / "figure.svg"
    result = command("--shape", "32,28,28,3", "--svg", str(target), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["svg"] == str(target)
    assert target.read_text(encoding="utf-8") == draw(explain((32, 28, 28, 3)))
    assert command("--shape", "32,28,28,3", "--svg", str(target)).stdout.endswith(f"\n\nFigure: {target}\n")


SHAPE_RULE = "--shape takes whole numbers, ? where a size is unknown, as in 32,28,28,3"
AXIS_RULE = "--axis takes a whole number, or several, as in -1 or 1,3"
BAD = [
    (["--shape", "32,x"], f"{SHAPE_RULE}; received 'x' in '32,x'"),
    (["--shape", ""], f"{SHAPE_RULE}; received ''"),
    (["--shape", "()"], f"{SHAPE_RULE}; received '()'"),
    (["--shape", "32,,3"], f"{SHAPE_RULE}; received '' in '32,,3'"),
    (["--shape", "-1,3"], f"{SHAPE_RULE}; received '-1' in '-1,3'"),
    (["--shape", "32,2.5"], f"{SHAPE_RULE}; received '2.5' in '32,2.5'"),
    (["--shape", "(32,3"], f"{SHAPE_RULE}; received '(32' in '(32,3'"),
    (["--shape", "3\n,4;"], f"{SHAPE_RULE}; received '4;' in '3\\n,4;'"),
    (["--shape", "32,10", "--axis", ""], f"{AXIS_RULE}; received ''"),
    (["--shape", "32,10", "--axis", "last"], f"{AXIS_RULE}; received 'last' in 'last'"),
    (
        ["--shape", "32,10", "--axis", "2"],
        "axis 2 was asked of a shape of rank 2, (32, 10); valid axes are -2 to 1; channels-last is -1, channels-first is 1",
    ),
    (
        ["--shape", "32,10", "--axis", "1,-1"],
        "each axis may be named once; received axis=(1, -1) for shape (32, 10), which is (1, 1)",
    ),
    (
        ["--shape", "32,?"],
        "the channel axis needs a known size, since gamma and beta have one value per channel; axis 1 of shape (32, ?) is "
        "unknown; give its size or choose another axis",
    ),
    (
        ["--shape", "32,10", "--svg", "no/such/folder/a.svg"],
        "cannot write 'no/such/folder/a.svg': there is no folder 'no/such/folder'; "
        "choose a file in a folder that takes new files",
    ),
    (["--shape", "32,10", "--svg", "."], "cannot write '.': it is a folder; choose a file in a folder that takes new files"),
    (
        ["--shape", "0,10", "--svg", "a.svg"],
        "a figure needs cells to draw; axis 0 has size 0; give the size of a batch that holds values",
    ),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"evennorm: {text}\n"
    assert list(tmp_path.iterdir()) == []


def test_errors_in_python_are_those_of_geometry():
    with pytest.raises(ShapeError, match="received the empty shape"):
        explain(())


@pytest.mark.parametrize(("columns", "width"), [("40", 60), ("90", 90), ("300", 100)])
def test_a_terminal_gets_colours_and_its_own_width(columns, width):
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": columns, "NO_COLOR": None}
    result = CliRunner(env=terminal).invoke(main, ["explain", "--shape", "32,3,28,28"], color=True)
    assert result.stdout.startswith("\x1b[1mBatch normalization")
    assert "\x1b[1;33mWarning [spatial-axis]" in result.stdout
    assert re.sub(r"\x1b\[[0-9;]*m", "", result.stdout) == explain((32, 3, 28, 28)).text(width) + "\n"


def test_help_names_every_option():
    result = command("--help")
    assert result.exit_code == 0
    options = ["--shape", "--axis", "--batch", "--svg", "--json", "--force", "--debug", "--quiet"]
    assert re.findall(r"^  (--\w+)", result.stdout, re.MULTILINE) == options


def documented_commands():
    page = (DOCS / "explain.md").read_text(encoding="utf-8")
    return re.findall(r"```console\n\$ evennorm explain ([^\n]+)\n(.*?)```", page, re.DOTALL)


def test_the_page_has_its_commands():
    assert len(documented_commands()) == 4


@pytest.mark.parametrize(("arguments", "output"), documented_commands())
def test_the_page_shows_real_output(arguments, output, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    keras.utils.clear_session()  # it numbers models without a name
    result = command(*shlex.split(arguments))
    assert result.stdout == output, result.output
    for figure in Path("docs").iterdir():
        assert figure.read_text(encoding="utf-8") == (DOCS / figure.name).read_text(encoding="utf-8")


def test_the_page_shows_the_right_axis():
    assert (DOCS / "explain-right-axis.svg").read_text(encoding="utf-8") == draw(explain((32, 3, 28, 28), 1))


def test_the_python_of_the_page_runs(capsys):
    page = (DOCS / "explain.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith("Batch normalization: shape (32, 3, 28, 28), axis 3 (-1)\n")
