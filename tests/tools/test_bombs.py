"""Small files that claim or expand to GiB: one line that names the trick, exit code 2, and no memory taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from evennorm.errors import InputError
from evennorm.tools import hdf5


def test_files_that_expand(tmp_path) -> None:
    """In a process with half a GiB to spare; bombs.py writes the files."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.bombs", str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [result for result in results if not refused(*result)]
    assert not wrong
    assert len(results) > 12


def refused(name: str, code: int, stderr: str, words: str, left: list[str]) -> bool:
    return code == 2 and len(stderr.splitlines()) == 1 and words in stderr and not left


@pytest.mark.parametrize("wrong", [(1, "a: 3", []), (2, "a: 4", []), (2, "a: 3\nb", []), (2, "a: 3", ["out.keras"])])
def test_what_is_held_to_be_refused(wrong) -> None:
    code, stderr, left = wrong
    assert refused("", 2, "a: 3", "3", [])
    assert not refused("", code, stderr, "3", left)


def test_honest_files_are_read(tmp_path) -> None:
    """Many names and a long configuration of variable length, as Keras writes them, and numbers that gzip packs well."""
    with h5py.File(tmp_path / "names.h5", "w") as file:
        file.attrs["layer_names"] = [f"a_layer_{number:04}".encode() for number in range(1000)]
        file.attrs["model_config"] = json.dumps(["x" * 1000] * 1000)
        file["text"] = ["one", "two and more"]
    hdf5.check_hdf5_file(tmp_path / "names.h5", "names.h5")
    with h5py.File(tmp_path / "packed.h5", "w") as file:
        file.create_dataset("w", data=np.zeros((600, 1000), "float32"), compression="gzip", shuffle=True, fletcher32=True)
        noise = np.random.default_rng(0).integers(0, 255, 600_000, "uint8")
        file.create_dataset("v", data=noise, chunks=(300_000,), compression="gzip", fletcher32=True)
    hdf5.check_hdf5_file(tmp_path / "packed.h5", "packed.h5")


def test_more_objects_than_a_network_has(tmp_path, monkeypatch) -> None:
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for number in range(12):
            file.create_group(str(number))
    hdf5.check_hdf5_file(tmp_path / "many.h5", "many.h5")
    monkeypatch.setattr(hdf5, "_MOST_OBJECTS", 12)
    with pytest.raises(InputError, match="holds more than 12 groups and data sets"):
        hdf5.check_hdf5_file(tmp_path / "many.h5", "many.h5")
