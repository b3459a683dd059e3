"""States move between Keras, torch and Flax, and what predicts by them predicts the same."""

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

from evennorm import BatchNormState, InputError
from evennorm.errors import ArgumentError
from evennorm.keras import BatchNormalization
from evennorm.keras import read_states as read_keras
from evennorm.keras import write_states as write_keras
from evennorm.keras.states import layer_of
from evennorm.keras.to_torch import torch_state_dict
from evennorm.models.state import matched
from evennorm.tools.to_torch import write_state_dict
from evennorm.tools.weights import load_weights
from evennorm.torch import BatchNorm1d
from evennorm.torch import read_states as read_torch
from evennorm.torch import write_states as write_torch
from evennorm.torch.states import module_of

random = np.random.default_rng(0)
X = random.normal(size=(9, 4)).astype("float32")
STATE = BatchNormState("bn", 0.02, 0.75, *random.uniform(0.5, 2, (4, 4)).astype("float32"), updates=7)


def textbook(state, x):
    y = (x.astype("float64") - state.mean) / np.sqrt(state.variance.astype("float64") + state.epsilon)
    return y * (1 if state.gamma is None else state.gamma) + (0 if state.beta is None else state.beta)


def keras_model(norm=layers.BatchNormalization, **arguments):
    return keras.Sequential([keras.Input((4,)), norm(name="bn", **arguments)])


def through_keras(state, norm):
    model = keras_model(norm)
    write_keras(model, {"bn": state})
    return np.asarray(model.predict(X, verbose=0)), read_keras(model)["bn"]


def through_torch(state, norm):
    model = nn.Sequential()
    model.add_module("bn", norm(4))
    write_torch(model, {"bn": state})
    with torch.no_grad():
        return model.eval()(torch.tensor(X)).numpy(), read_torch(model)["bn"]


def through_flax(state, norm):
    from flax import nnx

    from evennorm.jax import nnx as door

    model = nnx.Dict(bn=nnx.BatchNorm(4, rngs=nnx.Rngs(0), use_running_average=True))
    door.write_states(model, {"bn": state})
    return np.asarray(model["bn"](X)), door.read_states(model)["bn"]


WAYS = {
    "Keras": (through_keras, layers.BatchNormalization),
    "evennorm.keras": (through_keras, BatchNormalization),
    "torch": (through_torch, nn.BatchNorm1d),
    "evennorm.torch": (through_torch, BatchNorm1d),
    "Flax": (through_flax, None),
}


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_there_and_on(first, second) -> None:
    state = STATE
    for way in (first, second):
        through, norm = WAYS[way]
        y, state = through(state, norm)
        np.testing.assert_allclose(y, textbook(STATE, X), rtol=1e-5, atol=1e-6)
        assert (state.epsilon, state.decay) == pytest.approx((STATE.epsilon, STATE.decay))
        for name in ("gamma", "beta", "mean", "variance"):
            np.testing.assert_array_equal(getattr(state, name), getattr(STATE, name))


def test_conventions() -> None:
    assert read_torch(nn.BatchNorm1d(3, momentum=None))[""].decay is None
    model = nn.Sequential(nn.BatchNorm1d(4))
    write_torch(model, {"bn": STATE})  # one layer each: by order
    assert (model[0].momentum, model[0].eps, int(model[0].num_batches_tracked)) == (0.25, 0.02, 7)
    assert read_torch(model)["0"].unbiased
    assert not read_keras(keras_model())["bn"].unbiased
    assert read_keras(keras_model(BatchNormalization, unbiased_variance=True))["bn"].unbiased


def test_the_moving_average_follows_as_it_would_have() -> None:
    """One more training batch of n values moves the statistics alike, but for n / (n - 1) in torch's variance."""
    model, module = keras_model(BatchNormalization), nn.BatchNorm1d(4)
    write_keras(model, {"bn": STATE})
    write_torch(module, {"": STATE})
    model.layers[0](X, training=True)
    module.train()(torch.tensor(X))
    ours, theirs = read_keras(model)["bn"], read_torch(module)[""]
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5)
    keep = STATE.decay * STATE.variance
    np.testing.assert_allclose((ours.variance - keep) * 9 / 8, theirs.variance - keep, rtol=1e-4)


def test_epsilon_and_bias() -> None:
    other = STATE.with_epsilon(1e-5)
    np.testing.assert_allclose(textbook(other, X), textbook(STATE, X), rtol=1e-6)
    with pytest.raises(ArgumentError, match="no variance is negative"):
        STATE.with_epsilon(5.0)
    assert STATE.with_bias(False, 10) is STATE
    np.testing.assert_allclose(STATE.with_bias(True, 10).with_bias(False, 10).variance, STATE.variance)
    with pytest.raises(ArgumentError, match="two values"):
        STATE.with_bias(True, 1)


