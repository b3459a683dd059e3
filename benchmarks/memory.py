"""What the forward pass of ResNet-50 keeps for backward, with torch's batch normalization and with evennorm's.

Writes benchmarks/results/memory.json and, from it, docs/memory.md. Bytes are counted, not timed: what torch's allocator has
given out and not taken back while the loss is alive. They are the same on any device.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

RESULT = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "memory.md"
SIDE = 224


def held(forward: Callable[[], Any]) -> int:
    """Bytes that are allocated by `forward`, and still are while its result is alive."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what an earlier pass left must not be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = forward()
    total = sum(event.self_cpu_memory_usage for event in recorded.events())
    del result
    return total


def measure(side: int = SIDE) -> dict[str, Any]:
    """Bytes of each way, with one image and with two."""
    from evennorm.tools.bench.network_cases import NetworkCase
    from evennorm.tools.bench.steps import WITHOUT
    from evennorm.tools.bench_gpu import network

    one, two = (NetworkCase("resnet50", batch, side) for batch in (1, 2))
    found = {}
    for name, change in network.contestants(
        one, compiled=False, with_leaky=True
    ).items():  # the profiler sees no compiled one
        if name == WITHOUT:
            continue
        train = network.training(one, change, "cpu")
        train.loss()
        found[name] = []
        for case in (one, two):
            train.x, train.labels = network.batch_of(case, "cpu")
            found[name].append(held(train.loss))
    return {"side": side, "bytes": found, "environment": environment()}


def page(result: dict[str, Any]) -> str:
    return "\n".join(_page(result))


def _page(result: dict[str, Any]) -> Iterator[str]:
    from evennorm.tools.bench.contestants import OURS
    from evennorm.tools.bench.steps import EAGER
    from evennorm.tools.bench_gpu.network import LEAKY_CONVERTED, LEAKY_EAGER, LEAKY_IN_PLACE, RECOMPUTED

    words = {
        EAGER: "ReLU: torch",
        OURS: "ReLU: `convert`",
        RECOMPUTED: "ReLU: `convert` and `recompute_outputs`",
        LEAKY_EAGER: "LeakyReLU: torch",
        LEAKY_CONVERTED: "LeakyReLU: `convert`",
        LEAKY_IN_PLACE: 'LeakyReLU: `convert`, `memory="inplace"` where no sum follows',
    }
    per_image = {name: two - one for name, (one, two) in result["bytes"].items()}
    fixed = {name: 2 * one - two for name, (one, two) in result["bytes"].items()}
    side = result["side"]
    yield f"""# Memory of the backward pass

How many megabytes per image the forward pass of ResNet-50 saves for the backward pass, with in-place activations,
{side}x{side} images, and bfloat16 by autocast:

| | MB per image | less than torch |
| --- | ---: | ---: |"""
    for name, word in words.items():
        before = per_image[LEAKY_EAGER if name.startswith("Leaky") else EAGER]
        yield f"| {word} | {per_image[name] / 1e6:.1f} | {100 * (1 - per_image[name] / before):.0f} % |"
    yield f"""
The weights in bfloat16 take another {fixed[EAGER] / 1e6:.0f} MB, independent of the batch size.

- **Fusing alone saves no memory here.** torch keeps x for its normalization, and y for the next convolution; an in-place
  ReLU shares y. evennorm keeps the same two, plus one bit per element where a residual is added. Fusing saves time.
- **`recompute_outputs`** does not keep y where evennorm computed it. The backward pass computes it again, with the same
  bits, in a pass that costs about as much as a copy.
- **`memory="inplace"`** does not keep x, but computes it from y. In a residual network this is possible for two of three
  normalizations, and only with an activation that has an inverse.

```python
import torch
from torch import nn
from evennorm.torch import convert, recompute_outputs

model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
with recompute_outputs():
    loss = model(torch.randn(4, 3, 16, 16)).square().mean()
loss.backward()
```

`python benchmarks/memory.py` counts these bytes, which are the same on any device. The time that recomputing takes on a GPU
has not been measured yet; `make bench-gpu` measures it.

{sentence(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page from the results that are there")
    if not parser.parse_args().page:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
