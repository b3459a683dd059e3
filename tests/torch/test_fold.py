"""Folded torch models, held to the models in float64: over a grid of layers, and where folding would be wrong."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from evennorm.errors import ArgumentError
from evennorm.models.fold_plan import Plan
from evennorm.torch import BatchNorm2d, convert
from evennorm.torch.fold import fold
from tests.torch import architectures

NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def trained(model: nn.Module, positive: bool = False) -> nn.Module:
    """With statistics, scales and shifts as training leaves them; scales above 0 if asked for."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 3, generator=generator)
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        parameter.normal_(generator=generator)
                if positive:
                    module.weight.abs_()
    return model.eval()


def outputs(model: nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(*inputs).double().numpy()


def check(model: nn.Module, *inputs: torch.Tensor, bound: float = 1e-12) -> tuple[nn.Module, Plan]:
    """Folds a model in float64 and compares; then in float32, where rounding is all that may differ."""
    before = copy.deepcopy(model.state_dict())
    exact = copy.deepcopy(model).double()
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    folded, plan = fold(exact, wide)
    expected = outputs(exact, *wide)
    scale = max(1.0, abs(expected).max())
    assert abs(outputs(folded, *wide) - expected).max() <= bound * scale
    single, plan = fold(model, inputs)
    assert abs(outputs(single, *inputs) - expected).max() <= 2e-5 * scale
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return single, plan


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(st.data())
def test_the_grid_of_convolutions(data: st.DataObject) -> None:
    """Behind: always part of the convolution. In front: where every output sees all taps, else one scale and shift."""
    rank, groups, kernel = (data.draw(st.sampled_from(each)) for each in ((1, 2, 3), (1, 2, 4), (1, 2, 3)))
    transposed, behind, bias = (data.draw(st.booleans()) for _ in range(3))
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    padding: Any = data.draw(st.integers(0, 2))
    mode = "zeros"
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    if transposed:
        outside = data.draw(st.sampled_from((4, 8)))
        extra = data.draw(st.integers(0, max(stride, dilation) - 1))
        conv = TRANSPOSED[rank](4, outside, kernel, padding=padding, output_padding=extra, **options)
        exact = stride == 1 and padding >= dilation * (kernel - 1) and not extra
    else:
        outside = data.draw(st.sampled_from((4, 8)))
        mode = data.draw(st.sampled_from(("zeros", "reflect", "circular", "replicate")))
        if stride == 1:
            padding = data.draw(st.sampled_from((padding, "same", "valid")))
        conv = CONV[rank](4, outside, kernel, padding=padding, padding_mode=mode, **options)
        padded = kernel > 1 if padding == "same" else padding not in (0, "valid")
        exact = not padded or mode != "zeros"
    norm = NORMS[rank + 2](outside if behind else 4, affine=data.draw(st.booleans()))
    model = trained(nn.Sequential(conv, norm) if behind else nn.Sequential(norm, conv))
    _, plan = check(model, torch.randn(3, 4, *[7] * rank))
    (found,) = plan.folded
    assert found.outcome == ("folded" if behind or exact else "scale and shift")


@given(st.sampled_from(("linear", "embedding")), st.booleans(), st.booleans(), st.booleans())
def test_the_grid_of_rows(kind: str, behind: bool, bias: bool, ours: bool) -> None:
    kind = "linear" if not behind else kind
    layer = nn.Linear(6, 4, bias=bias) if kind == "linear" else nn.Embedding(6, 4, padding_idx=0 if bias else None)
    norm = nn.BatchNorm1d(4 if behind else 6)
    model = trained(nn.Sequential(layer, norm) if behind else nn.Sequential(norm, layer))
    x = torch.randn(5, 6) if kind == "linear" else torch.randint(0, 6, (5,))
    folded, plan = check(convert(model) if ours else model, x)
    assert plan.folded[0].outcome == "folded"
    assert len(list(folded.children())) == 1


@pytest.mark.parametrize(
    "between", ["dropout", "average", "global average", "maximum", "flatten", "pad", "mean", "identity"]
)
@pytest.mark.parametrize("behind", [False, True])
def test_what_a_scale_and_shift_may_pass(between: str, behind: bool) -> None:
    step = {
        "dropout": nn.Dropout(),
        "average": nn.AvgPool2d(2, padding=1, count_include_pad=False),
        "global average": nn.AdaptiveAvgPool2d(1),
        "maximum": nn.MaxPool2d(2, padding=1),
        "flatten": nn.Flatten(),
        "pad": nn.ReflectionPad2d(1),
        "mean": Mean(),
        "identity": nn.Identity(),
    }[between]
    if between == "flatten":
        layers = [nn.Conv2d(3, 4, 5), step, nn.BatchNorm1d(4)] if behind else [nn.BatchNorm2d(3), step, nn.Linear(75, 2)]
    elif between == "mean":
        layers = [nn.Conv2d(3, 4, 1), step, nn.BatchNorm1d(4)] if behind else [nn.BatchNorm2d(3), step, nn.Linear(3, 2)]
    else:
        layers = [nn.Conv2d(3, 4, 1), step, nn.BatchNorm2d(4)]
        layers = layers if behind else [nn.BatchNorm2d(3), step, nn.Conv2d(3, 4, 1)]
    model = trained(nn.Sequential(*layers), positive=True)
    folded, plan = check(model, torch.randn(3, 3, 5, 5))
    assert plan.folded[0].outcome == "folded"
    assert not norms(folded)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(-2, -1))