def test_new_layers() -> None:
    np.testing.assert_allclose(
        np.asarray(keras.ops.convert_to_numpy(layer_of(STATE)(X))), textbook(STATE, X), rtol=1e-5, atol=1e-6
    )
    with torch.no_grad():
        np.testing.assert_allclose(
            module_of(STATE, 1).eval()(torch.tensor(X)).numpy(), textbook(STATE, X), rtol=1e-5, atol=1e-6
        )


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="bn has 3 channels; the state of 'bn' has 4"):
        matched({"bn": STATE}, {"bn": 3})
    with pytest.raises(InputError, match="2 states for 3 layers"):
        matched({"a": STATE, "b": STATE}, {"x": 4, "y": 4, "z": 4})
    with pytest.raises(InputError, match="none for b"):
        matched({"a": STATE, "c": STATE}, {"a": 4, "b": 4})
    assert list(matched({"block/bn": STATE}, {"block.bn": 4})) == ["block.bn"]
    with pytest.raises(ArgumentError, match="scale=True"):
        write_keras(keras_model(scale=False), {"bn": STATE})
    with pytest.raises(ArgumentError, match="affine=True"):
        write_torch(nn.Sequential(nn.BatchNorm1d(4, affine=False)), {"0": STATE})
    with pytest.raises(ArgumentError, match="averages all batches alike"):
        write_keras(keras_model(), read_torch(nn.BatchNorm1d(4, momentum=None)))


def scrambled(model):
    for weight in model.weights:
        low = 0.5 if "variance" in weight.path else -1
        weight.assign(random.uniform(low, 1, weight.shape))
    return model


class Net(nn.Module):
    """The torch twin of `article`, named alike."""

    def __init__(self, eps):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, eps=eps)
        self.deep = nn.Conv2d(4, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.separable = nn.ModuleDict(
            {"depthwise": nn.Conv2d(4, 4, 3, groups=4, bias=False), "pointwise": nn.Conv2d(4, 5, 1)}
        )
        self.slope = nn.PReLU(5)
        self.flat = nn.BatchNorm1d(180, eps=eps)
        self.block = nn.ModuleDict({"fc": nn.Linear(180, 6), "out": nn.BatchNorm1d(6, eps=eps, affine=True)})

    def forward(self, x):
        x = self.up(self.deep(torch.relu(self.norm(self.conv(x)))))
        x = self.slope(self.separable["pointwise"](self.separable["depthwise"](x)))
        return self.block["out"](self.block["fc"](self.flat(x.flatten(1))))


def article():
    block = [keras.Input((180,)), layers.Dense(6, name="fc"), layers.BatchNormalization(name="out", center=False)]
    return scrambled(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, name="conv"),
                layers.BatchNormalization(name="norm"),
                layers.ReLU(),
                layers.DepthwiseConv2D(3, depth_multiplier=2, name="deep"),
                layers.Conv2DTranspose(4, 2, strides=2, name="up"),
                layers.SeparableConv2D(5, 3, name="separable"),
                layers.PReLU(shared_axes=[1, 2], name="slope"),
                layers.Flatten(),
                layers.BatchNormalization(name="flat"),
                layers.Dropout(0.5),
                keras.Sequential(block[1:], name="block"),
            ]
        )
    )


@pytest.mark.parametrize("epsilon", [None, 1e-5])
def test_a_whole_model_for_torch(tmp_path, epsilon) -> None:
    model, x = article(), random.normal(size=(5, 8, 8, 3)).astype("float32")
    found = write_state_dict(model, tmp_path / "net.safetensors", epsilon)
    net = Net(1e-3 if epsilon is None else epsilon).eval()
    load_weights(net, "torch", "net", tmp_path / "net.safetensors")
    with torch.no_grad():
        y = net(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(y, model.predict(x, verbose=0), rtol=1e-3, atol=1e-4)
    assert "reordered" in found.written["flat"]
    assert found.metadata["norm"] == f"eps={0.001 if epsilon is None else 1e-5:g}, momentum=0.01"
    assert found.left == {}


def test_what_torch_has_not(tmp_path) -> None:
    model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4), BatchNormalization(mode=1, name="one")])
    found = torch_state_dict(model)
    assert found.arrays == {}
    assert found.left["lstm" if "lstm" in found.left else next(iter(found.left))]
    with pytest.raises(InputError, match="no layer"):
        write_state_dict(model, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="is written to"):
        write_state_dict(model, tmp_path / "net.pt")
    assert list(tmp_path.iterdir()) == []


def flattening(shape, *middle, first=(), data_format="channels_last", flatten=None):
    """A network of images or rows that is flattened, with weights of every kind behind it."""
    keras.utils.set_random_seed(0)
    flatten = layers.Flatten(data_format=data_format) if flatten is None else flatten
    parts = [*first, flatten, *middle, layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input(shape), *parts])
    for variable in model.variables:
        variable.assign(random.uniform(0.5, 2, variable.shape))
    return model


