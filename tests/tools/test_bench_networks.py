"""`evennorm bench --network`: the networks, what is compared, what is printed, the file, and what is refused."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from evennorm.cli import main
from evennorm.errors import EvennormError, InputError
from evennorm.tools.bench import network_processes, networks, training
from evennorm.tools.bench.contestants import OURS
from evennorm.tools.bench.network_cases import NETWORKS, ON_GPU, NetworkCase, parsed_networks
from evennorm.tools.bench.steps import (
    COMPILED,
    EAGER,
    OURS_COMPILED,
    WITHOUT,
    NetworkBenchmark,
    NetworkSettings,
    Step,
    Steps,
    read,
)
from tests.grids import mostly

MLP, TINY = NetworkCase("mlp", 16), NetworkCase("resnet18", 2, 32)
SMALL = {"mlp": 2, "article": 24, "resnet18": 32, "resnet50": 32, "mobilenet": 32}
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def small(name: str) -> NetworkCase:
    return NetworkCase(name, 2, None if name == "mlp" else SMALL[name])


def test_lists_of_networks() -> None:
    assert [str(case) for case in parsed_networks("all")] == [
        *("mlp:16", "mlp:128", "article:64x48", "resnet18:4x96", "resnet50:4x96", "mobilenet:4x96"),
    ]
    assert [str(case) for case in parsed_networks("resnet50,mlp:8", ON_GPU)] == ["resnet50:128x224", "mlp:8"]
    assert parsed_networks("mlp:16, mlp") == parsed_networks("mlp")
    libraries = parsed_networks("timm:vit_tiny_patch16_224:2x224,torchvision:resnet18:8,timm:resnet18.a1_in1k")
    assert [(case.name, case.batch, case.side) for case in libraries] == [
        ("timm:vit_tiny_patch16_224", 2, 224),
        ("torchvision:resnet18", 8, 96),
        ("timm:resnet18.a1_in1k", 4, 96),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "vgg",
            "networks are mlp, article, .*, timm:NAME, torchvision:NAME, or all; a batch may follow, .*; received 'vgg'",
        ),
        ("mlp:x", "received 'mlp:x'"),
        ("nets:vgg", "received 'nets:vgg'"),
        ("timm:", "received 'timm:'"),
        ("", "received ''"),
        ("mlp:0", "the number of samples must be at least 1; received 0"),
        ("mlp:4x32", "mlp takes vectors, which have no side; received the side 32"),
        ("resnet50:4x16", "resnet50 takes images from 32 px on; received 16"),
        ("article:4x23", "article takes images from 24 px on; received 23"),
    ],
)
def test_lists_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed_networks(text)


@pytest.mark.parametrize(
    ("name", "parameters", "normalizations"),
    [
        ("mlp", 4 * (256 * 257 + 2 * 256) + 2570, 4),
        ("article", 2_350_087, 3),
        ("resnet18", 11_689_512, 20),  # these three as torchvision has them
        ("resnet50", 25_557_032, 53),
        ("mobilenet", 3_504_872, 52),
    ],
)
def test_the_networks_are_what_they_say(name: str, parameters: int, normalizations: int) -> None:
    case = parsed_networks(name)[0]
    with torch.device("meta"):
        model, _ = networks.build(case)
        y = model(torch.empty(case.shape))
    assert y.shape == (case.batch, case.network.classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(kinds) == normalizations


@pytest.mark.parametrize(*mostly(lambda name: name not in ("resnet50", "mobilenet"), "name", [(name,) for name in NETWORKS]))
def test_without_normalization_the_numbers_stay_usual_ones(name: str) -> None:
    """Neither infinite nor denormal, in values and gradients: those would take a time of their own."""
    train = training.training(small(name), WITHOUT)
    assert not [module for module in train.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert math.isfinite(float(train()))
    gradients = torch.cat([parameter.grad.flatten() for parameter in train.model.parameters()]).abs()
    assert torch.isfinite(gradients).all()
    assert not ((gradients > 0) & (gradients < torch.finfo(torch.float32).tiny)).any()


def test_all_start_from_equal_weights_and_compute_the_same() -> None:
    theirs, ours = (training.training(NetworkCase("resnet18", 4, 32), name) for name in (EAGER, OURS))
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=0)
    losses = [[float(train()) for _ in range(3)] for train in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 1, "the learning rate is 0"


def test_what_is_kept_is_counted() -> None:
    """Of an MLP without normalization: each layer's input, once for itself and the ReLU before it, and the loss's own."""
    kept = training.training(NetworkCase("mlp", 100), WITHOUT).kept_bytes()
    floats = 4 * 100 * 256 + 100 * 10 + 1
    assert kept == pytest.approx(4 * floats, rel=0.01)


def test_what_convert_computes_together() -> None:
    assert training.fused(small("mlp")) == {"relu": 4}
    assert training.fused(small("resnet50")) == {"relu": 33, "add + relu": 16, "": 4}
    assert training.fused(small("mobilenet")) == {"relu6": 35, "": 7, "add": 10}


def test_numbers_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Training, "loss", lambda self: self.model(self.x).sum() * math.nan)
    with pytest.raises(EvennormError, match="evennorm on mlp:16: the loss is nan, and such numbers take"):
        training.in_turns(MLP, [OURS], 1)


def test_a_contestant_that_fails_is_named() -> None:
    with pytest.raises(EvennormError, match="torch eager failed on mlp:1: Expected more than 1 value per channel"):
        training.first_step(NetworkCase("mlp", 1), EAGER)


def benchmark() -> NetworkBenchmark:
    """By figures made up here: evennorm is ahead in one network and behind in the other."""
    figures = {MLP: (4.0, 2.0, 1.0, 6.0, 3.0), TINY: (90.0, 100.0, 80.0, 90.0, 45.0)}
    names = (EAGER, OURS, WITHOUT, COMPILED, OURS_COMPILED)
    steps = [
        Step(
            case, name, (time, 1.1 * time, 0.9 * time), first=10 * time / 1000, memory=None if "comp" in name else 2_500_000
        )
        for case, times in figures.items()
        for name, time in zip(names, times, strict=True)
    ]
    where = {"device": "a machine", "versions": {"torch": "2.13"}, "commit": "abc", "load before": 0.1}
    settings = NetworkSettings((MLP, TINY), compiled=True, threads=2)
    return NetworkBenchmark(settings, where, tuple(steps), {"mlp:16": {"relu": 4}, "resnet18:2x32": {"": 20}})


def test_ratios_and_shares() -> None:
    steps = benchmark().steps
    theirs, ours, without, compiled, _ = steps.of(MLP)
    assert (steps.ratio(theirs), steps.ratio(compiled)) == pytest.approx((2.0, 2.0))
    assert [steps.ratio(step) for step in (ours, without)] == [None, None]
    assert (steps.share(theirs), steps.share(ours)) == pytest.approx((0.75, 0.5))
    assert [steps.share(step) for step in (without, compiled)] == [None, None]
    empty = Step(MLP, OURS, reason="not here")
    assert Steps([theirs, empty]).ratio(theirs) is None


def test_ratios_are_taken_within_rounds() -> None:
    """A round in which all took thrice as long says the same as the others."""
    theirs, ours = Step(MLP, EAGER, (2.0, 6.0, 2.0)), Step(MLP, OURS, (1.0, 3.0, 1.0))
    assert Steps([theirs, ours]).ratio(theirs) == 2.0


def test_the_file_is_read_back(tmp_path: Path) -> None:
    found, path = benchmark(), tmp_path / "found.json"
    found.write(path)
    assert read(path) == found
    assert sum(line.startswith('  {"network"') for line in path.read_text().splitlines()) == 10
    path.write_text('{"format": "evennorm bench 1"}')
    with pytest.raises(InputError, match="has the format 'evennorm bench networks 1'; received 'evennorm bench 1'"):
        read(path)
    path.write_text("[")
    with pytest.raises(InputError, match=r"found\.json is no result of evennorm bench --network"):
        read(path)


def command(*options: str) -> Result:
    return CliRunner().invoke(main, ["bench", *options], prog_name="evennorm")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Measure in this process, where torch is loaded already; gives what each process was asked for."""
    asked: list[tuple[str, str]] = []

    def events(module: str, task: dict, environment: dict[str, str], engine: str):
        assert (module, engine) == ("evennorm.tools.bench.training", "torch")
        asked.append((task["first"], environment["OMP_NUM_THREADS"]))
        folder = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
        if task["first"]:
            assert not folder.exists(), "nothing is compiled before a first step"
            folder.mkdir()
            (folder / task["first"]).touch()
        else:
            assert sorted(path.name for path in folder.iterdir()) == sorted({name for name, _ in asked if name})
        return training._measured(task)

    monkeypatch.setattr(network_processes, "events", events)
    return asked


