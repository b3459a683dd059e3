"""Where `evennorm.torch.place` puts batch normalization, by values: against the same networks written by hand in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from evennorm.errors import ArgumentError
from evennorm.torch import BatchNorm1d, BatchNorm2d, place
from evennorm.torch.placement import sites

EPS = 1e-5


class Small(nn.Module):
    """Activations of every kind of writing: module, method in place, function; dropout by the mode; a shortcut."""

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(3, 3, 1, bias=not norm)
        self.mix_norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.fc = nn.Linear(3, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        y = self.mix_norm(self.mix(x))
        y += x
        y = F.gelu(y).mean((2, 3))
        return torch.sigmoid(self.out(F.dropout(self.fc(y).tanh_(), 0.0, self.training)))


def normalized(x):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + EPS).sqrt()


def by_hand(model, x, where):
    before = normalized if where == "before" else lambda x: x
    after = normalized if where == "after" else lambda x: x
    bias = (lambda layer: None) if where == "before" else lambda layer: layer.bias
    x = normalized(x) if where == "input" else x
    x = after(before(F.conv2d(x, model.conv.weight, bias(model.conv))).relu())
    y = after(F.gelu(before(F.conv2d(x, model.mix.weight, model.mix.bias) + x))).mean((2, 3))
    y = after(before(F.linear(y, model.fc.weight, bias(model.fc))).tanh())
    return model.out(y).sigmoid()


@pytest.fixture
def x():
    return torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize("where", ["none", "before", "after", "input"])
def test_values_in_training(where, had, x):
    model = Small(had).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    placed = place(model, where, input_shape=(2, 6, 6))
    if had:  # its convolution gets the bias that beta stood in for
        assert model.mix.bias is None
        model.mix.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        assert placed.mix.bias is not None
    torch.testing.assert_close(placed(x), by_hand(model, x, where), rtol=1e-12, atol=1e-12)
    assert placed.training
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("where", ["before", "after", "input"])
def test_moving_averages_and_evaluation(where, x):
    model = Small().double()
    placed = place(model, where, input_shape=(2, 6, 6), momentum=1.0)
    placed(x)
    first = next(module for module in placed.modules() if isinstance(module, BatchNorm2d))
    seen = {"before": F.conv2d(x, model.conv.weight), "after": model.conv(x).relu(), "input": x}[where]
    torch.testing.assert_close(first.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(first.running_var, seen.var((0, 2, 3)))
    placed.eval()
    torch.testing.assert_close(placed(x)[:1], placed(x[:1]))  # no batch statistics


def test_names_dtypes_and_modes():
    model = Small().half().eval()
    model.conv.weight.requires_grad_(False)
    model.conv.bias.requires_grad_(False)
    placed = place(model, "before", input_shape=(2, 6, 6), eps=0.5)
    found = {name: module for name, module in placed.named_modules() if name.endswith("_bn")}
    assert list(found) == ["conv_bn", "gelu_bn", "fc_bn"]
    assert {module.weight.dtype for module in found.values()} == {torch.float16}
    assert {module.eps for module in found.values()} == {0.5}
    assert not any(module.training for module in placed.modules())
    assert not found["conv_bn"].weight.requires_grad
    assert found["fc_bn"].weight.requires_grad
    assert placed.conv.bias is None
    assert placed.mix.bias is not None
    assert type(placed).__name__ == "Small"


def test_dropout_follows_the_mode():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 50), nn.Linear(50, 50)

        def forward(self, x):
            return self.b(F.dropout(F.relu(self.a(x), True) + 1, 0.5, self.training))

    placed = place(Dropped(), "none", input_shape=(4,))
    seen = []
    placed.b.register_forward_pre_hook(lambda module, given: seen.append(float((given[0] == 0).double().mean())))
    placed.train()(torch.ones(3, 4))
    placed.eval()(torch.ones(3, 4))
    assert seen[0] > 0.2
    assert seen[1] == 0


def test_a_shortcut_that_was_saved_from_being_overwritten_stays_so():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn, self.out = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.out(F.relu(self.bn(x), inplace=True) + x)

    model, x = PreActivation(), torch.randn(6, 3)
    h = model.stem(x)
    torch.testing.assert_close(place(model, "none", input_shape=(3,))(x), model.out(h.relu() + h))


def test_sequences_are_normalized_along_their_last_axis():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    placed = place(model, "before", input_shape=(7, 3))
    h = F.linear(x, model[0].weight)
    h = (h - h.mean((0, 1))) / (h.var((0, 1), unbiased=False) + EPS).sqrt()
    torch.testing.assert_close(placed(x), model[2](F.gelu(h)))
    assert [type(m) for m in placed.modules() if isinstance(m, nn.BatchNorm1d)] == [BatchNorm1d]
    again = place(placed, "none", input_shape=(7, 3))
    assert [node.name for node in again.graph.nodes] == ["input_1", "_0", "_1", "_2", "output"]


def test_placing_twice_is_placing_once():
    once = place(Small(True), "before", input_shape=(2, 6, 6))
    twice = place(once, "before", input_shape=(2, 6, 6))
    assert list(twice.state_dict()) == list(once.state_dict())
    assert place(Small(), "none", input_shape=(2, 6, 6)).state_dict().keys() == Small().state_dict().keys()


def test_what_is_shared_stays_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out, self.act = nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x):
            return self.out(self.act(self.a(x)) + self.act(self.a(2 * x)))

    placed = place(Shared(), "before", input_shape=(3,))
    calls = [node.target for node in placed.graph.nodes if node.op == "call_module"]
    assert sorted(calls) == ["a", "a", "a_bn", "a_bn", "act", "act", "out"]


def test_sites_and_where_you_say():
    model = Small()
    found = sites(model, input_shape=(2, 6, 6))
    assert [site.name for site in found if site.is_activation] == ["act", ":gelu", ":tanh"]
    assert [site.name for site in found if not site.is_activation][:3] == ["conv", "mix", ":add"]
    chosen = place(model, {"act": "after", ":tanh": "before", ":gelu": None}, input_shape=(2, 6, 6))
    asked = place(
        model,
        lambda site: {"act": "after", ":tanh": "before"}.get(site.name) if site.is_activation else None,
        inputs=torch.rand(3, 2, 6, 6),
    )
    assert str(chosen.code) == str(asked.code)
    assert [name for name, _ in chosen.named_modules() if name.endswith("_bn")] == ["conv_bn", "fc_bn"]
    assert chosen.fc.bias is None
    assert place(model, {"act": "before"}, drop_bias=False, input_shape=(2, 6, 6)).conv.bias is not None


def test_inputs_behind_what_tells_the_channel():
    def first(model, shape):
        placed = place(model, "input", input_shape=shape)
        norm = next(node for node in placed.graph.nodes if node.op == "call_module" and "_bn" in node.target)
        return norm.args[0].name, placed.get_submodule(norm.target).num_features

    tail = [nn.Flatten(), nn.LazyLinear(2)]
    assert first(nn.Sequential(*tail), (3, 4, 4)) == ("input_1", 3)
    assert first(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)), (4, 5)) == ("_0", 20)
    assert first(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LazyLinear(2)), (6,)) == (
        "_0",
        1,
    )


def test_an_activation_inside_of_batch_normalization_is_what_is_left_of_it():
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4, activation="leaky_relu", negative_slope=0.3), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    torch.testing.assert_close(place(model, "none", input_shape=(3,))(x), model[2](F.leaky_relu(model[0](x), 0.3)))
    assert [n for n, _ in place(model, "after", input_shape=(3,)).named_modules() if n.endswith("_bn")] == ["0_bn"]


class Branching(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.a, self.inner = nn.Linear(3, 3), inner

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.a(x) if self.inner is None else self.inner(x)


class ByMode(Branching):
    def forward(self, x):
        return self.a(x) if self.training else self.a(x).relu()


class Residual(Branching):
    def __init__(self):
        super().__init__(BatchNorm1d(3))

    def forward(self, x):
        return self.a(self.inner(x, residual=x).relu())


class Writing(Branching):
    def forward(self, x):
        x[:, 0] = 0
        return self.a(x)


class Unknown(Branching):
    def forward(self, x):
        return self.a((x * 2).relu().mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "where", "shape", "text"),
    [
        (mlp, "behind", (3,), "where is one of none, before, after, input, .* received 'behind'"),
        (mlp, lambda site: "input", (3,), "returns None, 'before' or 'after'; it returned 'input' for '0'"),
        (mlp, {"0": "before"}, (3,), "'0' of class Linear has none of its own"),
        (mlp, {"relu": "before"}, (3,), r"keys \(0, 1\); received 'relu'"),
        (mlp, "none", (4,), r"fails on inputs of shape \(2, 4\): .*; give an input_shape \(of one sample\)"),
        (mlp, "none", None, "one of input_shape, .* or inputs; received neither"),
        (mlp, "none", (0,), r"sizes above 0; received \(0,\)"),
        (lambda: "model.pt", "none", (3,), "place takes a torch.nn.Module; received str"),
        (lambda: torch.jit.script(mlp()), "none", (3,), "compiled by TorchScript"),
        (Branching, "none", (3,), "models whose code torch.fx can follow .* received Branching: the code of Branching"),
        (ByMode, "none", (3,), "received ByMode: it takes other steps in training than in evaluation"),
        (Writing, "none", (3,), "received Writing: the code of Writing cannot be followed .*; put evennorm.torch"),
        (Residual, "none", (3,), "'inner' is called with residual, which nothing else could take"),
        (
            lambda: nn.Sequential(Branching(nn.BatchNorm1d(3)), nn.Linear(3, 2)),
            "none",
            (3,),
            "cannot be done inside '0', which holds 'inner': the code of Branching cannot be followed",
        ),
        (lambda: nn.Linear(3, 2), "before", (3,), "received the layer Linear; put it into an nn.Sequential"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "before", (3,), "model 'Sequential' has no place for where='before': none"),
        (Unknown, "before", (3, 5, 5), r"nothing tells that of 'mul' in Unknown, of shape \(2, 3, 5, 5\)"),
    ],
)  # fmt: skip
def test_refusals(model, where, shape, text):
    with pytest.raises(ArgumentError, match=text) as caught:
        place(model(), where, input_shape=shape)
    assert "\n" not in str(caught.value)


def test_options_are_checked_even_where_nothing_is_placed():
    with pytest.raises(ArgumentError, match="place decides activation and dtype itself; received activation='relu'"):
        place(mlp(), "none", input_shape=(3,), dtype=torch.half, activation="relu")
    with pytest.raises(ArgumentError, match="momentun"):
        place(mlp(), "none", input_shape=(3,), momentun=0.9)


def test_a_model_that_holds_indices_has_no_input_to_normalize():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2))
    tokens = torch.zeros(2, 2, dtype=torch.long)
    assert "2_bn" in dict(place(model, "before", inputs=tokens).named_modules())
    with pytest.raises(ArgumentError, match="those that go into an Embedding are indices"):
        place(model, "input", inputs=tokens)


@pytest.mark.parametrize("training", [True, False])
def test_a_lazy_model_keeps_its_mode(training):
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)).train(training)
    placed = place(model, "before", input_shape=(3,))
    assert {module.training for module in placed.modules()} == {training}


def test_what_stands_in_no_state_dict_stands_in_none_afterwards():
    model = mlp()
    model[1] = nn.Sequential(nn.ReLU(), Scaling())
    placed = place(model, "none", input_shape=(3,))
    assert placed.state_dict().keys() == model.state_dict().keys()
    placed.load_state_dict(model.state_dict())


class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return x * self.scale + self.shift


class Scaled(nn.Module):
    """One step passes on an `out=` of None, the other writes into a tensor that it is given."""

    def __init__(self, writes: bool):
        super().__init__()
        self.a, self.b, self.writes = nn.Linear(3, 4), nn.Linear(4, 2), writes

    def forward(self, x):
        x = nn.functional.normalize(self.a(x)).relu()
        return self.b(torch.abs(x, out=x) if self.writes else x)


def test_a_tensor_to_write_into():
    assert "relu_bn" in dict(place(Scaled(False), "before", input_shape=(3,)).named_modules())
    with pytest.raises(ArgumentError, match="the code of Scaled passes out= to 'abs'; leave that argument out"):
        place(Scaled(True), "before", input_shape=(3,))