class AsTorch(nn.Module):
    """What a person writes in torch: images channels first, and all else as it is."""

    def __init__(self, model, images):
        super().__init__()
        self.images, self.kinds = images, []
        for layer in model.layers:
            match layer:
                case layers.Conv2D() | layers.Conv1D():
                    kind = nn.Conv2d if isinstance(layer, layers.Conv2D) else nn.Conv1d
                    made = kind(layer.kernel.shape[-2], layer.filters, layer.kernel_size)
                case layers.Dense():
                    made = nn.Linear(*layer.kernel.shape)
                case layers.PReLU():
                    made = nn.PReLU(layer.alpha.shape[-1])
                case layers.LayerNormalization():
                    made = nn.LayerNorm(layer.gamma.shape[-1], eps=layer.epsilon)
                case layers.BatchNormalization():
                    made = nn.BatchNorm1d(layer.gamma.shape[-1], eps=layer.epsilon)
                case layers.Flatten() | layers.Reshape():
                    made = nn.Flatten()
                case layers.MaxPooling2D():
                    made = nn.MaxPool2d(2)
                case _:
                    made = nn.Identity()
            self.add_module(layer.name, made)
            self.kinds.append(layer.name)

    def forward(self, x):
        x = x.movedim(-1, 1) if self.images else x
        for name in self.kinds:
            x = getattr(self, name)(x)
        return x


EVERY = (layers.PReLU, layers.LayerNormalization, layers.BatchNormalization, lambda: layers.Dropout(0.5))


@pytest.mark.parametrize(
    ("shape", "first", "images"),
    [
        ((28, 20), (), False),  # rows of pixels: no axis of them is the channel
        ((6, 5, 3), (), True),
        ((6, 5, 3), (lambda: layers.Conv2D(4, 2),), True),
        ((6, 6, 3), (lambda: layers.Conv2D(4, 1), lambda: layers.MaxPooling2D(2)), True),
        ((7, 3), (lambda: layers.Conv1D(4, 2),), True),
        ((7, 3), (lambda: layers.Dense(4),), False),  # sequences of features have no other order in torch
    ],
)
@pytest.mark.parametrize("flatten", [layers.Flatten, lambda: layers.Reshape((-1,))])
def test_what_is_flattened_is_in_the_order_of_torch(shape, first, images, flatten) -> None:
    """Held to the outputs: a wrong order fits all shapes."""
    middle = [kind() for kind in EVERY]
    model = flattening(shape, *middle, first=[make() for make in first], flatten=flatten())
    found = torch_state_dict(model)
    assert found.left == {}
    network = AsTorch(model, images).eval()
    network.load_state_dict({name: torch.tensor(array) for name, array in found.arrays.items()})
    x = random.normal(size=(5, *shape)).astype("float32")
    with torch.no_grad():
        y = network(torch.tensor(x)).numpy()
    np.testing.assert_allclose(y, model.predict(x, verbose=0), rtol=1e-4, atol=1e-4)


def test_what_channels_first_networks_flatten() -> None:
    """Keras's Flatten moves the channels to the end if it is told of them, and keeps the order if not."""
    for data_format, same in (("channels_first", False), ("channels_last", True)):
        pooling = layers.ZeroPadding2D(0, data_format="channels_first")
        model = flattening((3, 4, 5), first=[pooling], data_format=data_format)
        weight = torch_state_dict(model).arrays["head.weight"]
        kernel = np.asarray(keras.ops.convert_to_numpy(model.get_layer("head").kernel)).T
        places = np.arange(60) if same else np.arange(60).reshape(4, 5, 3).transpose(2, 0, 1).reshape(-1)
        np.testing.assert_array_equal(weight, kernel[:, places])


def test_an_order_that_is_not_known_is_left_out() -> None:
    x = keras.Input((4, 4, 2))
    flat = layers.Flatten()(x)
    y = layers.Concatenate()([flat, layers.Dense(3, name="beside")(flat)])
    model = keras.Model(x, layers.Dense(2, name="head")(y))
    found = torch_state_dict(model)
    assert set(found.left) == {"head"}
    assert "flattened in different orders" in found.left["head"]
    assert "beside.weight" in found.arrays
    turned = keras.Sequential(
        [x, layers.Flatten(), layers.Reshape((8, 4)), layers.Permute((2, 1)), layers.GlobalMaxPooling1D(), layers.Dense(2)]
    )
    assert "which may put them in another order" in next(iter(torch_state_dict(turned).left.values()))


def test_sums_of_flattened_values_keep_their_order() -> None:
    x = keras.Input((4, 5, 2))
    flat = layers.Flatten()(x)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Add()([flat, layers.ReLU()(flat)])))
    places = np.arange(40).reshape(4, 5, 2).transpose(2, 0, 1).reshape(-1)
    kernel = np.asarray(keras.ops.convert_to_numpy(model.get_layer("head").kernel)).T
    np.testing.assert_array_equal(torch_state_dict(model).arrays["head.weight"], kernel[:, places])
