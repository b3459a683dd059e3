"""`evennorm doctor` names what serves, and of what does not the reason and the remedy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import evennorm
from evennorm.cli import main
from evennorm.kernels import cpu
from evennorm.tools import doctor
from evennorm.tools.doctor import probe
from evennorm.tools.doctor.text import lines

DTYPES = {"float32", "float64", "bfloat16", "float16"}


def run(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], *options: str) -> Result:
    """Runs the command on some of the frameworks."""
    everything = doctor.diagnose
    monkeypatch.setattr(doctor, "diagnose", lambda: everything(names))
    return CliRunner().invoke(main, ["doctor", *options])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages the trials find before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.parametrize("engine", ["numpy", "jax", "torch", "tensorflow"])
def test_what_serves_an_engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels, for every dtype: the tests run where they are built."""
    result = run(monkeypatch, (engine,), "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found = json.loads(result.stdout)
    assert (found["served"], found["evennorm"]) == (True, evennorm.__version__)
    assert found["instruction_set"] == cpu._cpu.instruction_set()
    (framework,) = found["frameworks"]
    assert (framework["name"], framework["problems"]) == (engine, [])
    row = framework["rows"][0]
    assert row["device"] == "CPU"
    assert row["training"] == dict.fromkeys(row["training"], "cpu")
    assert set(row["training"]) == DTYPES
    inference = "reference" if engine in ("jax", "tensorflow") else "cpu"
    assert row["inference"] == dict.fromkeys(row["training"], inference)
    assert all(part["built"] and part["problem"] is None for part in found["parts"])
    assert [part["name"] for part in found["parts"]][:3] == ["_cpu", "_xla", "_tensorflow"]


def test_one_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, ("numpy", "triton"))
    assert result.exit_code == 0
    shown = result.output.splitlines()
    assert shown[0].startswith(f"evennorm {evennorm.__version__}, Python {sys.version.split()[0]}, ")
    assert shown[-1] == "Compiled kernels run in every installed framework."
    assert len(shown) <= 24
    assert any(line.split()[::2] == ["numpy", "CPU", "compiled"] for line in shown)


def test_what_is_not_installed_is_not_looked_at(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: name == "numpy")
    found = doctor.diagnose()
    assert {framework.name for framework in found.frameworks if framework.version is None} == {*doctor.FRAMEWORKS} - {
        "numpy"
    }
    assert found.served
    assert sum("not installed" in line for line in lines(found)) == 6


