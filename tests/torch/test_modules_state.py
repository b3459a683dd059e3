"""State: that of torch's modules under the same names, in both directions, through copies, files, casts and devices."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import evennorm.torch as ours

PAIRS = [(name, getattr(nn, name), getattr(ours, name)) for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")]
OPTIONS = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"bias": False}]
SHAPES = {"BatchNorm1d": (6, 4, 3), "BatchNorm2d": (6, 4, 3, 2), "BatchNorm3d": (6, 4, 3, 2, 2)}


def trained(module: nn.Module, name: str = "BatchNorm2d", steps: int = 2) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(SHAPES[name], generator=generator) * 3 + 1
        module(x.to(next(iter(module.state_dict().values()), x).dtype))
    return module


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "theirs", "own"), PAIRS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_state_dict_is_torchs(name, theirs, own, options) -> None:
    a, b = theirs(4, **options), own(4, **options)
    trained(a, name), trained(b, name)
    assert list(a.state_dict()) == list(b.state_dict())
    assert a.state_dict()._metadata == b.state_dict()._metadata
    assert [key for key, _ in a.named_parameters()] == [key for key, _ in b.named_parameters()]
    for key, value in a.state_dict().items():
        assert value.dtype is b.state_dict()[key].dtype
        torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "theirs", "own"), PAIRS, ids=lambda value: value if isinstance(value, str) else "")
def test_checkpoints_load_both_ways(name, theirs, own) -> None:
    for source, target in ((theirs, own), (own, theirs)):
        file = io.BytesIO()
        torch.save(trained(source(4), name).state_dict(), file)
        file.seek(0)
        module = target(4)
        missing, unexpected = module.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert not missing
        assert not unexpected
        assert int(module.num_batches_tracked) == 2
        x = torch.randn(SHAPES[name])
        torch.testing.assert_close(module.eval()(x), trained(source(4), name).eval()(x), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_a_count_is_as_old_as_torchs() -> None:
    """Version 1 had no num_batches_tracked."""
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.BatchNorm2d(4).load_state_dict(state)
    state._metadata = {"": {"version": 1}}
    module = trained(ours.BatchNorm2d(4))
    module.load_state_dict(state)
    assert module.num_batches_tracked is not None


@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_fit_is_refused_as_by_torch(strict: bool) -> None:
    errors = []
    for module in (nn.BatchNorm2d(4), ours.BatchNorm2d(4)):
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict(nn.BatchNorm2d(5).state_dict(), strict=strict)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_loading_forgets_what_belonged_to_other_statistics() -> None:
    module = trained(ours.BatchNorm2d(4, momentum=None))
    module(torch.full((6, 4, 3, 2), torch.nan))
    assert int(module.skipped_batches) == 1
    assert module.running_mean_low.any()
    module.load_state_dict(nn.BatchNorm2d(4).state_dict())
    assert int(module.skipped_batches) == 0
    assert not module.running_mean_low.any()
    trained(module)
    theirs = trained(nn.BatchNorm2d(4, momentum=None))
    torch.testing.assert_close(module.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_go_on_where_the_module_stood(how: str) -> None:
    module = trained(ours.BatchNorm2d(4, activation="leaky_relu", negative_slope=0.2, virtual_batch_size=3))
    module(torch.full((6, 4, 3, 2), torch.nan))
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert repr(other) == repr(module)
    assert int(other.skipped_batches) == 1
    trained(module), trained(other)
    for (key, a), (_, b) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg=key)
        assert a.data_ptr() != b.data_ptr()


def test_reset() -> None:
    module = trained(ours.BatchNorm2d(4))
    module(torch.full((6, 4, 3, 2), torch.nan))
    with torch.no_grad():
        module.weight.fill_(3)
    module.reset_running_stats()
    fresh = ours.BatchNorm2d(4)
    for (key, a), (_, b) in zip(module.named_buffers(), fresh.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert module.weight[0] == 3
    module.reset_parameters()
    assert module.weight[0] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_of_the_whole_module(dtype: torch.dtype) -> None:
    """Parameters and statistics follow, the count does not; results are torch's of the same dtype."""
    a, b = trained(nn.BatchNorm2d(4).to(dtype)), trained(ours.BatchNorm2d(4).to(dtype))
    for key, value in a.state_dict().items():
        assert b.state_dict()[key].dtype is value.dtype
    bound = 1e-6 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(dict(b.state_dict()), dict(a.state_dict()), rtol=bound, atol=bound)
    x = torch.randn(SHAPES["BatchNorm2d"], dtype=dtype)
    torch.testing.assert_close(b.eval()(x), a.eval()(x), rtol=bound, atol=bound)


