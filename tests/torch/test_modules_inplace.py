"""memory="inplace": the output lies where the input lay, and the gradient is found from it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import evennorm.torch as ours
from tests.torch.reference import MODULES, array

ACTIVATIONS = [{}, {"activation": "leaky_relu", "negative_slope": 0.2}, {"activation": "elu", "alpha": 1.3}]


def pair(c: int = 3, rank: int = 4, dtype: torch.dtype = torch.float64, **options):
    """The same module twice, in place and not, with gammas of both signs."""
    torch.manual_seed(0)
    modules = [MODULES[rank](c, eps=1e-3, dtype=dtype, memory=memory, **options) for memory in ("inplace", "save")]
    gamma, beta = (torch.rand(c) + 0.3) * torch.tensor([1.0, -1.0]).repeat(c)[:c], torch.randn(c)
    for module in modules:
        with torch.no_grad():
            module.weight.copy_(gamma)
            module.bias.copy_(beta)
    return modules


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
def test_the_input_is_overwritten_in_both_modes(options, training) -> None:
    inplace, save = (module.train(training) for module in pair(**options))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    expected = save(x)
    y = inplace(x)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(dict(inplace.named_buffers()), dict(save.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [*ACTIVATIONS, {"virtual_batch_size": 3}, {"affine": False}, {"bias": False}], ids=str)
def test_gradcheck_and_gradgradcheck(options) -> None:
    module = MODULES[4](3, eps=1e-2, dtype=torch.float64, memory="inplace", **options)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    start = (torch.tensor([0.5, -0.7, 1.2]), torch.tensor([0.3, -0.1, 0.0]))
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.double().requires_grad_() for p in start[: len(names)]]

    def run(x, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x * 1.5,))

    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


def test_gradients_around_a_mask() -> None:
    module, _ = pair(rank=3, activation="leaky_relu")
    x, mask = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, 4) < 0.7
    assert torch.autograd.gradcheck(lambda x: module(x * 1.5, mask=mask), x)
    assert torch.autograd.gradgradcheck(lambda x: module(x * 1.5, mask=mask), x)


@given(
    sizes=st.lists(st.integers(2, 6), min_size=2, max_size=5),
    options=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    mean=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 999),
)
def test_gradients_of_any_shape_and_dtype(sizes, options, dtype, mean, seed) -> None:
    """Off by a few roundings of the tensor that is kept."""
    half = dtype in (torch.float16, torch.bfloat16)
    if half and options.get("activation") == "elu":
        return  # whose inverse has lost most of their digits at z = -3
    mean = 0.0 if half else mean
    inplace, _ = pair(sizes[1], len(sizes), torch.float32 if half else dtype, **options)
    _, save = pair(sizes[1], len(sizes), torch.float64, **options)
    save.load_state_dict({key: value.double() for key, value in inplace.state_dict().items()})
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(mean, 1, sizes), dtype=dtype)
    dy = torch.tensor(rng.normal(size=sizes), dtype=dtype)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got = torch.autograd.grad(inplace(leaf + 0), (leaf, *inplace.parameters()), dy)
    expected = torch.autograd.grad(save(exact), (exact, *save.parameters()), dy.double())
    unit = torch.finfo(dtype).eps
    # xhat is off by up to |beta / gamma| = 10 units and, behind elu, by exp(-z) = 50 times as many.
    bound = unit * (2000 if options.get("activation") == "elu" else 40)
    for a, b in zip(got, expected, strict=True):
        assert (array(a) - array(b)).__abs__().max() <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elu_where_it_is_flat(dtype: torch.dtype) -> None:
    """What rounding has made -alpha has no inverse; the gradient stays finite, and that of all others right."""
    module = ours.BatchNorm1d(1, memory="inplace", activation="elu")
    with torch.no_grad():
        module.weight.fill_(20.0)
    x = torch.randn(64, 1).to(dtype).requires_grad_()
    y = module(x * 1)
    assert (y == -1).any()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(gradient).all()


def test_training_steps_are_those_of_the_module_that_keeps_its_input() -> None:
    losses = []
    for memory in ("inplace", "save"):
        torch.manual_seed(0)
        norms = [ours.BatchNorm2d(8, memory=memory, activation="leaky_relu") for _ in range(2)]
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Conv2d(8, 8, 3), norms[1], nn.Flatten(), nn.Linear(32, 2))
        model.double()
        optimizer, x = torch.optim.SGD(model.parameters(), 0.05), torch.randn(16, 3, 6, 6).double()
        for _ in range(20):
            loss = model(x).square().sum(1).sub(1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses[:20], losses[20:], rtol=1e-9)


def test_one_tensor_is_kept_and_it_is_the_output() -> None:
    module, _ = pair(activation="leaky_relu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(8, 3, 4, 4, dtype=torch.float64, requires_grad=True) * 1.5
        kept.clear()
        y = module(x)
    large = [t for t in kept if t.numel() >= y.numel()]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]


def test_torchs_rules_for_what_is_overwritten() -> None:
    module, _ = pair()
    leaf = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    before = leaf.detach().clone()
    for training in (True, False):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
            module.train(training)(leaf)
    assert torch.equal(leaf, before)
    with pytest.raises(RuntimeError, match=r"needed for gradient computation has been modified by an inplace operation"):
        module.train()(torch.sigmoid(leaf)).sum().backward()
    y = module(leaf * 2)
    y.mul_(2)
    with pytest.raises(RuntimeError, match=r"needed for gradient computation has been modified by an inplace operation"):
        y.sum().backward()


def test_views() -> None:
    module, _ = pair()
    base = torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True) * 1
    before = base.detach().clone()
    with pytest.raises(RuntimeError, match=r"a view of another tensor here, .* clone the input"):
        module(base[:, :3])
    assert torch.equal(base, before)
    module(base[:, :3].clone()).sum().backward()
    with torch.no_grad():
        module(base[:, :3])
    assert not torch.equal(base, before)


@pytest.mark.parametrize("gamma", [0.0, 1e-5, -1e-5])
def test_a_gamma_that_cannot_be_divided_by(gamma: float) -> None:
    module, _ = pair(4, dtype=torch.float32)
    with torch.no_grad():
        module.weight[1:3] = gamma
        module.bias[1:3] = torch.tensor([1.0, -2.0])
    x = torch.randn(4, 4, 2, 2)
    before = x.clone()
    with pytest.raises(
        ValueError, match=r"above 0.00024 times \|beta\| .*; received 2 of 4 channels that are not: channel 1"
    ):
        module(x)
    assert torch.equal(x, before)
    assert int(module.num_batches_tracked) == 0


def test_a_small_gamma_beside_no_offset() -> None:
    """Nothing cancels there, so that nothing is lost."""
    module, save = pair(3, dtype=torch.float32, activation="leaky_relu")
    for m in (module, save):
        with torch.no_grad():
            m.weight.copy_(torch.tensor([1e-12, -1e-12, 1e-3]))
            m.bias.zero_()
    x = torch.randn(6, 3, 2, 2, requires_grad=True)
    dy = torch.randn(6, 3, 2, 2)
    got, expected = (torch.autograd.grad(m(x * 1), (x, m.weight), dy) for m in (module, save))
    for a, b in zip(got, expected, strict=True):
        per_channel = (a - b).abs().amax((0, 2, 3)) / b.abs().amax((0, 2, 3)) if a.dim() == 4 else (a - b).abs() / b.abs()
        assert per_channel.max() < 1e-5


def test_a_residual_is_refused() -> None:
    module, _ = pair()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="a residual; add it to the result"):
        module(x, x.clone())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_region_around_it(use_reentrant: bool) -> None:
    inplace, save = pair(activation="elu")
    gradients = []
    for module in (inplace, save):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        checkpoint(lambda x, module=module: module(x * 3).sin(), x, use_reentrant=use_reentrant).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
def test_compiled(options) -> None:
    torch.compiler.reset()
    inplace, save = pair(dtype=torch.float32, **options)
    run = torch.compile(lambda x: inplace(x * 2) + 1, fullgraph=True)
    for _ in range(2):
        x = torch.randn(6, 3, 4, 4, requires_grad=True)
        y, expected = run(x), save(x * 2) + 1
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        got, wanted = (torch.autograd.grad(z.sin().sum(), (x, *m.parameters())) for z, m in ((y, inplace), (expected, save)))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(inplace.named_buffers()), dict(save.named_buffers()), rtol=1e-5, atol=1e-6)


def test_compiled_with_a_gamma_that_cannot_be_divided_by() -> None:
    torch.compiler.reset()
    module, _ = pair(dtype=torch.float32)
    with torch.no_grad():
        module.weight.zero_()
    with pytest.raises(RuntimeError, match=r"memory=inplace divides by gamma: \|gamma\| has to be above 0.00024"):
        torch.compile(lambda x: module(x * 2), fullgraph=True)(torch.randn(4, 3, 2, 2))
