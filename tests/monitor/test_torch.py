"""`evennorm.torch.monitor`: what it logs, against the activations themselves in float64."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evennorm.errors import ArgumentError, InputError
from evennorm.monitor import FIELDS
from evennorm.torch import BatchNorm1d, BatchNorm2d, convert, monitor
from tests.events import events


def network(norm: type[nn.Module] = nn.BatchNorm1d, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), norm(5, **options), nn.ReLU(), nn.Linear(5, 2))


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 + 2 * torch.randn(16, 6, generator=generator) for _ in range(number)]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm1d])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_numbers_are_those_of_float64(norm: type[nn.Module], momentum: float | None) -> None:
    model, seen = network(norm, momentum=momentum), []
    norm_of, inputs = model[1], []
    model[0].register_forward_hook(lambda module, given, output: inputs.append(output.detach().double().numpy()))
    with monitor(model, lambda *found: seen.append(found), every=3):
        for x in batches(6):
            old = (norm_of.running_mean.double().numpy().copy(), norm_of.running_var.double().numpy().copy())
            model(x)
            if len(seen) == 1 + len(inputs) // 3 and seen[-1][0] == len(inputs):
                _step, layer, found = seen[-1]
                mean, variance = inputs[-1].mean(0), inputs[-1].var(0, ddof=1)
                assert layer == "1"
                assert found["batch_mean_min"] == pytest.approx(mean.min(), rel=1e-4, abs=1e-5)
                assert found["batch_mean_median"] == pytest.approx(np.median(mean), rel=1e-4, abs=1e-5)
                assert found["batch_variance_max"] == pytest.approx(variance.max(), rel=1e-4)
                if momentum is not None or len(inputs) > 1:
                    off = (mean - old[0]) / np.sqrt(old[1] + 1e-5)
                    assert found["drift"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-4)
                    assert found["variance_ratio"] == pytest.approx(np.median((variance + 1e-5) / (old[1] + 1e-5)), rel=1e-4)
                assert found["moving_mean_max"] == pytest.approx(norm_of.running_mean.max().item())
                assert found["gamma_median"] == 1
                assert found["dead_channels"] == 0
    assert [step for step, _, _ in seen] == [1, 3, 6]


def test_batches_that_are_skipped_and_channels_that_are_dead() -> None:
    model, seen = network(BatchNorm1d), []
    with torch.no_grad():
        model[1].weight[2] = 1e-9
    with monitor(model, lambda step, layer, found: seen.append(found), every=1):
        model(torch.full((4, 6), torch.nan))
    assert seen[0]["skipped_batches"] == 1
    assert seen[0]["dead_channels"] == 1
    assert not {"drift", "batch_mean_min"} & set(seen[0])  # the statistics stand still


def test_modes_calls_and_the_end() -> None:
    model, steps = network(), []
    watched = monitor(model, lambda step, layer, found: steps.append(step), every=2)
    model.eval()(batches(1)[0])
    assert watched.step == 0
    model.train()
    for x in batches(3):
        model(x)
    watched.close()
    model(batches(1)[0])
    assert (watched.step, steps) == (3, [1, 2])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_what_is_computed_stays_the_same_bits() -> None:
    """A converted model runs its fused steps under a monitor, too."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    one, two = convert(plain), convert(plain)
    x = torch.randn(4, 3, 8, 8)
    with monitor(two, lambda *found: None, every=1):
        expected, got = one(x), two(x)
    assert torch.equal(expected, got)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def test_a_compiled_model() -> None:
    model, seen = network(BatchNorm1d), []
    compiled = torch.compile(model, backend="eager")
    with monitor(compiled, lambda step, layer, found: seen.append((step, layer, found["drift"] > 0)), every=2):
        for x in batches(4):
            compiled(x)
    assert [(step, kind) for step, _, kind in seen] == [(1, True), (2, True), (4, True)]


def test_a_csv_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "statistics.csv"
    for _ in range(2):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))
        with monitor(model, path, every=1):
            model(torch.randn(4, 3, 8, 8))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows] == [("1", "1"), ("1", "2")] * 2
    assert list(rows[0]) == ["step", "layer", *FIELDS]
    assert (rows[0]["gamma_min"], rows[1]["gamma_min"]) == ("", "1.0")  # without gamma
    assert float(rows[1]["moving_variance_max"]) > 0


def test_a_row_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    path, model, (x,) = tmp_path / "statistics.csv", network(), batches(1)
    with monitor(model, path, every=1):
        model(x)
    path.write_bytes(path.read_bytes()[:-20])
    with monitor(model, path, every=1):
        model(x)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "1"]
    assert float(rows[1]["moving_mean_max"]) == pytest.approx(model[1].running_mean.max().item())


def test_tensorboard_files(tmp_path: Path) -> None:
    model, other = network(), network()
    with monitor(model, tmp_path / "lr0.1", every=1), monitor(other, tmp_path / "lr0.1", every=1):
        for x in batches(2):
            model(x)
    assert len(list((tmp_path / "lr0.1").iterdir())) == 2  # files of one second have names of their own
    found = events(tmp_path / "lr0.1")
    assert found["1/gamma_median", 1] == 1
    assert found["1/moving_mean_max", 2] == pytest.approx(model[1].running_mean.max().item())
    assert {step for _, step in found} == {1, 2}


@pytest.mark.parametrize(
    ("to", "every", "error", "words"),
    [
        (3, 1, ArgumentError, "writes to a folder .for TensorBoard., a file .csv, or a function .* received int"),
        ("log.txt", 1, ArgumentError, "writes to a folder .for TensorBoard. or a file .csv; received 'log.txt'"),
        (print, 0, ArgumentError, "every is a number of steps, 1 or more; received 0"),
        (print, 2.5, ArgumentError, "received 2.5"),
        (print, True, ArgumentError, "received True"),
    ],
)
def test_arguments_that_cannot_be_used(to: object, every: object, error: type[Exception], words: str) -> None:
    model = network()
    with pytest.raises(error, match=words):
        monitor(model, to, every)
    assert not model._forward_hooks


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match="holds something else than the log of a monitor; give another file"):
        monitor(network(), path)
    assert path.read_text() == "x,y\n1,2\n"
    with pytest.raises(ArgumentError, match=r"monitor takes a torch.nn.Module; received list"):
        monitor([], path)
