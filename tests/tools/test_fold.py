"""`evennorm fold` as a program and as a command: files, reports, and what it refuses."""

import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from keras import layers as L  # noqa: N812
from safetensors import safe_open
from scipy import stats
from torch import nn

from evennorm.cli import main
from evennorm.errors import ArgumentError, InputError
from evennorm.keras import BatchNormalization
from evennorm.tools.fold import fold
from evennorm.tools.fold.difference import difference
from evennorm.tools.fold.speed import Speed, speed
from evennorm.tools.spread import FEWEST, Median


def evennorm(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization | BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return model


def small() -> keras.Model:
    x = keras.Input((8, 8, 3), name="image")
    y = L.BatchNormalization(name="first")(L.Conv2D(4, 3, use_bias=False, name="conv")(x))
    y = BatchNormalization(activation="relu", name="second")(L.ReLU(name="relu")(y), residual=y)
    return trained(keras.Model(x, L.Dense(2, name="head")(L.Flatten()(y)), name="small"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.keras"
    small().save(path)
    return path


def net() -> nn.Module:
    """What the tests name by module:function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        for norm in (model[1], model[3]):
            norm.running_mean.normal_()
            norm.weight.normal_()
    return model


def noisy() -> nn.Module:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) + torch.randn(3)

    return Noisy()


def broken() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[1].running_mean.fill_(float("nan"))
    return model


NET = f"{__name__}:net"
X = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype("float32")


def test_a_keras_file(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    output = tmp_path / "folded.keras"
    result = evennorm("fold", file, "-o", output)
    assert result.exit_code == 0, result.output
    first, second, _, summary, difference, faster, written = result.output.splitlines()
    assert first == "first   folded into the previous layer, conv"
    assert second.startswith("second  one scale and shift: the activation relu stands in between; it applies relu itself")
    assert summary == "1 of 2 batch normalizations folded, 1 now one scale and shift"
    assert difference.endswith("over 5 samples, random inputs")
    assert re.search(r"(times as fast|times as long) \(.* to .*\): |no difference in speed is shown: ", faster)
    assert re.search(r"ms \(.* to .*\) before, .* ms \(.* to .*\) after, medians and 95 % intervals of \d+ rounds", faster)
    assert written == f"written to {output}"
    assert file.read_bytes() == before
    np.testing.assert_allclose(
        keras.saving.load_model(output).predict(X, verbose=0),
        keras.saving.load_model(file).predict(X, verbose=0),
        atol=1e-5,
    )


def test_the_file_loads_without_evennorm(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "folded.keras"
    fold(file, output, measure=False)
    code = (
        "import sys; sys.modules['evennorm'] = None; import keras; print(len(keras.saving.load_model(sys.argv[1]).layers))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 8


def test_the_same_bytes_each_time(file: Path, tmp_path: Path) -> None:
    """Also in another process, whose addresses and clock are others."""
    pairs = [(tmp_path / f"here{suffix}", tmp_path / f"there{suffix}") for suffix in (".keras", ".h5")]
    for here, _ in pairs:
        fold(file, here, measure=False)
    code = "import sys; from evennorm.tools.fold import fold; [fold(sys.argv[1], x, measure=False) for x in sys.argv[2:]]"
    there = [str(there) for _, there in pairs]
    subprocess.run([sys.executable, "-c", code, str(file), *there], capture_output=True, check=True)
    for here, other in pairs:
        assert here.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_a_torch_model(tmp_path: Path, suffix: str) -> None:
    first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
    for output in (first, second):
        result = evennorm("fold", NET, "-o", output, "--json", "--no-speed")
        assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [each["outcome"] for each in report["layers"]] == ["folded", "scale and shift"]
    assert report["difference"]["relative"] < 1e-5
    assert (report["speed"], report["output"]) == (None, str(second))
    assert first.read_bytes() == second.read_bytes()
    x = torch.from_numpy(X).movedim(-1, 1)[:, :, :, :7]
    expected = net().eval()(x)
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(first).module()(x), expected, atol=1e-5, rtol=1e-5)
    else:
        assert sorted(torch.load(first, weights_only=True)) == ["0.bias", "0.weight", "3.scale", "3.shift"]


def test_given_data_are_compared_too(file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X)
    report = fold(file, data=tmp_path / "data.npz", measure=False)
    assert (report.difference.samples, report.data) == (10, f"random inputs and {tmp_path / 'data.npz'}")
    report = fold(net(), data=X.transpose(0, 3, 1, 2), measure=False)
    assert report.difference.samples == 10


def test_inputs_that_torch_models_do_not_show() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 3), nn.BatchNorm1d(3)

        def forward(self, words: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.embed(words)) + x

    report = fold(Two(), input_shape=[(), (3,)], measure=False)
    assert report.layers[0].into == ("embed",)
    with pytest.raises(InputError, match="Two takes 2 inputs; say what one sample is by --input-shape"):
        fold(Two(), measure=False)
    with pytest.raises(InputError, match="Linear does not run on samples of shape 5"):
        fold(nn.Linear(3, 2), input_shape=[(5,)])


@pytest.mark.parametrize("given", [(3, 32, 32.0), [(3,), 4], "3,4", [(0,)], (-1, 4)])
def test_shapes_that_are_none(given) -> None:
    with pytest.raises(ArgumentError, match="input_shape is the shape of one sample") as caught:
        fold(nn.Linear(3, 2), input_shape=given)
    assert "\n" not in str(caught.value)


def test_the_shape_of_the_only_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    texts = {fold(model, input_shape=given, measure=False).inputs for given in ((3, 8, 8), [3, 8, 8], [(3, 8, 8)])}
    assert texts == {"inputs of rank 4, as (samples, 3, 8, 8)"}


def test_nothing_is_written_beyond_the_tolerance(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "folded.keras"
    output.write_bytes(file.read_bytes())
    result = evennorm("fold", file, "-o", output, "--tolerance", "0")
    assert result.exit_code == 2
    assert "of the largest output, and 0 is allowed; nothing was written; see --tolerance" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert output.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing.keras", "-o", "b.keras"], "there is no file nothing.keras"),
        (["model.keras", "-o", "b.txt"], "Keras models are written to .keras or .h5; received 'b.txt'"),
        (["model.keras", "-o", "b.pt2"], "Keras models are written to .keras or .h5; received 'b.pt2'"),
        ([NET, "-o", "b.keras"], "folded torch models are written to .pt2 or .onnx, as a program"),
        (["model.keras", "-o", "no/b.keras"], "there is no folder 'no'"),
        (["cut.keras", "-o", "b.keras"], "cut.keras is damaged or cut short"),
        (["model.keras", "-o", "b.keras", "--data", "wrong.npz"], "its input 'image' takes samples of shape 8 x 8 x 3"),
        (["model.keras", "-o", "b.keras", "--data", "empty.npz"], "empty"),
        (["model.keras", "-o", "b.keras", "--input-shape", "3,4"], "--input-shape is for torch models"),
        ([NET, "-o", "b.pt", "--input-shape", "3,x"], "--input-shape takes the sizes of one sample, as in 3,224,224"),
        ([NET, "-o", "b.pt", "--data", "wrong.npz"], "wrong.npz does not fit"),
        ([NET, "-o", "b.pt", "--tolerance", "-1"], "the tolerance is a part of the largest output, 0 or more"),
        ([f"{__name__}:noisy", "-o", "b.pt"], "gives other outputs each time, so nothing can be verified"),
        ([f"{__name__}:broken", "-o", "b.pt"], "gives outputs that are not finite"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], told: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.keras").write_bytes(file.read_bytes()[:2000])
    np.savez("wrong.npz", x=X[:, 1:, :, :2])
    np.savez("empty.npz", x=X[:0])
    there = {path.name for path in tmp_path.iterdir()}
    result = evennorm("fold", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == there


def test_a_model_without_batch_normalization() -> None:
    report = fold(keras.Sequential([keras.Input((3,)), L.Dense(2)]), measure=False)
    assert report.text().startswith("nothing was folded: no batch normalization in it")


def rows(norm_first: bool = False) -> nn.Module:
    """Of vectors or of sequences: both run, and the channels of the two layers are the same axis in vectors alone."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(norm, nn.Linear(8, 3)) if norm_first else nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU())
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.weight.normal_()
        norm.bias.normal_()
    return model.eval()


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 8), nn.BatchNorm1d(8))


def synchronized() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.SyncBatchNorm(8))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2), nn.BatchNorm1d(2))


