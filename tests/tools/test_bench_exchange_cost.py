"""What synchronized statistics cost by the model, against values worked out by hand; the page is that of its file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from evennorm.tools.bench import exchange_cost as model
from evennorm.tools.bench.exchange_cost import Cost, Link

ROOT = Path(__file__).resolve().parents[2]
LINK = Link(alpha=10.0, beta=0.5)


@pytest.mark.parametrize(
    ("way", "n", "expected"),
    [
        (model.ring_gather, 4, Cost(3, 300)),
        (model.doubling_gather, 4, Cost(2, 300)),
        (model.doubling_gather, 5, Cost(3, 400)),
        (model.ring_reduce, 4, Cost(6, 150)),
        (model.tree_reduce, 4, Cost(4, 400)),
        (model.doubling_reduce, 4, Cost(2, 200)),
        *((way, 1, Cost(0, 0)) for way in (*model.RING, *model.TREE)),
    ],
)
def test_costs_of_one_hundred_bytes(way: Any, n: int, expected: Cost) -> None:
    assert way(n, 100) == expected


def test_a_step_by_hand() -> None:
    """Two layers, four devices: gathered 3 C + 1 numbers, added 2 C, of 4 bytes."""
    cost = model.layers_cost([1, 2], 4, model.TREE)
    assert cost == Cost(2 * (2 + 4), 3 * (16 + 28) + 4 * (8 + 16))
    assert LINK.time(cost) == 10 * 12 + 0.5 * 228


def test_the_largest_group_is_the_last_that_fits() -> None:
    seconds = LINK.time(model.layers_cost([8, 8], 17))
    assert model.largest_group([8, 8], LINK, seconds, 1000) == 17
    assert model.largest_group([8, 8], LINK, seconds - 1e-6, 1000) == 16
    assert model.largest_group([8, 8], LINK, 1e9, 1000) == 1000
    assert model.largest_group([8, 8], LINK, 0.0, 1000) == 1


def test_the_fit_finds_the_link_and_nothing_below_zero() -> None:
    costs = [way(n, size) for way in model.RING for n in (2, 3, 5) for size in (100, 1000)]
    assert model.fitted(costs, [LINK.time(cost) for cost in costs]) == pytest.approx(LINK)
    assert model.fitted([Cost(1, 1), Cost(1, 2)], [2.0, 1.0]).beta == 0
    assert model.fitted([Cost(1, 1), Cost(2, 1)], [2.0, 1.0]).alpha == 0
    assert model.errors(LINK, [Cost(1, 2)], [10.0]) == pytest.approx([0.1])


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("_scaling")


def test_the_page_is_that_of_its_file(scaling: Any) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "collectives-torch.json").read_text())
    assert (ROOT / "docs" / "scaling.md").read_text() == scaling.page(found)


def test_resnet50_has_53_layers() -> None:
    pytest.importorskip("torch")
    found = json.loads((ROOT / "benchmarks" / "results" / "collectives-torch.json").read_text())
    from torch import nn

    from evennorm.tools.bench.networks import resnet50

    widths = [module.num_features for module in resnet50().modules() if isinstance(module, nn.BatchNorm2d)]
    assert found["network"] == widths
    assert len(widths) == 53
    assert sum(widths) == 64 + 3 * (64 + 64 + 256) + 256 + 4 * 768 + 512 + 6 * 1536 + 1024 + 3 * 3072 + 2048
