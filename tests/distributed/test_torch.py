"""`evennorm.torch.SyncBatchNorm` over several processes is one process with the whole batch, in all that it computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evennorm import torch as ours
from evennorm.errors import ArgumentError
from tests.distributed import ranks
from tests.distributed.processes import Processes, processes

CHANNELS = 5


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as found:
        yield found


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    with processes(4) as found:
        yield found


def textbook(
    x: np.ndarray,
    dy: np.ndarray,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    slope: float = 1.0,
    eps: float = 1e-5,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """The whole batch in float64, differentiated by autograd; inputs are rounded as those of the processes are."""
    torch.manual_seed(1)
    module = nn.BatchNorm1d(x.shape[1])
    nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(module.bias)
    gamma, beta = (p.detach().double().requires_grad_() for p in (module.weight, module.bias))

    def rounded(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(ranks.DTYPES[dtype]).double()

    leaves = [rounded(x).requires_grad_()]
    leaves += [] if residual is None else [rounded(residual).requires_grad_()]
    axes = [a for a in range(x.ndim) if a != 1]
    row = [1, -1] + [1] * (x.ndim - 2)
    counts = torch.ones(x.shape[0], 1, *x.shape[2:], dtype=torch.float64)
    if mask is not None:
        counts = counts * torch.from_numpy(mask)[:, None]
    n = counts.sum()
    mean = (leaves[0] * counts).sum(axes) / n
    centred = leaves[0] - mean.view(row)
    variance = (centred.square() * counts).sum(axes) / n
    z = centred / (variance.view(row) + eps).sqrt() * gamma.view(row) + beta.view(row)
    z = z if residual is None else z + leaves[1]
    y = nn.functional.leaky_relu(z, slope)
    (y * rounded(dy)).sum().backward()
    found = {"y": y, "dx": leaves[0].grad, "d_gamma": gamma.grad, "d_beta": beta.grad}
    if residual is not None:
        found["d_residual"] = leaves[1].grad
    found["running_mean"] = 0.1 * mean
    found["running_var"] = 0.9 + 0.1 * variance * n / (n - 1)
    return {name: ranks.array(value) for name, value in found.items()}


def whole(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Answers of all processes as one; what all have is the same to the last bit."""
    found: dict[str, np.ndarray] = {}
    for name, value in parts[0].items():
        if name in ("y", "dx", "d_residual"):
            found[name] = np.concatenate([part[name] for part in parts])
        else:
            assert all(np.array_equal(part[name], value, equal_nan=True) for part in parts), name
            found[name] = value
    return found