def test_a_folder_of_the_same_name_is_no_framework(packages: Path) -> None:
    (packages / "no_framework_of_that_name").mkdir()
    assert not doctor._installed("no_framework_of_that_name")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise RuntimeError('libcudart.so.13 is missing\\nand more')", "RuntimeError: libcudart.so.13 is missing"),
        ("raise SystemExit(3)", "triton ended its process with exit code 3"),
        ("import os; os.abort()", "triton ended its process with signal SIGABRT"),
        ("import sys; sys.stderr.write('a\\nwhy\\n'); sys.stderr.flush(); import os; os._exit(1)", "exit code 1: why"),
        (
            "import os; os.write(1, b'noise'); raise ImportError('\\x1b[2J::error::x')",
            r"ImportError: \x1b[2J:\x3aerror:\x3ax",
        ),
    ],
)
def test_a_broken_framework_is_one_line(text: str, why: str, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(packages, "triton", text)
    result = run(monkeypatch, ("numpy", "triton"))
    assert (result.exit_code, result.stderr) == (1, "")
    (line,) = [line for line in result.output.splitlines() if line.startswith("problem: ")]
    assert line.startswith("problem: triton: ")
    assert why in line
    assert line.endswith(". Install triton anew.")
    assert any(line.split()[:1] == ["numpy"] and "compiled" in line for line in result.output.splitlines())


def test_a_framework_that_never_answers(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(packages, "triton", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    (found,) = doctor.diagnose(["triton"]).frameworks
    assert found.problems[0].why == "triton did not answer within 0.2 seconds"


def test_a_framework_that_does_not_fit(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(packages, "jax", "__version__ = '0.1.2'")
    result = run(monkeypatch, ("jax",))
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert last.startswith("problem: jax: evennorm.jax does not work with jax 0.1.2: ")
    assert last.endswith(". Install a version of jax that evennorm[jax] asks for.")


def test_keras_without_its_backend(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(packages, "keras", "import tensorflow")
    write(packages, "tensorflow", "raise ModuleNotFoundError(name='tensorflow')")
    (found,) = doctor.diagnose(["keras"]).frameworks
    (problem,) = found.problems
    assert problem.why == "evennorm.keras needs the package tensorflow, which is not installed"
    expected = "install it with: pip install 'evennorm[tensorflow]', or set KERAS_BACKEND=jax, which is installed"
    assert problem.remedy == expected


def test_kernels_that_were_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENNORM_KERNEL", "reference")
    result = run(monkeypatch, ("numpy",))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "problem: numpy: EVENNORM_KERNEL=reference turns the compiled kernels off. Unset it."
    )


def test_a_kernel_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line here and of every command; it was a traceback at import."""
    monkeypatch.setenv("EVENNORM_KERNEL", "fast")
    (problem,) = doctor.diagnose(["numpy"]).frameworks[0].problems
    assert problem == ("EVENNORM_KERNEL is unset, or reference to compare with; received EVENNORM_KERNEL=fast", "unset it")
    words = ["bench", "--engine", "numpy", "--shapes", "8x8", "--rounds", "1"]
    run = subprocess.run([sys.executable, "-m", "evennorm", *words], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert "received EVENNORM_KERNEL=fast" in line


def test_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not here: torch is made to say so."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(probe.triton, "missing", lambda: "Triton is not installed; pip install 'evennorm[gpu]'")
    monkeypatch.setattr(probe.triton, "AVAILABLE", False)
    found = probe.look("torch")
    assert [row["device"] for row in found["rows"]] == ["CPU", "NVIDIA H200"]
    assert found["rows"][1]["training"] == dict.fromkeys(DTYPES, "reference")
    (problem,) = found["problems"]
    assert problem == ("on NVIDIA H200: Triton is not installed", "run pip install 'evennorm[gpu]'")
    monkeypatch.setattr(probe.triton, "missing", lambda: None)
    monkeypatch.setattr(probe.triton, "AVAILABLE", True)
    found = probe.look("torch")
    assert found["rows"][1]["inference"] == dict.fromkeys(DTYPES, "triton")
    assert found["problems"] == []


def test_jax_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H200"

    monkeypatch.setattr(jax, "devices", lambda: [Gpu(), Gpu()])
    found = probe.look("jax")
    assert [row["device"] for row in found["rows"]] == ["CPU", "NVIDIA H200"]
    assert set(found["rows"][1]["training"].values()) == {"reference"}
    assert (found["problems"], found["notes"][0].why) == ([], "evennorm has no kernels for GPUs under JAX")


def test_torch_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Served, but slower than need be: a note, and no problem."""
    from evennorm.kernels import parts
    from evennorm.torch import native

    monkeypatch.setattr(native, "EXTENSION", "_torch_9_9_9")
    parts.keep("_torch_9_9_9", ImportError("none"), native.BUILD_BESIDE_TORCH)
    found = probe.look("torch")
    assert found["problems"] == []
    (note,) = found["notes"]
    assert "go through Python" in note.why
    assert "pip install --no-build-isolation ." in note.remedy


def test_wrong_values_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import evennorm.numpy as ours

    right = ours.batch_norm
    monkeypatch.setattr(ours, "batch_norm", lambda *given, **options: (right(*given, **options)[0] + 0.5, None))
    (problem,) = probe.look("numpy")["problems"]
    assert problem.why == "evennorm.numpy.batch_norm is wrong by 0.5 on a small array"


def test_the_kernel_of_each_dtype_where_they_differ() -> None:
    row = {"device": "CPU", "training": {"float32": "cpu", "float16": "reference", "float64": "cpu"}, "inference": {}}
    numpy = doctor.Framework("numpy", "2", rows=(row,))
    shown = list(lines(doctor.Diagnosis("1", "3", "Linux", "x", 2, None, 1, (numpy,))))
    assert "compiled (float32 float64), plain (float16)" in shown[4]
    assert shown[1] == "x, 2 cores: no compiled kernels"
    assert shown[5].startswith("plain: the framework's own operations.")


WITHOUT_PARTS = """
import sys
for name in ("_cpu", "_xla"):
    sys.modules[f"evennorm.kernels.{name}"] = None
"""


def alone(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=300,
    )


NORMALIZE = """
import numpy as np
x = np.arange(32, dtype="float32").reshape(8, 4) ** 2
expected = (x.astype("float64") - x.mean(0)) / np.sqrt(x.astype("float64").var(0) + 1e-3)
import evennorm.{engine} as ours
from {module} import {array} as array
for _ in range(2):
    y, _ = ours.batch_norm(array(x), axis=-1, epsilon=1e-3)
np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-5, atol=1e-5)
"""
ENGINES = {
    "numpy": ("numpy", "asarray"),
    "jax": ("jax.numpy", "asarray"),
    "torch": ("torch", "from_numpy"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_without_its_kernels_says_so_once(engine: str) -> None:
    module, array = ENGINES[engine]
    part = {"jax": "_xla"}.get(engine, "_cpu")
    code = WITHOUT_PARTS + NORMALIZE.format(engine=engine, module=module, array=array)
    run = alone(code)
    assert run.returncode == 0, run.stderr
    (said,) = [line for line in run.stderr.splitlines() if "UserWarning: evennorm" in line]
    assert (
        f"UserWarning: evennorm.{engine} computes without its compiled kernels, and slower: evennorm.kernels.{part} " in said
    )
    assert "To fix it, run pip install . in evennorm's source tree; `evennorm doctor` says more;" in said
    off = alone(code, EVENNORM_KERNEL="reference")
    assert (off.returncode, "UserWarning: evennorm" in off.stderr) == (0, False), off.stderr


def test_a_jax_that_refuses_the_kernels(tmp_path: Path) -> None:
    """As one does that no longer knows the version of XLA's interface that they were compiled for."""
    refusal = """
import jax
def refuse(name, handler, platform):
    raise ValueError("the handler's API version (0.1) is incompatible")
jax.ffi.register_ffi_target = refuse
jax.__version_info__ = (0, 99, 0)
"""
    tail = "\nfrom evennorm.kernels import choose\nassert choose('jax', 'float32') == 'reference'\n"
    run = alone(refusal + NORMALIZE.format(engine="jax", module="jax.numpy", array="asarray") + tail)
    assert run.returncode == 0, run.stderr
    (said,) = [line for line in run.stderr.splitlines() if "UserWarning: evennorm" in line]
    assert (
        "refuses evennorm.kernels._xla: the handler's API version (0.1) is incompatible. To fix it, install JAX 0.10" in said
    )


def test_the_headers_of_xla_serve_this_jax() -> None:
    """XLA takes handlers of its own version and of older ones. A JAX that was not tried is asked later than it might be."""
    import jax

    from evennorm.jax.lowering import TRIED

    def version(folder: Path) -> tuple[int, ...]:
        text = (folder / "xla/ffi/api/c_api.h").read_text()
        return tuple(int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR"))

    ours = version(Path(__file__).parents[2] / "native/third_party/xla")
    assert ours == (0, 1) <= version(Path(jax.ffi.include_dir()))
    assert jax.__version_info__[:2] <= TRIED


def test_a_jax_that_is_known_gets_the_kernels_at_once() -> None:
    """So that programs compiled before, and read from a file, find them."""
    code = """
import jax
names = []
register = jax.ffi.register_ffi_target
jax.ffi.register_ffi_target = lambda name, *rest, **more: (names.append(name), register(name, *rest, **more))
import evennorm.jax
assert names == ["evennorm_forward", "evennorm_backward"], names
"""
    run = alone(code)
    assert run.returncode == 0, run.stderr


def test_an_extension_for_torch_that_cannot_be_loaded(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go through Python, and the doctor says why."""
    code = """
import importlib
real = importlib.import_module
def broken(name, package=None):
    if "_torch_" in name:
        raise ImportError("undefined symbol: _ZN2at")
    return real(name, package)
importlib.import_module = broken
"""
    run = alone(
        code
        + NORMALIZE.format(engine="torch", module="torch", array="from_numpy")
        + (
            "\nfrom evennorm.kernels import parts\nfrom evennorm.torch import native\n"
            "assert not native.AVAILABLE\nprint(parts.problem(native.EXTENSION).why)\n"
        )
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("cannot be loaded: undefined symbol: _ZN2at")


def test_the_module_runs_as_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "evennorm", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"evennorm, version {evennorm.__version__}"
