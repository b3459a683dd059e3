"""The GPU benchmark, but for the GPU: arrays, bytes, clock, tables, files, and what it says where there is no device."""

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
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.rows import IN_TURNS, Row
from evennorm.tools.bench.settings import Settings
from evennorm.tools.bench_gpu import clock, network
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
        model = network.ResNet50()
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
            assert {OURS, "F.batch_norm, relu", "nn.BatchNorm2d, nn.ReLU", COPY} <= set(found)


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


def test_a_rival_that_fails_is_named_and_one_of_ours_is_an_error() -> None:
    def broken(case, sets):
        raise RuntimeError("no kernel\nfor this")

    plan = Plan("queued", ("forward",), 1, ticking, lambda case, seed: place(case, seed, "cpu"))
    [rows] = measure(CASES[:1], [Contestant("them", "theirs", OURS, broken)], plan)
    assert [(row.reason, row.milliseconds) for row in rows] == [("no kernel", ())]
    with pytest.raises(EvennormError, match="evennorm failed on 4x5x5x6: no kernel"):
        list(measure(CASES[:1], [Contestant(OURS, OURS, None, broken)], plan))


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
        network.Step(name, "ResNet-50", 128, (40.0, 41.0, 42.0), peak)
        for name, peak in ((network.EAGER, 10_000_000_000), (network.CONVERTED, 7_500_000_000))
    )
    steps += (network.Step("torch.compile", "ResNet-50", 128, reason="no compiler"),)
    settings = Settings("torch", (large, small), ("forward", "both"))
    return GpuBenchmark("recorded", Benchmark(settings, where, {"float32": "triton"}, tuple(rows)), steps)


def test_shares_of_the_copy_and_ratios() -> None:
    found = benchmark()
    large, small = found.arrays.settings.cases
    assert found.share(found.rows(large, "both")[OURS]) == pytest.approx(8 / 2 * 0.02 / 0.1)
    assert found.share(found.rows(large, "forward")[OURS]) == pytest.approx(3 / 2 * 0.02 / 0.1)
    assert found.share(found.rows(small, "both")[OURS]) == pytest.approx(5 / 2 * 0.01 / 0.01), "on the chip"
    assert found.ratio(large, "both", "torch eager") == pytest.approx(2.0), "the best of the family"
    assert found.ratio(small, "both", "torch eager") == pytest.approx(3.0)
    targets = {target.what.partition(": ")[2]: target for target in found.targets()}
    assert targets["times as fast as torch eager, geometric mean of 2 shapes"].value == pytest.approx(6**0.5)
    assert targets["times as fast as torch.compile, geometric mean of 2 shapes"].value == pytest.approx(2.4**0.5)
    assert targets["times as fast as either rival, worst shape of 8 MB"].value == pytest.approx(1.2)
    assert targets["share of the copy's bandwidth, worst shape of 8 MB"].value == pytest.approx(0.8)
    assert targets["part of the step's peak memory saved"].value == pytest.approx(0.25)


def test_files_are_read_back(tmp_path: Path) -> None:
    found, path = benchmark(), tmp_path / "gpu.json"
    found.write(path)
    assert read(path) == found
    values = json.loads(path.read_text())
    assert [step["median"] for step in values["steps"][:2]] == [41.0, 41.0]
    assert sum(line.lstrip().startswith('{"protocol"') for line in path.read_text().splitlines()) == len(found.arrays.rows)
    replace(found, steps=()).write(path)
    assert read(path).steps == ()
    path.write_text('{"format": "evennorm bench 1"}')
    with pytest.raises(InputError, match="has the format 'evennorm bench gpu 1'; received 'evennorm bench 1'"):
        read(path)
    path.write_text("[")
    with pytest.raises(InputError, match="is no result of the GPU benchmark"):
        read(path)


def test_the_table() -> None:
    lines = table(benchmark()).splitlines()
    assert lines[0] == "A GPU, 132 multiprocessors, torch 2.13.0."
    assert (
        "reached: bn+relu, float32: times as fast as torch eager, geometric mean of 2 shapes: 2.45, wanted 1.50" in lines[3]
    )
    [row] = [line for line in lines if line.startswith("| 128x14x14x400") and "| forward + backward |" in line]
    assert (
        row
        == "| 128x14x14x400 | 40.1 | float32, bn+relu | forward + backward | 100.0 | 300.0 | 200.0 | 120.0 | 20.0 | 80 % |"
    )
    assert "| torch eager | 41.0 | 10000 |" in lines
    assert "| torch.compile | no compiler | |" in lines


def test_a_network_trains_and_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> tuple[torch.nn.Module, str]:
        stem, pool = torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1)
        return torch.nn.Sequential(
            stem, network.Bottleneck(8, 4, 2), pool, torch.nn.Flatten(), torch.nn.Linear(16, 1000)
        ), "us"

    assert network.resnet50()[1] in ("torchvision", "timm", "evennorm.tools.bench_gpu.network")
    monkeypatch.setattr(network, "resnet50", small)
    ways = {name: change for name, change in network.WAYS.items() if "compile" not in name}
    ways["another"] = lambda model: (_ for _ in ()).throw(NotServed("not here"))
    found = network.steps(2, 32, 1, "cpu", ways, ticking)
    assert [(step.contestant, len(step.milliseconds), step.peak, step.reason) for step in found] == [
        *((name, 1, None, None) for name in list(ways)[:-1]),
        ("another", 0, None, "not here"),
    ]
    assert found[0].network.startswith("ResNet-50 of us, 32x32")
    assert found[0].median == 2.0 / network.STEPS


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runpy.run_path(str(SCRIPT))["main"]([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "bench-gpu measures on a CUDA device, and torch sees none here; run it on a machine that has one.\n"


def test_rivals_are_chosen_by_family() -> None:
    wanted = runpy.run_path(str(SCRIPT))["wanted"]
    names = [one.name for one in wanted("torch.compile", contestants())]
    assert names == [OURS, "torch.compile", "evennorm, module", COPY]
    assert len(wanted("", contestants())) == len(contestants())
    with pytest.raises(
        InputError, match=r"against: one or more of torch eager, torch\.compile, torch modules; received 'them'"
    ):
        wanted("them", contestants())
