"""Small files that expand to GiB when they are read without care, each by a trick of its format; run by test_bombs.py.

Run in a process of its own, with less memory than any of them would take. Prints the exit code and stderr of every command.
"""

from __future__ import annotations

import _codecs
import io
import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
from click.testing import CliRunner

from evennorm.cli import main
from tests.tools.hostile import NETS, limit_memory

GB = 1 << 30


def weights(path: Path, names: object = (b"dense_1",)) -> h5py.File:
    """An open file such as Keras 2 wrote, of one layer."""
    file = h5py.File(path, "w")
    file.attrs["layer_names"], file.attrs["keras_version"], file.attrs["backend"] = list(names), b"2.2.4", b"tensorflow"
    group = file.create_group("dense_1")
    group.attrs["weight_names"] = [b"kernel:0", b"bias:0"]
    group["kernel:0"], group["bias:0"] = np.ones((4, 3), "float32"), np.ones(3, "float32")
    return file


def reference_to(content: bytes, text: bytes) -> bytes:
    """How a file refers to the string of variable length that it holds once."""
    at = content.index(text)
    number, size = struct.unpack("<H6xQ", content[at - 16 : at])
    return struct.pack("<IQI", size, content.rindex(b"GCOL", 0, at), number)


def repointed(path: Path, large: bytes, small: bytes) -> None:
    """Makes every reference to equal small strings one to the large string."""
    content = path.read_bytes()
    new, at, size = reference_to(content, large), 0, len(small)
    changed = bytearray(content)
    while (at := content.find(struct.pack("<I", size), at)) >= 0:  # references begin with the length
        address = int.from_bytes(content[at + 4 : at + 12], "little")
        if content[address : address + 4] == b"GCOL":
            changed[at : at + 16] = new
            at += 15
        at += 1
    path.write_bytes(bytes(changed))


def strings_of_an_attribute(path: Path) -> None:
    """3000 names, all of them the same MB."""
    with weights(path, [b"n" * 13] * 3000) as file:
        file.attrs["large"] = b"L" * (1 << 20)
    repointed(path, b"L" * (1 << 20), b"n" * 13)


def strings_of_a_data_set(path: Path) -> None:
    with weights(path) as file:
        file.attrs["large"] = b"L" * (1 << 20)
        del file["dense_1/bias:0"]
        file["dense_1/bias:0"] = [b"n" * 13] * 3000
    repointed(path, b"L" * (1 << 20), b"n" * 13)


def compressed_chunk(path: Path) -> None:
    """It says 262 KB, and unpacks to a GiB."""
    packer = zlib.compressobj(1)
    zeros = bytes(1 << 24)
    packed = b"".join(packer.compress(zeros) for _ in range(GB >> 24)) + packer.flush()
    with weights(path) as file:
        del file["dense_1/bias:0"]
        data = file["dense_1"].create_dataset("bias:0", (1 << 16,), "f4", chunks=(1 << 16,), compression="gzip")
        data.id.write_direct_chunk((0,), packed)


