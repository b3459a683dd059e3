"""Models that torch.fx cannot follow are placed as torch.export records them, where that is right in both modes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from evennorm.errors import ArgumentError
from evennorm.tools.programs import open_program
from evennorm.torch import place
from evennorm.torch.fold import fold
from evennorm.torch.placement import sites

ROOT = Path(__file__).parents[2]
SHAPE = (3, 5, 4)


class Sized(nn.Module):
    """Its code asks for sizes, as that of networks of windows and patches does."""

    def __init__(self, where="before"):
        super().__init__()

        def norm(here, channels):
            return nn.BatchNorm2d(channels) if here == where else nn.Identity()

        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv2d(4, 5, 1)
        self.out = nn.Linear(5, 2)
        self.first = norm("input", 3)
        self.conv_norm, self.mix_norm = norm("before", 4), norm("before", 5)
        self.act = nn.SiLU(inplace=True)
        self.act_norm, self.relu_norm = norm("after", 4), norm("after", 5)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4).reshape(4, 1, 1))
        self.register_buffer("shift", torch.tensor(0.25), persistent=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.act_norm(self.act(self.conv_norm(self.conv(self.first(x))))) * self.scale + self.shift
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        x = self.relu_norm(F.relu(self.mix_norm(self.mix(x))))
        return self.out(self.drop(x).mean((2, 3)))


def sized(where="before"):
    torch.manual_seed(0)
    return Sized(where).double()


def trained(model):
    """Outputs in evaluation after some steps."""
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.manual_seed(2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model.eval()(x)


@pytest.mark.parametrize("where", ["none", "before", "after", "input"])
def test_it_trains_as_one_written_by_hand(where):
    placed = place(sized(), where, drop_bias=False, input_shape=SHAPE)
    torch.testing.assert_close(trained(placed), trained(sized(where)), rtol=1e-9, atol=1e-9)


def test_what_is_copied_and_what_is_not():
    model = sized().train()
    model.drop.eval()
    model.mix.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placed = place(model, "after", input_shape=SHAPE)
    assert type(placed).__name__ == "Sized"
    assert all(module.training is not (name == "drop") for name, module in model.named_modules())
    assert placed.conv.training
    assert placed.conv_bn.training
    assert not placed.drop.training
    assert not placed.mix.weight.requires_grad
    kept = {name for name in before if "norm" not in name}
    assert {name for name in placed.state_dict() if "_bn" not in name} == kept
    placed.load_state_dict({name: before[name] for name in kept}, strict=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert placed.conv.weight is not model.conv.weight


def test_sites_have_the_names_of_the_models_layers():
    found = [site.name for site in sites(sized(), input_shape=SHAPE) if site.is_activation]
    assert found == ["act", "relu"]
    mixed = place(sized(), {"act": "after", "relu": "before"}, input_shape=SHAPE)
    assert [name for name, module in mixed.named_modules() if isinstance(module, nn.BatchNorm2d)] == ["conv_bn", "mix_bn"]


def test_any_number_of_samples_and_no_other_size():
    placed = place(sized(), "none", input_shape=SHAPE).eval()
    assert placed(torch.ones(7, *SHAPE).double()).shape == (7, 2)
    with pytest.raises(
        AssertionError, match=r"placed for samples of shape \(3, 5, 4\), whose sizes its code uses; place it again"
    ):
        placed(torch.ones(2, 3, 6, 4).double())
    again = place(placed, "before", drop_bias=False, input_shape=SHAPE)
    torch.testing.assert_close(trained(again), trained(sized("before")), rtol=1e-9, atol=1e-9)
    with pytest.raises(ArgumentError, match="fails on inputs of shape"):
        place(placed, "before", input_shape=(3, 6, 4))


def test_a_placed_model_is_exported_and_folded(tmp_path):
    placed = place(sized(), "after", input_shape=SHAPE)
    trained(placed)
    x = torch.ones(5, *SHAPE, dtype=torch.float64)
    program = torch.export.export(placed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "placed.pt2")
    opened = open_program(tmp_path / "placed.pt2").model
    folded, plan = fold(placed, (x,))
    assert plan.folded
    for each in (opened, folded):
        torch.testing.assert_close(each(x), placed(x), rtol=1e-9, atol=1e-9)


class Windows(nn.Module):
    """A bias that is looked up in training and kept for evaluation, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.bias = nn.Parameter(torch.arange(3.0))
        self.register_buffer("index", torch.tensor([0, 1, 2, 1]), persistent=False)
        self.kept = None

    def forward(self, x):
        if self.training:
            self.kept, bias = None, self.bias[self.index]
        else:
            self.kept = bias = self.bias[self.index].detach() if self.kept is None else self.kept
        if x.shape[1] > 3:
            x = x * 2
        return self.b((self.a(x) + bias).relu())


