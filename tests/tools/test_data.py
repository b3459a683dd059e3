"""Opening data: batches hold every row once, from files that are mapped, unpacked or streamed; bad input says what it is."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from evennorm.errors import InputError
from evennorm.tools.data import open_data
from evennorm.tools.data.arrays import CompressedArray
from evennorm.tools.data.batch import leaves

X = np.arange(50 * 6, dtype="float32").reshape(50, 2, 3)
Y = np.arange(50) % 4


def whole(data, size=8, **options):
    batches = list(data.batches(size, **options))
    y = None if batches[0].y is None else np.concatenate([batch.y for batch in batches])
    return np.concatenate([batch.x for batch in batches]), y


def refused(source, *words, **options):
    with pytest.raises(InputError) as caught:
        for _ in open_data(source, **options).batches(8):
            pass
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def write(path, how):
    arrays = {"x": np.asfortranarray(X) if "fortran" in how else X, "y": Y}
    (np.savez_compressed if "compressed" in how else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("how", ["stored", "compressed", "stored fortran", "compressed fortran"])
@pytest.mark.parametrize("size", [1, 8, 50, 1000])
def test_npz(tmp_path, how, size) -> None:
    data = open_data(write(tmp_path / "d.npz", how))
    assert (data.samples, data.labelled) == (50, True)
    for _ in range(2):  # as often as asked
        x, y = whole(data, size)
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(y, Y)
    assert all(batch.samples <= size for batch in data.batches(size))


@pytest.mark.parametrize("how", ["stored", "compressed"])
def test_a_limit_takes_batches_from_all_over(tmp_path, how) -> None:
    x, _ = whole(open_data(write(tmp_path / "d.npz", how)), 5, limit=3)
    np.testing.assert_array_equal(x[:, 0, 0] / 6, [*range(5), *range(22, 27), *range(45, 50)])


def test_nothing_is_read_into_memory(tmp_path) -> None:
    from evennorm.tools.data.arrays import _member

    for how, kind in (("stored", np.memmap), ("compressed", CompressedArray)):
        path = write(tmp_path / f"{how}.npz", how)
        with zipfile.ZipFile(path) as archive:
            assert isinstance(_member(path, archive, archive.getinfo("x.npy")), kind)


def test_names_of_arrays(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3])
    assert open_data(tmp_path / "a.npz").samples == 50
    np.savez(tmp_path / "b.npz", left=X, right=X + 1, y=Y)
    (batch,) = open_data(tmp_path / "b.npz").batches(50)
    assert (list(batch.x), batch.y.shape) == (["left", "right"], (50,))
    np.savez(tmp_path / "c.npz", y=Y)
    refused(tmp_path / "c.npz", "must hold the samples as x", "it holds y")


def test_npy_and_folders(tmp_path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.testing.assert_array_equal(whole(open_data(tmp_path / "x.npy"))[0], X)
    np.save(tmp_path / "y.npy", Y)
    np.testing.assert_array_equal(whole(open_data(tmp_path))[1], Y)
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(3):
        np.savez(shards / f"{i}.npz", x=X[i * 20 : i * 20 + 20], y=Y[i * 20 : i * 20 + 20])
    data = open_data(shards)
    assert data.samples == 50
    np.testing.assert_array_equal(whole(data)[0], X)
    np.savez(shards / "4.npz", x=X)
    refused(shards, "has no labels")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither .npz or .npy files nor images")


def test_images(tmp_path) -> None:
    random = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype="uint8")
    for i, pixels in enumerate(random):
        place = tmp_path / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    x, y = whole(open_data(tmp_path))
    np.testing.assert_array_equal(x, random[[0, 2, 4, 1, 3, 5]])
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    x, _ = whole(open_data(tmp_path, "torch"))
    np.testing.assert_allclose(x, random[[0, 2, 4, 1, 3, 5]].transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    Image.fromarray(random[0][:3]).save(tmp_path / "b" / "9.png")
    refused(tmp_path, "images must have one size", "5 x 3")
    (tmp_path / "b" / "9.png").write_bytes(b"\x89PNG\r\n")
    refused(tmp_path, "not a readable image")


class Stream:
    """Batches that can be iterated anew."""

    def __iter__(self):
        return ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 50, 8))


def generate():
    yield from Stream()


def sequence():
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return X[i * 8 : i * 8 + 8], Y[i * 8 : i * 8 + 8]

    return Batches()


def loader():
    import torch

    pairs = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    return torch.utils.data.DataLoader(pairs, batch_size=8)


def torch_dataset():
    import torch

    return torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))


def tf_data():
    import tensorflow

    return tensorflow.data.Dataset.from_tensor_slices((X, Y)).batch(8)


SOURCES = {
    "arrays": lambda: (X, Y),
    "dictionary": lambda: {"x": X, "y": Y},
    "iterable": Stream,
    "generator": generate,
    "generator function": lambda: generate,
    "function of arrays": lambda: lambda: (X, Y),
    "PyDataset": sequence,
    "DataLoader": loader,
    "torch Dataset": torch_dataset,
    "tf.data": tf_data,
    "list": lambda: [(X[:25], Y[:25]), (X[25:], Y[25:])],
    "weights": lambda: [(X, Y, np.ones(50))],
}


@pytest.mark.parametrize("source", SOURCES)
def test_objects(source) -> None:
    data = open_data(SOURCES[source]())
    for _ in range(2):
        x, y = whole(data)
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(y, Y)


def test_an_iterator_is_kept_as_far_as_it_was_read() -> None:
    data = open_data(generate())
    assert next(data.batches()).samples == 8
    np.testing.assert_array_equal(whole(data)[0], X)
    assert len(list(open_data(generate()).batches(limit=2))) == 2


def test_endless_data_need_a_limit() -> None:
    endless = tf_data().repeat()
    refused(endless, "has no end", "--batches")
    assert len(list(open_data(endless).batches(limit=20))) == 20


def test_structures() -> None:
    (batch,) = open_data([({"a": X, "b": [X, X]}, Y)]).batches()
    assert [array.shape for array in leaves(batch.x)] == [X.shape] * 3
    data = open_data({"x": (X, X + 1), "y": Y})
    assert [array.shape for array in leaves(data.first(4).x)] == [(4, 2, 3)] * 2


def test_functions_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "data_of_the_user.py").write_text(
        "import numpy as np\narray = np.ones((5, 2))\ndef batches():\n    for i in range(3): yield array, array\n"
        "def fails(): raise ValueError('no\\ndata')\ndef breaks():\n    yield array\n    raise KeyError('gone')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert whole(open_data("data_of_the_user:batches"))[0].shape == (15, 2)
    assert whole(open_data("data_of_the_user:array"))[0].shape == (5, 2)
    refused("data_of_the_user:fails", "ValueError: no")
    refused("data_of_the_user:breaks", "reading batch 2 fails", "gone")
    refused("data_of_the_user:nothing", "has no 'nothing'")
    refused("nowhere_at_all:batches", "no module")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
@pytest.mark.parametrize("how", ["stored", "compressed"])
def test_files_cut_short(tmp_path, how, share) -> None:
    content = write(tmp_path / "d.npz", how).read_bytes()
    (tmp_path / "d.npz").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "d.npz", "not a readable .npz file")
    np.save(tmp_path / "x.npy", X)
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "x.npy", "not a readable .npy file")


def test_damaged_in_the_middle(tmp_path) -> None:
    random = np.random.default_rng(0).normal(size=(500, 8))
    np.savez_compressed(tmp_path / "d.npz", x=random)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[5000:5100] = bytes(100)
    (tmp_path / "d.npz").write_bytes(content)
    refused(tmp_path / "d.npz", "damaged")


def test_pickles(tmp_path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}, None], dtype=object))
    refused(tmp_path / "d.npz", "pickled Python objects")
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(tmp_path / "x.npy", "pickled Python objects")


def test_bombs_and_lies(tmp_path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((300, 1000, 1000), "uint8"))
    refused(tmp_path / "d.npz", "bombs")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10, 10**12)})
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(40))
    refused(tmp_path / "lie.npz", "announces float32")
    with zipfile.ZipFile(tmp_path / "path.npz", "w") as archive:
        archive.writestr("../x.npy", header.getvalue())
    refused(tmp_path / "path.npz", "leads out of the file")


def test_bad_arrays() -> None:
    refused({"x": X[:0]}, "is empty")
    refused({}, "no array")
    refused((X, Y[:10]), "one label for each sample", "(50, 2, 3)", "(10,)")
    refused({"x": np.float32(3)}, "single number")
    refused([], "is empty")
    refused([(X, Y[:3])], "as many labels as samples")
    refused([(X, Y, Y, Y)], "tuple of 4")
    refused(3, "received int")
    refused("nowhere.npz", "there is no nowhere.npz")


def test_labels_may_be_required() -> None:
    open_data((X, Y)).require_labels("accuracy")
    open_data(Stream()).require_labels("accuracy")
    for source in (X, [X]):
        with pytest.raises(InputError, match="needs labels"):
            open_data(source).require_labels("accuracy")


def test_images_are_grey_only_where_all_are(tmp_path) -> None:
    """One colour image among 200 grey ones, and 16 bits of grey, of which the upper byte counts."""
    for name in range(200):
        Image.fromarray(np.full((2, 2), name, np.uint8)).save(tmp_path / f"{name:03}.png")
    Image.fromarray(np.full((2, 2), 0x1234, np.uint16)).save(tmp_path / "199.png")
    assert open_data(tmp_path, "keras").first(200).x[-1].tolist() == [[[0x12]] * 2] * 2
    Image.fromarray(np.full((2, 2, 3), (1, 2, 3), np.uint8)).save(tmp_path / "101.png")
    x = open_data(tmp_path, "keras").first(200).x
    assert x.shape == (200, 2, 2, 3)
    assert x[101, 0, 0].tolist() == [1, 2, 3]
    assert x[-1, 0, 0].tolist() == [0x12] * 3