def packed_twice(path: Path) -> None:
    with weights(path) as file:
        del file["dense_1/bias:0"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((3,))
        settings.set_deflate(9)
        settings.set_deflate(9)
        space = h5py.h5s.create_simple((3,))
        data = h5py.h5d.create(file["dense_1"].id, b"bias:0", h5py.h5t.IEEE_F32LE, space, settings)
        data.write_direct_chunk((0,), zlib.compress(zlib.compress(bytes(1 << 24))))


def shape_beyond_64_bits(path: Path) -> None:
    with weights(path) as file:
        del file["dense_1/bias:0"]
        file["dense_1"].create_dataset("bias:0", (1 << 31, 1 << 31, 4), "f4", chunks=(1, 1, 4))


def data_over_each_other(path: Path) -> None:
    """A hundred weights of 16 MB, all at the same place."""
    shape = (1 << 22,)
    with weights(path) as file:
        del file["dense_1/bias:0"]
        file["dense_1/bias:0"] = np.zeros(shape, "float32")
        first = file["dense_1/bias:0"].id.get_offset()
        names, others = [f"w{number}" for number in range(100)], []
        for name in names:
            data = file["dense_1"].create_dataset(name, (5,), "f4")
            data[...] = 1
            others.append(data.id.get_offset())
        file["dense_1"].attrs["weight_names"] = [b"kernel:0", b"bias:0", *(name.encode() for name in names)]
    content = path.read_bytes()
    for offset in others:
        at = content.index(struct.pack("<QQ", offset, 20))  # where it lies, and its size; its shape stands in front
        header = content[at - 200 : at].replace(struct.pack("<Q", 5), struct.pack("<Q", 1 << 22))
        content = content[: at - 200] + header + struct.pack("<QQ", first, 4 << 22) + content[at + 16 :]
    path.write_bytes(content)


def same_weights_under_many_names(path: Path) -> None:
    """A thousand names of 4 MB."""
    with weights(path) as file:
        group = file["dense_1"]
        del group["bias:0"]
        group["bias:0"] = np.zeros(1 << 20, "float32")
        names = [f"w{number}" for number in range(1000)]
        for name in names:
            group[name] = group["bias:0"]
        group.attrs["weight_names"] = [b"kernel:0", b"bias:0", *(name.encode() for name in names)]


def linked(path: Path) -> None:
    with weights(path) as file:
        del file["dense_1/bias:0"]
        file["dense_1/bias:0"] = h5py.SoftLink("/dense_1/bias:0")


def linked_to_a_file(path: Path) -> None:
    with weights(path) as file:
        del file["dense_1/bias:0"]
        file["dense_1/bias:0"] = h5py.ExternalLink("/etc/passwd", "/")


def kept_in_a_file(path: Path) -> None:
    with weights(path) as file:
        del file["dense_1/bias:0"]
        file["dense_1"].create_dataset("bias:0", (3,), "f4", external=[("/etc/passwd", 0, 12)])


def seen_through_a_file(path: Path) -> None:
    with weights(path) as file:
        del file["dense_1/bias:0"]
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource("/dev/zero", "x", (3,))
        file["dense_1"].create_virtual_dataset("bias:0", layout)


HDF5 = {
    strings_of_an_attribute: "the text of its attributes announces 3,1",
    strings_of_a_data_set: "announces 2",
    compressed_chunk: "unpacks to more than the 262,144 bytes of its chunks",
    packed_twice: "packed by filters [1, 1]",
    shape_beyond_64_bits: "announces 73,786,976,294,838 MB",
    data_over_each_other: "they lie over each other",
    same_weights_under_many_names: "is another name for an object elsewhere in it",
    linked: "is a link, which Keras never writes",
    linked_to_a_file: "leads out of the file",
    kept_in_a_file: "keeps its data in other files",
    seen_through_a_file: "keeps its data in other files",
}


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stored:
    """Pickled as a reference to a storage."""

    def __init__(self, numbers: int):
        self.numbers = numbers


class Build(Call):
    """A call, and then a state."""

    def __init__(self, state, function, *arguments):
        self.call = function, arguments, state


def pickled(value: object) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", value.numbers, None) if isinstance(value, Stored) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def tensor(numbers: int, shape: object, stride: tuple[int, ...]) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, Stored(numbers), 0, shape, stride, False, {})


def legacy(path: Path, value: object) -> None:
    """As torch.save wrote until 1.6: pickles, and behind them one storage of four numbers."""
    begin = b"".join(map(pickled, (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})))
    path.write_bytes(
        begin
        + (value if isinstance(value, bytes) else pickled({"0.weight": value}))
        + pickled(["0"])
        + struct.pack("<q", 4)
        + bytes(16)
    )


