"""What hangs on a model hangs on the converted one: objects, hooks, flags, attributes; what is done to it later counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize

import evennorm.torch
from evennorm.torch import convert, report, revert
from tests.torch.architectures import BasicBlock, resnet18

X = torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()


def conv_norm_relu() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.normal_(model[1].bias)
    return model


class Block(nn.Module):
    """relu(bn(conv(x)) + x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def steps(model: nn.Module) -> dict[str, str]:
    return {layer.name: " + ".join(layer.steps) for layer in report(model).layers}


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any) -> None:
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(*args or (X,)), theirs.train(training)(*args or (X,)))


# Objects


def test_in_place_every_object_stays_what_it_is() -> None:
    model = resnet18()
    before = {
        name: (id(module), *map(id, module.parameters(False)), *map(id, module.buffers(False)))
        for name, module in model.named_modules()
    }
    assert convert(model, inplace=True) is model
    after = {name: (id(module), *map(id, module.parameters(False))) for name, module in model.named_modules()}
    assert {name: ids[: len(after[name])] for name, ids in before.items()} == after
    for name, module in model.named_modules():
        assert {*before[name]} <= {id(module), *map(id, module.parameters(False)), *map(id, module.buffers(False))}
    assert isinstance(model.layer1[0], BasicBlock)
    assert isinstance(model.bn1, nn.BatchNorm2d)


def test_an_optimizer_goes_on() -> None:
    model, theirs = conv_norm_relu(), conv_norm_relu()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, theirs)]
    for step in range(4):
        if step == 2:
            convert(model, inplace=True)
        for m, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            m(X).square().sum().backward()
            optimizer.step()
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_copy_leaves_the_original_alone() -> None:
    model = resnet18()
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    convert(model)
    assert {name: (type(module), dict(vars(module))) for name, module in model.named_modules()} == before


def test_shared_modules_stay_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = self.other = nn.BatchNorm2d(3)
            self.block = self.again = Block()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.block(self.other(self.relu(self.bn(x)))))

    model = Twice()
    ours = convert(model)
    assert ours.bn is ours.other
    assert ours.block is ours.again
    assert steps(ours) == {"bn = other": "relu", "block.bn = again.bn": "add + relu"}
    assert_same(ours, model)
    assert ours.bn.num_batches_tracked == 2


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    ours = convert(model)
    assert ours[2].weight is ours[0].weight
    assert len(list(ours.parameters())) == 3


def test_flags_are_kept() -> None:
    model = resnet18()
    model.layer1[0].bn1.eval()
    model.layer1[0].bn2.requires_grad_(False)
    ours = convert(model)
    assert [m.training for m in ours.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in model.parameters()]
    torch.testing.assert_close(ours(X), model(X))
    assert ours.layer1[0].bn1.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_hyperparameters_are_kept(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm1d(5, eps=0.1, momentum=None, affine=False, dtype=dtype)
    ours = convert(norm)
    assert (ours.eps, ours.momentum, ours.affine, ours.running_mean.dtype) == (0.1, None, False, dtype)
    x = torch.randn(7, 5, dtype=dtype)
    torch.testing.assert_close(ours(x), norm(x), rtol=torch.finfo(dtype).eps * 4, atol=torch.finfo(dtype).eps * 4)
    assert convert(nn.BatchNorm2d(3, device="meta")).running_mean.is_meta
    assert convert(nn.BatchNorm2d(3, track_running_stats=False)).running_mean is None


def test_what_users_attached_is_kept() -> None:
    norm = nn.BatchNorm2d(3)
    norm.note = "mine"
    norm.register_buffer("extra", torch.ones(1))
    ours = convert(norm)
    assert (ours.note, ours.extra) == ("mine", torch.ones(1))
    assert list(ours.state_dict()) == list(norm.state_dict())
    assert vars(revert(ours)).keys() == vars(norm).keys()


def test_a_model_may_be_a_batch_normalization_itself() -> None:
    norm = nn.BatchNorm2d(3)
    assert type(convert(norm)) is evennorm.torch.BatchNorm2d
    assert type(norm) is nn.BatchNorm2d
    assert convert(norm, inplace=True) is norm
    assert type(norm) is evennorm.torch.BatchNorm2d
    assert type(revert(norm, inplace=True)) is nn.BatchNorm2d
    assert report(norm).layers[0].name == "the model"


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    ours = convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()), inplace=True)
    assert type(ours[1]) is evennorm.torch.LazyBatchNorm2d
    torch.manual_seed(0)
    y = ours(X)
    torch.manual_seed(0)
    torch.testing.assert_close(y, model(X))
    assert type(ours[1]) is evennorm.torch.BatchNorm2d
    assert_same(ours, model)
    assert type(revert(convert(nn.LazyBatchNorm1d(), inplace=True), inplace=True)) is nn.LazyBatchNorm1d