def test_on_the_meta_device() -> None:
    module = ours.BatchNorm2d(4, device="meta")
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}
    assert module(torch.empty(6, 4, 3, 2, device="meta")).shape == (6, 4, 3, 2)
    module.load_state_dict(trained(nn.BatchNorm2d(4)).state_dict(), assign=True)
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert int(trained(module).num_batches_tracked) == 4


@pytest.mark.parametrize("options", [*OPTIONS, {"activation": "elu"}, {"virtual_batch_size": 3}], ids=str)
def test_nothing_asks_a_device_for_a_value(options) -> None:
    """Which would make the program wait for a GPU, and keep it out of CUDA graphs: tensors on meta have no values."""
    module = ours.BatchNorm2d(4, device="meta", **options)
    x = torch.empty(6, 4, 3, 2, device="meta", requires_grad=True)
    module(x, torch.empty_like(x)).sum().backward()
    module(x, mask=torch.empty(6, 3, 2, dtype=torch.bool, device="meta")).sum().backward()
    module.eval()(x).sum().backward()
    with pytest.raises(RuntimeError, match="meta"):
        bool(x.sum())


GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30]


def initialized_by_hand(module: nn.Module, state: dict[str, torch.Tensor], how: str) -> None:
    """As programs do that know of torch's tensors alone."""
    if how == "assign":
        module.load_state_dict(state, assign=True)
        return
    with torch.no_grad():
        for key, value in state.items():
            module.get_buffer(key).copy_(value) if key in module._buffers else module.get_parameter(key).copy_(value)


def filled(module: nn.Module, value: float, refused: int) -> None:
    with torch.no_grad():
        module.running_mean_low.fill_(value)
        module.skipped_batches.fill_(refused)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("how", ["by hand", "assign"])
