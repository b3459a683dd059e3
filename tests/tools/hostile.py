"""Hostile files, grown by mutation from honest ones, for every reader of the command line; run by test_hostile_files.py.

Run in a process of its own, with less memory than a lie would take. Each file must end in exit code 0, 1 or 2, with one line
on stderr where it is refused, soon, without growth and without a file left behind.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_tensors
from torch import nn

from evennorm.cli import main
from evennorm.errors import EvennormError
from evennorm.tools.compare.data import load_data

MEMORY = 1 << 30
"""Bytes that a file may take, beside what the process holds when it begins."""
SECONDS = 15
"""For one file; one takes far less than one second where nobody else works."""
RECORDED = Path(__file__).parents[1] / "data" / "keras1"

NETS = """
from torch import nn
def net(): return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
def own():
    import keras
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
"""
NUMBERS = (0, -1, 2**31 - 1, 10**10, 2**63 - 1, 10**30, 1.5, float("inf"))
VALUES = (*NUMBERS, True, None, "", "\ud800", "a\x1b[2J\n::error::", [], {})
LARGE = (b"\xff" * 8, b"\x7f" + b"\xff" * 3, b"\0" * 8, b"9" * 8, b"((((")


class Failure(BaseException):
    """What no handler of a reader may take for damage."""


# Mutations


@st.composite
def bytes_like(draw, honest: bytes) -> bytes:
    """An honest file with a few bytes changed, left out or repeated, most of them in its first part."""
    content = bytearray(honest)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        end = draw(st.sampled_from((min(len(content), 160), len(content)))) - 1
        at = draw(st.integers(0, end))
        match draw(st.sampled_from(("byte", "large", "cut", "leave", "repeat"))):
            case "byte":
                content[at] = draw(st.integers(0, 255))
            case "large":
                content[at : at + 8] = draw(st.sampled_from(LARGE))
            case "cut":
                del content[at:]
            case "leave":
                del content[at : at + draw(st.integers(1, 32))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
    return bytes(content)


def places(value, path=()):
    """Every place in a parsed JSON document."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def documents_like(draw, honest):
    """A JSON document with some of its values exchanged for others, left out or repeated."""
    changed = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        found = [path for path in places(changed) if path]
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        inside = changed
        for step in above:
            inside = inside[step]
        match draw(st.sampled_from(("value", "value", "leave", "another", "repeat"))):
            case "value":
                inside[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "leave":
                del inside[key]
            case "another":
                other = changed
                for step in draw(st.sampled_from(found)):
                    other = other[step] if isinstance(other, dict | list) and _has(other, step) else other
                inside[key] = copy.deepcopy(other)
            case "repeat":
                if isinstance(inside, list):
                    inside.insert(key, copy.deepcopy(inside[key]))
    return changed


def _has(value, step) -> bool:
    return step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)


# Honest files


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def idx(sizes, count: int) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + bytes(range(count))


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "png")
    return file.getvalue()


def model() -> keras.Model:
    x = inputs = keras.Input((4, 4, 2), name="images")
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Add(name="sum")([x, keras.layers.Activation("relu", name="relu")(x)])
    return keras.Model(inputs, keras.layers.Dense(2, name="dense")(keras.layers.Flatten(name="flat")(x)))


def honest(folder: Path) -> dict[str, bytes]:
    """What the readers take, by name."""
    made = model()
    made.save(folder / "net.keras")
    made.save(folder / "net.h5")
    made.save_weights(folder / "net.weights.h5")
    state = {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4), "1.weight": torch.ones(4), "1.bias": torch.ones(4)}
    state |= {"1.running_mean": torch.zeros(4), "1.running_var": torch.ones(4), "1.num_batches_tracked": torch.tensor(3)}
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (torch.ones(2, 1, 4, 4),), dynamic_shapes=batch), folder / "net.pt2")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files["state.safetensors"] = save_tensors(state)
    shutil.copy(RECORDED / "keras-1.0.5-dense.weights.h5", folder / "old.weights.h5")
    files["old.weights.h5"] = (folder / "old.weights.h5").read_bytes()
    with h5py.File(folder / "old.h5", "w") as file:  # what Keras 1.2 writes
        names = {"dense_1": (("dense_1_W", (4, 3)), ("dense_1_b", (3,)))}
        names["bn"] = (("bn_gamma", (3,)), ("bn_beta", (3,)), ("bn_running_mean", (3,)), ("bn_running_std", (3,)))
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [name.encode() for name in names]
        for name, weights in names.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight, _ in weights]
            for weight, shape in weights:
                group[weight] = np.ones(shape, "float32")
        file.attrs["keras_version"] = b"1.2.2"
        file.attrs["model_config"] = json.dumps(OLD).encode()
    files["old.h5"] = (folder / "old.h5").read_bytes()
    with h5py.File(folder / "packed.h5", "w") as file:  # the same compressed, its names of variable length
        for key, value in h5py.File(folder / "old.h5").attrs.items():
            file.attrs[key] = value
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = list(names)
        for name, weights in names.items():
            root.create_group(name).attrs["weight_names"] = [weight for weight, _ in weights]
            for weight, shape in weights:
                root[name].create_dataset(weight, data=np.ones(shape, "float32"), compression="gzip", fletcher32=True)
    files["packed.h5"] = (folder / "packed.h5").read_bytes()
    with h5py.File(folder / "older.h5", "w") as file:  # what came before weights had names
        file.attrs["nb_layers"] = 1
        group = file.create_group("layer_0")
        group.attrs["nb_params"] = 2
        group["param_0"], group["param_1"] = np.ones((4, 3), "float32"), np.ones(3, "float32")
    files["older.h5"] = (folder / "older.h5").read_bytes()
    return files


