"""Where `evennorm.torch.place` puts layer, group and RMS normalization, by values in float64, computed by hand."""

import pytest
import torch
from torch import nn

from evennorm.errors import ArgumentError
from evennorm.torch import place

EPS = {"layer": 1e-5, "group": 1e-5, "rms": torch.finfo(torch.float64).eps}


class ChannelsLast(nn.Module):
    """Images with the channels last, before linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.first(x)))


NETWORKS = {
    "dense": ((4,), lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), 1),
    "steps": ((5, 4), lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), 2),
    "series": ((4, 7), lambda: nn.Sequential(nn.Conv1d(4, 6, 2), nn.Tanh(), nn.Conv1d(6, 2, 2)), 1),
    "image": ((4, 5, 6), lambda: nn.Sequential(nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Conv2d(6, 2, 2)), 1),
    "channels last": ((5, 3, 4), ChannelsLast, 3),
}


def by_hand(norm, x, channels):
    if norm == "group":  # 3 groups of 2 channels, with all pixels of them
        x = x.movedim(channels, 1)
        parts = x.reshape(len(x), 3, -1)
        scale = (parts.var(2, unbiased=False, keepdim=True) + EPS[norm]).sqrt()
        return ((parts - parts.mean(2, keepdim=True)) / scale).reshape(x.shape).movedim(1, channels)
    axes = list(range(1, x.dim())) if x.dim() > 3 else [channels]
    if norm == "rms":
        return x / (x.square().mean(axes, keepdim=True) + EPS[norm]).sqrt()
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + EPS[norm]).sqrt()


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("norm", ["layer", "group", "rms"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_values_are_those_of_float64(kind, norm, where):
    shape, make, channels = NETWORKS[kind]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn((3, *shape), dtype=torch.float64)
    first, _, last = model if isinstance(model, nn.Sequential) else (model.first, None, model.out)
    placed = place(model, where, norm=norm, input_shape=shape)
    beta = torch.zeros(6, dtype=torch.float64) if where == "before" and norm != "rms" else first.bias
    bias = (beta - first.bias).reshape([6 if axis == channels else 1 for axis in range(len(shape) + 1)])
    hidden = first(x) + bias
    hidden = by_hand(norm, hidden, channels).tanh() if where == "before" else by_hand(norm, hidden.tanh(), channels)
    torch.testing.assert_close(placed(x), last(hidden), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(placed(x[:1]), last(hidden)[:1], rtol=1e-9, atol=1e-9)  # no sample hangs on others


def test_inputs_are_normalized():
    shape, make, _ = NETWORKS["image"]
    model = make().double()
    x = torch.randn((2, *shape), dtype=torch.float64)
    placed = place(model, "input", norm="layer", input_shape=shape)
    torch.testing.assert_close(placed(x), model(by_hand("layer", x, 1)))


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("instance", {}, "norm is one of batch, layer, group, rms; received 'instance'"),
        ("layer", {"momentum": 0.1}, "LayerNorm takes no argument 'momentum'"),
        ("group", {"num_groups": 2}, "place decides num_groups itself"),
    ],
)
def test_what_does_not_fit_is_refused(norm, options, message):
    shape, make, _ = NETWORKS["dense"]
    with pytest.raises(ArgumentError, match=message):
        place(make(), "before", norm=norm, input_shape=shape, **options)


@pytest.mark.parametrize("norm", ["layer", "group", "rms"])
def test_a_single_value_is_refused(norm):
    model = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 2))
    with pytest.raises(ArgumentError, match=r"single value loses it; a hidden tensor has shape \(2, 1\)"):
        place(model, "before", norm=norm, input_shape=(4,))
