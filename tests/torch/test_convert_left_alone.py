"""What convert and revert leave as it is, what they refuse, and what they say."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune, weight_norm

import evennorm.torch
from evennorm.errors import ArgumentError
from evennorm.torch import SyncBatchNorm, convert, report, revert

X = torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnCheck(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Unrelated(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.BatchNorm2d(3))


def with_old_weight_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.weight = nn.Parameter(torch.ones(3, 1))
    return weight_norm(norm)


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.BatchNorm2d(3), "weight", 1)


def with_its_own_forward() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda input: input
    return norm


def for_quantization() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.qconfig = torch.ao.quantization.default_qconfig
    return norm


LEFT_ALONE = {
    "own forward": (lambda: OwnForward(3), "OwnForward has a forward of its own"),
    "own check": (lambda: OwnCheck(3), "OwnCheck has a _check_input_dim of its own"),
    "unrelated": (lambda: Unrelated(3), "Unrelated is derived from none of torch's layers"),
    "parametrized": (parametrized, "its tensors are parametrized"),
    "weight_norm": (with_old_weight_norm, "its weight is made of others (weight_norm, spectral_norm, pruning)"),
    "pruned": (pruned, "its weight is made of others (weight_norm, spectral_norm, pruning)"),
    "on the object": (with_its_own_forward, "it has a forward of its own, set on the object"),
    "qconfig": (for_quantization, "it is prepared for quantization"),
    "momentum": (
        lambda: nn.BatchNorm2d(3, momentum=1.5),
        "momentum is the weight of the new batch, from 0 to 1, or None for the average of all batches (Keras's momentum is "
        "1 minus it); received momentum=1.5",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_layers_that_stay(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.ReLU())
    kind = type(model[1])
    for changed in (convert(model, inplace=True), revert(model, inplace=True)):
        assert type(changed[1]) is kind
        layer = report(changed).layers[0]
        assert (layer.exchanged, layer.steps, layer.reason) == (False, (), reason)


class Derived(nn.BatchNorm2d):
    """Computes as its base does."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=0.01)
        nn.init.zeros_(self.weight)

    def doubled(self) -> Tensor:
        return 2 * self.weight


def test_derived_classes_that_compute_alike_are_exchanged() -> None:
    model = nn.Sequential(Derived(3), nn.ReLU())
    nn.init.normal_(model[0].weight)
    ours = convert(model)
    assert isinstance(ours[0], Derived)
    assert isinstance(ours[0], evennorm.torch.BatchNorm2d)
    torch.testing.assert_close(ours(X), model(X))
    torch.testing.assert_close(ours[0].doubled(), model[0].doubled())
    assert report(ours).layers[0].steps == ("relu",)
    assert type(revert(ours)[0]) is Derived


