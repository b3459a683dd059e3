"""What a command may write: never an input, and nothing of another kind without --force."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from evennorm.cli import main
from evennorm.errors import InputError
from evennorm.tools.outputs import Output, check_outputs, is_of_kind, refuse_inputs

EXPLAIN = ("explain", "--shape", "32,10")


def command(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def refused(result, *words):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("evennorm: ")
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of Keras in both formats, and data for it."""
    import keras

    folder = tmp_path_factory.mktemp("saved")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    model.save(folder / "net.keras")
    np.savez(folder / "train.npz", x=np.random.default_rng(0).normal(size=(8, 4)).astype("float32"))
    return folder


@pytest.fixture
def files(saved, tmp_path, monkeypatch):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard", "through a folder", "in other words"])
@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("fold", "net.keras", "-o", "OUT"), "net.keras"),
        (("recalibrate", "net.keras", "--data", "train.npz", "-o", "OUT"), "net.keras"),
        (("check", "net.keras", "--fix", "-o", "OUT"), "net.keras"),
        (("migrate", "old.h5", "-o", "OUT"), "old.h5"),
        (("migrate", "old.h5", "--to", "torch", "-o", "OUT"), "old.h5"),
        (("check", "net.html", "--html", "OUT"), "net.html"),
        (("check", "net.keras", "--data", "train.html", "--html", "OUT"), "train.html"),
        (("check", "net.keras", "--weights", "weights.html", "--html", "OUT"), "weights.html"),
    ],
)
def test_an_input_is_never_overwritten(files, arguments, name, force, link) -> None:
    if not (files / name).exists():
        (files / name).write_bytes(b"the original of 2016")
    before = (files / name).read_bytes()
    out = f"out{os.path.splitext(name)[1]}"
    match link:
        case "itself":
            out = name
        case "symbolic":
            os.symlink(name, out)
        case "hard":
            os.link(name, out)
        case "through a folder":
            os.symlink(".", "here")
            out = os.path.join("here", name)
        case "in other words":
            out = os.path.join("..", files.name, name)
    result = command(*(out if each == "OUT" else each for each in arguments), *force)
    refused(result, "an input is never overwritten", repr(out))
    assert (files / name).read_bytes() == before
    assert not list(files.glob(".*"))


def test_functions_do_not_overwrite_inputs_either(files) -> None:
    from evennorm.tools.fold import fold
    from evennorm.tools.migrate import migrate

    for call in (lambda: fold("net.keras", "net.keras", measure=False), lambda: migrate("net.keras", "net.keras")):
        with pytest.raises(InputError, match="an input is never overwritten"):
            call()


def test_files_of_a_folder_of_data_are_inputs(tmp_path) -> None:
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    image = folder / "picture.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    elsewhere = tmp_path / "hard.png"
    os.link(image, elsewhere)
    for path in (image, elsewhere):
        with pytest.raises(InputError, match="is --data itself, or a file of it"):
            refuse_inputs(path, {"--data": str(tmp_path / "data")}, "--plot")
    refuse_inputs(tmp_path / "other.png", {"--data": str(tmp_path / "data"), "--weights": None, "MODEL": "net:build"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*EXPLAIN, "--svg", "net.py"), "--svg writes a file that ends with .svg; received 'net.py'"),
        (("bench", "--json", "bench.py"), "--json writes a file that ends with .json; received 'bench.py'"),
        (("bench", "--plot", "bench.json"), "--plot writes a file that ends with .png; received 'bench.json'"),
        (("check", "net.keras", "--html", "net.keras"), "--html writes a file that ends with .html or .htm"),
        (("check", "net.keras", "--html", "report.txt"), "--html writes a file that ends with .html or .htm"),
    ],
)
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_reports_have_suffixes(files, arguments, words, force) -> None:
    (files / "net.py").write_text("import keras\n")
    (files / "bench.py").write_text("import timeit\n")
    refused(command(*arguments, *force), words)
    assert (files / "net.py").read_text() == "import keras\n"


def test_a_file_of_another_kind_needs_force(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    figure = tmp_path / "figure.svg"
    figure.write_text("my notes\n")
    refused(command(*EXPLAIN, "--svg", "figure.svg"), "'figure.svg' exists and is no SVG figure", "--force")
    assert figure.read_text() == "my notes\n"
    assert command(*EXPLAIN, "--svg", "figure.svg", "--force").exit_code == 0
    assert is_of_kind(figure, ".svg")
    written = figure.read_bytes()
    assert command(*EXPLAIN, "--svg", "figure.svg").exit_code == 0  # of the kind that is written
    assert figure.read_bytes() == written


@pytest.mark.parametrize(
    "arguments",
    [
        ("fold", "net.keras", "--no-speed", "-o", "out.keras"),
        ("recalibrate", "net.keras", "--data", "train.npz", "-o", "out.keras"),
        ("check", "net.keras", "--fix", "-o", "out.keras"),
        ("check", "net.keras", "--html", "out.html"),
        ("migrate", "net.h5", "-o", "out.keras"),
        ("compare", "--data", "train.npz", "--out", "."),
    ],
)
def test_every_command_looks_at_what_is_there(files, arguments) -> None:
    for name in ("out.keras", "out.html", "summary.json", "net.h5"):
        (files / name).write_bytes(b"somebody else's")
    refused(command(*arguments), "exists and is no", "--force")
    assert (files / "out.keras").read_bytes() == (files / "out.html").read_bytes() == b"somebody else's"


def test_a_model_is_written_over_a_model(files) -> None:
    for _ in range(2):
        assert command("fold", "net.keras", "--no-speed", "-o", "out.keras").exit_code == 0
    (files / "out.keras").write_bytes(b"somebody else's")
    assert command("fold", "net.keras", "--no-speed", "-o", "out.keras", "--force").exit_code == 0
    assert is_of_kind(files / "out.keras", ".keras")


def test_compare_writes_to_no_folder_of_data(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    refused(command("compare", "--data", tmp_path / "images", "--out", tmp_path / "images"), "never overwritten")


def test_kinds(tmp_path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {"weight": torch.ones(3)}
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    assert is_of_kind(tmp_path / "a.pt", ".pt")
    assert is_of_kind(tmp_path / "a.pt", ".pth")
    assert is_of_kind(tmp_path / "old.pth", ".pt")
    assert is_of_kind(tmp_path / "a.safetensors", ".safetensors")
    for name in ("a.npz", "other.zip"):
        for suffix in (".pt", ".keras", ".safetensors", ".h5", ".json", ".svg", ".png", ".html", ".csv"):
            assert not is_of_kind(tmp_path / name, suffix)
    (tmp_path / "empty.keras").touch()
    assert is_of_kind(tmp_path / "empty.keras", ".keras")


def test_only_regular_files_are_overwritten(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.svg")
    with pytest.raises(InputError, match="is no regular file"):
        check_outputs([Output("--svg", tmp_path / "pipe.svg", (".svg",))], {}, force=True)
