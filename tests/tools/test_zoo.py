"""Models of timm and torchvision by name, in every command that takes a model: on packages that stand for the libraries."""

from __future__ import annotations

import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from evennorm.cli import main
from evennorm.errors import InputError, MissingExtra
from evennorm.tools.bench import networks, training
from evennorm.tools.bench.contestants import OURS
from evennorm.tools.bench.network_cases import NetworkCase
from evennorm.tools.models import open_model
from evennorm.tools.zoo import LIBRARIES, maker

STUBS = """
import types
from torch import nn

SEEN = []

def tiny(*, num_classes=1000, weights=None, **options):
    SEEN.append(options)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)

def with_backbone(*, num_classes=1000, weights=None, weights_backbone="those on the net"):
    assert weights_backbone is None
    return tiny(num_classes=num_classes)

def create_model(name, pretrained=True, **options):
    assert not pretrained
    return get_model(name, **options)

def get_model_builder(name):
    if name not in KNOWN:
        raise RuntimeError(f"Unknown model ({name})")
    return KNOWN[name]

def get_model(name, **options):
    return get_model_builder(name)(**options)

KNOWN = {"tiny": tiny, "with_backbone": with_backbone}
models = types.SimpleNamespace(get_model=get_model, get_model_builder=get_model_builder)
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """In the current folder, and found by processes that tests start."""
    for library in LIBRARIES:
        (tmp_path / f"{library}.py").write_text(STUBS)
        monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for library in LIBRARIES:
        sys.modules.pop(library, None)


def run(*words: str):
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize("library", LIBRARIES)
def test_commands_take_them_by_name(stubs, library) -> None:
    checked = run("check", f"{library}:tiny")
    assert checked.exit_code == 1
    assert "Sequential: 1 batch normalization" in checked.output
    assert "BN201 note" in checked.output  # a convolution's bias
    assert f"the weights of {library}:tiny are fresh ones; give trained ones by --weights" in checked.output
    torch.manual_seed(1)
    trained = maker(f"{library}:tiny")()
    torch.save(trained.state_dict(), "tiny.pt")
    shape = ("--input-shape", "3,8,8", "--no-speed")
    done = run("fold", f"{library}:tiny", "--weights", "tiny.pt", "-o", "folded.pt2", *shape)
    assert done.exit_code == 0, done.output
    assert "1 of 1 batch normalizations folded" in done.output
    assert "fresh" not in done.output
    x = torch.randn(2, 3, 8, 8)
    folded = torch.export.load("folded.pt2").module()
    torch.testing.assert_close(folded(x), trained.eval()(x))


def test_benchmarks_take_them_by_name(stubs) -> None:
    case = NetworkCase("timm:tiny", 2, 8)
    model, source = networks.build(case)
    assert (source, model[-1].out_features) == ("timm", 1000)
    assert training.first_step(case, OURS).first > 0
    assert training.fused(case) == {"relu": 1}


def test_nothing_is_downloaded(stubs) -> None:
    assert isinstance(open_model("torchvision:with_backbone").model, nn.Sequential)


def test_refusals(stubs, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"^timm:absent: building it fails: RuntimeError: Unknown model \(absent\)$"):
        open_model("timm:absent")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"^timm:tiny needs the package timm, .* pip install 'evennorm\[timm\]'$"):
        open_model("timm:tiny")
