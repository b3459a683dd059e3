"""Every reader of the command line on files of unknown origin: no traceback, no growth, no wait, nothing left behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from evennorm.errors import InputError
from evennorm.tools.compare.data import load_data
from evennorm.tools.compare.models import load_model
from evennorm.tools.data import open_data
from evennorm.tools.migrate import migrate
from evennorm.tools.models import open_model

EXAMPLES = 12
"""Files for each reader."""


def test_files_grown_by_mutation(tmp_path) -> None:
    """In a process with a limit of memory; hostile.py says what must hold."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.hostile", str(tmp_path), str(EXAMPLES)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("0 readers failed"), done.stdout


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def npy_header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


LIES = {
    "6.98 TiB": (npy_header("(1000000, 1919999)"), "announces float32 of shape (1000000, 1919999), and holds 8 bytes"),
    "broken": (npy_header("(((("), "its header is broken"),
    "negative": (npy_header("(-2, -1)"), "no array has the shape (-2, -1)"),
    "no integer": (npy_header("(1.5,)"), "its header is broken"),
    "values of no size": (npy_header("(1000000000000,)", "|S0"), "take no space"),
    "objects": (npy_header("(1,)", "|O"), "pickled Python objects"),
    "many axes": (npy_header(str((1,) * 60)), "its header is broken"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_of_arrays_that_lie(tmp_path, name, method) -> None:
    """The same reader for check, recalibrate, fold and compare."""
    header, words = LIES[name]
    content = header + b"\0" * 8
    (tmp_path / "x.npy").write_bytes(content)
    refused(lambda: open_data(tmp_path / "x.npy"), words)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("x.npy", content)
    refused(lambda: open_data(tmp_path / "x.npz"), words)
    good = io.BytesIO()
    np.save(good, np.arange(10))
    with zipfile.ZipFile(tmp_path / "xy.npz", "w", method) as archive:
        archive.writestr("x_train.npy", content)
        for other in ("y_train", "x_test", "y_test"):
            archive.writestr(f"{other}.npy", good.getvalue())
    refused(lambda: load_data(str(tmp_path / "xy.npz")), words)


def test_any_number_of_samples_without_values(tmp_path) -> None:
    (tmp_path / "x.npy").write_bytes(npy_header("(1000000000000, 0)"))
    refused(lambda: open_data(tmp_path / "x.npy"), "its samples hold no values")


def test_bombs_for_compare(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(npy_header("(100, 3000000)", "|u1"))
                for _ in range(100):
                    file.write(bytes(3_000_000))
    refused(lambda: load_data(str(tmp_path / "x.npz")), "as bombs do")


def test_many_small_bombs(tmp_path) -> None:
    """Each below what one member may be, all of them together above it."""
    content = bytes(100_000_000)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(4):
            archive.writestr(f"x{number}.npy", npy_header("(100000000,)", "|u1") + content)
    refused(lambda: open_data(tmp_path / "x.npz"), "all of it announces", "as bombs do")


def idx_folder(folder: Path, images: bytes, suffix: str = "") -> str:
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + b"\0\1")
    return str(folder)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((2**32 - 1,) * 3, "announces"),
        ((2**32 - 1,) * 255, "is not a readable IDX file"),
        ((2, 3, 3), "7 values follow"),
        ((2, 1, 3), "more values follow"),
        ((), "is not a whole IDX file"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_headers_of_idx_files_that_lie(tmp_path, sizes, words, packed) -> None:
    content = struct.pack(f">HBB{min(len(sizes), 9)}I", 0, 8, len(sizes), *sizes[:9]) + bytes(7)
    content = gzip.compress(content) if packed else content
    refused(lambda: load_data(idx_folder(tmp_path, content, ".gz" if packed else "")), words)


def test_a_gzip_bomb(tmp_path) -> None:
    """What the header counts is read, and one byte more."""
    content = struct.pack(">HBB3I", 0, 8, 3, 2, 1, 1) + bytes(400_000_000)
    refused(lambda: load_data(idx_folder(tmp_path, gzip.compress(content, 1), ".gz")), "more values follow")


def test_images_that_announce_more_than_they_hold(tmp_path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (12_000, 10_000)).save(tmp_path / "a" / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "0.png")
    refused(lambda: load_data(str(tmp_path)), "announces 360 MB", "as bombs do")


def test_many_images_that_unpack_well(tmp_path) -> None:
    """Each below what one image may be, all of them together above it."""
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("L", (8_000, 8_000)).save(tmp_path / name / f"{number}.png")
    refused(lambda: load_data(str(tmp_path)), "its images as far as", "as bombs do")
    refused(lambda: list(open_data(tmp_path).batches(32)), "its images as far as", "as bombs do")


def test_pictures_that_are_programs_are_not_run(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n%%EOF\n")
    refused(lambda: load_data(str(tmp_path)), "is not a readable image")


def old_file(path: Path, **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["nb_layers"] = attributes.get("nb_layers", 1)
        group = file.create_group("layer_0")
        group.attrs["nb_params"] = attributes.get("nb_params", 1)
        group["param_0"] = np.ones((4, 3), "float32")
    return path


@pytest.mark.parametrize("key", ["nb_layers", "nb_params"])
@pytest.mark.parametrize("count", [10**10, -1])
def test_counts_that_lie(tmp_path, key, count) -> None:
    refused(lambda: migrate(old_file(tmp_path / "old.h5", **{key: count})), f"counts {key} = {count}", "damaged")


def configured(path: Path, **changes: object) -> Path:
    """A file of Keras 1.2 of one Dense layer, with changes to its configuration."""
    layer = {"name": "dense_1", "output_dim": 3, "activation": "linear", "bias": True}
    inbound = [[["in", 0, 0]]]
    config = {
        "name": "model_1",
        "layers": [
            {"class_name": "InputLayer", "name": "in", "config": {"batch_input_shape": [None, 4]}, "inbound_nodes": []},
            {"class_name": "Dense", "name": "dense_1", "config": layer | changes, "inbound_nodes": inbound},
        ],
        "input_layers": changes.pop("inputs", [["in", 0, 0]]),
        "output_layers": changes.pop("outputs", [["dense_1", 0, 0]]),
    }
    name = str(changes.get("name", "dense_1"))
    config["layers"][1]["name"] = name
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = b"1.2.2"
        file.attrs["model_config"] = json.dumps({"class_name": "Model", "config": config}).encode()
        file.attrs["layer_names"] = [b"dense_1"]
        group = file.create_group("dense_1")
        group.attrs["weight_names"] = [b"dense_1_W", b"dense_1_b"]
        group["dense_1_W"], group["dense_1_b"] = np.ones((4, 3), "float32"), np.ones(3, "float32")
    return path


def test_the_honest_one_is_read(tmp_path) -> None:
    assert migrate(configured(tmp_path / "old.h5")).parameters == 15


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": [["nobody", 0, 0]]},
        {"outputs": [["dense_1", 7, 0]]},
        {"outputs": [["dense_1", -1, 0]]},
        {"outputs": [["dense_1", 0, 3]]},
        {"inputs": [["nobody", 0, 0]]},
        {"inputs": []},
        {"output_dim": -1},
        {"output_dim": "three"},
        {"activation": {"class_name": 3}},
    ],
)
def test_configurations_that_are_wrong(tmp_path, changes) -> None:
    refused(lambda: migrate(configured(tmp_path / "old.h5", **changes)))


def test_layers_of_ten_billion_units(tmp_path) -> None:
    refused(lambda: migrate(configured(tmp_path / "old.h5", output_dim=10**10)), "announces", "as bombs do")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    model.save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b'"units": 3', b'"units": 10000000000')
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(lambda: open_model(tmp_path / "net.keras"), "announces", "as bombs do")
    refused(lambda: load_model(str(tmp_path / "net.keras"), load_data("digits")), "announces", "as bombs do")


def test_devices_are_no_files(tmp_path) -> None:
    for path in ("/dev/zero", "/dev/null"):
        refused(lambda path=path: open_model(path), "no regular file")
        refused(lambda path=path: open_data(path), "")
        refused(lambda path=path: migrate(old_file(tmp_path / "old.h5"), architecture=path), "no regular file")


def test_hdf5_chunks_and_many_data_sets(tmp_path) -> None:
    """What is read as a whole is a chunk, and all data sets together may be far more than the file."""
    path = old_file(tmp_path / "chunk.h5")
    with h5py.File(path, "r+") as file:
        file["layer_0"].create_dataset("param_1", (4,), "f4", chunks=(100_000_000,), maxshape=(None,))
    refused(lambda: migrate(path), "announces 400 MB", "as bombs do")
    path = old_file(tmp_path / "many.h5")
    with h5py.File(path, "r+") as file:
        for number in range(1, 4):
            file["layer_0"].create_dataset(f"param_{number}", (50_000_000,), "f4", chunks=(1000,), compression=9)
    refused(lambda: migrate(path), "all of it announces", "as bombs do")


def test_a_list_of_the_same_layer_many_times(tmp_path) -> None:
    path = configured(tmp_path / "old.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["layer_names"] = [b"dense_1"] * 1000
    refused(lambda: migrate(path), "lists the layer 'dense_1' twice")


def test_deep_json(tmp_path) -> None:
    path = old_file(tmp_path / "old.h5")
    (tmp_path / "model.json").write_text("[" * 100_000)
    refused(lambda: migrate(path, architecture=tmp_path / "model.json"), "is no JSON")
