"""Data sets and files as users have them, and every way in which they can be unusable."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from evennorm.errors import InputError
from evennorm.tools.compare.data import load_data

REAL_IDX = Path(__file__).parents[3] / "shared" / "data" / "fashion-mnist"


def arrays(**changes):
    random = np.random.default_rng(0)
    x = random.random((60, 4, 5))
    y = np.arange(60) % 3
    return {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]} | changes


def npz(folder, **changes):
    path = folder / "data.npz"
    np.savez(path, **{name: value for name, value in arrays(**changes).items() if value is not None})
    return str(path)


def image(path, size=(6, 5), colour=100, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def class_folders(folder, classes=("cat", "dog"), count=10):
    for label, name in enumerate(classes):
        for number in range(count):
            image(folder / name / f"{number}.png", colour=10 * label + number)
    return str(folder)


def idx(folder, name, values, compressed=True):
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(content) if compressed else content)


def idx_folder(folder, compressed=True):
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        idx(folder, f"{part}-images-idx3-ubyte", random.integers(0, 256, (count, 4, 5)), compressed)
        idx(folder, f"{part}-labels-idx1-ubyte", np.arange(count) % 3, compressed)
    return str(folder)


def refusal(source):
    with pytest.raises(InputError) as caught:
        load_data(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shape", "wanted", "said", "moved"),
    [
        ((3, 32, 32), "channels_first", None, None),
        ((32, 32, 3), "channels_first", None, (-1, 1)),
        ((32, 24, 1), "channels_first", None, (-1, 1)),
        ((1, 32, 24), "channels_first", None, None),
        ((10, 20, 20), "channels_first", None, None),
        ((3, 32, 32), "channels_last", None, (1, -1)),
        ((32, 32, 3), "channels_last", None, None),
        ((7, 8, 9), "channels_last", None, None),
        ((7, 8, 9), "channels_first", "channels_last", (-1, 1)),
        ((7, 8, 9), "channels_first", "channels_first", None),
        ((7, 8, 9), "channels_last", "channels_first", (1, -1)),
        ((3, 32, 32), "channels_last", "channels_last", None),
        ((3, 32, 32), "unchanged", None, None),
    ],
)
def test_images_have_their_channels_where_the_model_takes_them(tmp_path, shape, wanted, said, moved):
    x = np.random.default_rng(0).normal(size=(40, *shape)).astype("float32")
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(40) % 2)
    data = load_data(str(tmp_path / "images.npz"), None, wanted, said)
    parts = (data.x_train, data.x_validation, data.x_test)
    assert all(part.flags.c_contiguous for part in parts)
    expected = np.moveaxis(x, *moved) if moved else x
    assert data.input_shape == expected.shape[1:]
    assert sorted(row.tobytes() for row in np.concatenate(parts)) == sorted(row.tobytes() for row in expected)


@pytest.mark.parametrize("said", [None, "channels_first", "channels_last"])
@pytest.mark.parametrize(("wanted", "given"), [("channels_first", (1, 32, 24)), ("channels_last", (32, 24, 1))])
def test_grey_images_get_an_axis_where_the_model_takes_it(tmp_path, wanted, said, given):
    np.savez(tmp_path / "grey.npz", x=np.ones((40, 32, 24)), y=np.arange(40) % 2)
    assert load_data(str(tmp_path / "grey.npz"), None, wanted, said).input_shape == given


def test_images_that_fit_both_formats_are_asked_about(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.ones((40, 7, 8, 9)), y=np.arange(40) % 2)
    with pytest.raises(InputError, match=r"7 x 8 x 9 may have their channels first or last; give --data-format") as caught:
        load_data(str(tmp_path / "images.npz"), None, "channels_first")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"--data-format is for the images of an \.npz file; digits says itself"):
        load_data("digits", None, "channels_first", "channels_last")
    assert load_data("digits", None, "channels_first").input_shape == (1, 8, 8)


def test_digits_are_cut_into_three_parts_that_hold_every_class_alike():
    data = load_data("digits")
    assert (data.input_shape, data.classes) == ((8, 8, 1), 10)
    assert len(data.x_train) + len(data.x_validation) + len(data.x_test) == 1797
    original = load_digits()
    for y, share in ((data.y_train, 0.64), (data.y_validation, 0.16), (data.y_test, 0.2)):
        assert np.bincount(y) == pytest.approx(np.bincount(original.target) * share, abs=1)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    every = np.concatenate([data.x_train, data.x_validation, data.x_test]).reshape(1797, -1)
    assert np.array_equal(np.sort(every.sum(axis=1)), np.sort((original.data / 16).astype("float32").sum(axis=1)))


def test_the_cut_is_the_same_every_time():
    assert load_data("digits").digest == load_data("digits").digest


def test_npz_keeps_its_own_test_set(tmp_path):
    data = load_data(npz(tmp_path))
    given = arrays()
    assert np.array_equal(data.x_test, given["x_test"].astype("float32")[..., None])
    assert np.array_equal(data.y_test, given["y_test"])
    assert (len(data.x_train), len(data.x_validation), data.classes, data.name) == (31, 9, 3, "data.npz")
    # Each sample still has its own label.
    for x, y in zip(data.x_train, data.y_train, strict=True):
        [where] = np.flatnonzero((given["x_train"].astype("float32") == x[..., 0]).all(axis=(1, 2)))
        assert given["y_train"][where] == y


def test_bytes_are_scaled_and_floats_are_not(tmp_path):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (40, 4, 5), dtype=np.uint8)
    assert load_data(npz(tmp_path, x_train=x)).x_train.max() == x.max() / np.float32(255)
    assert load_data(npz(tmp_path, x_train=x.astype("float64"))).x_train.max() == x.max()


@pytest.mark.parametrize(
    "labels",
    [
        np.eye(3)[np.arange(40) % 3],
        (np.arange(40) % 3)[:, None],
        (np.arange(40) % 3).astype(float),
        5 * (np.arange(40) % 3) - 2,
    ],
    ids=["one-hot", "column", "floats", "with gaps"],
)
def test_labels_in_other_forms_mean_the_same(tmp_path, labels):
    test_labels = np.arange(20) % 3 if labels.min() >= 0 else 5 * (np.arange(20) % 3) - 2
    data = load_data(npz(tmp_path, y_train=labels, y_test=test_labels))
    plain = load_data(npz(tmp_path, y_train=np.arange(40) % 3, y_test=np.arange(20) % 3))
    assert np.array_equal(data.y_train, plain.y_train)
    assert np.array_equal(data.y_test, plain.y_test)


@pytest.mark.parametrize("names", [("x", "y"), ("x_train", "y_train")])
def test_samples_to_test_on_are_cut_from_a_file_without_them(tmp_path, names):
    """As `check` and `recalibrate` read it; every sample is in one part."""
    x, y = np.arange(60 * 20.0).reshape(60, 4, 5), np.arange(60) % 3
    path = tmp_path / "own.npz"
    np.savez(path, **dict(zip(names, (x, y), strict=True)))
    data = load_data(str(path))
    parts = data.x_train, data.x_validation, data.x_test
    assert [len(part) for part in parts] == [39, 9, 12]
    assert np.array_equal(np.sort(np.concatenate(parts)[:, 0, 0, 0]), x[:, 0, 0])
    assert all(
        np.bincount(labels).tolist() == [len(labels) // 3] * 3 for labels in (data.y_train, data.y_validation, data.y_test)
    )


def test_binarized_cuts_in_the_middle_of_the_training_range(tmp_path):
    x = np.tile(np.linspace(-1, 3, 20).reshape(4, 5), (40, 1, 1))
    data = load_data(npz(tmp_path, x_train=x, x_test=x[:20])).binarized()
    assert np.array_equal(data.x_test[0, ..., 0], (x[0] > 1).astype("float32"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "y_test is missing; it holds x_train, y_train, x_test"),
        (
            {"y_train": np.zeros(39, int)},
            "one label per sample is needed; received 40 training samples and labels of shape (39,)",
        ),
        ({"y_train": np.zeros(40, int)}, "two classes or more; every training label is 0"),
        ({"y_train": np.full(40, 0.5)}, "labels are whole numbers or one-hot rows; received training labels of float64"),
        ({"y_train": np.array(["a", "b"] * 20)}, "labels are whole numbers or one-hot rows"),
        ({"y_train": np.ones((40, 3))}, "training labels of shape (40, 3) must be one-hot"),
        ({"y_test": np.full(20, 7)}, "test label 7 never occurs in training"),
        ({"x_train": np.full((40, 4, 5), np.nan)}, "training sample 0 holds NaN or infinity"),
        ({"x_train": np.full((40, 4, 5), 1e300)}, "training sample 0 holds NaN or infinity"),
        ({"x_train": np.full((40, 4, 5), "a")}, "training samples must be numbers; received an array of <U1"),
        ({"x_train": np.zeros(40)}, "received (40,)"),
        ({"x_train": np.zeros((0, 4, 5)), "y_train": np.zeros(0)}, "none of them 0; received (0, 4, 5)"),
        ({"x_test": np.zeros((20, 4, 6))}, "one shape; received (4, 5, 1) and (4, 6, 1)"),
        ({"x_train": np.array([{}] * 40)}, "it holds pickled Python objects"),
    ],
)
def test_npz_that_cannot_be_trained_on(tmp_path, changes, words):
    path = npz(tmp_path, **changes)
    message = refusal(path)
    assert words in message
    assert path in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but then nothing", b"\x80\x04 a pickle", b"text"])
def test_damaged_npz(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    assert f"{path} is not a readable .npz file" in refusal(path)


def test_truncated_npz(tmp_path):
    path = Path(npz(tmp_path))
    path.write_bytes(path.read_bytes()[:-300])
    assert "is not a readable .npz file" in refusal(path)


def test_npz_with_a_flipped_byte(tmp_path):
    path = Path(npz(tmp_path))
    content = bytearray(path.read_bytes())
    content[1000] ^= 0xFF
    path.write_bytes(content)
    assert "is not a readable .npz file (Bad CRC-32" in refusal(path)


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_folder(tmp_path, compressed):
    data = load_data(idx_folder(tmp_path, compressed))
    assert (len(data.x_train), len(data.x_validation), len(data.x_test), data.input_shape) == (31, 9, 20, (4, 5, 1))
    random = np.random.default_rng(0)
    random.integers(0, 256, (40, 4, 5))
    assert np.array_equal(data.x_test[..., 0], random.integers(0, 256, (20, 4, 5)).astype("float32") / 255)


def test_idx_folder_with_a_missing_or_damaged_file(tmp_path):
    idx_folder(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-9])
    assert f"{labels} is not a readable IDX file" in refusal(tmp_path)
    labels.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    assert "header says type 8 and sizes (20,), 19 values follow" in refusal(tmp_path)
    labels.write_bytes(b"not gzip")
    assert f"{labels} is not a readable IDX file" in refusal(tmp_path)
    labels.unlink()
    assert "t10k-labels-idx1-ubyte is missing" in refusal(tmp_path)


@pytest.mark.skipif(not REAL_IDX.is_dir(), reason="Fashion-MNIST does not lie beside the project")
def test_fashion_mnist_as_it_is_published():
    data = load_data(str(REAL_IDX))
    assert str(data) == "fashion-mnist: 50000 training, 10000 validation and 10000 test samples of 28 x 28 x 1, 10 classes"
    assert np.bincount(data.y_train).tolist() == [5000] * 10
    assert data.x_train.max() == 1


def test_class_folders(tmp_path):
    data = load_data(class_folders(tmp_path))
    assert (data.input_shape, data.classes) == ((5, 6, 1), 2)
    assert len(data.x_train) + len(data.x_validation) + len(data.x_test) == 20
    # The colour tells the class: cats below 10, dogs from 10 on.
    assert np.array_equal((data.x_train[:, 0, 0, 0] * 255).round() >= 10, data.y_train == 1)


def test_class_folders_with_a_test_set_of_their_own(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test", count=4)
    assert len(load_data(str(tmp_path)).x_test) == 8


def test_one_coloured_image_makes_all_coloured(tmp_path):
    class_folders(tmp_path)
    image(tmp_path / "cat" / "5.png", colour=(1, 2, 3), mode="RGB")
    assert load_data(str(tmp_path)).input_shape == (5, 6, 3)


def test_images_of_unequal_sizes_are_named(tmp_path):
    class_folders(tmp_path)
    image(tmp_path / "dog" / "3.png", size=(7, 5))
    message = refusal(tmp_path)
    assert f"{tmp_path / 'cat' / '0.png'} is 6 x 5 and {tmp_path / 'dog' / '3.png'} is 7 x 5" in message


def test_folders_that_are_no_data(tmp_path):
    assert "it has no folders" in refusal(tmp_path)
    class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no images" in refusal(tmp_path)
    (tmp_path / "empty" / "broken.png").write_bytes(b"not a picture")
    assert f"{tmp_path / 'empty' / 'broken.png'} is not a readable image" in refusal(tmp_path)


def test_train_and_test_folders_of_other_classes(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test", classes=("cat", "cow"))
    assert "only one of them has cow, dog" in refusal(tmp_path)


def test_one_class(tmp_path):
    assert "two classes or more" in refusal(class_folders(tmp_path, classes=("cat",)))


def test_too_few_samples(tmp_path):
    assert "no sample is left for validation" in refusal(class_folders(tmp_path, count=2))


@pytest.mark.parametrize("source", ["nonsense", "missing.npz", "README.md"])
def test_what_is_no_data_at_all(source):
    assert f"received {source!r}, which is none of these" in refusal(source)
