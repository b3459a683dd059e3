"""Write docs/scaling.md from what `collectives.py` has measured, by the model of `evennorm.tools.bench.exchange_cost`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from _environment import sentence

from evennorm.tools.bench.exchange_cost import (
    RING,
    TREE,
    Cost,
    Link,
    added_bytes,
    doubling_gather,
    doubling_reduce,
    doublings,
    errors,
    fitted,
    gathered_bytes,
    largest_group,
    layers_cost,
    ring_gather,
    ring_reduce,
    tree_reduce,
)

CHANNELS = (64, 256, 1024, 2048)
"""Of the collectives that are measured alone."""
WIDTHS = (32, 64, 128)
"""Of the network that is trained."""
DEVICES = (8, 64, 512, 4096, 10_000)
ASSUMED = {
    "datacentre (assumed)": Link(20e-6, 1 / 12.5e9),
    "internet (assumed)": Link(30e-3, 1 / 12.5e6),
}
"""Round figures, measured nowhere: 20 us and 100 Gbit/s; 30 ms and 100 Mbit/s."""
STEPS = (0.1, 1.0, 10.0)
SHARE = 0.1

PINGPONG = {512: 2.22, 1024: 2.33, 2048: 3.06, 4096: 3.78, 8192: 4.86, 16384: 6.75}
ALL_REDUCE = {512: 13.83, 1024: 14.63, 2048: 16.15, 4096: 19.67, 8192: 32.13, 16384: 36.22}
PROCESSES = 144
"""Microseconds by bytes, of July 2023, with Open MPI 4.1.2a1, from Oracle's tutorial of the Intel MPI Benchmarks."""


def page(found: dict[str, Any]) -> str:
    """docs/scaling.md."""
    return "\n".join([*_page(found), ""])


def _page(found: dict[str, Any]) -> Iterator[str]:
    where = found["environment"]
    link = fitted(*_measured(found["runs"]))
    links = {"loopback (fitted)": link, **ASSUMED}
    yield from f"""# What synchronized statistics cost

`evennorm.torch.SyncBatchNorm` exchanges numbers twice per layer and training step. This page says how many, measures the
exchange with 2 to 5 processes on one machine, fits a model, and shows the model's prediction for up to
{DEVICES[-1]:,} devices. Nothing was measured with more than {found["runs"][-1]["processes"]} processes.

`python benchmarks/collectives.py` writes this page from `benchmarks/results/collectives-torch.json`.

{where["device"]}, one thread per process, load average before {where["load before"]}, commit {where["commit"]}. With more
than {where["cores"]} processes, times include waiting for a core.
""".splitlines()
    yield from ("", *_exchanged(found["network"]), "", *_model())
    yield from ("", *_collectives(found), "", *_fit(found, link), "", *_steps(found, link))
    yield from ("", *_published(), "", *_predictions(found["network"], links), "", *_groups(found["network"], links))
    yield from ("", sentence(where))


def _exchanged(network: Sequence[int]) -> Iterator[str]:
    total = sum(network)
    yield from f"""## What is exchanged

In the forward pass, each device sends the mean, the mean's low part and the variance of C channels, and a count: 3 C + 1
numbers of 4 bytes. It receives those of all others (all_gather). In the backward pass, two sums per channel are added over
the devices (all_reduce): 2 C numbers. ResNet-50 has {len(network)} layers with {total:,} channels.
Bytes per device and step:

| channels | layers | sent forward, per layer | added backward, per layer | received forward from n devices, per layer |
| ---: | ---: | ---: | ---: | ---: |""".splitlines()
    for channels, layers in sorted(Counter(network).items()):
        forward = gathered_bytes(channels)
        yield f"| {channels} | {layers} | {forward:,} | {added_bytes(channels):,} | {forward:,} (n - 1) |"
    forward, backward = (sum(map(size, network)) for size in (gathered_bytes, added_bytes))
    yield f"| all {total:,} | {len(network)} | {forward:,} | {backward:,} | {forward:,} (n - 1) |"


