"""docs/memory.md: what `benchmarks/memory.py` counts, and the page that it writes from the results."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        import memory

        return memory


def test_bytes_are_counted_exactly(memory: ModuleType) -> None:
    x, weight = torch.randn(1000), torch.randn(1000, requires_grad=True)
    assert memory.held(lambda: x.exp()) == 4000
    assert memory.held(lambda: ((x * 2) * weight).sum()) == 4000 + 4, "the factor is kept, the product is not"


def test_the_page_is_that_of_the_results(memory: ModuleType) -> None:
    assert memory.PAGE.read_text() == memory.page(json.loads(memory.RESULT.read_text()))


def test_less_is_kept_as_the_page_says(memory: ModuleType) -> None:
    """On small images, where the same arrays are there."""
    from evennorm.tools.bench.contestants import OURS
    from evennorm.tools.bench.steps import EAGER
    from evennorm.tools.bench_gpu.network import LEAKY_EAGER, LEAKY_IN_PLACE, RECOMPUTED

    found = {name: two - one for name, (one, two) in memory.measure(side=64)["bytes"].items()}
    assert found[OURS] == pytest.approx(found[EAGER], rel=0.03)
    assert 1 - found[RECOMPUTED] / found[EAGER] > 0.3
    assert 1 - found[LEAKY_IN_PLACE] / found[LEAKY_EAGER] > 0.15