def test_a_parameter_that_evaluation_keeps_a_copy_of_is_trained():
    model = Windows()
    model.eval()(torch.ones(2, 4))
    placed = place(model, "none", input_shape=(4,))
    x = torch.randn(5, 4)
    for each in (model, placed):
        each.train()(x).square().sum().backward()
    assert model.bias.grad.any()
    torch.testing.assert_close(placed.bias.grad, model.bias.grad)


class Positions(Windows):
    """New tensors on the device of the input, in ways that torch.export writes down as a device."""

    def forward(self, x):
        start = torch.arange(x.shape[1], device=x.device) * torch.ones((), device=x.device).to(x.device, torch.float32)
        return super().forward(x + start)


def test_new_tensors_are_made_where_the_input_is():
    placed = place(Positions(), "before", input_shape=(4,))
    x = torch.randn(3, 4)
    assert placed.to("meta")(x.to("meta")).is_meta
    assert "device(type='cpu')" not in placed.code


class Typed(nn.Module):
    """torch.fx follows the other branch than tensors do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x).tanh()) if isinstance(x, torch.Tensor) else x


def test_a_branch_that_torch_fx_does_not_take():
    model = Typed()
    x = torch.randn(5, 4)
    torch.testing.assert_close(place(model, "none", input_shape=(4,))(x), model(x))
    assert "a_bn" in dict(place(model, "before", input_shape=(4,)).named_modules())


class Auxiliary(Windows):
    def forward(self, x):
        y = super().forward(x)
        return y + self.b(x) if self.training else y


class Dropped(Windows):
    """Draws at random without a layer of torch's."""

    def forward(self, x):
        y = super().forward(x)
        return y * x.new_empty(len(x), 1).bernoulli_(0.5) if self.training else y


class Pair(Windows):
    def forward(self, x, y):
        return super().forward(x + y)


@pytest.mark.parametrize(
    ("kind", "inputs", "text"),
    [
        (
            Auxiliary,
            (torch.ones(2, 4),),
            "received Auxiliary: .* torch.export does not record it either: .* computes something else",
        ),
        (
            Dropped,
            (torch.ones(2, 4),),
            "received Dropped: .* torch.export does not record it either: .* computes something else",
        ),
        (Pair, (torch.ones(2, 4),) * 2, "received Pair: .* either: models of one input are recorded"),
    ],
)
def test_refusals(kind, inputs, text):
    with pytest.raises(ArgumentError, match=text) as caught:
        place(kind(), "before", inputs=inputs)
    assert "\n" not in str(caught.value)


class Branching(Windows):
    def forward(self, x):
        return super().forward(x * 2 if x.sum() > 0 else x)


def test_torch_prints_nothing_of_what_it_cannot_record():
    """In a process of its own, since torch's logs go to the stream that it found first."""
    code = (
        "from tests.torch.test_place_recorded import Branching, place\n"
        "try: place(Branching(), 'before', input_shape=(4,))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True, cwd=ROOT)
    assert done.stderr == ""
    assert re.fullmatch(".* torch.export does not record it either: GuardOnDataDependent.*\n", done.stdout)


def test_hooks_are_not_lost():
    model = Windows()
    model.a.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ArgumentError, match=r"received Windows: the code of Windows cannot be followed .* into that code$"):
        place(model, "before", input_shape=(4,))