def _model() -> Iterator[str]:
    yield from """## The model

A message takes alpha seconds, plus beta seconds for each byte. The table is for m bytes per device and n devices, after
Thakur, Rabenseifner & Gropp 2005 (*Optimization of collective communication operations in MPICH*) and, for the all_reduce
by a ring, Patarasuk & Yuan 2009 (*Bandwidth optimal all-reduce algorithms for clusters of workstations*):

| | messages, one after the other | bytes of these |
| --- | ---: | ---: |
| all_gather, ring | n - 1 | (n - 1) m |
| all_gather, recursive doubling | log2 n | (n - 1) m |
| all_reduce, ring | 2 (n - 1) | 2 (n - 1) / n m |
| all_reduce, tree | 2 log2 n | 2 log2 n m |
| all_reduce, recursive doubling | log2 n | log2 n m |

Logarithms are rounded up. The model assumes that adding takes no time, that links do not share capacity, and that all
devices arrive at the same time; in reality, each of these costs time. Layers wait for each other, so the cost of a step is
the sum over its layers.""".splitlines()


def _collectives(found: dict[str, Any]) -> Iterator[str]:
    yield from f"""## Measured

Medians of {found["rounds"]} in microseconds, with quartiles, in turns within the same processes (gloo, loopback):
""".splitlines()
    runs = found["runs"]
    yield ""
    yield "| collective | channels | " + " | ".join(f"{run['processes']} processes" for run in runs) + " |"
    yield "| --- | ---: |" + " ---: |" * len(runs)
    for rows in zip(*(run["collectives"] for run in runs), strict=True):
        first = rows[0]
        yield f"| {first['collective']} | {first['channels']} | " + " | ".join(_spread(row, 1e6) for row in rows) + " |"


def _spread(row: dict[str, float], unit: float) -> str:
    return f"{number(row['median'] * unit)} ({number(row['low'] * unit)} to {number(row['high'] * unit)})"


def _measured(runs: Sequence[dict[str, Any]]) -> tuple[list[Cost], list[float]]:
    """What the ring gives for each collective that was measured, and its median in seconds."""
    costs, times = [], []
    for run in runs:
        for row in run["collectives"]:
            gathers, channels = row["collective"] == "all_gather", row["channels"]
            way, size = (ring_gather, gathered_bytes(channels)) if gathers else (ring_reduce, added_bytes(channels))
            costs.append(way(run["processes"], size))
            times.append(row["median"])
    return costs, times


def _fit(found: dict[str, Any], link: Link) -> Iterator[str]:
    runs, before = found["runs"], found["before"]
    yield from """## Fitted

Alpha and beta for rings, fitted to these medians by least squares of the relative errors. An error is the difference of the
model's and the measured time, relative to the measured time:

| fitted to | tried on | alpha, us | beta, ns per byte | median error | largest error |
| --- | --- | ---: | ---: | ---: | ---: |""".splitlines()
    few, more = [run for run in runs if run["processes"] <= 3], [run for run in runs if run["processes"] > 3]
    two = [run for run in runs if run["processes"] == 2]
    for fit, tried in ((runs, runs), (two, two), (few, more), (before, before)):
        if not (fit and tried):
            continue
        line = link if fit is runs else fitted(*_measured(fit))
        sizes = [abs(error) for error in errors(line, *_measured(tried))]
        name = _names(fit) + (", the measurement before" if fit is before else "")
        row = [name, _names(tried), number(line.alpha * 1e6), f"{line.beta * 1e9:.3g}"]
        yield "| " + " | ".join([*row, f"{100 * median(sizes):.0f} %", f"{100 * max(sizes):.0f} %"]) + " |"
    yield ""
    growth = max(
        max(last, first) / min(last, first) - 1
        for run in runs
        for name in ("all_gather", "all_reduce")
        for first, last in [_ends([row["median"] for row in run["collectives"] if row["collective"] == name])]
    )
    times = CHANNELS[-1] // CHANNELS[0]
    cores = found["environment"]["cores"]
    yield from f"""The third row predicts process counts that its fit has not seen. The first row is called loopback "
        f"below; as its errors
show, it gives only an order of magnitude. With more than {cores} processes, times include waiting for a core, which is not
part of the model. So this measurement cannot validate the model for other networks. It hardly determines beta: with {times}
times the channels, medians change by {100 * growth:.0f} % at most.""".splitlines()


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[-1]