def key_of_tuples() -> bytes:
    """A dictionary whose key has 2 ** 60 parts, of which a hash looks at each."""
    key: tuple = ()
    for _ in range(60):
        key = (key, key)
    return b"\x80\x02}" + pickled(key)[2:-1] + b"K\x01s."


TEXT = "x" * (1 << 22)
LEGACY = {
    "storage of a GiB": (tensor(1 << 28, (1 << 28,), (1,)), "its storages announce 1,073,741,824 bytes, and 24 follow"),
    "numbers without strides": (tensor(4, (1 << 40,), (0,)), "the sum of its tensors announces 4,398,047 MB"),
    "a size that is a torch.Size": (
        tensor(4, Call(torch.Size, (1 << 40,)), (0,)),
        "the sum of its tensors announces 4,398,047 MB",
    ),
    "a size that is a list": (tensor(4, [1 << 40], (0,)), "more than tensors"),
    "a tensor of the first releases": (
        Build((Stored(4), 0, (1 << 40,), (1,)), torch.FloatTensor),
        "the sum of its tensors announces 4,398,047 MB",
    ),
    "memory alone": (Call(bytearray, 1 << 31), "the sum of its tensors announces"),
    "numbers that nobody wrote": (Call(torch.FloatTensor, 1 << 29), "the sum of its tensors announces"),
    "the same behind a subclass": (
        Call(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (1 << 31,), {}),
        "the sum of its tensors announces",
    ),
    "one text a thousand times": (
        [Call(_codecs.encode, TEXT, "latin1") for _ in range(1000)],
        "the sum of its tensors announces",
    ),
    "tuples in tuples": (key_of_tuples(), "more than tensors"),
}


def zipped_state(path: Path, numbers: int, held: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", pickled({"0.weight": tensor(numbers, (4,), (1,))}))
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/data/0", held)
        archive.writestr("a/version", b"3\n")


MIGRATE = ("--architecture", "nets:own", "-o", "out.keras")


def cases() -> dict[str, tuple[tuple[str, ...], str]]:
    """By name: the command, and words of its line. The files are written here."""
    found = {}
    for write, words in HDF5.items():
        name = write.__name__
        write(Path(f"{name}.h5"))
        found[name] = ("migrate", f"{name}.h5", *MIGRATE), words
    for name in (strings_of_an_attribute.__name__, compressed_chunk.__name__):
        Path(f"{name}.weights.h5").write_bytes(Path(f"{name}.h5").read_bytes())
        found[f"{name} as weights"] = ("check", "nets:own", "--weights", f"{name}.weights.h5"), found[name][1]
    for number, (name, (value, words)) in enumerate(LEGACY.items()):
        legacy(Path(f"{number}.pt"), value)
        found[name] = ("check", "nets:net", "--weights", f"{number}.pt"), words
    zipped_state(Path("lie.pt"), 1 << 28, bytes(16))
    found["zipped storage"] = ("check", "nets:net", "--weights", "lie.pt"), "announces 1,073,741,824 bytes, and holds 16"
    zipped_state(Path("bomb.pt"), 1 << 27, bytes(1 << 29), zipfile.ZIP_DEFLATED)
    found["zip bomb"] = ("check", "nets:net", "--weights", "bomb.pt"), "announces 537 MB"
    return found


def run(folder: Path) -> None:
    os.chdir(folder)
    Path("nets.py").write_text(NETS)
    warnings.simplefilter("ignore")
    commands = cases()
    for model in ("nets:net", "nets:own"):
        CliRunner().invoke(main, ["check", model])  # imports all there is to import
    limit_memory(GB >> 1)
    for name, (arguments, words) in commands.items():
        before = set(folder.iterdir())
        result = CliRunner().invoke(main, list(arguments))
        left = sorted(path.name for path in set(folder.iterdir()) - before if path.name != "__pycache__")
        print(json.dumps([name, result.exit_code, result.stderr, words, left]), flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
