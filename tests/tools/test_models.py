"""Opening a model: what can be opened is what was saved; what is damaged or unsafe says so in one line and runs nothing."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from evennorm.errors import InputError
from evennorm.tools.archives import check_growth
from evennorm.tools.models import check_output, open_model, save_model


def small():
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(2, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model as .keras and .h5 file, with what it predicts."""
    folder, model, x = tmp_path_factory.mktemp("models"), small(), np.ones((2, 4), "float32")
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.save_weights(folder / "model.weights.h5")
    return folder, x, model.predict(x, verbose=0)


def refused(path, *words, **options):
    with pytest.raises(InputError) as caught:
        open_model(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_file_opens_as_it_was_saved(saved, name) -> None:
    folder, x, y = saved
    opened = open_model(folder / name)
    assert (opened.framework, opened.path, opened.notes) == ("keras", folder / name, ())
    np.testing.assert_allclose(opened.model.predict(x, verbose=0), y, rtol=1e-6)
    assert opened.model.compiled


def test_objects_and_functions(saved, tmp_path, monkeypatch) -> None:
    model = small()
    assert open_model(model).model is model
    (tmp_path / "of_the_user.py").write_text(
        "import keras\n"
        "def build(): return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(),"
        " keras.layers.Dense(2, activation='softmax')])\n"
        "made = build()\nnumber = 3\ndef fails(): raise RuntimeError('no\\nway')\ndef asks(what): return what\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder, x, y = saved
    opened = open_model("of_the_user:build", weights=folder / "model.weights.h5")
    np.testing.assert_allclose(opened.model.predict(x, verbose=0), y, rtol=1e-6)
    assert open_model("of_the_user:made").name == "of_the_user:made"
    refused("of_the_user:number", "received 'of_the_user:number' of int")
    refused("of_the_user:fails", "RuntimeError: no")
    refused("of_the_user:asks", "without arguments")
    refused("of_the_user:nothing", "has no 'nothing'")
    refused("nowhere_at_all:build", "no module 'nowhere_at_all'")
    refused("of_the_user:build", "there is no file of weights", weights=tmp_path / "gone.h5")


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_file_cut_short(saved, tmp_path, name, share) -> None:
    content = (saved[0] / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / name, name)


def test_a_damaged_member(saved, tmp_path) -> None:
    content = bytearray((saved[0] / "model.keras").read_bytes())
    start = content.index(b"\x89HDF")
    content[start + 3000 : start + 3100] = bytes(100)
    content[start : start + 4] = b"XXXX"
    (tmp_path / "model.keras").write_bytes(content)
    refused(tmp_path / "model.keras", "damaged")


def test_what_is_no_model(tmp_path, saved) -> None:
    refused(tmp_path / "gone.keras", "there is no file")
    refused(tmp_path, "is a folder")
    (tmp_path / "text.keras").write_text("hello, this is text")
    refused(tmp_path / "text.keras", "is no model file")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.keras", "no .keras file", "readme.txt")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["temperature"] = np.zeros(3)
    refused(tmp_path / "foreign.h5", "HDF5, but not of Keras")
    refused(saved[0] / "model.weights.h5", "weights without their model", "--weights")
    (tmp_path / "model.zip").write_bytes((saved[0] / "model.keras").read_bytes())
    refused(tmp_path / "model.zip", "rename it")


def test_keras_1_is_sent_to_migrate(tmp_path) -> None:
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["keras_version"] = b"1.2.2"
        file.attrs["model_config"] = b"{}"
    refused(tmp_path / "old.h5", "Keras 1.2.2", "evennorm migrate", "-o old.keras")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("pickle-was-run"),))


@pytest.mark.parametrize("name", ["model.pt", "model.keras", "model.pkl"])
def test_pickles_are_not_run(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(pickle.dumps(Bomb()))
    refused(name, "pickle")
    with zipfile.ZipFile(name, "w") as archive:  # as torch.save writes it
        archive.writestr("model/data.pkl", pickle.dumps(Bomb()))
    refused(name, "pickle")
    assert not Path("pickle-was-run").exists()


def test_pickles_in_a_state_dict_are_not_run(tmp_path, monkeypatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(3), "bomb": Bomb()}, "state.pt")
    with pytest.raises(InputError, match="more than tensors") as caught:
        open_model(torch.nn.BatchNorm1d(3), weights="state.pt")
    assert "\n" not in str(caught.value)
    assert not Path("pickle-was-run").exists()


def with_members(saved, path, **members):
    """A copy of the .keras file with members replaced or added."""
    with zipfile.ZipFile(saved[0] / "model.keras") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        kept = {name: old.read(name) for name in old.namelist()}
        for name, content in {**kept, **members}.items():
            new.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside", "assets/../../outside", "C:\\outside", "..\\outside"])