def old_layer(kind: str, name: str, inputs: str | None, **config):
    inbound = [[[inputs, 0, 0]]] if inputs else []
    return {"class_name": kind, "name": name, "config": {"name": name, **config}, "inbound_nodes": inbound}


OLD = {
    "class_name": "Model",
    "config": {
        "name": "model_1",
        "layers": [
            old_layer("InputLayer", "in", None, batch_input_shape=[None, 4], input_dtype="float32", sparse=False),
            old_layer("Dense", "dense_1", "in", output_dim=3, init="glorot_uniform", activation="linear", bias=True),
            old_layer("BatchNormalization", "bn", "dense_1", epsilon=1e-3, mode=0, axis=-1, momentum=0.99),
        ],
        "input_layers": [["in", 0, 0]],
        "output_layers": [["bn", 0, 0]],
    },
}


def with_configuration(file: bytes, key: str, document) -> bytes:
    opened = io.BytesIO(file)
    with h5py.File(opened, "r+") as changed:
        changed.attrs[key] = json.dumps(document)[: 1 << 15].encode()
    return opened.getvalue()


# What must hold


def held(folder: Path, call) -> None:
    """Runs one reader in the folder, which is then as it was."""
    before = {path: path.stat().st_size for path in folder.rglob("*") if "__pycache__" not in path.parts}
    signal.alarm(SECONDS)
    try:
        call()
    finally:
        signal.alarm(0)
    after = {path: path.stat().st_size for path in folder.rglob("*") if "__pycache__" not in path.parts}
    if before != after:
        raise Failure(f"left behind or changed: {sorted(map(str, before.items() ^ after.items()))}")


def command(*arguments: str) -> None:
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise Failure(f"{arguments}: {type(result.exception)}") from result.exception
    lines = result.stderr.splitlines()
    if result.exit_code not in (0, 1, 2) or len(lines) != (result.exit_code == 2) or "fault of evennorm" in result.stderr:
        raise Failure(f"{arguments}: exit code {result.exit_code}\n{result.output}")
    shown = result.stdout + "".join(lines)
    if any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown):
        raise Failure(f"{arguments}: control characters in {shown!r}")
    if any(line.lstrip().startswith("::") for line in shown.splitlines()):
        raise Failure(f"{arguments}: a command to CI services in {shown!r}")
    for written in ("out.keras", "out.safetensors"):
        Path(written).unlink(missing_ok=True)


def loaded(source: str) -> None:
    try:
        load_data(source)
    except EvennormError as error:
        if "\n" in str(error):
            raise Failure(f"{source}: not one line: {error}") from error