class BatchNormAct2d(nn.BatchNorm2d):
    """In the form of timm's."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None):
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize(
    ("parts", "steps", "reason"),
    [
        ((), ("relu",), ""),
        ((nn.LeakyReLU(0.2),), ("leaky_relu",), ""),
        ((nn.SiLU(),), (), "its own SiLU follows"),
        ((nn.Identity(),), (), "its own Identity follows"),
        ((nn.ReLU(), nn.Dropout2d(0.5)), (), "its own Dropout2d follows"),
    ],
)
def test_batch_normalization_with_activation(parts: Any, steps: tuple[str, ...], reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAct2d(3, *parts))
    ours = convert(model)
    layer = report(ours).layers[0]
    assert (layer.exchanged, layer.steps, layer.reason) == (True, steps, reason)
    assert isinstance(ours[1], BatchNormAct2d)
    assert isinstance(ours[1], evennorm.torch.BatchNorm2d)
    for training in (True, False):
        outputs = []
        for each in (model, ours):
            torch.manual_seed(0)
            outputs.append(each.train(training)(X))
        torch.testing.assert_close(outputs[1], outputs[0])
    seen: list[Tensor] = []
    ours[1].act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ours(X)
    torch.testing.assert_close(seen[0], nn.BatchNorm2d.forward(model[1], model[0](X)))
    assert [type(module) for module in revert(ours)] == [nn.Conv2d, BatchNormAct2d]
    ours, model = convert(model).eval(), model.eval()
    torch.testing.assert_close(torch.export.export(ours, (X,)).module()(X), model(X))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(X), model(X))
    torch.testing.assert_close(copy.deepcopy(ours)(X), model(X))


# Synchronized layers


def test_synchronized_layers_of_one_process_are_exchanged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3), nn.ReLU())
    ours = convert(model)
    assert type(ours[1]) is SyncBatchNorm
    assert report(ours).layers[0].steps == ("relu",)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(X), model.train(training)(X))
    assert type(revert(ours)[1]) is nn.SyncBatchNorm
    ours = convert(nn.SyncBatchNorm(5))
    for shape in ((4, 5), (4, 5, 2), (4, 5, 2, 2, 2)):
        assert ours(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        ours(torch.randn(5))


# Whole models


def compiled() -> nn.Module:
    return torch.compile(nn.BatchNorm2d(3))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.DataParallel(nn.BatchNorm2d(3)), "is wrapped in DataParallel"),
        (compiled, "is compiled by torch.compile"),
        (scripted, "is compiled by TorchScript"),
    ],
)
@pytest.mark.parametrize("verb", [convert, revert, report])
def test_closed_models_are_refused(make: Any, reason: str, verb: Any) -> None:
    name = verb.__name__
    message = (
        f"{name} looks at a model before it is wrapped or compiled; received one that {reason}; {name} the model inside, "
        "and wrap or compile the result"
    )
    with pytest.raises(ArgumentError) as caught:
        verb(make())
    assert str(caught.value) == message


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.DataParallel(nn.BatchNorm2d(3)), "is wrapped in DataParallel"),
        (compiled, "is compiled by torch.compile"),
        (
            lambda: torch.ao.nn.intrinsic.qat.ConvBn2d(3, 3, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
            "is a quantized ConvBn2d",
        ),
    ],
)
def test_closed_parts_are_left_alone(make: Any, reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), make())
    kinds = [type(module) for module in model[1].modules()]
    ours = convert(model, inplace=True)
    assert [type(module) for module in ours[1].modules()] == kinds
    first, second = report(ours).layers
    assert first.exchanged
    assert second.reason == f"it is inside 1, which {reason}"
    assert [type(module) for module in revert(ours, inplace=True)[1].modules()] == kinds


@pytest.mark.parametrize("verb", [convert, revert, report])
def test_what_is_no_module_is_refused(verb: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{verb.__name__} takes a torch.nn.Module; received dict$"):
        verb({})


def test_what_cannot_be_copied_is_changed_in_place() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.lock = threading.Lock()
    with pytest.raises(
        ArgumentError, match=r"which copy.deepcopy could not make \(cannot pickle .* object\); .* inplace=True\)$"
    ):
        convert(model)
    assert isinstance(convert(model, inplace=True)[0], evennorm.torch.BatchNorm2d)


@pytest.mark.parametrize(("name", "value"), [("activation", "relu"), ("virtual_batch_size", 2)])
def test_what_torch_cannot_do_is_not_reverted(name: str, value: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), evennorm.torch.BatchNorm2d(3, **{name: value}))
    message = (
        f"torch.nn's batch normalization cannot do what '1' does with {name}={value!r}; keep that layer, write the "
        "activation as a module of its own, or build it without"
    )
    with pytest.raises(ArgumentError) as caught:
        revert(model)
    assert str(caught.value) == message


def test_models_without_batch_normalization() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert convert(model) is not model
    assert report(model).layers == ()
    assert str(report(model)).endswith(
        "0 batch normalizations: 0 computed by evennorm, 0 of them together with what follows; 0 computed by torch"
    )


def test_layers_of_evennorm_with_an_activation_of_their_own() -> None:
    model = nn.Sequential(evennorm.torch.BatchNorm2d(3, activation="leaky_relu"), nn.ReLU())
    ours = convert(model)
    torch.testing.assert_close(ours(X), model(X))
    assert type(ours) is nn.Sequential
    assert report(ours).layers[0].steps == ("leaky_relu",)


def test_a_name_that_breaks_the_code_of_a_graph_leaves_a_module_unfused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a\nb", nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(getattr(self, "a\nb")(x))

    model = Block()
    converted = convert(model)
    assert isinstance(getattr(converted, "a\nb"), evennorm.torch.BatchNorm2d)
    torch.testing.assert_close(converted(X), model(X))
    assert "a name that torch.fx cannot write into code" in str(report(converted))