VECTORS, SEQUENCES = torch.randn(6, 4), torch.randn(6, 8, 4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".pt"])
def test_without_a_shape_what_holds_for_every_rank_is_folded(suffix: str, tmp_path: Path) -> None:
    """nn.Linear and nn.BatchNorm1d take (N, C) and (N, L, C): nothing but what is the same for both."""
    model, output = rows(), tmp_path / f"folded{suffix}"
    report = fold(model, output, measure=False)
    assert (report.layers[0].outcome, report.count("folded")) == ("kept", 0)
    assert "inputs of several ranks (at rank 2 it is part of 0, at rank 3 it is not)" in report.layers[0].why
    assert report.inputs == "inputs of rank 2, as (samples, 4), and of rank 3, as (samples, 8, 4)"
    for x in (VECTORS, SEQUENCES):
        torch.testing.assert_close(report.folded(x), model(x))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("by", ["input_shape", "data"])
def test_a_rank_that_is_said_is_folded_for(norm_first: bool, rank: int, by: str, tmp_path: Path) -> None:
    model, output = rows(norm_first), tmp_path / "folded.safetensors"
    sample = ((8,) if norm_first else (4,)) if rank == 2 else ((8, 8) if norm_first else (8, 4))
    x = torch.randn(7, *sample)
    given = {"input_shape": [sample]} if by == "input_shape" else {"data": x.numpy()}
    report = fold(model, output, measure=False, **given)
    assert report.layers[0].outcome == ("folded" if rank == 2 else "scale and shift")
    torch.testing.assert_close(report.folded(x), model(x), atol=1e-5, rtol=1e-5)
    said = f"inputs of rank {rank}, as (samples, {', '.join(map(str, sample))})"
    assert report.inputs == said
    assert f"; for {said}" in report.text()
    assert report.as_dict()["inputs"] == said
    with safe_open(output, "pt") as file:
        assert file.metadata()["folded_for"] == said
    other = torch.randn(7, *((8, 8) if norm_first else (8, 4))) if rank == 2 else torch.randn(7, sample[-1])
    assert model(other).isfinite().all()  # the model takes it, and the folded one must not, since it is not right for it
    with pytest.raises(AssertionError, match=f"folded where its input is of rank {rank}; fold the model again"):
        report.folded(other)