def cases(folder: Path):
    """Name, strategy, the file that it makes, and what reads it."""
    files = honest(folder)
    numbers = np.arange(32.0, dtype="float32").reshape(8, 4)
    labels = np.arange(8) % 2
    members = {"x.npy": npy(numbers), "y.npy": npy(labels)}
    four = {f"{axis}_{part}.npy": npy({"x": numbers, "y": labels}[axis]) for axis in "xy" for part in ("train", "test")}
    check = ("check", "nets:net", "--data")
    yield "npy", bytes_like(npy(numbers)), "x.npy", lambda: command(*check, "x.npy")
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        yield f"npz {name}", bytes_like(zipped(members, method)), "x.npz", lambda: command(*check, "x.npz")
        inside = bytes_like(members["x.npy"]).map(lambda x, m=method: zipped(members | {"x.npy": x}, m))
        yield f"array in npz {name}", inside, "x.npz", lambda: command(*check, "x.npz")
        inside = bytes_like(four["x_train.npy"]).map(lambda x, m=method: zipped(four | {"x_train.npy": x}, m))
        yield f"npz {name} for compare", inside, "x.npz", lambda: loaded("x.npz")
    images = idx((4, 3, 3), 36)
    labelled = idx((4,), 4)[:-4] + bytes((0, 1, 0, 1))
    for part in ("train", "t10k"):
        (folder / "idx").mkdir(exist_ok=True)
        (folder / "idx" / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / "idx" / f"{part}-labels-idx1-ubyte").write_bytes(labelled)
    yield "IDX", bytes_like(images), "idx/train-images-idx3-ubyte", lambda: loaded("idx")
    yield "IDX, gzipped", bytes_like(images).map(gzip.compress), "idx/train-images-idx3-ubyte.gz", lambda: loaded("idx")
    yield "gzip", bytes_like(gzip.compress(images)), "idx/train-images-idx3-ubyte.gz", lambda: loaded("idx")
    for name in ("cats", "dogs"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(5):
            (folder / "images" / name / f"{number}.png").write_bytes(png())
    yield "image", bytes_like(png()), "images/cats/0.png", lambda: loaded("images")
    weights = ("check", "nets:net", "--weights")
    yield "pt", bytes_like(files["state.pt"]), "state.pt", lambda: command(*weights, "state.pt")
    yield "legacy pt", bytes_like(files["legacy.pt"]), "legacy.pt", lambda: command(*weights, "legacy.pt")
    yield "safetensors", bytes_like(files["state.safetensors"]), "a.safetensors", lambda: command(*weights, "a.safetensors")
    yield (
        "weights.h5",
        bytes_like(files["net.weights.h5"]),
        "a.weights.h5",
        lambda: command("check", "nets:own", "--weights", "a.weights.h5"),
    )
    yield "h5", bytes_like(files["net.h5"]), "net.h5", lambda: command("check", "net.h5")
    with h5py.File(folder / "net.h5") as file:
        config = json.loads(file.attrs["model_config"])
    changed = documents_like(config).map(lambda x: with_configuration(files["net.h5"], "model_config", x))
    yield "configuration in h5", changed, "net.h5", lambda: command("check", "net.h5")
    with zipfile.ZipFile(folder / "net.keras") as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(inside["config.json"])
    yield "keras", bytes_like(files["net.keras"]), "net.keras", lambda: command("check", "net.keras")
    changed = documents_like(config).map(lambda x: zipped(inside | {"config.json": json.dumps(x).encode()}))
    yield "configuration in keras", changed, "net.keras", lambda: command("check", "net.keras")
    changed = bytes_like(inside["model.weights.h5"]).map(lambda x: zipped(inside | {"model.weights.h5": x}))
    yield "weights in keras", changed, "net.keras", lambda: command("check", "net.keras")
    migrate = ("migrate", "old.h5", "-o", "out.keras")
    yield "old h5", bytes_like(files["old.h5"]), "old.h5", lambda: command(*migrate)
    packed = ("migrate", "packed.h5", "-o", "out.keras")
    yield "packed old h5", bytes_like(files["packed.h5"]), "packed.h5", lambda: command(*packed)
    changed = documents_like(OLD).map(lambda x: with_configuration(files["old.h5"], "model_config", x))
    yield "old configuration", changed, "old.h5", lambda: command(*migrate)
    yield "pt2", bytes_like(files["net.pt2"]), "net.pt2", lambda: command("check", "net.pt2")
    with zipfile.ZipFile(folder / "net.pt2") as archive:
        program = {name: archive.read(name) for name in archive.namelist()}
    for part in ("models/model.json", "data/weights/model_weights_config.json"):
        member = f"net/{part}"
        changed = documents_like(json.loads(program[member])).map(
            lambda x, member=member: zipped(program | {member: json.dumps(x).encode()})
        )
        yield f"{part} in pt2", changed, "net.pt2", lambda: command("check", "net.pt2")
    written = ("--architecture", "old.json", "--written-by", "keras==1.0.4,theano", "-o", "out.keras")
    (folder / "old.json").write_text(json.dumps(OLD))
    yield "old weights", bytes_like(files["older.h5"]), "older.h5", lambda: command("migrate", "older.h5", *written)
    changed = documents_like(OLD).map(lambda x: json.dumps(x).encode())
    yield "architecture", changed, "old.json", lambda: command("migrate", "old.weights.h5", *written)
    yield (
        "text of an architecture",
        bytes_like(json.dumps(OLD).encode()),
        "old.json",
        lambda: command("migrate", "old.weights.h5", *written),
    )


def too_late(*_) -> None:
    raise Failure(f"it takes more than {SECONDS} s")


def limit_memory(more: int = MEMORY) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.RLIM_INFINITY))


def run(folder: Path, examples: int, chosen: str) -> int:
    os.chdir(folder)
    Path("nets.py").write_text(NETS)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_late)
    failures, limited = 0, False
    for name, strategy, target, read in cases(folder):
        if chosen and chosen != name:
            continue
        kept = Path(target).read_bytes() if Path(target).exists() else None
        if not limited:
            command("check", "nets:net")  # imports all there is to import
            command("check", "nets:own")
            limit_memory()
            limited = True

        @settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(strategy)
        def every_file(content: bytes) -> None:
            Path(target).write_bytes(content)  # noqa: B023
            held(folder, read)  # noqa: B023

        try:
            every_file()
        except BaseException as error:
            failures += 1
            print(f"== {name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        if kept is None:
            Path(target).unlink(missing_ok=True)
        else:
            Path(target).write_bytes(kept)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(f"{failures} readers failed; at most {peak >> 20} MB")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