def test_what_it_may_not_pass() -> None:
    for step, why in (
        (nn.MaxPool2d(2), "1 takes maxima in between, and scales below 0 turn them into minima"),
        (nn.ZeroPad2d(1), "1 puts zeros around its input, which are not shifted"),
        (nn.ReLU(), "the activation 1 stands in between"),
        (nn.PReLU(), "the activation 1 stands in between"),
        (nn.AvgPool2d(2, padding=1), "1 (AvgPool2d) is neither linear nor lets a scale and shift pass"),
        (nn.GroupNorm(2, 4), "1 (GroupNorm) is neither linear nor lets a scale and shift pass"),
    ):
        model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), step, nn.BatchNorm2d(4)))
        folded, plan = check(model, torch.randn(3, 3, 6, 6))
        assert plan.folded[0].why.startswith(why)
        assert plan.folded[0].outcome == "scale and shift"
        assert not norms(folded)
        assert {"2.scale", "2.shift"} < set(folded.state_dict())


def test_positions_are_no_channels() -> None:
    """(N, L, C) from a linear layer, normalized over L, which is as large as C."""
    model = trained(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    _, plan = check(model, torch.randn(3, 4, 6))
    assert plan.folded[0].why.startswith("what it normalizes, axis 1, are not the channels of 0")


class Shared(nn.Module):
    """pytorch#104593: a convolution that is called twice; one whose weight another layer has too; one that code reads."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.n, self.m = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        if how == "tied":
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "twice":
            return self.n(self.a(x)) + self.m(self.a(F.relu(x)))
        y = self.a(x)
        if self.how == "branch":
            return self.n(y) + y
        return self.n(y) * self.a.weight.mean() if self.how == "read" else self.n(y) + self.b(F.relu(x))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("twice", "a is called 2 times, and would change everywhere"),
        ("tied", "a shares its weight with a Conv2d"),
        ("read", "a has a weight that the model's code reads too"),
        ("branch", ":add reads the values of a too"),
    ],
)
def test_never_into_a_layer_that_is_used_elsewhere(how: str, why: str) -> None:
    model = trained(Shared(how))
    _, plan = check(model, torch.randn(4, 3, 5, 5))
    assert why in plan["n"].why
    assert plan["n"].outcome == "scale and shift"


def test_one_normalization_behind_two_convolutions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.n(self.a(x)) * F.relu(self.n(self.b(x)))

    folded, plan = check(trained(Twice()), torch.randn(3, 3, 5, 5))
    assert plan["n"].into == ("a", "b")
    assert sorted(folded.state_dict()) == ["a.bias", "a.weight", "b.bias", "b.weight"]


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "elu"])
@pytest.mark.parametrize("folds", [True, False])
def test_activations_and_residuals_of_our_modules_stay(activation: str, folds: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3, padding=1) if folds else nn.SiLU()
            self.norm = BatchNorm2d(4, activation=activation, negative_slope=0.3, alpha=0.7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(self.first(x)), x) if not folds else self.norm(self.first(x), residual=x)

    folded, plan = check(trained(Block()), torch.randn(3, 4, 5, 5))
    assert plan["norm"].outcome == ("folded" if folds else "scale and shift")
    assert not norms(folded)


def test_a_residual_that_is_the_input_itself() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.norm(x, x)

    _, plan = check(trained(Block()), torch.randn(3, 4, 5, 5))
    assert (plan["norm"].outcome, plan["norm"].why) == ("kept", "its residual is its own input")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "sequential_resnet"])
@pytest.mark.parametrize("converted", [False, True])
def test_networks_that_people_write(name: str, converted: bool) -> None:
    """All is folded; what is left keeps its keys; the result is a program that torch.export takes."""
    model = trained(getattr(architectures, name)())
    keys = set(model.state_dict())
    folded, plan = check(convert(model) if converted else model, torch.randn(3, 3, 16, 16))
    assert {each.outcome for each in plan.folded} == {"folded"}
    gone = {f"{each.layer}.{name}" for each in plan.folded for name in norms(model)[0].state_dict()}
    biases = {f"{path}.bias" for each in plan.folded for path in each.into}
    assert set(folded.state_dict()) == (keys - gone) | biases
    torch.export.export(folded, (torch.randn(2, 3, 16, 16),))


def test_code_that_cannot_be_followed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
            self.twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.never = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2 if x.sum() < 1e9 else 1):
                x = self.twice[1](self.twice(x))
            return self.body(x) if x.sum() < 1e9 else self.never(x)

    folded, plan = check(trained(Branching()), torch.randn(3, 3, 5, 5))
    assert [each.outcome for each in plan.folded] == ["folded", "scale and shift", "kept", "kept"]
    assert "ran 4 times on the example inputs, and 1 can be read" in plan["twice.1"].why
    assert "did not run" in plan["never.1"].why
    assert type(folded.body[1]) is nn.Identity


def test_what_stays_as_it_is() -> None:
    without = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    _, plan = check(without, torch.randn(3, 3, 5, 5))
    assert (plan.folded[0].outcome, plan.folded[0].why) == ("kept", "it normalizes by the batch at inference too")
    hooked = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    hooked[1].register_forward_hook(lambda *_: None)
    _, plan = check(hooked, torch.randn(3, 3, 5, 5))
    assert plan.folded[0].why == "it has hooks, which see its input and output"
    weighted = trained(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
    _, plan = fold(weighted, (torch.randn(3, 3, 5, 5),))
    assert "made of others" in plan.folded[0].why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))).to(dtype)
    x = torch.randn(3, 3, 5, 5, dtype=dtype)
    folded, _ = fold(model, (x,))
    expected = outputs(copy.deepcopy(model).double(), x.double())
    assert abs(outputs(folded, x) - expected).max() < 8 * torch.finfo(dtype).eps * abs(expected).max()
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {dtype}


def test_what_cannot_be_folded_at_all() -> None:
    with pytest.raises(ArgumentError, match=r"fold takes a torch\.nn\.Module; received str"):
        fold("model", ())
    with pytest.raises(ArgumentError, match="fold runs the model on example inputs, which fails"):
        fold(nn.Linear(3, 4), (torch.zeros(2, 5),))


@pytest.mark.parametrize("known", [True, False])
def test_an_epsilon_that_only_the_code_knows(known: bool) -> None:
    """FrozenBatchNorm2d of DETR has it in its forward; 0 would be a guess, wrong where variances are small."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.full((4,), 0.01))
            if known:
                self.eps = 0.1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w, b, mean, var = (each.reshape(1, -1, 1, 1) for each in (self.weight, self.bias, *list(self.buffers())[2:]))
            return (x - mean) * (w * (var + 0.1).rsqrt()) + b

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d()).eval()
    folded, plan = fold(model, (torch.randn(2, 3, 4, 4),))
    assert plan.folded[0].outcome == ("folded" if known else "kept")
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("rank", [2, 3])
def test_vectors_and_sequences_in_code_that_cannot_be_followed(rank: int) -> None:
    """Chains in it are folded for the rank of the example, and refuse the other."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) if x.sum() < 1e9 else x

    examples = {2: torch.randn(5, 4), 3: torch.randn(5, 8, 4)}
    model = trained(Branching())
    folded, plan = fold(model, (examples[rank],))
    assert [each.outcome for each in plan.folded] == ["folded" if rank == 2 else "scale and shift", "scale and shift"]
    torch.testing.assert_close(folded(examples[rank]), model(examples[rank]))
    with pytest.raises(AssertionError, match=f"folded where its input is of rank {rank}"):
        folded(examples[5 - rank])
    both, plan = fold(model, (examples[2],), [(examples[3],)])
    assert {each.outcome for each in plan.folded} == {"kept"}
    for x in examples.values():
        torch.testing.assert_close(both(x), model(x))


def test_a_buffer_that_no_state_dict_has_is_in_none_afterwards() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
            self.register_buffer("scale", torch.ones(4), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.layer(x)) * self.scale

    folded, _ = fold(Scaled().eval(), (torch.randn(2, 3),))
    assert list(folded.state_dict()) == ["layer.weight", "layer.bias"]
