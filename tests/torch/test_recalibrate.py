"""Recalibrated torch models: every module has the float64 statistics of what it gets, and nothing else has changed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from evennorm.errors import InputError
from evennorm.tools.recalibrate import recalibrate
from evennorm.torch import BatchNorm2d, convert
from tests.tools.populations import check
from tests.torch.architectures import ARCHITECTURES

random = np.random.default_rng(0)
X = (random.normal(size=(60, 4)) * 3 + 1).astype("float32")
NORMS = nn.modules.batchnorm._BatchNorm


def scrambled(model):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, NORMS):
            with torch.no_grad():
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.normal_(1, 0.3, generator=generator)
                module.bias.normal_(generator=generator)
    return model


def inputs_of(model, x):
    """What each module gets, all of its calls together."""
    found, hooks = {}, []

    def see(module, args):
        found.setdefault(module, []).append(args[0].detach().double().numpy().copy())

    for module in model.modules():
        if isinstance(module, NORMS):
            hooks += [module.register_forward_pre_hook(see)]
    training = model.training
    with torch.no_grad():
        model.eval()(x)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return {module: np.concatenate(parts) for module, parts in found.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("cache", [None, 0])
def test_each_module_has_the_statistics_of_what_it_gets(name, cache) -> None:
    torch.manual_seed(0)
    model = scrambled(ARCHITECTURES[name].make())
    x = torch.randn(6, 3, 16, 16) + 1
    others = {key: value.clone() for key, value in model.state_dict().items() if "running" not in key}
    modes = [module.training for module in model.modules()]
    recalibrate(model, x, batch_size=4, cache=cache)
    found = inputs_of(model, x)
    assert found
    for module, values in found.items():
        check(module, values, axis=1, bound=5e-6)  # batches of 4 and 2 round otherwise than one of 6
    for key, value in others.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def small(norm=nn.BatchNorm1d):
    return nn.Sequential(norm(4), nn.Linear(4, 5), nn.ReLU(inplace=True), norm(5), nn.Dropout(0.5), nn.Linear(5, 3))


def loader():
    return DataLoader(TensorDataset(torch.tensor(X), torch.zeros(60, dtype=torch.long)), batch_size=16)


@pytest.mark.parametrize("data", [lambda: X, lambda: torch.tensor(X), loader, lambda: iter([X[:50], X[50:]])])
def test_any_data(data) -> None:
    model = small()
    done = recalibrate(model, data())
    check(model[0], X)
    assert [layer.values for layer in done.layers] == [60, 60]


def test_ours_and_what_they_keep_beside() -> None:
    x = (random.normal(size=(64, 3, 4, 4)) + np.array([1e5, 0, -3]).reshape(3, 1, 1)).astype("float32")
    model = nn.Sequential(BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 2, 1), BatchNorm2d(2))
    recalibrate(model, x)
    check(model[0], x, axis=1)
    whole = model[0].running_mean.double() + model[0].running_mean_low.double()
    np.testing.assert_allclose(whole.numpy(), x.astype("float64").mean(axis=(0, 2, 3)), rtol=1e-9, atol=5e-8)
    converted = convert(small())
    recalibrate(converted, X)
    check(converted[0], X)


def test_written_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(3)])
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.norms[0](x)
            torch.relu_(y)  # read by its old name
            z = self.norms[1](self.linear(y))
            z += y
            z.mul_(2)
            return self.norms[2](z)

    model = scrambled(InPlace())
    for cache in (None, 0):
        recalibrate(model, X, batch_size=20, cache=cache)
        for module, values in inputs_of(model, torch.tensor(X)).items():
            check(module, values)


def test_code_that_cannot_be_followed() -> None:
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x = self.linear(self.a(x))
            return self.b(x) if x.abs().sum() > 0 else self.c(x)

    model = scrambled(Branching())
    done = recalibrate(model, X)
    check(model.a, X)
    check(model.b, inputs_of(model, torch.tensor(X))[model.b])
    assert done.left == (("c", "nothing calls it"),)


def test_shared_and_behind_itself() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.norm(self.linear(self.norm(x)))

    model = Twice()
    recalibrate(model, X)
    check(model.norm, inputs_of(model, torch.tensor(X))[model.norm], bound=1e-5)


def test_several_inputs_by_name() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, a, b, scale=2.0):
            return self.left(a) + scale * self.right(b)

    for data in ({"a": X, "b": X + 5}, [((X, X + 5), None)], [({"a": X, "b": X + 5}, None)]):
        model = Two()
        recalibrate(model, data)
        check(model.left, X)
        check(model.right, X + 5)


def test_other_dtypes() -> None:
    model = small().double()
    recalibrate(model, X.astype("float64") + 1e8)
    check(model[0], X.astype("float64") + 1e8, bound=1e-12)
    images = random.integers(0, 256, (10, 3, 4, 4), dtype="uint8")
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, images)
    check(model[0], images, axis=1)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).to(torch.bfloat16)
    recalibrate(model, images)
    assert model[1].running_mean.dtype == torch.bfloat16


def test_words() -> None:
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(20, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.embedding(x).transpose(1, 2))

    model = Words()
    x = random.integers(0, 20, (30, 6))
    recalibrate(model, x)
    check(model.norm, model.embedding(torch.tensor(x)).detach().numpy())


def test_what_is_left() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.LazyBatchNorm1d())
    with pytest.raises(InputError, match="no batch normalization"):
        recalibrate(model[1:], X)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    model[0].weight.requires_grad_(False)
    done = recalibrate(model, X)
    assert [layer.frozen for layer in done.layers] == [True]
    assert "track_running_stats" in dict(done.left)["1"]


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_a_frozen_backbone() -> None:
    x = random.normal(size=(20, 3, 4, 4)).astype("float32") + 2
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    kept = copy.deepcopy(model)
    recalibrate(model, x)
    check(model[0], x, axis=1)
    recalibrate(kept, x, keep_frozen=True)
    assert kept[0].running_mean.tolist() == [0, 0, 0]
    check(kept[2], kept[1](kept[0](torch.tensor(x))).detach().numpy(), axis=1)


def test_one_pass_and_wrappers() -> None:
    model = small()
    done = recalibrate(nn.DataParallel(model), X, one_pass=True, batch_size=60)
    assert done.passes == 1
    twin = copy.deepcopy(model)
    recalibrate(twin, X)  # one batch of all samples: the same
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_data_that_do_not_fit() -> None:
    for data in (X[:, :3], np.zeros((5, 4, 4, 4, 4), "float32")):
        with pytest.raises(InputError, match="the model cannot take") as caught:
            recalibrate(small(), data)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", 'a"b', "a\\b", "a\ud800b"])
def test_names_that_break_the_code_of_a_graph(name) -> None:
    """The model runs as one call, and each layer gets the statistics of its own input."""
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    model.add_module("norm", nn.BatchNorm1d(4))
    recalibrate(scrambled(model), X)
    with torch.no_grad():
        z = model[0](torch.from_numpy(X)).double().numpy()
    np.testing.assert_allclose(model[1].running_mean.numpy(), z.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var.numpy(), z.var(0), rtol=1e-5)
