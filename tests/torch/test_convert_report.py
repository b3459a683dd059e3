"""The report says of any model, converted or not, what computes each layer, together with what, and why not more."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from evennorm.torch import convert, report
from tests.torch.architectures import BasicBlock


class Blocks(nn.Module):
    """Layers in containers that have no code of their own, one of them called by name from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"first": nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU()])})
        self.block = BasicBlock(3, 4)
        self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4))
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.stages["first"]:
            x = module(x)
        return self.head(self.block(x))


TABLE = """\
layer               class        computed by  together with  why not more
stages.first.0      BatchNorm2d  evennorm     relu
block.bn1           BatchNorm2d  evennorm     relu
block.bn2           BatchNorm2d  evennorm     add + relu
block.downsample.1  BatchNorm2d  evennorm                    the sum is written over the other operand
head.0              BatchNorm2d  evennorm                    1 (Dropout) follows
head.2              BatchNorm2d  evennorm                    its output is returned
unused              BatchNorm2d  evennorm                    no forward that was read calls it

7 batch normalizations: 7 computed by evennorm, 3 of them together with what follows; 0 computed by torch"""


def test_the_table() -> None:
    assert str(report(convert(Blocks()))) == TABLE


def test_before_the_conversion_and_without_fusion() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    (layer,) = report(model).layers
    assert (layer.exchanged, layer.steps, layer.reason) == (False, (), "convert(model) exchanges it")
    ours = convert(model, fuse=False)
    (layer,) = report(ours).layers
    assert (layer.exchanged, layer.steps, layer.reason) == (True, (), "convert(model) computes relu with it")
    (layer,) = report(convert(ours)).layers
    assert (layer.exchanged, layer.steps, layer.reason) == (True, ("relu",), "")


def test_converting_twice_is_converting_once() -> None:
    once = convert(Blocks())
    twice = convert(once)
    assert report(twice) == report(once)
    assert [type(module) for module in twice.modules()] == [type(module) for module in once.modules()]


def test_a_model_that_ends_in_batch_normalization() -> None:
    ours = convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert report(ours).layers[0].reason == "its output is the model's"


def test_calls_that_differ() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(x).relu()).tanh()

    (layer,) = report(convert(Twice())).layers
    assert (layer.steps, layer.reason) == (("relu",), "tanh follows")


def test_it_changes_nothing() -> None:
    model = convert(Blocks())
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = report(model)
    assert {name: (type(module), dict(vars(module))) for name, module in model.named_modules()} == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.layers[0].name = "other"