def test_the_command(here: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    result = command("--network", "mlp:4,article:2x24", "--rounds", "2", "--threads", "1", "--json", str(path))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("torch ")
    assert ", 1 thread on " in lines[0]
    assert "MLP, 4 x 256, batch 4, training steps, in turns" in lines
    assert "The articles' network, 24 px, batch 2, training steps, in turns" in lines
    assert "convert: 3 normalizations, of which 3 alone" in lines
    assert "share      the part of an eager step that normalization takes, compared with a step without it" in lines
    assert lines[-1] == f"All samples: {path}"
    found = read(path)
    assert [(str(step.network), step.contestant) for step in found.measured] == [
        (network, name) for network in ("mlp:4", "article:2x24") for name in (EAGER, OURS, WITHOUT)
    ]
    assert all(len(step.milliseconds) == 2 and step.first and step.memory for step in found.measured)
    assert here == [(EAGER, "1"), (OURS, "1"), (WITHOUT, "1"), (None, "1")] * 2


def test_the_table_says_where_evennorm_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evennorm.tools.bench.measure_networks", lambda settings, progress: benchmark())
    result = command("--network", "--compile")
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "torch eager 4.000 (3.800 to 4.200) 2.00 75 % 0.04 2.5" in rows
    assert "evennorm 2.000 (1.900 to 2.100) 50 % 0.02 2.5" in rows
    assert "torch.compile 6.000 (5.700 to 6.300) 2.00 0.06" in rows
    assert rows[-1] == "evennorm is slower than torch eager in resnet18:2x32: 1.11 times as long."


def test_alone_the_option_means_all_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[NetworkSettings] = []

    def measure(settings: NetworkSettings, progress: object) -> NetworkBenchmark:
        asked.append(settings)
        return benchmark()

    monkeypatch.setattr("evennorm.tools.bench.measure_networks", measure)
    assert command("--network", "--rounds", "3").exit_code == 0
    assert [*asked[0].networks] == parsed_networks("all")
    assert (asked[0].rounds, asked[0].compiled) == (3, False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--network", "vgg"),
            "networks are mlp, article, resnet18, resnet50, mobilenet, timm:NAME, torchvision:NAME, or all; ",
        ),
        (("--network", "mlp", "--threads", "0"), "the number of threads must be at least 1; received 0"),
        (("--network", "mlp", "--rounds", "0"), "the number of rounds must be at least 1; received 0"),
        (("--network", "mlp", "--engine", "jax"), "networks are measured on torch; received --engine jax"),
        (
            ("--network", "mlp", "--each-alone"),
            "--network goes with --compile, --threads, --rounds and --json; received --each-alone",
        ),
        (("--compile",), "--compile goes with --network; for arrays choose --against torch.compile"),
        (("--network", "--json", "/nowhere/a.json"), "cannot write /nowhere/a.json: there is no such folder"),
    ],
)
def test_bad_input(options: tuple[str, ...], text: str) -> None:
    result = command(*options)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("evennorm: ")
    assert text in line


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """`benchmarks/networks.py` as a module; its name is that of no other one here."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("networks_page", BENCHMARKS / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [os.fspath(BENCHMARKS), *sys.path])
        spec.loader.exec_module(module)
    return module


def test_the_page(page: ModuleType) -> None:
    lines = page.page(benchmark()).replace("(spread unknown)", "(?)").splitlines()
    for line in (
        "| MLP, 4 x 256, batch 16 | 4.00 | 2.00 | 1.00 | 2.00 (?) | 75 % (?) | 50 % (?) |",
        "| ResNet-18, 32 px, batch 2 | 90.0 | 100 | 80.0 | 0.90 (?) | 11 % (?) | 20 % (?) |",
        "| MLP, 4 x 256, batch 16 | 6.00 | 3.00 | 2.00 (?) |",
        "| MLP, 4 x 256, batch 16 | 0.04 | 0.02 | 0.06 | 0.03 |",
        "| MLP, 4 x 256, batch 16 | 2.5 | 2.5 | 4 relu |",
        "Measured on a machine, with torch 2.13.",
    ):
        assert line in lines, f"{line}\n{chr(10).join(lines)}"


def test_the_pages_say_what_the_result_does(page: ModuleType) -> None:
    """docs/networks.md, and the first table of README.md."""
    assert page.PAGE.exists() == page.RESULT.exists()
    if page.RESULT.exists():
        found = read(page.RESULT)
        assert page.PAGE.read_text() == page.page(found)
        assert "\n".join(page.headline(found)) in (page.ROOT / "README.md").read_text()
