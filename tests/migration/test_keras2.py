"""Files of Keras 2 and tf.keras 2: written here in their layout, predictions by their formulas in float64 NumPy."""

from __future__ import annotations

import json

import h5py
import keras
import numpy as np
import pytest

from evennorm.tools.migrate import migrate
from tests.migration import spatial
from tests.migration.keras1 import hard_sigmoid, sigmoid

RNG = np.random.default_rng(3)


def draw(*shape):
    return RNG.normal(size=shape).astype("float32")


def entry(kind, name, sources=(), **config):
    """One layer as Keras 2 wrote it; `sources` as (layer, node, tensor, arguments)."""
    nodes = [[[*source, {}] for source in sources]] if sources else []
    return {"class_name": kind, "name": name, "config": {"name": name, "trainable": True, **config}, "inbound_nodes": nodes}


def model(layers, inputs, outputs, kind="Model"):
    config = {"name": "model_1", "layers": layers, "input_layers": inputs, "output_layers": outputs}
    return {"class_name": kind, "config": config}


def chain(shape, *layers, kind="Sequential"):
    """A Sequential as Keras 2.2 and later wrote it, with a dict; given layers without their sources."""
    entries = [{key: x[key] for key in ("class_name", "config")} for x in layers]
    entries[0]["config"]["batch_input_shape"] = [None, *shape]
    return {"class_name": kind, "config": {"name": "sequential_1", "layers": entries}}


