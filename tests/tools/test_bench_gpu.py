"""The GPU benchmark without a GPU: networks, calls, arrays, bytes, clock, tables, files, and what is chosen."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evennorm.errors import EvennormError, InputError
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import COPY, LIMIT, OURS, NotServed
from evennorm.tools.bench.network_cases import NetworkCase
from evennorm.tools.bench.networks import Bottleneck
from evennorm.tools.bench.networks import resnet50 as resnet50_network
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.rows import IN_TURNS, Row
from evennorm.tools.bench.settings import Settings
from evennorm.tools.bench.steps import EAGER, WITHOUT, Step
from evennorm.tools.bench_gpu import calls, clock, network
from evennorm.tools.bench_gpu.cases import L2, LAYERS, kept_on_chip, resnet50, sets_of, traffic
from evennorm.tools.bench_gpu.contestants import Contestant, contestants, place
from evennorm.tools.bench_gpu.measure import Plan, measure
from evennorm.tools.bench_gpu.report import GpuBenchmark, read, table

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def ticking(rounds):
    """Every turn is done once and said to take a millisecond, the first one of a round two."""
    for turns in rounds[:1]:
        for start in turns:
            start()
    return [[1.0 + (i == 0) for i, _ in enumerate(turns)] for turns in rounds]


def test_the_arrays_are_those_of_the_network() -> None:
    """Counted in the network itself."""
    seen: Counter = Counter()
    with torch.device("meta"):
        model = resnet50_network()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, given: seen.update([(given[0].shape[1], given[0].shape[2])]))
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert dict(seen) == LAYERS
    assert sum(LAYERS.values()) == 53
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032  # as torchvision has it


def test_all_combinations_once() -> None:
    every = resnet50()
    assert len(every) == len(set(every)) == 12 * (3 * 2 + 2)
    assert every[0] == Case((128, 112, 112, 64), "last", "bfloat16", "none")
    assert {case.layout for case in resnet50(variants=["bn+add+relu"], layouts=["first"])} == {"first"}
    with pytest.raises(InputError, match=r"variants: one or more of bn, bn\+relu, bn\+add\+relu; received 'gelu'"):
        resnet50(variants=["gelu"])


@pytest.mark.parametrize(
    ("case", "passes", "on_chip", "arrays", "bits"),
    [
        (Case((4, 8)), "forward", (False, False), 3, 0),
        (Case((4, 8)), "forward", (True, False), 2, 0),
        (Case((4, 8)), "both", (False, False), 3 + 5, 0),
        (Case((4, 8)), "both", (True, True), 2 + 3, 0),
        (Case((4, 8), residual=True), "forward", (False, False), 4, 1),
        (Case((4, 8), residual=True), "both", (False, False), 4 + 6, 3),
        (Case((4, 8), residual=True), "both", (True, False), 3 + 6, 3),
        (Case((4, 8), residual=True, activation="none"), "both", (False, False), 4 + 5, 0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_that_must_move(
    case: Case, passes: str, on_chip: tuple[bool, bool], arrays: int, bits: int, dtype: str
) -> None:
    typed = replace(case, dtype=dtype)
    assert traffic(typed, passes, on_chip).bytes_of(typed) == arrays * typed.bytes + bits * 32 / 8


def test_which_arrays_stay_on_the_chip() -> None:
    assert kept_on_chip(Case((128, 2048, 7, 7), "first", "bfloat16"), 132) == (True, True)
    assert kept_on_chip(Case((128, 7, 7, 2048), "last", "bfloat16"), 132) == (False, False)
    assert kept_on_chip(Case((256, 1024)), 132) == (True, True)


def test_no_array_waits_in_the_cache() -> None:
    for case in resnet50():
        sets = sets_of(case)
        assert sets >= 2
        assert sets * (3 + case.residual) * case.bytes >= 4 * L2


def test_turns_are_long_enough_and_counted() -> None:
    calls = []
    turn = clock.queued([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    turn.start()
    assert calls == ["a", "b"] * 3
    assert turn.calls == 6
    assert clock.repeats(turn, lambda rounds: [[0.2] for _ in rounds]) == 5
    assert clock.repeats(turn, lambda rounds: [[7.0] for _ in rounds]) == 1
    assert clock.in_turns({"x": turn, "y": turn}, 3, lambda rounds: [[6.0, 12.0] for _ in rounds]) == {
        "x": [1.0] * 3,
        "y": [2.0] * 3,
    }


CASES = (Case((4, 5, 5, 6)), Case((4, 6, 5, 5), "first", residual=True), Case((4, 5, 5, 6), activation="none"))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Of everyone who needs no GPU, on one; in turns, by a clock that does not measure."""
    plan = Plan("queued", rounds=3, clock=ticking, place=lambda case, seed: place(case, seed, "cpu"))
    few = [one for one in contestants() if one.name != "torch.compile"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evennorm.tools.bench_gpu.measure.sets_of", lambda case: 2)
        return [row for found in measure(CASES, few, plan) for row in found]


def test_every_contestant_takes_every_case(rows: list[Row]) -> None:
    for case in CASES:
        for passes in ("forward", "both"):
            found = {row.contestant: row for row in rows if (row.case, row.passes) == (case, passes)}
            without = {name for name, row in found.items() if row.reason}
            assert without <= {"F.batch_norm, relu_", "evennorm, module"}
            assert all(len(row.milliseconds) == 3 for row in found.values() if row.reason is None)
            assert {OURS, "F.batch_norm, relu", "nn.BatchNorm, nn.ReLU", COPY} <= set(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everyone_computes_the_same(case: Case) -> None:
    sets = [place(case, 0, "cpu")]
    expected = None
    for one in contestants():
        if one.name in ("torch.compile", COPY) or (
            one.family.endswith(("module", "modules"))
        ):  # modules have weights of their own
            continue
        try:
            [(forward, both)] = one.prepare(case, sets)
        except NotServed:
            continue
        y, *gradients = both()
        torch.testing.assert_close(forward(), y)
        expected = [y, *gradients] if expected is None else expected
        torch.testing.assert_close([y, *gradients], expected, rtol=1e-4, atol=1e-4)


def test_another_layer_that_fails_is_named_and_one_of_ours_is_an_error() -> None:
    def broken(case, sets):
        raise RuntimeError("no kernel\nfor this")

    plan = Plan("queued", ("forward",), 1, ticking, lambda case, seed: place(case, seed, "cpu"))
    [rows] = measure(CASES[:1], [Contestant("them", "theirs", OURS, broken)], plan)
    assert [(row.reason, row.milliseconds) for row in rows] == [("no kernel", ())]
    with pytest.raises(EvennormError, match="evennorm failed on 4x5x5x6: no kernel"):
        list(measure(CASES[:1], [Contestant(OURS, OURS, None, broken)], plan))


RESNET = NetworkCase("resnet50", 128, 224)


def benchmark() -> GpuBenchmark:
    """Of two arrays, 10 MB and a small one on the chip, by figures made up here."""
    large, small = Case((128, 14, 14, 400), "last", "float32"), Case((64, 64), "last", "float32")
    figures = {
        large: {OURS: 0.10, "F.batch_norm, relu": 0.3, "F.batch_norm, relu_": 0.2, "torch.compile": 0.12, COPY: 0.02},
        small: {OURS: 0.01, "F.batch_norm, relu": 0.03, "torch.compile": 0.02, COPY: 0.01},
    }
    families = {OURS: (OURS, None), COPY: (LIMIT, None), "torch.compile": ("torch.compile", OURS)}
    rows = [
        Row(IN_TURNS, case, passes, name, *families.get(name, ("torch eager", OURS)), (milliseconds,) * 3)
        for case, found in figures.items()
        for passes in ("forward", "both")
        for name, milliseconds in found.items()
    ]
    gpu = {"name": "A GPU", "multiprocessors": 132}
    where = {"versions": {"torch": "2.13.0"}, "gpu": gpu}
    steps = tuple(
        Step(RESNET, name, (milliseconds, milliseconds + 1, milliseconds + 2), (7.0,) * 3, 1.5, peak)
        for name, milliseconds, peak in (
            (EAGER, 40.0, 10_000_000_000),
            (OURS, 30.0, 7_500_000_000),
            (WITHOUT, 20.0, 5_000_000_000),
        )
    )
    steps += (Step(RESNET, "torch.compile", reason="no compiler"),)
    settings = Settings("torch", (large, small), ("forward", "both"))
    titles = {str(RESNET): "ResNet-50 of here, 224 px, batch 128"}
    called = (
        calls.Call(small, "both", "evennorm, module", (300.0, 310.0, 320.0), (20.0, 21.0, 22.0)),
        calls.Call(small, "both", "nn.BatchNorm, nn.ReLU", (200.0,), (), "cannot be recorded"),
    )
    arrays = Benchmark(settings, where, {"float32": "triton"}, tuple(rows))
    return GpuBenchmark("recorded", arrays, steps, titles, called)


def test_shares_of_the_copy_and_ratios() -> None:
    found = benchmark()
    large, small = found.arrays.settings.cases
    assert found.share(found.rows(large, "both")[OURS]).value == pytest.approx(8 / 2 * 0.02 / 0.1)
    assert found.share(found.rows(large, "forward")[OURS]).value == pytest.approx(3 / 2 * 0.02 / 0.1)
    assert found.share(found.rows(small, "both")[OURS]).value == pytest.approx(5 / 2 * 0.01 / 0.01), "on the chip"
    assert found.ratio(large, "both", "torch eager").value == pytest.approx(2.0), "the best of the family"
    assert found.ratio(small, "both", "torch eager").value == pytest.approx(3.0)
    targets = {target.what.partition(": ")[2]: target for target in found.targets()}
    assert targets["times as fast as torch eager, geometric mean of 2 shapes"].value == pytest.approx(6**0.5)
    assert targets["times as fast as torch.compile, geometric mean of 2 shapes"].value == pytest.approx(2.4**0.5)
    assert targets["times as fast as either baseline, worst shape of 8 MB"].value == pytest.approx(1.2)
    assert targets["share of the copy's bandwidth, worst shape of 8 MB"].value == pytest.approx(0.8)
    assert targets["part of the step's peak memory saved"].value == pytest.approx(0.25)


def test_files_are_read_back(tmp_path: Path) -> None:
    found, path = benchmark(), tmp_path / "gpu.json"
    found.write(path)
    assert read(path) == found
    values = json.loads(path.read_text())
    assert [step["median"] for step in values["steps"][:2]] == [41.0, 31.0]
    assert sum(line.lstrip().startswith('{"protocol"') for line in path.read_text().splitlines()) == len(found.arrays.rows)
    replace(found, steps=(), calls=()).write(path)
    assert (read(path).steps, read(path).calls) == ((), ())
    path.write_text('{"format": "evennorm bench 1"}')
    with pytest.raises(InputError, match="has the format 'evennorm bench gpu 2'; received 'evennorm bench 1'"):
        read(path)
    path.write_text("[")
    with pytest.raises(InputError, match="is no result of the GPU benchmark"):
        read(path)


def test_the_table() -> None:
    lines = table(benchmark()).replace("(spread unknown)", "(?)").splitlines()
    assert lines[:7] == [
        "A GPU, 132 multiprocessors, torch 2.13.0.",
        "",
        "ResNet-50 of here, 224 px, batch 128: a training step, in turns.",
        "",
        "| | step, ms | times ours | normalization's share | host, ms | first step, s | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| torch eager | 41.00 | 1.32 (?) | 49 % (?) | 7.00 | 1.50 | 10000 |",
    ], "whole steps come first"
    assert "| torch.compile | no compiler |  |  |  |  |  |" in lines
    assert "| 64x64 | float32 | forward + backward | 310.0 | 21.0 | 200.0 | - |" in lines
    assert "- nn.BatchNorm, nn.ReLU lacks figures: cannot be recorded" in lines
    reached = "- reached: bn+relu, float32: times as fast as torch eager, geometric mean of 2 shapes: 2.45 (?), wanted 1.50"
    assert reached in lines
    [row] = [line for line in lines if line.startswith("| 128x14x14x400") and "| forward + backward |" in line]
    assert row.startswith("| 128x14x14x400 | 40.1 | float32, bn+relu | forward + backward | 100.0 | 300.0 | ")
    assert row.endswith(" | 200.0 | 120.0 | 20.0 | 80 % (?) |")


@pytest.mark.parametrize("case", [NetworkCase("mlp", 8), NetworkCase("resnet50", 2, 32)], ids=str)
def test_networks_train_in_turns_and_what_fails_is_told(case: NetworkCase, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(case: NetworkCase) -> tuple[torch.nn.Module, str]:
        stem, pool = torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1)
        return torch.nn.Sequential(stem, Bottleneck(8, 4, 2), pool, torch.nn.Flatten(), torch.nn.Linear(16, 1000)), "us"

    monkeypatch.setattr(network, "TURN", 4.0)
    if case.name == "resnet50":
        monkeypatch.setattr(network, "build", small)
    changes = network.contestants(case, compiled=False, with_leaky=True)
    changes["another"] = lambda model, x: (_ for _ in ()).throw(NotServed("not here"))
    found = network.steps(case, changes, 2, "cpu", ticking)
    assert [(step.contestant, len(step.milliseconds), len(step.host), step.memory, step.reason) for step in found] == [
        *((name, 2, 2, None, None) for name in list(changes)[:-1]),
        ("another", 0, 0, None, "not here"),
    ]
    assert all(step.first for step in found[:-1])
    assert [step.milliseconds for step in found[:2]] == [(1.0, 1.0), (0.5, 0.5)], "a turn is two steps"
    assert [name for name in changes if name.startswith("Leaky")] == ([] if case.name == "mlp" else list(network.LEAKY))


def test_images_lie_channels_last_and_imagenet_trains_in_bfloat16() -> None:
    assert network.title(NetworkCase("resnet50", 2, 64)).endswith("channels last, bfloat16 by autocast")
    assert network.title(NetworkCase("mlp", 16)) == "MLP, 4 x 256, batch 16, of evennorm, float32"
    train = network.training(NetworkCase("resnet18", 2, 64), lambda model, x: model, "cpu")
    assert train.x.is_contiguous(memory_format=torch.channels_last)
    assert train.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert train.model(train.x).dtype == torch.float32
    assert train.autocast
    assert not network.training(NetworkCase("mlp", 16), lambda model, x: model, "cpu").autocast


def test_who_was_not_prepared_in_time_is_left_out() -> None:
    case = NetworkCase("mlp", 8)
    answers = iter([False, True, True])
    changes = {name: lambda model, x: model for name in "abc"}
    found = network.steps(case, changes, 1, "cpu", ticking, late=lambda: next(answers))
    assert [step.reason for step in found] == [None, "time was up", "time was up"]


def test_a_loss_that_is_not_finite_is_a_reason() -> None:
    def broken(model: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
        torch.nn.init.constant_(model[0].weight, torch.nan)
        return model

    [step] = network.steps(NetworkCase("mlp", 8), {"broken": broken}, 1, "cpu", ticking)
    assert step.reason == "the loss is nan, and such numbers take a time of their own"


def test_what_a_call_costs_host_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SHAPES", "8x16,2x3x4x4:first")
    plan = Plan("queued", rounds=3, clock=ticking, place=lambda case, seed: place(case, seed, "cpu"))
    found = calls.calls(plan)
    assert [(call.case.place, call.passes, call.contestant) for call in found] == [
        (shape, passes, name)
        for shape in ("8x16", "2x3x4x4:first")
        for passes in ("forward", "both")
        for name in ("evennorm, module", "nn.BatchNorm, nn.ReLU")
    ]
    assert all(len(call.host) == len(call.device) == 3 and call.reason is None for call in found)
    assert {call.device[0] for call in found} == {1000.0, 2000.0}, "a turn of one or two milliseconds, one call each"

    def broken(case, sets):
        raise RuntimeError("no kernel\nfor this")

    [call] = calls.calls(plan._replace(passes=("forward",)), everyone=[Contestant("them", "theirs", None, broken)])[:1]
    assert (call.reason, call.medians) == ("no kernel", (None, None))


def test_what_is_measured_is_chosen() -> None:
    arguments = runpy.run_path(str(SCRIPT))["arguments"]
    full, quick = arguments([]), arguments(["--quick", "--networks", "mlp:16"])
    assert full.parts == "networks,calls,arrays"
    assert (full.networks, full.compile, full.network_rounds) == ("all", "mlp,article,resnet50", 9)
    assert (quick.networks, quick.compile, quick.dtypes, quick.rounds) == ("mlp:16", "", "bfloat16", 9)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runpy.run_path(str(SCRIPT))["main"]([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "bench-gpu measures on a CUDA device, and torch sees none here; run it on a machine that has one.\n"


def test_networks_come_first_and_each_result_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own part of a run, with the device's replaced."""
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["run"].__globals__, "where", lambda: {"versions": {}, "gpu": {"name": "none"}})
    monkeypatch.setattr(network, "steps", lambda case, changes, rounds, late: [Step(case, name) for name in changes])
    monkeypatch.setattr(calls, "calls", lambda plan: [calls.Call(Case((8, 16)), "both", plan.mode)])
    row = Row(IN_TURNS, Case((8, 16)), "both", OURS, OURS, None, (1.0,))
    monkeypatch.setattr("evennorm.tools.bench_gpu.measure.measure", lambda cases, everyone, plan: [[row] for _ in cases])
    asked = script["arguments"](["--quick", "--networks", "mlp:8,mlp:16", "--mode", "queued"])
    found = list(script["run"](asked))
    sizes = [(len(one.networks), len(one.steps), len(one.calls), len(one.arrays.rows)) for one in found]
    assert sizes == [(1, 4, 0, 0), (2, 8, 0, 0), (2, 8, 1, 0), *((2, 8, 1, 1 + done) for done in range(12))]
    assert found[-1].calls[0].contestant == "recorded", "calls always are"
    [only] = list(script["run"](script["arguments"](["--parts", "calls"])))
    assert (only.steps, len(only.calls)) == ((), 1)
    assert len(list(script["run"](script["arguments"](["--parts", "calls,arrays", "--minutes", "-1"])))) == 0
    with pytest.raises(InputError, match="parts: one or more of networks, calls, arrays; received 'nets'"):
        list(script["run"](script["arguments"](["--parts", "nets"])))


def test_other_layers_are_chosen_by_family() -> None:
    wanted = runpy.run_path(str(SCRIPT))["wanted"]
    names = [one.name for one in wanted("torch.compile", contestants())]
    assert names == [OURS, "torch.compile", "evennorm, module", COPY]
    assert len(wanted("", contestants())) == len(contestants())
    with pytest.raises(
        InputError, match=r"against: one or more of torch eager, torch\.compile, torch modules; received 'them'"
    ):
        wanted("them", contestants())