def test_files_of_torch_say_what_they_were_folded_for(tmp_path: Path) -> None:
    said = "inputs of rank 2, as (samples, 4)"
    for suffix in (".pt", ".pt2"):
        fold(rows(), tmp_path / f"folded{suffix}", input_shape=[(4,)], measure=False)
    state = torch.load(tmp_path / "folded.pt", weights_only=True)
    assert state._metadata["folded_for"] == {"inputs": said}
    nn.Sequential(nn.Linear(4, 8)).load_state_dict(state)
    told = {"folded_for": ""}
    program = torch.export.load(tmp_path / "folded.pt2", extra_files=told).module()
    assert told["folded_for"] in (said, said.encode())
    torch.testing.assert_close(program(VECTORS), rows()(VECTORS), atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match=r"."):  # torch's own refusals differ between its versions
        program(SEQUENCES)


@pytest.mark.parametrize(
    ("make", "outcomes"),
    [
        (embedded, ["kept"]),  # indices (N,) or (N, L)
        (synchronized, ["kept"]),
        (flattened, ["folded", "folded"]),  # sequences of 8 alone, all in one row
        (lambda: nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 8), nn.BatchNorm1d(8)), ["folded"] * 2),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8)), ["folded"]),
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), ["folded"]),
    ],
)
def test_where_ranks_are_and_are_not_in_doubt(make: Callable[[], nn.Module], outcomes: list[str]) -> None:
    """Widths that differ leave one length for both layers: none."""
    assert [each.outcome for each in fold(make(), measure=False).layers] == outcomes


def test_data_and_shape_of_other_ranks_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"--input-shape 4 and the samples of the data, of shape \(8, 4\), are of other ranks"
    ):
        fold(rows(), input_shape=[(4,)], data=SEQUENCES.numpy(), measure=False)


def test_a_small_output_is_not_hidden_by_a_large_one() -> None:
    before, after = [np.full((2, 1), 1e6), np.ones((2, 1))], [np.full((2, 1), 1e6), np.full((2, 1), 1.5)]
    found = difference(lambda _: before, lambda _: after, [[np.zeros((2, 1))]], "m")
    assert (found.largest, found.output, found.relative, found.samples) == (0.5, 1e6, 0.5, 2)
    assert not found.varies


def test_outputs_that_never_vary_show_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Threshold(1e9, 0.0))
    assert "outputs were the same for all samples" in fold(model, measure=False).text()
    assert "the same for all samples" not in fold(net(), measure=False).text()


class Reading(nn.Module):
    """A forward that reads what a layer holds, in code that can be followed or not."""

    def __init__(self, of: str, what: str, followed: bool):
        super().__init__()
        self.body = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
        self.of, self.what, self.followed = of, what, followed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if not self.followed and x.sum() > 1e9:
            y = y + 1
        return y * getattr(getattr(self.body, self.of), self.what).mean()


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize(
    ("of", "what", "outcome", "why"),
    [
        ("norm", "weight", "kept", "the model's code reads its weight"),
        ("norm", "running_mean", "kept", "the model's code reads its running_mean"),
        ("conv", "weight", "scale and shift", "body.conv has a weight that the model's code reads too"),
        ("conv", "bias", "scale and shift", "body.conv has a bias that the model's code reads too"),
    ],
)
def test_layers_whose_weights_are_read_by_code_stay(of: str, what: str, outcome: str, why: str, followed: bool) -> None:
    model = Reading(of, what, followed)
    report = fold(model, input_shape=[(3, 8, 8)], measure=False)
    assert report["body.norm"].outcome == outcome
    assert why in report["body.norm"].why