def save(path, config, weights, version="2.1.6", backend="tensorflow", whole=True):
    """`weights`: by layer, lists of (name, array)."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = version, backend
        root = file
        if whole:
            file.attrs["model_config"] = json.dumps(config)
            root = file.create_group("model_weights")
            root.attrs["keras_version"], root.attrs["backend"] = version, backend
        names = [name.encode() for name in weights]
        half = len(names) // 2
        # Keras cut long lists of names in parts.
        root.attrs["layer_names0"], root.attrs["layer_names1"] = names[:half], names[half:]
        for layer, stored in weights.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name, _ in stored]
            for name, value in stored:
                group[name] = value
    return path


def predicted(path, tmp_path, *inputs, **options):
    migrate(path, tmp_path / "new.keras", **options)
    new = keras.saving.load_model(tmp_path / "new.keras")
    return np.asarray(new.predict_on_batch(inputs[0] if len(inputs) == 1 else list(inputs)))


CONV = {"filters": 4, "kernel_size": [3, 3], "padding": "same", "activation": "relu", "use_bias": True}


@pytest.mark.parametrize("backend", ["tensorflow", "theano", "cntk"])
@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
def test_kernels_of_theano_alone_are_flipped(order, backend, tmp_path):
    letters = "th" if order == "channels_first" else "tf"
    shape = (3, 7, 6) if letters == "th" else (7, 6, 3)
    kernel, bias, x = draw(3, 3, 3, 4), draw(4), draw(2, *shape)
    config = chain(shape, entry("Conv2D", "c", data_format=order, strides=[2, 2], **CONV))
    path = save(tmp_path / "o.h5", config, {"c": [("c/kernel:0", kernel), ("c/bias:0", bias)]}, backend=backend)
    y = spatial.convolve(spatial.channels_last(x, letters), kernel, (2, 2), "same", backend == "theano")
    expected = spatial.as_ordered(np.maximum(y + bias, 0), letters)
    np.testing.assert_allclose(predicted(path, tmp_path, x), expected, atol=1e-5)


def gru(x, kernel, inner, bias, reset_after, gate):
    h = np.zeros((len(x), inner.shape[0]))
    kernels, inners = np.split(kernel, 3, 1), np.split(inner, 3, 1)
    first = np.split(bias[0] if reset_after else bias, 3)
    second = np.split(bias[1], 3) if reset_after else [0, 0, 0]
    for t in range(x.shape[1]):
        z, r = (gate(x[:, t] @ kernels[k] + first[k] + h @ inners[k] + second[k]) for k in (0, 1))
        if reset_after:
            new = np.tanh(x[:, t] @ kernels[2] + first[2] + r * (h @ inners[2] + second[2]))
        else:
            new = np.tanh(x[:, t] @ kernels[2] + first[2] + (r * h) @ inners[2])
        h = z * h + (1 - z) * new
    return h


def lstm(x, kernel, inner, bias, gate):
    h = c = np.zeros((len(x), inner.shape[0]))
    for t in range(x.shape[1]):
        i, f, new, o = np.split(x[:, t] @ kernel + h @ inner + bias, 4, 1)
        c = gate(f) * c + gate(i) * np.tanh(new)
        h = gate(o) * np.tanh(c)
    return h


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("name", "gate"), [("hard_sigmoid", hard_sigmoid), ("sigmoid", sigmoid)])
def test_gru(name, gate, reset_after, tmp_path):
    weights = [draw(3, 12), draw(4, 12), draw(2, 12) if reset_after else draw(12)]
    config = chain((5, 3), entry("GRU", "g", units=4, activation="tanh", recurrent_activation=name, reset_after=reset_after))
    stored = [(f"g/{kind}:0", w) for kind, w in zip(("kernel", "recurrent_kernel", "bias"), weights, strict=True)]
    x = draw(2, 5, 3)
    got = predicted(save(tmp_path / "o.h5", config, {"g": stored}), tmp_path, x)
    np.testing.assert_allclose(got, gru(x, *map(np.float64, weights), reset_after, gate), atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "CuDNNLSTM"])
def test_lstm(kind, tmp_path):
    kernel, inner, bias = draw(3, 16), draw(4, 16), draw(16)
    weights = [kernel, inner, bias]
    if kind == "CuDNNLSTM":  # each gate's matrix is stored transposed; a bias for the input and one for the state
        weights = [np.hstack([k.T.reshape(k.shape) for k in np.hsplit(kernel, 4)])]
        weights += [np.hstack([k.T for k in np.hsplit(inner, 4)]), np.concatenate([bias - 1, np.ones(16, "float32")])]
    config = chain((5, 3), entry(kind, "l", units=4, **({} if kind == "CuDNNLSTM" else {"activation": "tanh"})))
    stored = [(f"l/{name}:0", w) for name, w in zip(("kernel", "recurrent_kernel", "bias"), weights, strict=True)]
    x = draw(2, 5, 3)
    got = predicted(save(tmp_path / "o.h5", config, {"l": stored}), tmp_path, x)
    gate = sigmoid if kind == "CuDNNLSTM" else hard_sigmoid
    np.testing.assert_allclose(got, lstm(x, *map(np.float64, (kernel, inner, bias)), gate), atol=1e-5)


@pytest.mark.parametrize(("version", "zero"), [("2.2.4", False), ("2.1.6-tf", False), ("2.2.4-tf", True), ("2.4.0", True)])
def test_masked_steps_of_both_directions_by_release(version, zero, tmp_path):
    """Zero in tf.keras since TensorFlow 1.13, as in Keras 3; the output before them in all others."""
    inner = entry("LSTM", "l", units=2, activation="tanh", recurrent_activation="sigmoid", return_sequences=True)
    del inner["inbound_nodes"], inner["name"]
    config = chain((4, 3), entry("Masking", "m", mask_value=0.0), entry("Bidirectional", "b", layer=inner, merge_mode="sum"))
    weights = [[draw(3, 8), draw(2, 8), draw(8)] for _ in range(2)]
    stored = [
        (f"b/{side}_l/{kind}:0", w)
        for side, arrays in zip(("forward", "backward"), weights, strict=True)
        for kind, w in zip(("kernel", "recurrent_kernel", "bias"), arrays, strict=True)
    ]
    x = draw(2, 4, 3)
    x[:, 2] = 0  # between two steps that count
    forward, backward = (
        [lstm(part, *map(np.float64, arrays), sigmoid) for part in parts]
        for arrays, parts in zip(
            weights, ([x[:, :1], x[:, :2], x[:, [0, 1, 3]]], [x[:, [3, 1, 0]], x[:, [3, 1]], x[:, [3]]]), strict=True
        )
    )
    middle = np.zeros((2, 2)) if zero else forward[1] + backward[2]
    expected = np.stack([forward[0] + backward[0], forward[1] + backward[1], middle, forward[2] + backward[2]], 1)
    path = save(tmp_path / "o.h5", config, {"m": [], "b": stored}, version=version)
    np.testing.assert_allclose(predicted(path, tmp_path, x), expected, atol=1e-5)


def test_an_encoder_hands_its_states_to_a_decoder(tmp_path):
    """Several outputs of one call, several inputs of another, as in every sequence-to-sequence example."""
    options = {"units": 4, "activation": "tanh", "recurrent_activation": "sigmoid"}
    layers = [
        entry("InputLayer", "a", batch_input_shape=[None, None, 3], dtype="float32"),
        entry("InputLayer", "b", batch_input_shape=[None, None, 3], dtype="float32"),
        entry("LSTM", "encoder", [("a", 0, 0)], return_state=True, **options),
        entry("LSTM", "decoder", [("b", 0, 0), ("encoder", 0, 1), ("encoder", 0, 2)], return_sequences=False, **options),
    ]
    weights = {name: [draw(3, 16), draw(4, 16), draw(16)] for name in ("encoder", "decoder")}
    stored = {
        name: [(f"{name}/{kind}:0", w) for kind, w in zip(("kernel", "recurrent_kernel", "bias"), arrays, strict=True)]
        for name, arrays in weights.items()
    }
    path = save(tmp_path / "o.h5", model(layers, [["a", 0, 0], ["b", 0, 0]], [["decoder", 0, 0]], "Functional"), stored)
    a, b = draw(2, 5, 3), draw(2, 4, 3)
    got = predicted(path, tmp_path, a, b)

    def run(x, arrays, h, c):
        kernel, inner, bias = map(np.float64, arrays)
        for t in range(x.shape[1]):
            i, f, new, o = np.split(x[:, t] @ kernel + h @ inner + bias, 4, 1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
            h = sigmoid(o) * np.tanh(c)
        return h, c

    zero = np.zeros((2, 4))
    h, _ = run(b, weights["decoder"], *run(a, weights["encoder"], zero, zero))
    np.testing.assert_allclose(got, h, atol=1e-5)


NORM = {"axis": [-1], "momentum": 0.99, "epsilon": 0.01, "center": True, "scale": True}


def normalized(x, gamma, beta, mean, variance, epsilon=0.01):
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def stored_norm(name, *arrays):
    kinds = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    return [(f"{name}/{kind}:0", value) for kind, value in zip(kinds, arrays, strict=False)]


def test_statistics_that_were_of_the_sample_are_kept_and_said(tmp_path):
    arrays = [draw(5), draw(5), draw(5), np.abs(draw(5)) + 0.1]
    config = chain((5,), entry("BatchNormalization", "bn", **NORM))
    for version, said in (("2.1.3", False), ("2.1.4", True), ("2.3.1", True), ("2.4.0", False), ("2.2.4-tf", False)):
        path = save(tmp_path / "o.h5", config, {"bn": stored_norm("bn", *arrays)}, version=version)
        x = draw(3, 5)
        np.testing.assert_allclose(predicted(path, tmp_path, x), normalized(x, *map(np.float64, arrays)), atol=1e-5)
        (layer,) = migrate(path).layers
        assert any("n / (n - (1 + epsilon))" in sentence for sentence in layer.assumed) is said


@pytest.mark.parametrize(("version", "said"), [("2.2.4", False), ("2.2.4-tf", True), ("2.4.0", True), ("2.15.0", True)])
@pytest.mark.parametrize("shape", [(3, 3, 2), (2,)])
def test_statistics_that_tf_keras_took_of_the_sample_are_said(shape, version, said, tmp_path):
    """Where it fused the layer: of images."""
    arrays = [abs(draw(2)) + 0.5 for _ in range(4)]
    config = chain(shape, entry("BatchNormalization", "bn", axis=-1, epsilon=0.01))
    report = migrate(save(tmp_path / "o.h5", config, {"bn": stored_norm("bn", *arrays)}, version), tmp_path / "n.keras")
    [assumed] = [layer.assumed for layer in report.layers if layer.old == "bn"]
    assert any("n / (n - 1), where tf.keras fused" in sentence for sentence in assumed) is (said and len(shape) == 3)
    x = draw(4, *shape)
    new = keras.saving.load_model(tmp_path / "n.keras")
    np.testing.assert_allclose(np.asarray(new.predict_on_batch(x)), normalized(x, *arrays), atol=1e-5)


def test_renormalization_keeps_its_statistics(tmp_path):
    arrays = [draw(5), draw(5), draw(5), *(np.abs(draw(5)) + 0.1 for _ in range(2)), draw(5), np.abs(draw(5)) + 0.1]
    clipping = {"rmax": 3.0, "rmin": 0.3, "dmax": 5.0}
    config = chain(
        (5,), entry("BatchNormalization", "bn", renorm=True, renorm_clipping=clipping, renorm_momentum=0.9, **NORM)
    )
    path = save(tmp_path / "o.h5", config, {"bn": stored_norm("bn", *arrays)}, version="2.4.0")
    x = draw(3, 5)
    np.testing.assert_allclose(predicted(path, tmp_path, x), normalized(x, *map(np.float64, arrays[:4])), atol=1e-5)
    (layer,) = migrate(path).model.layers
    found = {w.name: keras.ops.convert_to_numpy(w) for w in layer.weights}
    for name, value in zip(("moving_stddev", "renorm_mean", "renorm_stddev"), arrays[4:], strict=True):
        np.testing.assert_array_equal(found[name], value)
    assert layer.renorm
    assert layer.renorm_clipping == clipping
    assert layer.renorm_momentum == 0.9


def test_without_gamma_and_without_beta(tmp_path):
    x = draw(3, 5)
    for scale, center in ((False, True), (True, False), (False, False)):
        parameters = {**({"gamma": draw(5)} if scale else {}), **({"beta": draw(5)} if center else {})}
        mean, variance = draw(5), np.abs(draw(5)) + 0.1
        config = chain((5,), entry("BatchNormalization", "bn", **{**NORM, "scale": scale, "center": center}))
        stored = [(f"bn/{k}:0", v) for k, v in (parameters | {"moving_mean": mean, "moving_variance": variance}).items()]
        got = predicted(save(tmp_path / "o.h5", config, {"bn": stored}), tmp_path, x)
        expected = normalized(x, parameters.get("gamma", 1), parameters.get("beta", 0), mean, variance)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_nested_model_with_the_names_of_keras_2(tmp_path):
    """References to it count its calls from 1; its weights have its name in front."""
    inner = model(
        [
            entry("InputLayer", "x", batch_input_shape=[None, 5], dtype="float32"),
            entry("Dense", "d", [("x", 0, 0)], units=4, activation="linear", kernel_initializer="glorot_uniform"),
            entry("BatchNormalization", "bn", [("d", 0, 0)], **NORM),
        ],
        [["x", 0, 0]],
        [["bn", 0, 0]],
        "Functional",
    )
    nested = {"class_name": "Functional", "name": "inner", "config": {**inner["config"], "name": "inner"}}
    outer = model(
        [
            entry("InputLayer", "a", batch_input_shape=[None, 5], dtype="float32"),
            {**nested, "inbound_nodes": [[["a", 0, 0, {"training": False}]]]},
            entry("Concatenate", "c", [("inner", 1, 0), ("a", 0, 0)], axis=-1),
        ],
        [["a", 0, 0]],
        [["c", 0, 0]],
        "Functional",
    )
    kernel, bias = draw(5, 4), draw(4)
    norm = [draw(4), draw(4), draw(4), np.abs(draw(4)) + 0.1]
    stored = [("inner/d/kernel:0", kernel), ("inner/d/bias:0", bias)]
    stored += [(f"inner/{name}", value) for name, value in stored_norm("bn", *norm)]
    path = save(tmp_path / "o.h5", outer, {"a": [], "inner": stored, "c": []}, version="2.4.0")
    x = draw(3, 5)
    expected = np.concatenate([normalized(x @ np.float64(kernel) + bias, *map(np.float64, norm)), x], 1)
    np.testing.assert_allclose(predicted(path, tmp_path, x), expected, atol=1e-5)


def test_activations_that_were_layers(tmp_path):
    config = chain(
        (5,),
        entry("Dense", "d", units=4, activation="hard_sigmoid"),
        entry("ReLU", "r", max_value=0.9, negative_slope=0.25, threshold=0.0),
        entry("LeakyReLU", "l", alpha=0.1),
        entry("Softmax", "s", axis=-1),
    )
    kernel, bias, x = draw(5, 4), draw(4), draw(3, 5)
    path = save(tmp_path / "o.h5", config, {"d": [("d/kernel:0", kernel), ("d/bias:0", bias)], "r": [], "l": [], "s": []})
    y = np.minimum(hard_sigmoid(x @ np.float64(kernel) + bias), 0.9)
    np.testing.assert_allclose(predicted(path, tmp_path, x), np.exp(y) / np.exp(y).sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kind", ["Conv2DTranspose", "DepthwiseConv2D"])
def test_other_convolutions(kind, padding, tmp_path):
    x = draw(2, 5, 4, 3)
    common = {
        "kernel_size": [3, 3],
        "strides": [2, 2],
        "padding": padding,
        "activation": "linear",
        "data_format": "channels_last",
    }
    if kind == "Conv2DTranspose":
        kernel, bias = draw(3, 3, 2, 3), draw(2)  # (rows, columns, out, in)
        config, name = chain((5, 4, 3), entry(kind, "c", filters=2, **common)), "kernel"
        out = (10, 8) if padding == "same" else (11, 9)
        expected = spatial.deconvolve(x, kernel.transpose(0, 1, 3, 2), (2, 2), padding, False, out) + bias
    else:
        kernel, bias = draw(3, 3, 3, 1), draw(3)
        config, name = chain((5, 4, 3), entry(kind, "c", depth_multiplier=1, **common)), "depthwise_kernel"
        parts = [spatial.convolve(x[..., c : c + 1], kernel[:, :, c : c + 1], (2, 2), padding, False) for c in range(3)]
        expected = np.concatenate(parts, -1) + bias
    path = save(tmp_path / "o.h5", config, {"c": [(f"c/{name}:0", kernel), ("c/bias:0", bias)]})
    np.testing.assert_allclose(predicted(path, tmp_path, x), expected, atol=1e-5)


@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
def test_bilinear_sampling_from_the_corners(order, tmp_path):
    """Place i of the output lies at i / size of the input in Keras 2.2.3 to 2.3.1, and never behind the last."""
    x, kernel, bias = draw(2, 3, 4, 2), draw(1, 1, 2, 2), draw(2)
    rows, columns = (np.minimum(np.arange(n * f) / f, n - 1) for n, f in ((3, 2), (4, 3)))
    tall = np.stack([[[np.interp(rows, range(3), x[n, :, w, c]) for c in range(2)] for w in range(4)] for n in range(2)])
    wide = np.stack(
        [[[np.interp(columns, range(4), tall[n, :, c, y]) for c in range(2)] for y in range(6)] for n in range(2)]
    )
    expected = np.einsum("nycw,cd->nywd", wide, kernel[0, 0]) + bias
    first = order == "channels_first"
    conv = entry("Conv2D", "c", filters=2, kernel_size=[1, 1], data_format=order, activation="linear")
    up = entry("UpSampling2D", "u", size=[2, 3], interpolation="bilinear", data_format=order)
    config = chain((2, 3, 4) if first else (3, 4, 2), up, conv)
    path = save(tmp_path / "o.h5", config, {"u": [], "c": [("c/kernel:0", kernel), ("c/bias:0", bias)]}, version="2.2.4")
    got = predicted(path, tmp_path, np.moveaxis(x, -1, 1) if first else x)
    np.testing.assert_allclose(np.moveaxis(got, 1, -1) if first else got, expected, atol=1e-5)


def test_bilinear_sampling_of_tf_keras(tmp_path):
    options = {"size": [2, 2], "interpolation": "bilinear", "data_format": "channels_last"}
    config = chain((3, 4, 2), entry("UpSampling2D", "u", **options))
    x = draw(2, 3, 4, 2)
    for version, assumed in (("2.2.4-tf", 1), ("2.4.0", 0)):
        report = migrate(save(tmp_path / "o.h5", config, {"u": []}, version=version))
        expected = keras.layers.UpSampling2D(2, interpolation="bilinear")(x)
        np.testing.assert_allclose(report.model.predict_on_batch(x), keras.ops.convert_to_numpy(expected), atol=1e-5)
        assert len(report.layers[-1].assumed) == assumed


def test_weights_alone_say_who_wrote_them(tmp_path):
    kernel, bias, x = draw(5, 4), draw(4), draw(3, 5)
    config = chain((5,), entry("Dense", "d", units=4, activation="tanh"))
    path = save(tmp_path / "w.h5", None, {"d": [("d/kernel:0", kernel), ("d/bias:0", bias)]}, whole=False)
    (tmp_path / "a.json").write_text(json.dumps(json.dumps(config)))  # as json.dump(model.to_json()) wrote it
    got = predicted(path, tmp_path, x, architecture=tmp_path / "a.json")
    np.testing.assert_allclose(got, np.tanh(x @ np.float64(kernel) + bias), atol=1e-5)
    assert migrate(path, architecture=config).written_by == "Keras 2.1.6 on tensorflow"
