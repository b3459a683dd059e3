"""examples/article_cnn.py runs as its readers would run it, on little data."""

import runpy
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "article_cnn.py"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
    return runpy.run_path(str(PROGRAM), run_name="__main__")


@pytest.fixture
def faces(tmp_path):
    """Seven folders of two grey images each, of other sizes than 48 x 48, and a file that is no image."""
    rng = np.random.default_rng(0)
    for label in range(7):
        folder = tmp_path / f"class{label}"
        folder.mkdir()
        (folder / "notes.txt").write_text("no image")
        for number in range(2):
            pixels = np.full((50 + number, 40, 1), 30.0 * label) + rng.uniform(0, 10, (50 + number, 40, 1))
            keras.utils.save_img(folder / f"{number}.png", pixels, scale=False)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_on_generated_images(monkeypatch, capsys):
    space = run(monkeypatch, "--images", 40, "--epochs", 1)
    model = space["model"]
    assert (
        model.count_params() == 2_354_567
    )  # 320 + 18,496 + 73,856 + 147,584 + 2,098,176 + 7,175, and 4 x (64 + 128 + 2,048)
    assert model.optimizer.iterations == 4
    kinds = [type(layer).__module__.split(".")[0] for layer in model.layers if type(layer).__name__ == "BatchNormalization"]
    assert kinds == ["evennorm"] * 3
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith(f"{keras.backend.backend()}: accuracy ")
    assert "on 8 images not trained on" in out
    assert (space["x"].min() >= 0) & (space["x"].max() <= 255) & (space["x"].std() > 40)
    assert sorted(set(space["labels"])) == list(range(7))


@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_on_a_folder(monkeypatch, faces):
    space = run(monkeypatch, faces, "--epochs", 1)
    assert space["x"].shape == (14, 48, 48, 1)
    assert list(space["labels"]) == [label for label in range(7) for _ in range(2)]
    np.testing.assert_allclose(space["x"].mean((1, 2, 3)), 30.0 * space["labels"] + 4.5, atol=1.0)


def test_a_folder_without_the_classes(monkeypatch, tmp_path, faces):
    (faces / "class6").rename(tmp_path.parent / f"{tmp_path.name}-away")
    with pytest.raises(SystemExit, match="7 folders of images are needed, one for each class; found 6 folders, 12 images"):
        run(monkeypatch, faces)
    with pytest.raises(
        SystemExit, match="nowhere: 7 folders of images are needed, one for each class; found 0 folders, 0 images"
    ):
        run(monkeypatch, "nowhere")
