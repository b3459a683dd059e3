"""`evennorm compare` as users meet it: what it prints, its files, and the same numbers every time."""

import json

import keras
import numpy as np
import pytest

import evennorm
from evennorm.tools.compare.train import seed_of
from tests.tools.comparing import ENGINE, command, selected, table_of, trials


def test_it_prints_a_table_and_a_verdict(finished):
    out, result = finished
    lines = result.stdout.splitlines()
    assert lines[0] == "tiny_network:network on points.npz: 80 training, 20 validation and 20 test samples of 2, 2 classes"
    assert lines[1].startswith("repeats: 3; epochs: 3; batches of 16; " + ENGINE)
    assert [line.split()[0] for line in lines[4:9] if line.startswith(("none ", "before "))] == [
        "none",
        "none",
        "before",
        "before",
    ]
    assert max(map(len, lines[3:9])) <= 80
    [pair] = [line for line in lines if " 3 repeats" in line]
    assert pair.startswith(("none and before", "before and none", "none above before", "before above none"))
    assert f"runs.csv, summary.json, curves.png and report.html are in {out}" in lines
    assert lines[-1].startswith(f"The model is in {out / 'best.keras'}: ")
    assert result.stderr.strip() == ""


def test_it_writes_every_run(finished):
    out, _ = finished
    table = table_of(out)
    assert [(row["placement"], row["learning_rate"], row["repeat"]) for row in table] == [
        (placement, rate, repeat) for placement in ("none", "before") for rate in ("0.1", "0.5") for repeat in "012"
    ]
    assert {(row["repeat"], row["seed"]) for row in table} == {(str(repeat), str(seed_of(0, repeat))) for repeat in range(3)}
    for row in table:
        assert (float(row["test_accuracy"]) * 20).is_integer()
        assert (float(row["validation_accuracy"]) * 20).is_integer()
        assert row["epochs"] == "3"


def test_the_summary_agrees_with_the_runs(finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    runs = table_of(out)
    for row in summary["table"]:
        mine = [r for r in runs if (r["placement"], float(r["learning_rate"])) == (row["placement"], row["learning_rate"])]
        test = np.array([float(r["test_accuracy"]) for r in mine])
        train = np.array([float(r["train_accuracy"]) for r in mine])
        assert row["test_accuracy"] == pytest.approx(test.mean())
        assert row["curve"][-1] == pytest.approx(test.mean())
        half = 4.302653 * max(test.std(ddof=1), 1 / 20) / 3**0.5  # no less than one of 20 test samples
        assert row["low"] == pytest.approx(max(test.mean() - half, 0), rel=1e-6)
        assert row["high"] == pytest.approx(min(test.mean() + half, 1), rel=1e-6)
        assert row["gap"] == pytest.approx((train - test).mean())
        assert row["diverged"] == sum(int(r["diverged"]) for r in mine)
        assert row["seconds_per_epoch"] > 0
    assert sum(row["chosen"] for row in summary["table"]) == 2 * 3
    assert summary["settings"]["batch_size"] == 16
    assert summary["fingerprint"]["versions"].startswith(f"evennorm {evennorm.__version__}, keras {keras.__version__}")
    assert ENGINE in summary["device"]


def test_the_picture_is_a_picture(finished):
    from PIL import Image

    with Image.open(finished[0] / "curves.png") as picture:
        picture.load()
        assert picture.size[0] > 800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(0, 0, 0), (0, 0x72, 0xB2)} <= colours  # the lines of none and before
    assert [path.name for path in finished[0].iterdir() if path.name.startswith(".")] == []


def test_the_same_command_trains_nothing_again(finished, data):
    out, first = finished
    files = {name: (out / name).read_bytes() for name in ("runs.csv", "summary.json", "study.sqlite3")}
    again = command(data, out)
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert {name: (out / name).read_bytes() for name in files} == files


def test_json_is_all_there_is_on_stdout(finished, data):
    out, _ = finished
    result = command(data, out, "--json")
    assert json.loads(result.stdout) == json.loads((out / "summary.json").read_text())


def test_fewer_or_more_runs_give_the_same_numbers(finished, data, tmp_path):
    """Another folder, other runs before each run: the numbers of a run depend on the run alone."""
    out, _ = finished
    assert command(data, tmp_path / "part", placements="before", repeats=1, learning_rates="0.5").exit_code == 0
    assert table_of(tmp_path / "part") == selected(out, "before", "0.5", "0")
    # More repeats in the same folder train only those that are missing.
    assert command(data, tmp_path / "part", placements="before", repeats=3, learning_rates="0.5").exit_code == 0
    assert table_of(tmp_path / "part") == selected(out, "before", "0.5")
    assert trials(tmp_path / "part", "COMPLETE") == trials(tmp_path / "part") == 3


def test_another_seed_gives_other_numbers(finished, data, tmp_path):
    command(data, tmp_path, placements="none", repeats=1, learning_rates="0.5", seed=1)
    [row] = table_of(tmp_path)
    [other] = selected(finished[0], "none", "0.5", "0")
    assert row["seed"] != other["seed"]
    assert row["test_loss"] != other["test_loss"]