# Hooks


@pytest.mark.parametrize("make", [conv_norm_relu, Block])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("place", ["bn", "relu"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_hooks_see_what_they_saw(make: Any, before: bool, place: str, register: str) -> None:
    """Also those that come after the conversion."""

    def watched(model: nn.Module) -> list[Any]:
        seen: list[Any] = []
        module = getattr(model, place) if isinstance(model, Block) else model[["conv", "bn", "relu"].index(place)]
        getattr(module, register)(lambda module, *values: seen.append(values))
        return seen

    model = make()
    theirs = make()
    seen = watched(model) if before else []
    convert(model, inplace=True)
    if not before:
        seen = watched(model)
    expected = watched(theirs)
    for m in (model, theirs):
        m(X).square().sum().backward()
    torch.testing.assert_close(seen, expected)
    assert len(seen) == 1


def test_hooks_keep_steps_apart_and_the_report_says_so() -> None:
    model = conv_norm_relu()
    model[1].register_forward_hook(lambda *_: None)
    ours = convert(model)
    assert len(ours[1]._forward_hooks) == 1
    assert report(ours).layers[0].reason == "hooks on 1 see its output"
    block = Block()
    block.relu.register_forward_hook(lambda *_: None)
    assert report(convert(block)).layers[0].reason == "hooks on relu see its input"


def test_global_hooks_see_every_module() -> None:
    ours, seen = convert(conv_norm_relu()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        ours(X)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Sequential"]


# What is done to the model later


def test_modules_exchanged_later_count() -> None:
    for make, name in ((conv_norm_relu, "2"), (Block, "relu")):
        model, ours = make(), convert(make())
        for m in (model, ours):
            setattr(m, name, nn.GELU())
        assert_same(ours, model)


def test_synchronized_layers_made_later_keep_the_activation() -> None:
    for make in (conv_norm_relu, Block):
        model, ours = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in (make(), convert(make())))
        assert_same(ours, model)


def test_a_folded_layer_keeps_the_activation() -> None:
    model = conv_norm_relu().eval()
    ours = convert(model)
    ours[0], ours[1] = fuse_conv_bn_eval(ours[0], ours[1]), nn.Identity()
    torch.testing.assert_close(ours(X), model(X))


def test_a_sequential_may_be_cut_extended_and_run_by_hand() -> None:
    model = conv_norm_relu()
    ours = convert(model)
    x = X
    for mine, theirs in zip(ours, model, strict=True):
        y = theirs(x)
        torch.testing.assert_close(mine(x), y)
        x = y
    assert_same(ours[:2], model[:2])
    for m in (model, ours):
        m.append(nn.BatchNorm2d(4))
        m.append(nn.LeakyReLU(0.5))
        m[2] = nn.Tanh()
    assert_same(ours, model)


def test_layers_added_to_a_loop_count() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                x = norm(x).relu()
            return x

    model, ours = Loop(), convert(Loop())
    assert steps(ours) == {"norms.0": "relu", "norms.1": "relu"}
    for m in (model, ours):
        m.norms.append(nn.BatchNorm2d(3))
    assert_same(ours, model)
    assert ours.norms[2].num_batches_tracked == 1


class Switched(Block):
    mode = "sum"

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.shortcut: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.mode == "sum":
            y = y + (x if self.shortcut is None else self.shortcut(x)) * self.scale
        return self.relu(y)


@pytest.mark.parametrize(("name", "value"), [("mode", "plain"), ("scale", 3.0), ("shortcut", nn.Hardtanh(-0.1, 0.1))])
def test_attributes_set_later_count(name: str, value: Any) -> None:
    model, ours = Switched(), convert(Switched())
    assert steps(ours) == {"bn": "add + relu"}
    assert_same(ours, model)
    for m in (model, ours):
        setattr(m, name, value)
    assert_same(ours, model)
    assert report(ours).layers[0].reason.startswith("convert(model) computes ")
    assert_same(convert(ours), model)


def test_a_forward_set_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = convert(Block())
    ours.forward = lambda x: x + 1
    torch.testing.assert_close(ours(X), X + 1)
    ours = convert(Block())
    monkeypatch.setattr(Block, "forward", lambda self, x: x + 2)
    torch.testing.assert_close(ours(X), X + 2)


def test_what_does_nothing_may_do_something_later() -> None:
    class Dropping(Block):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.drop(self.bn(self.conv(x))) + x)

    model, ours = Dropping(), convert(Dropping())
    assert steps(ours) == {"bn": "add + relu"}
    assert_same(ours, model)
    for m in (model, ours):
        m.drop = nn.Hardtanh(-0.1, 0.1)
    assert_same(ours, model)
    ours = convert(Dropping())
    seen: list[Tensor] = []
    ours.drop.register_forward_hook(lambda module, args, output: seen.append(output))
    ours(X)
    assert len(seen) == 1


def test_a_module_replaced_by_a_function() -> None:
    ours = convert(Block())
    del ours.relu
    ours.relu = torch.tanh
    model = Block()
    torch.testing.assert_close(ours(X), torch.tanh(model.bn(model.conv(X)) + X))


# Classes


def test_a_class_that_lists_those_derived_from_it_lists_none_of_ours() -> None:
    known = []

    class Listed(Block):
        def __init_subclass__(cls, *, word: str) -> None:
            known.append(word)

    class Derived(Listed, word="derived"):
        pass

    ours = convert(Derived())
    assert steps(ours) == {"bn": "add + relu"}
    assert known == ["derived"]


class Meta(type):
    pass


class WithMeta(Block, metaclass=Meta):
    pass


class WithReduce(Block):
    def __reduce__(self) -> Any:
        return WithReduce, ()


class WithNew(Block):
    def __new__(cls, *args: Any) -> WithNew:
        assert args == () or args == (1,)
        return super().__new__(cls)


def with_parametrization() -> nn.Module:
    block = Block()
    block.register_parameter("gain", nn.Parameter(torch.ones(3)))
    return parametrize.register_parametrization(block, "gain", nn.Softplus())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithMeta, "WithMeta has a metaclass of its own"),
        (WithReduce, "WithReduce has a __reduce__ of its own"),
        (with_parametrization, "ParametrizedBlock holds parametrized tensors"),
        (
            lambda: torch.fx.symbolic_trace(Block()),
            "its code is a graph already (torch.fx.GraphModule); convert before tracing",
        ),
    ],
)
def test_classes_that_stay(make: Any, reason: str) -> None:
    model = make()
    ours = convert(model)
    assert report(ours).layers[0].reason == reason
    assert_same(ours, model)