def data(shape: tuple[int, ...], mean: float = 0.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return rng.normal(mean, 2, shape), rng.normal(size=shape), rng.normal(size=shape)


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        error, scale = abs(found[name] - value), np.abs(value).max(initial=1.0)
        assert (error <= 10 * tolerance * scale).all(), (name, error.max(), scale)


SPLITS = [[4, 4], [7, 1], [8, 0], [0, 8]]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("shape", [(8, CHANNELS), (8, CHANNELS, 6), (8, CHANNELS, 4, 3)], ids=str)
def test_two_processes_are_one(two: Processes, shape: tuple[int, ...], sizes: list[int]) -> None:
    """Uneven parts too, an empty one, and one value per channel."""
    x, dy, residual = data(shape, mean=100.0)
    found = whole(two.run("step", x, dy, sizes, "float32", residual, None, False))
    check(found, textbook(x, dy, residual), 1e-6)
    assert (found["num_batches_tracked"], found["skipped_batches"]) == (1, 0)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_follows_stays_fused(two: Processes, activation: str | None, with_residual: bool, channels_last: bool) -> None:
    x, dy, residual = data((6, CHANNELS, 4, 3))
    slope = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}[activation]
    given = residual if with_residual else None
    options = {"activation": activation}
    found = whole(two.run("step_with", options, x, dy, [2, 4], "float32", given, None, channels_last))
    check(found, textbook(x, dy, given, slope=slope), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_every_dtype(two: Processes, dtype: str, tolerance: float) -> None:
    x, dy, _ = data((6, CHANNELS, 4))
    check(whole(two.run("step", x, dy, [5, 1], dtype)), textbook(x, dy, dtype=dtype), tolerance)


def test_large_means(two: Processes) -> None:
    """Sums of squares would leave no digit."""
    x, dy, _ = data((8, CHANNELS, 6), mean=1e5)
    x = x.astype(np.float32).astype(np.float64)
    x[4:] += 3
    found = whole(two.run("step", x, dy, [4, 4]))
    expected = textbook(x, dy)
    check({name: found[name] for name in ("y", "dx", "d_gamma", "d_beta", "running_var")}, _without_mean(expected), 1e-6)
    np.testing.assert_allclose(found["running_mean"], expected["running_mean"], rtol=1e-7)


def _without_mean(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in expected.items() if name != "running_mean"}


@pytest.mark.parametrize("hidden", ["some", "all of one"])
def test_masks(two: Processes, hidden: str) -> None:
    x, dy, _ = data((8, CHANNELS, 6))
    mask = np.random.default_rng(3).random((8, 6)) < 0.5
    if hidden == "all of one":
        mask[4:] = False
    x[~mask[:, None].repeat(CHANNELS, 1)] = 1e3  # acts on nothing but itself
    check(whole(two.run("step", x, dy, [4, 4], "float32", None, mask)), textbook(x, dy, mask=mask), 1e-5)


def test_a_mask_in_one_process_alone(two: Processes) -> None:
    x, dy, _ = data((8, CHANNELS, 6))
    mask = np.random.default_rng(3).random((8, 6)) < 0.5
    mask[4:] = True
    check(whole(two.run("step_masked_on_first", x, dy, mask)), textbook(x, dy, mask=mask), 1e-5)


def test_masks_that_tell_channels_apart(two: Processes) -> None:
    """Against one process: each channel has a count of its own."""
    x, dy, _ = data((8, CHANNELS, 6))
    mask = np.random.default_rng(3).random((8, CHANNELS, 6)) < 0.5
    found = whole(two.run("step", x, dy, [4, 4], "float32", None, mask))
    expected = np.where(mask, x, np.nan)
    np.testing.assert_allclose(found["running_mean"], 0.1 * np.nanmean(expected, (0, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["running_var"], 0.9 + 0.1 * np.nanvar(expected, (0, 2), ddof=1), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_one_process_is_refused_in_all(two: Processes, bad: float) -> None:
    x, dy, _ = data((8, CHANNELS))
    x[1, 2] = bad
    found = whole(
        [{k: v for k, v in part.items() if "run" in k or "batches" in k} for part in two.run("step", x, dy, [4, 4])]
    )
    assert found["skipped_batches"] == 1
    assert not found["running_mean"].any()
    assert (found["running_var"] == 1).all()


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [2, 2, 2, 2]], ids=str)
def test_four_processes_are_one(four: Processes, sizes: list[int]) -> None:
    x, dy, residual = data((8, CHANNELS, 4, 3), mean=100.0)
    check(whole(four.run("step", x, dy, sizes, "float32", residual)), textbook(x, dy, residual), 1e-6)


def test_five_processes_are_one() -> None:
    x, dy, _ = data((9, CHANNELS, 7))
    with processes(5) as five:
        check(whole(five.run("step", x, dy, [1, 2, 3, 0, 3])), textbook(x, dy), 1e-6)


def test_one_collective_in_each_direction(two: Processes) -> None:
    """From the first step on, of 3 C + 1 and of 2 C numbers."""
    expected = [("all_gather", 3 * CHANNELS + 1), ("all_reduce", 2 * CHANNELS)]
    assert two.run("collectives_of_a_step", CHANNELS) == [[expected, expected]] * 2


def test_the_same_bits_at_every_run(two: Processes) -> None:
    for found in two.run("bits", 3):
        assert found[0] == found[1] == found[2]


# Networks


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """The network that one process has trained with the whole batches."""
    return ranks.train(ranks.network(synchronized=False), None)


def check_network(found: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> None:
    for answer in found:
        for name, value in expected.items():
            np.testing.assert_allclose(answer[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [{}, {"broadcast_buffers": False}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=str,
)
def test_distributed_data_parallel(two: Processes, alone: dict[str, np.ndarray], options: dict[str, bool]) -> None:
    check_network(two.run("data_parallel", [5, 3], False, options), alone)


def test_accumulated_gradients(two: Processes) -> None:
    expected = ranks.train(ranks.network(synchronized=False), None, accumulate=True)
    check_network(two.run("data_parallel", [5, 3], True), expected)


def test_fully_sharded(two: Processes, alone: dict[str, np.ndarray]) -> None:
    check_network(two.run("fully_sharded", [5, 3]), alone)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(two: Processes, alone: dict[str, np.ndarray], reentrant: bool) -> None:
    check_network(two.run("checkpointed", [5, 3], reentrant), alone)


def test_compiled_without_a_graph_break(two: Processes, alone: dict[str, np.ndarray]) -> None:
    check_network(two.run("compiled", [4, 4], "aot_eager"), alone)


def test_processes_without_gradients_take_no_part_in_the_backward_pass(four: Processes) -> None:
    """Those that differentiate get the gradient of their own losses, through the statistics of all."""
    answers = four.run("without_gradients_on", [1, 3], 8)
    torch.manual_seed(11)
    x = torch.randn(8, 3, 4).double().requires_grad_()
    y = nn.functional.batch_norm(x, None, None, training=True)
    parts = y.chunk(4)
    (dx,) = torch.autograd.grad(parts[0].pow(3).sum() + parts[2].pow(3).sum(), x)
    for rank, (got, gradient) in enumerate(answers):
        np.testing.assert_allclose(got, parts[rank].detach(), atol=1e-5)
        if gradient is not None:
            np.testing.assert_allclose(gradient, dx.chunk(4)[rank], atol=1e-5)


def test_groups_of_processes_are_ghost_batches(four: Processes) -> None:
    answers = four.run("ghost", 2)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5)
    for half, rank in ((x[:4], 0), (x[:4], 1), (x[4:], 2), (x[4:], 3)):
        y = nn.functional.batch_norm(half, None, None, training=True)
        np.testing.assert_allclose(answers[rank]["y"], y[(rank % 2) * 2 : (rank % 2) * 2 + 2], atol=1e-6)
        np.testing.assert_allclose(answers[rank]["mean"], 0.1 * half.mean((0, 2)), atol=1e-6)


def test_tensors_on_a_mesh(four: Processes) -> None:
    """A DTensor stands for the whole batch already, which is not taken twice."""
    torch.manual_seed(2)
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    module = ours.BatchNorm2d(3, activation="relu")
    y = module(x)
    y.square().sum().backward()
    for got, gradient, variance in four.run("spread_over_a_mesh"):
        np.testing.assert_allclose(got, y.detach(), atol=1e-5)
        np.testing.assert_allclose(gradient, x.grad, atol=1e-5)
        np.testing.assert_allclose(variance, module.running_var, rtol=1e-6)


# Faults


@pytest.mark.parametrize(
    ("channels", "dtypes", "words"),
    [
        ([3, 4], ["float32", "float32"], "3 channels of torch.float32 on rank 0 and 4 channels of torch.float32 on rank 1"),
        ([3, 3], ["float32", "float64"], "3 channels of torch.float32 on rank 0 and 3 channels of torch.float64 on rank 1"),
    ],
)
def test_different_inputs_are_refused_everywhere(channels: list[int], dtypes: list[str], words: str) -> None:
    with processes(2) as two:
        for answer in two.answers("different_inputs", channels, dtypes):
            first = str(answer).splitlines()[0]
            assert first.startswith("SynchronizationError: SyncBatchNorm(")
            assert words in first
            assert "build the same model in every process" in first


def test_a_group_without_this_process_is_refused(two: Processes) -> None:
    inside, outside = two.answers("outside_of_its_group")
    np.testing.assert_allclose(inside.mean(0), 0, atol=1e-6)
    first = str(outside).splitlines()[0]
    assert first.startswith("ArgumentError: process_group holds the processes that share statistics, this one among them;")
    assert "received a group without rank 1" in first


@pytest.mark.parametrize("steps", [0, 1])
def test_evaluation_in_one_process_ends_within_the_timeout(steps: int) -> None:
    with processes(2, timeout=4) as two:
        waiting, evaluating = two.answers("evaluation_on_one", steps)
    assert evaluating is True
    first = str(waiting).splitlines()[0]
    assert first.startswith("SynchronizationError: SyncBatchNorm '1' on rank 0 waited for ")
    assert "evaluation mode" in first


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_killed_process_ends_its_peers(during: str) -> None:
    with processes(3, timeout=10) as three:
        *others, last = three.answers("killed", during)
    assert last is None
    what = {"forward": "statistics", "backward": "gradients"}[during]
    for answer in others:
        first = str(answer).splitlines()[0]
        assert first.startswith("SynchronizationError: SyncBatchNorm '1' on rank"), first
        assert f"waited for the {what} of the other" in first


# Conversion


def test_a_converted_model_keeps_what_its_layers_have() -> None:
    model = nn.Sequential(ours.BatchNorm2d(3, activation="leaky_relu", negative_slope=0.2), nn.BatchNorm2d(3, momentum=None))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("hook"))
    x = torch.randn(4, 3, 5, 5)
    model(x)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    new = ours.SyncBatchNorm.convert_sync_batchnorm(model, process_group=None)
    assert new is model
    assert [type(layer) for layer in new] == [ours.SyncBatchNorm] * 2
    assert not new[0].weight.requires_grad
    assert (new[0].negative_slope, new[1].momentum, new[1].training) == (0.2, None, False)
    new.load_state_dict(state)
    assert torch.equal(new(x), expected)
    assert len(calls) == 3


def test_a_layer_alone_is_returned() -> None:
    assert type(ours.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))) is ours.SyncBatchNorm


def test_shared_layers_stay_shared() -> None:
    norm = nn.BatchNorm1d(3)
    new = ours.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm, nn.Linear(3, 3), norm))
    assert new[0] is new[2]


def test_torchs_layer_is_converted_and_comes_back() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3, eps=1e-3), nn.ReLU())
    new = ours.convert(model)
    assert type(new[0]) is ours.SyncBatchNorm
    back = ours.revert(new)
    assert type(back[0]) is nn.SyncBatchNorm
    assert back[0].eps == 1e-3
    nn.SyncBatchNorm(3).load_state_dict(ours.SyncBatchNorm(3).state_dict())


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"memory": "inplace", "activation": "leaky_relu"}], ids=str)
def test_what_cannot_be_synchronized_is_refused(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), ours.BatchNorm1d(3, **options))
    with pytest.raises(ArgumentError, match=r"received '1' with virtual_batch_size=.*process_group"):
        ours.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        ours.SyncBatchNorm(3, **options)


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(), type("Own", (nn.BatchNorm1d,), {})(3)], ids=["lazy", "derived"])
def test_other_classes_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=r"received '0', a (Lazy|Own)"):
        ours.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))


def test_copies_and_pickles() -> None:
    module = ours.SyncBatchNorm(3, activation="relu")
    module(torch.randn(4, 3))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(torch.ones(2, 3)), copy.deepcopy(module)(torch.ones(2, 3)))
    assert "activation=relu" in repr(module)
