"""Keras 1 in float64 NumPy: a configuration and an input go in, what that model predicted comes out; and its HDF5 files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from tests.migration import spatial

Config = dict[str, Any]


def hard_sigmoid(x):
    return np.clip(0.2 * x + 0.5, 0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


ACTIVATIONS: dict[str, Callable] = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "hard_sigmoid": hard_sigmoid,
    "softmax": softmax,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
}


class Keras1:
    """One model of one release on one backend; weights are drawn when a layer is first called."""

    def __init__(self, backend="tensorflow", version="1.2.2", seed=0):
        self.theano = backend == "theano"
        self.backend, self.version = backend, tuple(map(int, version.split(".")))
        self.rng = np.random.default_rng(seed)
        self.weights: dict[str, list[tuple[str, np.ndarray]]] = {}
        """By layer: stored names and values, in the order they are stored."""

    # Running

    def predict(self, model: Config | list, *inputs):
        if isinstance(model, list):
            return self._sequential(model, inputs)
        if model["class_name"] == "Sequential":
            return self._sequential(model["config"], inputs)
        return self._functional(model["config"], inputs)

    def _sequential(self, layers, inputs):
        first, *rest = layers
        if first["class_name"] == "Merge" and "layers" in first["config"]:
            branches = first["config"]["layers"]
            x = [self.predict(branch, x) for branch, x in zip(branches, inputs, strict=True)]
            x = merge(first["config"], x)
        else:
            x, rest = inputs[0], layers
        for layer in rest:
            x = self.call(layer, x)
        return x

    def _functional(self, config, inputs):
        given = iter(inputs)
        values: dict[tuple[str, int, int], Any] = {}
        containers = {x["name"] for x in config["layers"] if x["class_name"] in ("Model", "Sequential")}
        for layer in config["layers"]:
            if layer["class_name"] == "InputLayer":
                values[layer["name"], 0, 0] = next(given)
            for index, node in enumerate(layer["inbound_nodes"]):
                x = [values[name, number, tensor] for name, number, tensor in node]
                number = index + (layer["name"] in containers)
                values[layer["name"], number, 0] = self.call(layer, x if len(x) > 1 else x[0])
        outputs = [values[tuple(ref)] for ref in config["output_layers"]]
        return outputs if len(outputs) > 1 else outputs[0]

    def call(self, layer, x):
        kind, config = layer["class_name"], layer["config"]
        if kind in ("Model", "Sequential"):
            return self.predict(layer, x)
        return getattr(self, kind)(config, x)

    def weight(self, config, suffix, shape, positive=False, name=None):
        """Drawn at the first call."""
        name = name or config["name"]
        stored = self.weights.setdefault(name, [])
        for known, value in stored:
            if known == f"{name}_{suffix}":
                return value
        value = self.rng.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1) if len(shape) > 1 else 4)
        value = np.float32(np.abs(value) + 0.5 if positive else value)
        stored.append((f"{name}_{suffix}", value))
        return value.astype(np.float64)

    # Layers

    def Dense(self, config, x):  # noqa: N802
        y = x @ self.weight(config, "W", (x.shape[-1], config["output_dim"]))
        if config.get("bias", True):
            y = y + self.weight(config, "b", (config["output_dim"],))
        return ACTIVATIONS[config["activation"]](y)

    TimeDistributedDense = Dense

    def Activation(self, config, x):  # noqa: N802
        return ACTIVATIONS[config["activation"]](x)

    def Dropout(self, config, x):  # noqa: N802
        return x

    SpatialDropout2D = GaussianNoise = GaussianDropout = ActivityRegularization = Dropout

    def Flatten(self, config, x):  # noqa: N802
        return x.reshape(len(x), -1)

    def Reshape(self, config, x):  # noqa: N802
        return x.reshape(len(x), *config["target_shape"])

    def Permute(self, config, x):  # noqa: N802
        return x.transpose(0, *config["dims"])

    def RepeatVector(self, config, x):  # noqa: N802
        return np.repeat(x[:, None], config["n"], axis=1)

    def Masking(self, config, x):  # noqa: N802
        return x * (x != config["mask_value"]).any(-1, keepdims=True)

    def Embedding(self, config, x):  # noqa: N802
        return self.weight(config, "W", (config["input_dim"], config["output_dim"]))[x.astype(int)]

    def _bias(self, config, y, order, count):
        if not config.get("bias", True):
            return y
        bias = self.weight(config, "b", (count,))
        return y + bias.reshape((1, count) + (1,) * (y.ndim - 2) if order == "th" else count)

    def _convolution(self, config, x, size, strides, order, dilation=None):
        channels = x.shape[1] if order == "th" else x.shape[-1]
        filters = config["nb_filter"]
        shape = (filters, channels, *size) if order == "th" else (*size, channels, filters)
        kernel = self.weight(config, "W", shape)
        if order == "th":
            kernel = np.moveaxis(kernel, (0, 1), (-1, -2))
        y = spatial.convolve(spatial.channels_last(x, order), kernel, strides, config["border_mode"], self.theano, dilation)
        y = self._bias(config, spatial.as_ordered(y, order), order, filters)
        return ACTIVATIONS[config["activation"]](y)

    def Convolution1D(self, config, x):  # noqa: N802
        size, stride = config["filter_length"], config["subsample_length"]
        dilation = (config.get("atrous_rate", 1), 1)
        return self._convolution(config, x[:, :, None], (size, 1), (stride, 1), "tf", dilation)[:, :, 0]

    AtrousConvolution1D = Convolution1D

    def Convolution2D(self, config, x):  # noqa: N802
        size = config["nb_row"], config["nb_col"]
        rate = config.get("atrous_rate")
        return self._convolution(config, x, size, config["subsample"], config["dim_ordering"], rate)

    AtrousConvolution2D = Convolution2D

    def Convolution3D(self, config, x):  # noqa: N802
        size = tuple(config[f"kernel_dim{d}"] for d in (1, 2, 3))
        return self._convolution(config, x, size, config["subsample"], config["dim_ordering"])

    def Deconvolution2D(self, config, x):  # noqa: N802
        order, filters = config["dim_ordering"], config["nb_filter"]
        size = config["nb_row"], config["nb_col"]
        channels = x.shape[1] if order == "th" else x.shape[-1]
        kernel = self.weight(config, "W", (filters, channels, *size) if order == "th" else (*size, channels, filters))
        if order == "th":
            kernel = kernel.transpose(2, 3, 1, 0)
        out = config["output_shape"][2:] if order == "th" else config["output_shape"][1:3]
        y = spatial.deconvolve(
            spatial.channels_last(x, order), kernel, config["subsample"], config["border_mode"], self.theano, out
        )
        y = self._bias(config, spatial.as_ordered(y, order), order, filters)
        return ACTIVATIONS[config["activation"]](y)

    def SeparableConvolution2D(self, config, x):  # noqa: N802
        order, filters, multiplier = config["dim_ordering"], config["nb_filter"], config["depth_multiplier"]
        size = config["nb_row"], config["nb_col"]
        channels = x.shape[1] if order == "th" else x.shape[-1]
        inner = channels * multiplier
        shapes = ((*size, channels, multiplier), (1, 1, inner, filters))
        if order == "th":
            shapes = ((multiplier, channels, *size), (filters, inner, 1, 1))
        depthwise = self.weight(config, "depthwise_kernel", shapes[0])
        pointwise = self.weight(config, "pointwise_kernel", shapes[1])
        if order == "th":
            depthwise, pointwise = depthwise.transpose(2, 3, 1, 0), pointwise.transpose(2, 3, 1, 0)
        x = spatial.channels_last(x, order)
        parts = [
            spatial.convolve(
                x[..., c : c + 1], depthwise[:, :, c : c + 1], config["subsample"], config["border_mode"], False
            )
            for c in range(channels)
        ]
        y = self._bias(config, spatial.as_ordered(np.concatenate(parts, -1) @ pointwise[0, 0], order), order, filters)
        return ACTIVATIONS[config["activation"]](y)

    def _locally(self, config, x, size, strides, order):
        filters = config["nb_filter"]
        rank = len(size)
        sizes = x.shape[2:] if order == "th" else x.shape[1:-1]
        out = [(n - k) // s + 1 for n, k, s in zip(sizes, size, strides, strict=True)]
        channels = x.shape[1] if order == "th" else x.shape[-1]
        kernel = self.weight(config, "W", (int(np.prod(out)), int(np.prod(size)) * channels, filters))
        y = np.zeros((len(x), *out, filters))
        for index, position in enumerate(np.ndindex(*out)):
            where = tuple(slice(p * s, p * s + k) for p, s, k in zip(position, strides, size, strict=True))
            window = x[(slice(None), slice(None), *where)] if order == "th" else x[(slice(None), *where)]
            y[(slice(None), *position)] = window.reshape(len(x), -1) @ kernel[index]
        y = spatial.as_ordered(y, order)
        if config.get("bias", True):
            bias = self.weight(config, "b", (*out, filters))
            y = y + (bias.reshape(1, filters, *out) if order == "th" else bias)  # reshaped, not turned
        assert rank in (1, 2)
        return ACTIVATIONS[config["activation"]](y)

    def LocallyConnected1D(self, config, x):  # noqa: N802
        return self._locally(config, x, (config["filter_length"],), (config["subsample_length"],), "tf")

    def LocallyConnected2D(self, config, x):  # noqa: N802
        return self._locally(config, x, (config["nb_row"], config["nb_col"]), config["subsample"], config["dim_ordering"])

    def _pool(self, config, x, largest):
        order = config.get("dim_ordering", "tf")
        if "pool_length" in config:
            stride = config["stride"] or config["pool_length"]
            return spatial.pool(x, (config["pool_length"],), (stride,), config["border_mode"], self.theano, largest)
        strides = config["strides"] or config["pool_size"]
        moved = spatial.channels_last(x, order)
        y = spatial.pool(moved, config["pool_size"], strides, config["border_mode"], self.theano, largest)
        return spatial.as_ordered(y, order)

    def MaxPooling2D(self, config, x):  # noqa: N802
        return self._pool(config, x, True)

    def AveragePooling2D(self, config, x):  # noqa: N802
        return self._pool(config, x, False)

    MaxPooling1D = MaxPooling3D = MaxPooling2D
    AveragePooling1D = AveragePooling3D = AveragePooling2D

    def GlobalAveragePooling2D(self, config, x):  # noqa: N802
        return (
            spatial.channels_last(x, config.get("dim_ordering", "tf"))
            .reshape(len(x), -1, x.shape[1] if config.get("dim_ordering") == "th" else x.shape[-1])
            .mean(1)
        )

    GlobalAveragePooling1D = GlobalAveragePooling2D

    def GlobalMaxPooling2D(self, config, x):  # noqa: N802
        moved = spatial.channels_last(x, config.get("dim_ordering", "tf"))
        return moved.reshape(len(x), -1, moved.shape[-1]).max(1)

    GlobalMaxPooling1D = GlobalMaxPooling2D

    order = "tf"
    """Of the classes that did not store it."""

    def ZeroPadding2D(self, config, x):  # noqa: N802
        p = config["padding"]
        p = [p[k] for k in ("top_pad", "bottom_pad", "left_pad", "right_pad")] if isinstance(p, dict) else list(p)
        p = [p[0], p[0], p[1], p[1]] if len(p) == 2 else p
        y = np.pad(spatial.channels_last(x, self.order), [(0, 0), p[:2], p[2:], (0, 0)])
        return spatial.as_ordered(y, self.order)

    def ZeroPadding1D(self, config, x):  # noqa: N802
        p = config["padding"]
        return np.pad(x, [(0, 0), (p, p) if isinstance(p, int) else p, (0, 0)])

    def Cropping2D(self, config, x):  # noqa: N802
        (a, b), (c, d) = config["cropping"]
        y = spatial.channels_last(x, self.order)
        return spatial.as_ordered(y[:, a : y.shape[1] - b, c : y.shape[2] - d], self.order)

    def Cropping1D(self, config, x):  # noqa: N802
        a, b = config["cropping"]
        return x[:, a : x.shape[1] - b]

    def UpSampling2D(self, config, x):  # noqa: N802
        y = spatial.channels_last(x, self.order)
        return spatial.as_ordered(y.repeat(config["size"][0], 1).repeat(config["size"][1], 2), self.order)

    def UpSampling1D(self, config, x):  # noqa: N802
        return x.repeat(config["length"], 1)

    def BatchNormalization(self, config, x):  # noqa: N802
        axis, epsilon, mode = config["axis"], config["epsilon"], config["mode"]
        channels = x.shape[axis]
        gamma, beta, mean = (self.weight(config, name, (channels,)) for name in ("gamma", "beta", "running_mean"))
        fourth = self.weight(config, "running_std", (channels,), positive=True)
        if mode == 1:
            m = x.mean(-1, keepdims=True)
            if self.version <= (1, 0, 4):
                return gamma * (x - m) / (x.std(-1, keepdims=True) + epsilon) + beta
            return gamma * (x - m) / (np.sqrt(x.var(-1, keepdims=True) + epsilon) + epsilon) + beta
        shape = [1] * x.ndim
        shape[axis] = channels
        gamma, beta, mean, fourth = (v.reshape(shape) for v in (gamma, beta, mean, fourth))
        if mode == 2:
            axes = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
            return gamma * (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon) + beta
        if self.version <= (1, 0, 5) or (self.version == (1, 0, 6) and self.theano):
            return gamma * (x - mean) / (fourth + epsilon) + beta
        if self.version == (1, 0, 7) and self.theano:
            return gamma * (x - mean) / (np.sqrt(fourth) + epsilon) + beta
        return gamma * (x - mean) / np.sqrt(fourth + epsilon) + beta

    def LeakyReLU(self, config, x):  # noqa: N802
        return np.where(x > 0, x, config["alpha"] * x)

    def ELU(self, config, x):  # noqa: N802
        return np.where(x > 0, x, config["alpha"] * np.expm1(x))

    def ThresholdedReLU(self, config, x):  # noqa: N802
        return x * (x > config["theta"])

    def _parameter(self, config, suffix, x):
        shape = [1 if a + 1 in config.get("_shared", ()) else n for a, n in enumerate(x.shape[1:])]
        return self.weight(config, suffix, shape)

    def PReLU(self, config, x):  # noqa: N802
        return np.maximum(x, 0) + self._parameter(config, "alphas", x) * (x - np.abs(x)) * 0.5

    def ParametricSoftplus(self, config, x):  # noqa: N802
        alphas, betas = (self._parameter(config, name, x) for name in ("alphas", "betas"))
        return np.log1p(np.exp(betas * x)) * alphas

    def SReLU(self, config, x):  # noqa: N802
        t_left, a_left, t_right, a_right = (
            self._parameter(config, name, x) for name in ("t_left", "a_left", "t_right", "a_right")
        )
        actual = t_left + np.abs(t_right)
        u = x - t_left
        center = np.clip(np.maximum(u, 0), 0, actual - t_left) - a_left * np.maximum(-u, 0)
        return t_left + center + np.maximum(x - actual, 0) * a_right

    def MaxoutDense(self, config, x):  # noqa: N802
        features, units = config["nb_feature"], config["output_dim"]
        y = np.einsum("ni,fio->nfo", x, self.weight(config, "W", (features, x.shape[1], units)))
        return (y + self.weight(config, "b", (features, units))).max(1)

    def Highway(self, config, x):  # noqa: N802
        n = x.shape[1]
        old = self.version < (1, 1, 0)
        shapes = {"W": (n, n), "b": (n,), "W_carry": (n, n), "b_carry": (n,)}
        names = ("W", "b", "W_carry", "b_carry") if old else ("W", "W_carry", "b", "b_carry")
        found = {name: self.weight(config, name, shapes[name]) for name in names}
        gate = sigmoid(x @ found["W_carry"] + found["b_carry"])
        return ACTIVATIONS[config["activation"]](x @ found["W"] + found["b"]) * gate + (1 - gate) * x

    # Recurrent

    def _gates(self, config, inputs, gates, name):
        units = config["output_dim"]
        if config["consume_less"] == "gpu":
            w = self.weight(config, "W", (inputs, len(gates) * units), name=name)
            u = self.weight(config, "U", (units, len(gates) * units), name=name)
            b = self.weight(config, "b", (len(gates) * units,), name=name)
            stored = "ifco" if len(gates) == 4 else gates
            parts = [np.split(x, len(gates), -1) for x in (w, u, b)]
            return {gate: tuple(part[k] for part in parts) for k, gate in enumerate(stored)}
        return {
            gate: (
                self.weight(config, f"W_{gate}", (inputs, units), name=name),
                self.weight(config, f"U_{gate}", (units, units), name=name),
                self.weight(config, f"b_{gate}", (units,), name=name),
            )
            for gate in gates
        }

    def _run(self, config, x, step, states, mask):
        order = range(x.shape[1])[:: -1 if config["go_backwards"] else 1]
        outputs = []
        h = [np.zeros((len(x), config["output_dim"])) for _ in range(states)]
        for t in order:
            new = step(x[:, t], h)
            if mask is not None:
                keep = mask[:, t, None]
                new = [np.where(keep, a, b) for a, b in zip(new, h, strict=True)]
            h = new
            outputs.append(h[0])
        return np.stack(outputs, 1) if config["return_sequences"] else outputs[-1]

    def LSTM(self, config, x, name=None, mask=None):  # noqa: N802
        g = self._gates(config, x.shape[-1], "icfo", name)
        act, inner = ACTIVATIONS[config["activation"]], ACTIVATIONS[config["inner_activation"]]

        def step(x, states):
            h, c = states
            i, c_new, f, o = (x @ g[k][0] + h @ g[k][1] + g[k][2] for k in "icfo")
            c = inner(f) * c + inner(i) * act(c_new)
            return [inner(o) * act(c), c]

        return self._run(config, x, step, 2, mask)

    def GRU(self, config, x, name=None, mask=None):  # noqa: N802
        g = self._gates(config, x.shape[-1], "zrh", name)
        act, inner = ACTIVATIONS[config["activation"]], ACTIVATIONS[config["inner_activation"]]

        def step(x, states):
            (h,) = states
            z = inner(x @ g["z"][0] + h @ g["z"][1] + g["z"][2])
            r = inner(x @ g["r"][0] + h @ g["r"][1] + g["r"][2])
            new = act(x @ g["h"][0] + (r * h) @ g["h"][1] + g["h"][2])
            return [z * h + (1 - z) * new]

        return self._run(config, x, step, 1, mask)

    def SimpleRNN(self, config, x, name=None, mask=None):  # noqa: N802
        units = config["output_dim"]
        w, u, b = (
            self.weight(config, s, shape, name=name)
            for s, shape in (("W", (x.shape[-1], units)), ("U", (units, units)), ("b", (units,)))
        )
        act = ACTIVATIONS[config["activation"]]
        return self._run(config, x, lambda x, h: [act(x @ w + h[0] @ u + b)], 1, mask)

    def Bidirectional(self, config, x, mask=None):  # noqa: N802
        inner = config["layer"]["config"]
        run = getattr(self, config["layer"]["class_name"])
        forward = run(inner, x, name=f"forward_{inner['name']}", mask=mask)
        turned = inner | {"go_backwards": not inner["go_backwards"]}
        backward = run(turned, x, name=f"backward_{inner['name']}", mask=mask)
        if inner["return_sequences"]:
            backward = backward[:, ::-1]
        for side in ("forward_", "backward_"):
            stored = self.weights.pop(f"{side}{inner['name']}", None)
            if stored is not None:
                self.weights.setdefault(config["name"], []).extend(stored)
        return {
            "concat": lambda: np.concatenate([forward, backward], -1),
            "sum": lambda: forward + backward,
            "mul": lambda: forward * backward,
            "ave": lambda: (forward + backward) / 2,
        }[config["merge_mode"]]()

    def TimeDistributed(self, config, x):  # noqa: N802
        inner = config["layer"]
        y = self.call(inner, x.reshape(-1, *x.shape[2:]))
        self.weights[config["name"]] = self.stored(inner)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def Merge(self, config, x):  # noqa: N802
        return merge(config, x)

    # Files

    def stored(self, layer) -> list[tuple[str, np.ndarray]]:
        """The weights of a layer as Keras 1 listed them: of a model first all trainable ones, then the others."""
        if layer["class_name"] not in ("Model", "Sequential"):
            name = layer["config"]["name"]
            return self.weights.get(name, [])
        config = layer["config"]
        inner = config if isinstance(config, list) else config["layers"]
        weights = [(x, w) for x in inner for w in self.stored(x)]

        def fixed(x, name):
            return "running_" in name or not (isinstance(x["config"], list) or x["config"].get("trainable", True))

        return [w for x, w in weights if not fixed(x, w[0])] + [w for x, w in weights if fixed(x, w[0])]

    def save(self, path, model: Config, whole=True, named=True):
        """As Keras 1 wrote it; `whole` files hold the configuration and the version."""
        with h5py.File(path, "w") as file:
            root = file
            if whole:
                file.attrs["keras_version"] = ".".join(map(str, self.version)).encode()
                file.attrs["model_config"] = json.dumps(model).encode()
                root = file.create_group("model_weights")
            layers = list({self._name(layer): layer for layer in self._flattened(model)}.values())
            if not named:
                root.attrs["nb_layers"] = len(layers)
            else:
                root.attrs["layer_names"] = [self._name(layer).encode() for layer in layers]
            for k, layer in enumerate(layers):
                stored = self.stored(layer)
                if not named:
                    group = root.create_group(f"layer_{k}")
                    group.attrs["nb_params"] = len(stored)
                    for p, (_, value) in enumerate(stored):
                        group[f"param_{p}"] = np.float32(value)
                    continue
                group = root.create_group(self._name(layer))
                names = [name if self.theano else f"{name}:0" for name, _ in stored]
                group.attrs["weight_names"] = [name.encode() for name in names]
                for name, (_, value) in zip(names, stored, strict=True):
                    group.create_dataset(name, data=np.float32(value))
        return path

    def _name(self, layer):
        return layer.get("name") or layer["config"]["name"]

    def _flattened(self, model):
        config = model["config"]
        if not isinstance(config, list):
            return config["layers"]
        first = config[0]
        if first["class_name"] == "Merge" and "layers" in first["config"]:
            return [x for branch in first["config"]["layers"] for x in self._flattened(branch)] + config[1:]
        return config


def merge(config, x):
    mode = config["mode"]
    if mode == "concat":
        return np.concatenate(x, config["concat_axis"])
    if mode in ("dot", "cos"):
        axes = config["dot_axes"]
        a, b = axes if isinstance(axes, list) else (axes, axes)

        def dot(p, q):
            letters = "nabc"[: p.ndim], "nxyz"[: q.ndim]
            left = letters[0].replace(letters[0][a], "s")
            right = letters[1].replace(letters[1][b], "s")
            y = np.einsum(f"{left},{right}->n{left[1:].replace('s', '')}{right[1:].replace('s', '')}", p, q)
            return y[:, None] if y.ndim == 1 else y

        if mode == "dot":
            return dot(*x)
        return (dot(*x) / np.maximum(np.sqrt(dot(x[0], x[0]) * dot(x[1], x[1])), 1e-7))[:, None]
    stack = np.stack(x)
    return {"sum": stack.sum, "ave": stack.mean, "mul": stack.prod, "max": stack.max}[mode](axis=0)