@pytest.mark.parametrize("value", GARBAGE)
def test_what_no_state_dict_shows_may_hold_anything(value, how, momentum, composed) -> None:
    """`to_empty` and programs that give each tensor memory leave there what the memory held before."""
    state = trained(nn.BatchNorm2d(4, momentum=momentum)).state_dict()
    theirs, own = nn.BatchNorm2d(4, momentum=momentum), ours.BatchNorm2d(4, momentum=momentum, device="meta")
    theirs.load_state_dict(copy.deepcopy(state))
    own.to_empty(device="cpu")
    filled(own, value, -7)
    initialized_by_hand(own, copy.deepcopy(state), how)
    filled(own, value, 2**62)
    for seed in range(3):
        x = torch.randn(SHAPES["BatchNorm2d"], generator=torch.Generator().manual_seed(seed)) + 5
        mask = torch.ones(6, 3, 2, dtype=torch.bool) if composed else None
        own(x, mask=mask), theirs(x)
        filled(own, value, seed - 1)
    torch.testing.assert_close(dict(own.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", GARBAGE)
def test_a_compiled_step_reads_no_garbage(value: float) -> None:
    torch.compiler.reset()
    own, theirs = ours.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=None)
    run = torch.compile(own, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        filled(own, value, -7)
        x = torch.randn(SHAPES["BatchNorm2d"], generator=torch.Generator().manual_seed(seed))
        run(x), theirs(x)
    torch.testing.assert_close(dict(own.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-6)


def test_memory_from_to_empty_is_written_to() -> None:
    """Another module's memory may lie there; what is derived is 0, and what was known stays."""
    module = ours.BatchNorm2d(4, device="meta").to_empty(device="cpu")
    assert not module.running_mean_low.any()
    assert int(module.skipped_batches) == 0
    module.reset_parameters()
    module(torch.full((6, 4, 3, 2), torch.nan))
    trained(module)
    low = module.running_mean_low.clone()
    module.double().float().to_empty(device="cpu")
    assert torch.equal(module.running_mean_low, low)
    assert int(module.skipped_batches) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_checkpoint_holds_all_that_the_next_step_needs(momentum: float | None) -> None:
    """A refused batch has no part in the plain average, before a checkpoint and after it, in our module and in torch's."""
    one, two, theirs = (m.BatchNorm2d(4, momentum=momentum) for m in (ours, ours, nn))
    good = [torch.randn(SHAPES["BatchNorm2d"], generator=torch.Generator().manual_seed(k)) + k for k in range(5)]
    for x in good[:3]:
        one(x)
        one(torch.full((6, 4, 3, 2), torch.nan))
    assert int(one.skipped_batches) == 3
    two.load_state_dict(one.state_dict())
    theirs.load_state_dict(one.state_dict())
    for x in good[3:]:
        one(x), two(x), theirs(x)
    for module in (two, theirs):
        torch.testing.assert_close(dict(module.state_dict()), dict(one.state_dict()), rtol=1e-5, atol=1e-6)
    if momentum is None:
        expected = torch.stack([x.mean((0, 2, 3)) for x in good]).double().mean(0)
        torch.testing.assert_close(one.running_mean.double(), expected, rtol=1e-5, atol=1e-6)
        assert int(one.num_batches_tracked) == 5


def test_memory_given_later() -> None:
    module = ours.BatchNorm2d(4, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    torch.testing.assert_close(dict(trained(module).state_dict()), dict(trained(ours.BatchNorm2d(4)).state_dict()))
    assert int(module.skipped_batches) == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lazy_modules_become_ours(options) -> None:
    for name in SHAPES:
        theirs, own = (getattr(library, f"Lazy{name}")(**options) for library in (nn, ours))
        assert isinstance(own, getattr(nn, f"Lazy{name}"))
        trained(theirs, name), trained(own, name)
        assert type(own) is getattr(ours, name)
        assert own.num_features == 4
        assert list(own.state_dict()) == list(theirs.state_dict())
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(own.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_a_lazy_module_loads() -> None:
    state = trained(nn.BatchNorm2d(4)).state_dict()
    module = ours.LazyBatchNorm2d(activation="relu")
    module.load_state_dict(state)
    module.eval()(torch.randn(6, 4, 3, 2))
    torch.testing.assert_close(dict(module.state_dict()), dict(state))
    assert int(trained(module.train()).num_batches_tracked) == 4


def test_they_are_torchs_modules_to_everybody_who_asks() -> None:
    """Initialization, weight decay and freezing look for torch's classes."""
    for _, theirs, own in PAIRS:
        assert isinstance(own(3), theirs)
        assert isinstance(own(3), nn.modules.batchnorm._BatchNorm)


def test_statistics_switched_off_afterwards() -> None:
    """Programs set these attributes on modules they did not make."""
    for change in ({"track_running_stats": False}, {"running_mean": None, "running_var": None}, {"momentum": None}):
        modules = nn.BatchNorm2d(4), ours.BatchNorm2d(4)
        for module in modules:
            for key, value in change.items():
                setattr(module, key, value)
            trained(module)
            module.eval()
        a, b = modules
        torch.testing.assert_close(dict(b.state_dict()), dict(a.state_dict()), rtol=1e-5, atol=1e-6)
        x = torch.randn(SHAPES["BatchNorm2d"])
        torch.testing.assert_close(b(x), a(x), rtol=1e-5, atol=1e-5)


def test_statistics_given_afterwards() -> None:
    """As programs do that switch them on, or prune channels."""
    late = ours.BatchNorm2d(4, track_running_stats=False)
    late.track_running_stats, late.running_mean, late.running_var = True, torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(trained(late).running_mean, trained(nn.BatchNorm2d(4)).running_mean, rtol=1e-5, atol=1e-6)
    pruned = trained(ours.BatchNorm2d(7, affine=False), steps=0)
    pruned.running_mean, pruned.running_var = pruned.running_mean[:4].clone(), pruned.running_var[:4].clone()
    torch.testing.assert_close(trained(pruned).running_var, trained(nn.BatchNorm2d(4)).running_var, rtol=1e-5, atol=1e-6)
    pruned.running_var = pruned.running_var[:3].clone()
    with pytest.raises(ValueError, match=r"one value per channel each; received shapes \(4,\) and \(3,\)"):
        trained(pruned)


def test_averaging_over_a_data_set() -> None:
    """torch.optim.swa_utils.update_bn finds the modules by their class, and sets their momentum for a while."""
    batches = [torch.randn(6, 4, 3, 2) + k for k in range(5)]
    a, b = nn.Sequential(nn.BatchNorm2d(4)), nn.Sequential(ours.BatchNorm2d(4))
    for model in (a, b):
        torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(dict(b.state_dict()), dict(a.state_dict()), rtol=1e-5, atol=1e-6)


def test_repr() -> None:
    module = ours.BatchNorm2d(3, activation="leaky_relu", negative_slope=0.2, virtual_batch_size=8)
    theirs = repr(nn.BatchNorm2d(3))
    assert repr(module).startswith(
        theirs[:-1] + ", activation=leaky_relu, negative_slope=0.2, virtual_batch_size=8, kernel="
    )
    assert repr(ours.BatchNorm2d(3)).startswith(theirs[:-1] + ", kernel=")
    assert "memory=inplace" in repr(ours.BatchNorm2d(3, memory="inplace"))


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(ours.BatchNorm2d(4)).eval()(torch.randn(6, 4, 3, 2))
