"""`evennorm bench` as users meet it: the command, its files, its exit codes, and what it does where somebody fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evennorm.cli import main
from evennorm.errors import EvennormError, InputError, MissingExtra
from evennorm.tools.bench import bench, chosen_engine, on_numpy, worker
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import Calls, Contestant
from evennorm.tools.bench.processes import environment_for
from evennorm.tools.bench.report import read
from evennorm.tools.bench.rows import ALONE, IN_TURNS
from evennorm.tools.bench.settings import Settings


def command(*options: str) -> Result:
    return CliRunner().invoke(main, ["bench", *options], prog_name="evennorm")


def refused(*options: str) -> str:
    """The one line that a refused command prints."""
    result = command(*options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("evennorm: ")
    return line


QUICK = ("--engine", "numpy", "--rounds", "3")


def test_it_prints_tables_and_writes_files(tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png"))
    cases = ("--shapes", "8x16,512x512", "--residuals", "no,yes", "--passes", "forward")
    result = command(*QUICK, *cases, "--threads", "1", *files)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("numpy ")
    assert ", 1 thread on " in lines[0]
    titles = [line for line in lines if line.endswith(", in turns")]
    assert titles == [
        f"{case}, forward, {size} MB, in turns"
        for residual in ("", ", residual")
        for case, size in ((f"8x16{residual}", "0.000512"), (f"512x512{residual}", "1.05"))
    ]
    assert result.stdout.count("\nplain NumPy ") == 4 + 4  # a row of each table, and the summary
    found = read(tmp_path / "found.json")
    assert {len(row.milliseconds) for row in found.rows} == {3}
    assert [(s.protocol, s.family, len(s.large), len(s.small)) for s in found.summaries()] == [
        (IN_TURNS, "plain NumPy", 1, 1)
    ] * 2
    assert found.environment["versions"]["numpy"]
    assert found.kernels.keys() == {"float32"}
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"


def test_each_alone() -> None:
    found = bench("numpy", "8x16", passes=["forward"], rounds=3, each_alone=True)
    in_turns = [row.contestant for row in found.rows if row.protocol == IN_TURNS]
    assert in_turns == [row.contestant for row in found.rows if row.protocol == ALONE]
    assert found.protocols == [IN_TURNS, ALONE]


def test_chosen_families_on_torch() -> None:
    found = bench("torch", "8x4x6x6:first", against=["torch eager"], rounds=3)
    assert {row.family for row in found.rows} == {"evennorm", "torch eager", "limit"}
    assert {row.passes for row in found.rows} == {"forward", "both"}
    assert all(row.saved_bytes for row in found.rows if row.family == "torch eager")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--engine", "cuda"), "engines are torch, jax, tensorflow, numpy; received 'cuda'; choose one by --engine"),
        (("--shapes", "abc"), "shapes are sizes as they lie in memory, batch first"),
        (("--dtypes", "int8"), "dtypes: one or more of float32, float64, bfloat16, float16; received 'int8'"),
        (("--dtypes", ","), "received none"),
        (("--passes", "sideways"), "passes: one or more of forward, both; received 'sideways'"),
        (("--threads", "0"), "the number of threads must be at least 1; received 0"),
        (("--rounds", "-3"), "the number of rounds must be at least 1; received -3"),
        (
            ("--json", "/nowhere/found.json"),
            "cannot write /nowhere/found.json: there is no such folder; nothing was measured",
        ),
        (
            ("--shapes", "4x5", "--against", "nobody"),
            "on this engine evennorm is measured against plain NumPy; received 'nobody'",
        ),
        (("--shapes", "4x5", "--dtypes", "bfloat16"), "NumPy itself has no bfloat16; choose another dtype or engine"),
    ],
)
def test_bad_input(options: tuple[str, ...], text: str) -> None:
    assert text in refused(*QUICK, *options)


def test_an_array_that_no_machine_holds() -> None:
    assert "measuring on numpy ended early: " in refused(*QUICK, "--shapes", "999999x999999x9999")


def test_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    assert chosen_engine(None) == "numpy"
    assert chosen_engine("jax") == "jax"
    monkeypatch.setenv("KERAS_BACKEND", "openvino")
    with pytest.raises(InputError, match="KERAS_BACKEND is 'openvino'"):
        chosen_engine(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name != "numpy" else object())
    with pytest.raises(MissingExtra, match=r"pip install 'evennorm\[torch\]'"):
        chosen_engine("torch")
    monkeypatch.delenv("KERAS_BACKEND")
    assert chosen_engine(None) == "numpy"


@pytest.fixture
def contestants(monkeypatch: pytest.MonkeyPatch) -> list[Contestant]:
    """Those of NumPy, to be exchanged."""
    found = on_numpy.contestants()
    monkeypatch.setattr(on_numpy, "contestants", lambda: found)
    return found


def failing(case: object, data: object) -> Calls:
    raise ValueError("it has its reasons\nof many lines")


SETTINGS = Settings("numpy", (Case((4, 5)),), ("forward",), rounds=1)


def test_another_layer_that_fails_is_told_and_the_others_are_measured(contestants: list[Contestant]) -> None:
    contestants[1] = Contestant("broken", "broken", "evennorm", failing)
    [rows] = worker.measure(SETTINGS, IN_TURNS)
    assert {row.contestant: row.reason for row in rows if not row.milliseconds} == {"broken": "it has its reasons"}
    assert {row.contestant for row in rows if row.milliseconds} >= {"evennorm", "copy"}


def test_one_of_ours_that_fails_is_an_error(contestants: list[Contestant]) -> None:
    contestants[0] = Contestant("evennorm", "evennorm", None, failing)
    with pytest.raises(EvennormError, match=r"evennorm failed on 4x5: it has its reasons$"):
        list(worker.measure(SETTINGS, IN_TURNS))


def test_what_the_engine_is_told() -> None:
    told = environment_for(Settings("jax", (Case((4, 5), dtype="float64"),), threads=3))
    assert told["KERAS_BACKEND"] == "jax"
    assert told["JAX_ENABLE_X64"] == "1"
    assert {told[name] for name in ("OMP_NUM_THREADS", "EVENNORM_NUM_THREADS", "PJRT_NPROC", "TF_NUM_INTRAOP_THREADS")} == {
        "3"
    }
    assert "JAX_ENABLE_X64" not in environment_for(SETTINGS) or "JAX_ENABLE_X64" in os.environ


def test_torch_computes_with_as_many_threads() -> None:
    settings = Settings("torch", (Case((4, 5)),), threads=1)
    code = "import torch; print(torch.get_num_threads())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment_for(settings), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "1"


def test_frameworks_may_print_what_they_like() -> None:
    """A process that measures keeps its stdout for lines of JSON."""
    task = json.dumps({"settings": SETTINGS.as_dict(), "protocol": IN_TURNS, "only": None})
    code = (
        "from evennorm.tools.bench import on_numpy, worker\nplain = on_numpy._plain\n"
        "def loud(case, data):\n    print('hello')\n    return plain(case, data)\n"
        "on_numpy._plain = loud\nworker.main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=task + "\n",
        env=environment_for(SETTINGS),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line)[0] for line in run.stdout.splitlines()] == ["contestants", "rows", "kernels"]
    assert "hello" in run.stderr


def test_nothing_heavy_is_loaded_before_it_is_asked_for() -> None:
    code = (
        "import sys\nfrom evennorm.cli import main\n"
        "try:\n    main(['bench', '--shapes', 'abc'])\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "print([name for name in ('torch', 'jax', 'tensorflow', 'keras', 'matplotlib') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