def test_rows_of_as_many_images_as_it_takes() -> None:
    """x.view(-1, 4) makes one row of each image of 8 x 8, and more of larger ones."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(x).view(-1, 4))

    model = Viewing().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
    report = fold(model, input_shape=[(4, 1, 1)], measure=False)
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(report.folded(x), model(x))


def test_exit_codes_of_what_was_folded(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((3,)), L.Dense(2)]).save(tmp_path / "plain.keras")
    result = evennorm("fold", tmp_path / "plain.keras", "-o", tmp_path / "copy.keras", "--no-speed")
    assert (result.exit_code, (tmp_path / "copy.keras").is_file()) == (1, True)
    assert result.output.startswith("nothing was folded: no batch normalization in it")
    result = evennorm("fold", f"{__name__}:rows", "-o", tmp_path / "rows.pt", "--no-speed")
    assert (result.exit_code, "nothing was folded: 0 of 1" in result.output) == (1, True)
    result = evennorm("fold", f"{__name__}:rows", "-o", tmp_path / "rows.pt", "--no-speed", "--input-shape", "4")
    assert (result.exit_code, "nothing" in result.output) == (0, False)


def test_the_speed_is_never_told_without_its_spread() -> None:
    """By a clock that the models themselves move."""
    now = 0.0

    def taking(seconds: Callable[[int], float]) -> Callable[[object], list[np.ndarray]]:
        calls = 0

        def run(_: object) -> list[np.ndarray]:
            nonlocal now, calls
            now, calls = now + seconds(calls), calls + 1
            return []

        return run

    def measured(before: Callable[[int], float], after: Callable[[int], float]) -> Speed:
        return speed(taking(before), taking(after), [np.zeros((5, 1))], clock=lambda: now)

    fast = measured(lambda i: 0.02 + 0.0001 * (i * 37 % 101), lambda i: 0.01)
    assert re.match(r"2\.5\d times as fast \(2\.[34]\d to 2\.[67]\d\): 2\d(\.\d)? ms \(2", fast.text())
    slow = measured(lambda i: 0.01, lambda i: 0.02)
    assert slow.text().startswith("slower, 2.00 times as long (2.00 to 2.00): ")
    same = measured(lambda i: 0.01 + 0.005 * (i * 37 % 101), lambda i: 0.011 + 0.005 * (i * 41 % 103))
    assert (same.factor, same.text().split(":")[0]) == (None, "no difference in speed is shown")
    assert same.as_dict()["factor_interval"] is None
    endless = measured(lambda i: 40.0, lambda i: 0.4)  # one round is all there is time for: no "100 times as fast"
    assert (endless.rounds, endless.factor) == (1, None)
    assert endless.text().startswith("the speed is not known: 1 round of 4e+04 ms before and 400 ms after")


def test_the_interval_of_a_median() -> None:
    """Its tails are those of the binomial distribution: 95 % or more, and one sample less on each side would be too few."""
    for n in range(FEWEST, 60):
        found = Median.of(range(n))
        below = int(found.low)
        assert (found.low, found.high) == (below, n - 1 - below)
        assert stats.binom.cdf(below, n, 0.5) <= 0.025 < stats.binom.cdf(below + 1, n, 0.5)
    assert not Median.of(range(FEWEST - 1)).is_known
    assert Median(1, 0, 2).overlaps(Median(3, 2, 4))
    assert not Median(1, 0, 2).overlaps(Median(3, 2.5, 4))
    assert Median(1, 0, 2).overlaps(Median.of([9.0]))


NETS = """
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.a(x * 2 if x.sum() > 0 else x))

def net() -> nn.Module:
    return Branching()
"""


def test_what_cannot_be_exported_is_one_line(tmp_path):
    """In a process of its own, since torch's logs go to the stream that it found first."""
    (tmp_path / "nets.py").write_text(NETS)
    code = "import sys\nfrom evennorm.cli import main\nfor name in sys.argv[1:]:\n"
    code += "    try: main(['fold', 'nets:net', '--input-shape', '3', '--no-speed', '-o', name])\n"
    code += "    except SystemExit as ended: assert ended.code == 2"
    command = [sys.executable, "-c", code, "out.pt2", "out.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, cwd=tmp_path)
    said = [line.partition(" (")[0] for line in done.stderr.splitlines()]
    assert said == [f"evennorm: the folded model cannot be exported to .{kind}" for kind in ("pt2", "onnx")]
    assert done.stdout == ""
    assert not list(tmp_path.glob("out*"))