def test_paths_out_of_the_archive(saved, tmp_path, name) -> None:
    refused(with_members(saved, tmp_path / "model.keras", **{name: "x"}), "leads out of the file")


def test_links_and_twins_in_the_archive(saved, tmp_path) -> None:
    path = with_members(saved, tmp_path / "model.keras")
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("assets/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    refused(path, "leads out of the file")
    path = with_members(saved, tmp_path / "twins.keras")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", "{}")
    refused(path, "twice")


def test_bombs(saved, tmp_path) -> None:
    path = with_members(saved, tmp_path / "zip.keras", **{"assets/zeros": bytes(300_000_000)})
    assert path.stat().st_size < 1_000_000
    refused(path, "bombs")
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        file.create_dataset("layers/dense/vars/0", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip")
    refused(with_members(saved, tmp_path / "hdf5.keras", **{"model.weights.h5": inner.getvalue()}), "bombs")
    check_growth("honest", "zeros", 200_000_000, 1000)


@pytest.mark.parametrize("kind", ["external link", "soft link", "external data", "virtual"])
def test_hdf5_that_points_elsewhere(saved, tmp_path, kind) -> None:
    path = tmp_path / "model.h5"
    path.write_bytes((saved[0] / "model.h5").read_bytes())
    (tmp_path / "secret").write_bytes(bytes(400))
    with h5py.File(path, "a") as file:
        if kind == "external link":
            file["model_weights/more"] = h5py.ExternalLink("/etc/passwd", "/")
        elif kind == "soft link":
            file["model_weights/more"] = h5py.SoftLink("/model_weights")
        elif kind == "external data":
            file.create_dataset("more", (100,), "f4", external=[(str(tmp_path / "secret"), 0, 400)])
        else:
            layout = h5py.VirtualLayout((4,), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4,))
            file.create_virtual_dataset("more", layout)
    refused(path, "is not opened")


def test_a_group_that_holds_itself(saved, tmp_path) -> None:
    path = tmp_path / "model.h5"
    path.write_bytes((saved[0] / "model.h5").read_bytes())
    with h5py.File(path, "a") as file:
        file["model_weights/again"] = file["model_weights"]
    refused(path, "is another name for an object elsewhere in it")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_in_a_file_is_not_run(tmp_path, suffix, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: (open("lambda-was-run", "w").close(), x)[1])])
    ran = tmp_path / "lambda-was-run"
    ran.unlink()
    model.save(tmp_path / f"model{suffix}")
    refused(tmp_path / f"model{suffix}", "brings code along", "module:function")
    assert not ran.exists()


def test_unknown_classes_are_named(tmp_path, saved) -> None:
    with zipfile.ZipFile(saved[0] / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))
    config["config"]["layers"][1].update(class_name="Foreign", module="elsewhere", registered_name="mine>Foreign")
    path = with_members(saved, tmp_path / "model.keras", **{"config.json": json.dumps(config)})
    refused(path, "Foreign", "module:function")


def test_a_loss_that_cannot_be_read_is_a_note(tmp_path, saved) -> None:
    with zipfile.ZipFile(saved[0] / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))
    config["compile_config"]["loss"] = {
        "module": "elsewhere",
        "class_name": "Mine",
        "config": {},
        "registered_name": "a>Mine",
    }
    opened = open_model(with_members(saved, tmp_path / "model.keras", **{"config.json": json.dumps(config)}))
    assert "without its optimizer" in opened.notes[0]


def test_saving_is_whole_or_not_at_all(tmp_path, saved) -> None:
    opened = open_model(saved[0] / "model.keras")
    save_model(opened, opened.model, tmp_path / "new.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["new.keras"]
    np.testing.assert_array_equal(open_model(tmp_path / "new.keras").model.predict(saved[1], verbose=0), saved[2])

    class Broken:
        def save(self, path):
            Path(path).write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        save_model(opened, Broken(), tmp_path / "new.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["new.keras"]
    assert open_model(tmp_path / "new.keras").model
    for bad, words in (("new.txt", ".keras or .h5"), ("gone/new.keras", "in none")):
        with pytest.raises(InputError, match=words):
            check_output("keras", tmp_path / bad)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dicts_of_torch(tmp_path, suffix) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model[1].running_mean.fill_(5)
    path = tmp_path / f"state{suffix}"
    opened = open_model(model)
    save_model(opened, model, path)
    fresh = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert open_model(fresh, weights=path).model is fresh
    assert fresh[1].running_mean.tolist() == [5, 5, 5]
    refused(torch.nn.Linear(4, 4), "do not fit", weights=path)
    path.write_bytes(path.read_bytes()[:100])
    refused(fresh, "damaged" if suffix == ".pt" else "no whole", weights=path)