def _names(runs: Sequence[dict[str, Any]]) -> str:
    counts = [run["processes"] for run in runs]
    return f"{counts[0]} to {counts[-1]} processes" if len(counts) > 1 else f"{counts[0]} processes"


OPPOSITE = {"low": "high", "median": "median", "high": "low"}


def _steps(found: dict[str, Any], link: Link) -> Iterator[str]:
    widths = ", ".join(map(str, WIDTHS))
    yield from f"""## Whole training steps

The network has three convolutions of {widths} channels with normalization and ReLU. Each process trains on 8 images of
32 x 32 by SGD; one all_reduce averages the gradients. evennorm's layers run alone and synchronized, in turns. Times are in
milliseconds: medians of {found["steps"]} steps with quartiles. *Within the exchange* is the time of the layers' collectives,
including waiting for other processes:

| processes | alone | synchronized | difference | within the exchange | by the model |
| ---: | ---: | ---: | ---: | ---: | ---: |""".splitlines()
    for run in found["runs"]:
        alone, together = run["step"]["alone"], run["step"]["synchronized"]
        added = {end: together[end] - alone[other] for end, other in OPPOSITE.items()}
        cells = [_spread(alone, 1e3), _spread(together, 1e3), _spread(added, 1e3)]
        cells.append(_spread(run["step"]["exchange"], 1e3))
        cells.append(number(link.time(layers_cost(WIDTHS, run["processes"])) * 1e3))
        yield f"| {run['processes']} | " + " | ".join(cells) + " |"
    yield ""
    ratios = []
    for run in found["runs"]:
        by_model = link.time(layers_cost(WIDTHS, run["processes"]))
        times = {end: time / by_model for end, time in run["step"]["exchange"].items()}
        ratios.append(f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f}) with {run['processes']}")
    yield f"The exchange within a step takes {', '.join(ratios[:2])},"
    yield f"{', '.join(ratios[2:])} processes times what the model predicts. The interval of a"
    yield "difference uses opposite quartiles. The model ignores that processes which compute between the exchanges arrive"
    yield "at different times, and that they share cores."


def _published() -> Iterator[str]:
    link = fitted([Cost(1, size) for size in PINGPONG], [time * 1e-6 for time in PINGPONG.values()])
    alpha, beta = f"{link.alpha * 1e6:.2f} us", f"{link.beta * 1e9:.2f} ns per byte"
    yield from f"""## Comparison with published measurements

We found no published measurement of these exchanges with {DEVICES[0]} to {DEVICES[-1]:,} devices that can be cited with
certainty, but one of a part of them. Oracle's tutorial
[Intel MPI Benchmark](https://oracle-japan.github.io/ocitutorials/hpc/benchmark/run-imb/) showed messages between two nodes
(PingPong) and all_reduce by {PROCESSES} processes on 4 nodes, over RDMA, with Open MPI 4.1.2a1, in July 2023. (The page has
been rewritten for later versions since.) Alpha and beta fitted to the messages alone, {alpha} and {beta},
predict the all_reduce, in microseconds:

| bytes | published | recursive doubling | tree | ring |
| ---: | ---: | ---: | ---: | ---: |""".splitlines()
    for size, time in ALL_REDUCE.items():
        ways = (doubling_reduce, tree_reduce, ring_reduce)
        cells = [number(link.time(way(PROCESSES, size)) * 1e6) for way in ways]
        yield f"| {size:,} | {number(time)} | " + " | ".join(cells) + " |"
    ratios = [link.time(doubling_reduce(PROCESSES, size)) * 1e6 / time for size, time in ALL_REDUCE.items()]
    yield ""
    yield from f"""The prediction for recursive doubling is {min(ratios):.2f} to {max(ratios):.2f} times the published time.
The {PROCESSES} processes share 4 nodes, and a message within a node may take less time than one between nodes. The tutorial
does not say which algorithm the library chose.""".splitlines()


