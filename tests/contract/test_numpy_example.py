"""The example that standardizes a file: values against float64, memory that does not grow with it, whole files or none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "standardize_memmap.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_file_of_ones_own(dtype: str, tmp_path: Path) -> None:
    """Several chunks, the last one short, and a column of one value."""
    rng = np.random.default_rng(0)
    x = rng.normal(3.0 if dtype == "float16" else 1e5, 1.0, (90_001, 110)).astype(dtype)
    x[:, 7] = 2.0
    np.save(tmp_path / "in.npy", x)
    done = run(tmp_path / "in.npy", tmp_path / "out.npy")
    assert done.returncode == 0, done.stderr
    assert "over 90001 rows" in done.stdout
    y = np.load(tmp_path / "out.npy")
    assert y.dtype == x.dtype
    wide = x.astype(np.longdouble)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-12)
    bound = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-10}[dtype]
    np.testing.assert_allclose(y.astype(float), expected.astype(float), rtol=bound, atol=bound)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.npy"]


def test_memory_does_not_grow_with_the_file() -> None:
    peaks = []
    for gigabytes in (0.05, 0.25):
        done = run("--gigabytes", gigabytes)
        assert done.returncode == 0, done.stderr
        peaks.append(int(re.search(r"memory +(\d+) MB at most", done.stdout)[1]))
    assert peaks[1] < peaks[0] + 20, peaks


@pytest.mark.parametrize("table", [np.ones((4, 3), int), np.ones(4), np.asfortranarray(np.ones((4, 3))), np.ones((0, 3))])
def test_what_is_no_table(table: np.ndarray, tmp_path: Path) -> None:
    """What was at the target stays."""
    np.save(tmp_path / "in.npy", table)
    (tmp_path / "out.npy").write_text("as it was")
    done = run(tmp_path / "in.npy", tmp_path / "out.npy")
    assert done.returncode == 1
    assert f"a table of floats is needed, row after row; found {table.dtype} of shape {table.shape}" in done.stderr
    assert (tmp_path / "out.npy").read_text() == "as it was"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path / "in.npy", tmp_path / "out.npy")
    assert done.returncode == 1
    assert "in.npy: no .npy file to open" in done.stderr
    assert "Traceback" not in done.stderr