def test_what_creates_objects_in_its_own_way() -> None:
    assert steps(convert(WithNew())) == {"bn": "add + relu"}


def test_a_child_that_holds_its_parent() -> None:
    model = Block()
    model.relu.parent = model
    ours = convert(model)
    assert ours.relu.parent is ours
    assert isinstance(ours.bn, evennorm.torch.BatchNorm2d)
    torch.testing.assert_close(ours(X), model(X))


class Optional(Block):
    def forward(self, x: Tensor, shortcut: Tensor | None = None, scale: float = 1.0) -> Tensor:
        shortcut = x if shortcut is None else shortcut
        return self.relu(self.bn(self.conv(x)) + shortcut) * scale


@pytest.mark.parametrize("args", [(), (X.cos(),), (None, 2.0), (torch.ones(1, 3, 1, 1),), (X.double(),)])
def test_arguments_that_are_usually_left_out(args: tuple[Any, ...]) -> None:
    model, ours = Optional(), convert(Optional())
    assert steps(ours) == {"bn": "add + relu"}
    torch.testing.assert_close(ours(X, *args), model(X, *args), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x=X), model(x=X))


class Sum(nn.Module):
    def __init__(self, inplace: bool):
        super().__init__()
        self.bn, self.inplace = nn.BatchNorm2d(3), inplace

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.bn(x)
        if self.inplace:
            y += other
        else:
            y = y + other
        return y.relu()


@pytest.mark.parametrize("other", [torch.ones(3, 1, 1), X.double(), X.to(torch.bfloat16), X[:1]])
@pytest.mark.parametrize("inplace", [True, False])
def test_sums_that_broadcast_or_promote(inplace: bool, other: Tensor) -> None:
    model, ours = Sum(inplace), convert(Sum(inplace))
    assert steps(ours) == {"bn": "add + relu"}
    y = ours(X, other)
    assert y.dtype is model(X, other).dtype
    assert_same(ours, model, X, other)


def test_a_sum_in_place_that_does_not_fit_fails_as_before() -> None:
    for m in (Sum(True), convert(Sum(True))):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            m(X[:1], X)