def _predictions(network: Sequence[int], links: dict[str, Link]) -> Iterator[str]:
    yield from f"""## Predicted for ResNet-50

Milliseconds that the {len(network)} layers add to a step, forward and backward, if each layer waits. Datacentre and
internet are **assumptions**: round figures that were not measured. Use those of your own network:
`evennorm.tools.bench.exchange_cost.layers_cost` returns messages and bytes.
""".splitlines()
    yield ""
    yield "| network | alpha, us | MB/s | way | " + " | ".join(f"{n:,} devices" for n in DEVICES) + " |"
    yield "| --- | ---: | ---: | --- |" + " ---: |" * len(DEVICES)
    for name, link in links.items():
        speed = number(1e-6 / link.beta) if link.beta else "-"
        for way, ways in (("rings", RING), ("doubling, tree", TREE)):
            times = [number(link.time(layers_cost(network, n, ways)) * 1e3) for n in DEVICES]
            yield f"| {name} | {number(link.alpha * 1e6)} | {speed} | {way} | " + " | ".join(times) + " |"
    forward = sum(map(gathered_bytes, network))
    received = ", ".join(f"{(n - 1) * forward / 1e6:,.1f} MB with {n:,}" for n in DEVICES)
    yield from f"""
In the forward pass of a step, each device receives {received}.
This grows with n for every algorithm, because each device receives the rows of all others and merges them in a fixed order.
Doubling only reduces the number of messages.""".splitlines()


def _groups(network: Sequence[int], links: dict[str, Link]) -> Iterator[str]:
    forward, backward = (sum(map(size, network)) for size in (gathered_bytes, added_bytes))
    yield from f"""## When groups are better

Groups of g devices (`process_group=` from `torch.distributed.new_subgroups(g)`) make ghost batches of several devices. A
step then costs as much as with g devices in total. With L layers that exchange F bytes forward and B bytes backward, rings
of g devices take

    T(g) = 3 L (g - 1) alpha + ((g - 1) F + 2 (g - 1) / g B) beta

with L = {len(network)}, F = {forward:,}, B = {backward:,} here. If a step may spend T on the exchange, it can
synchronize up to

    n = 1 + T / (3 L alpha + F beta), or a little less for B

devices. With more devices, use groups. With doubling, bytes take more time than messages from about
n / log2 n = L alpha / (F beta) on:""".splitlines()
    yield ""
    yield "| network | bytes outweigh messages from n |"
    yield "| --- | ---: |"
    for name, link in links.items():
        yield f"| {name} | {_outweighed(network, link)} |"
    yield ""
    yield f"The largest group whose exchange takes at most {SHARE:.0%} of a step (1: not even two devices fit):"
    yield ""
    yield "| network | way | " + " | ".join(f"step of {step:g} s" for step in STEPS) + " |"
    yield "| --- | --- |" + " ---: |" * len(STEPS)
    for name, link in links.items():
        for way, ways in (("rings", RING), ("doubling, tree", TREE)):
            groups = [largest_group(network, link, SHARE * step, DEVICES[-1], ways) for step in STEPS]
            shown = [f"{n:,}" if n < DEVICES[-1] else f"{n:,} or more" for n in groups]
            yield f"| {name} | {way} | " + " | ".join(shown) + " |"
    yield from """
The benefit of larger groups falls while their cost rises. With b independent values per channel and device, the mean of a
group differs from that of the population by 1 / sqrt(g b) standard deviations: four times the devices halve the
difference.""".splitlines()


def _outweighed(network: Sequence[int], link: Link) -> str:
    """From how many devices the gathered bytes take longer than the messages, in all layers."""
    for n in range(2, 10 * DEVICES[-1]):
        cost = sum(doubling_gather(n, gathered_bytes(channels)).bytes for channels in network)
        if link.beta * cost > link.alpha * len(network) * doublings(n):
            return f"{n:,}"
    return f"more than {10 * DEVICES[-1]:,}"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
