"""The batch-normalization layers of several libraries, behind one face: train on a batch, read the moving statistics.

Everything but NumPy is imported where it is used.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

CHANNELS = 32
EPSILON = 1e-3


class Layer(ABC):
    """A layer of one library, with momentum 0.9 of the old average and epsilon 1e-3."""

    name: str
    kind: Any
    """What a user calls: its signature tells what it can do."""

    @abstractmethod
    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        """One training step's output; the moving statistics follow."""

    @abstractmethod
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Moving mean and variance."""

    def of_complex(self) -> Layer:
        """The same layer, told to expect complex numbers where it has to be told."""
        return self

    def takes_residual(self) -> bool:
        """Whether something is added to the output before the activation, in the same pass."""
        return "residual" in arguments(self)

    @abstractmethod
    def kept(self, x: np.ndarray) -> tuple[float | None, float | None]:
        """What a layer with ReLU keeps for backward, in arrays like x; and what it does with a dense layer behind it."""


class Torch(Layer):
    def __init__(self, ours: bool) -> None:
        import torch

        import evennorm.torch

        self.name, self.torch = "evennorm.torch" if ours else "torch.nn", torch
        self.kind = (evennorm.torch if ours else torch.nn).BatchNorm1d
        self.fused = {"activation": "relu"} if ours else {}
        self.layer = self.kind(CHANNELS, eps=EPSILON, momentum=0.1)

    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        tensor = self.torch.tensor(x)
        tensor = tensor.movedim(-1, 1) if x.ndim > 2 else tensor  # the channels of torch are always dimension 1
        mask = {name: self.torch.tensor(value)[:, None] for name, value in options.items()}
        return self.layer(tensor, **mask).detach().numpy()

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return self.layer.running_mean.numpy().copy(), self.layer.running_var.numpy().copy()

    def kept(self, x: np.ndarray) -> tuple[float, float]:
        layer = self.kind(CHANNELS, **self.fused)
        rectify = (lambda y: y) if self.fused else self.torch.relu
        return kept_by_torch(lambda tensor: rectify(layer(tensor)), x)


class Keras(Layer):
    """On the backend of this process."""

    def __init__(self, ours: bool) -> None:
        import keras

        import evennorm.keras

        self.keras, self.backend = keras, keras.backend.backend()
        words = {"jax": "JAX", "torch": "torch", "tensorflow": "TensorFlow"}[self.backend]
        self.name = f"{'evennorm.keras' if ours else 'Keras'} on {words}"
        self.kind = (evennorm.keras if ours else keras.layers).BatchNormalization
        self.fused = {"activation": "relu"} if ours else {}
        self.layer = self.kind(momentum=0.9, epsilon=EPSILON)

    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        return self.keras.ops.convert_to_numpy(self.layer(x, training=True, **options))

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        found = (self.layer.moving_mean, self.layer.moving_variance)
        mean, variance = (np.array(self.keras.ops.convert_to_numpy(value)) for value in found)
        return mean, variance

    def takes_residual(self) -> bool:
        x = np.ones((4, CHANNELS), np.float32)
        try:
            y = self.kind()(x, residual=x, training=True)
        except Exception:
            return False
        return np.allclose(self.keras.ops.convert_to_numpy(y), x, atol=1e-5)

    def kept(self, x: np.ndarray) -> tuple[float | None, float | None]:
        layer = self.kind(**self.fused)
        layer.build(x.shape)
        rectify = (lambda y: y) if self.fused else self.keras.activations.relu
        if self.backend == "torch":
            return kept_by_torch(lambda tensor: rectify(layer(tensor, training=True)), x)
        if self.backend == "tensorflow":
            return None, None  # its graph does not say what it keeps
        trainable = [variable.value for variable in layer.trainable_variables]
        state = [variable.value for variable in layer.non_trainable_variables]
        return kept_by_jax(lambda w, x: rectify(layer.stateless_call(w, state, x, training=True)[0]), trainable, x)


class Nnx(Layer):
    def __init__(self, ours: bool, **options: Any) -> None:
        from flax import nnx

        import evennorm.flax

        words = "".join(f", {name}={value}" for name, value in options.items())
        self.name, self.nnx, self.options = f"{'evennorm.flax' if ours else 'Flax nnx'}{words}", nnx, options
        self.kind = evennorm.flax.BatchNorm if ours else nnx.BatchNorm
        self.fused = {"activation": "relu"} if ours else {}
        self.layer = self.kind(CHANNELS, momentum=0.9, epsilon=EPSILON, rngs=nnx.Rngs(0), **options)

    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        mask = {name: value[..., None] for name, value in options.items()}
        return np.asarray(self.layer(x, use_running_average=False, **mask))

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.layer.mean[...]), np.array(self.layer.var[...])

    def kept(self, x: np.ndarray) -> tuple[float, float]:
        import jax

        layer = self.kind(CHANNELS, rngs=self.nnx.Rngs(0), **self.fused, **self.options)
        graph, weights, state = self.nnx.split(layer, self.nnx.Param, ...)
        rectify = (lambda y: y) if self.fused else jax.nn.relu

        def run(weights: Any, x: Any) -> Any:
            return rectify(self.nnx.merge(graph, weights, state, copy=True)(x, use_running_average=False))

        return kept_by_jax(run, weights, x)


class Linen(Layer):
    name = "Flax linen"

    def __init__(self) -> None:
        from flax import linen

        self.kind = linen.BatchNorm
        self.layer = linen.BatchNorm(momentum=0.9, epsilon=EPSILON, use_running_average=False)
        self.variables = self.layer.init(_key(), np.ones((2, CHANNELS), "float32"))

    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        mask = {name: value[..., None] for name, value in options.items()}
        y, changed = self.layer.apply(self.variables, x, mutable=["batch_stats"], **mask)
        self.variables = {**self.variables, **changed}
        return np.asarray(y)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        found = self.variables["batch_stats"]
        return np.array(found["mean"]), np.array(found["var"])

    def kept(self, x: np.ndarray) -> tuple[float, float]:
        import jax

        state = self.variables["batch_stats"]

        def run(weights: Any, x: Any) -> Any:
            y, _ = self.layer.apply({"params": weights, "batch_stats": state}, x, mutable=["batch_stats"])
            return jax.nn.relu(y)

        return kept_by_jax(run, self.variables["params"], x)


class Haiku(Layer):
    def __init__(self, ours: bool) -> None:
        import haiku

        import evennorm.haiku

        self.name = "evennorm.haiku" if ours else "Haiku"
        self.kind = (evennorm.haiku if ours else haiku).BatchNorm
        self.transform = haiku.transform_with_state
        self.fused = {"activation": "relu"} if ours else {}
        self.state: Any = None

    def _made(self, x: np.ndarray, **options: Any) -> tuple[Any, Any, Any]:
        """Its function, parameters and state, whose shapes depend on the rank of x."""
        settings = {"decay_rate": 0.9, "eps": EPSILON, **options}
        layer = self.transform(lambda x, **given: self.kind(True, True, **settings)(x, True, **given))
        return layer.apply, *layer.init(_key(), np.ones_like(x))

    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        if self.state is None:
            self.apply, self.weights, self.state = self._made(x)
        mask = {name: value[..., None] for name, value in options.items()}
        y, self.state = self.apply(self.weights, self.state, None, x, **mask)
        return np.asarray(y)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = (np.array(self.state[f"batch_norm/~/{name}_ema"]["average"]).ravel() for name in ("mean", "var"))
        return mean, variance

    def kept(self, x: np.ndarray) -> tuple[float, float]:
        import jax

        apply, weights, state = self._made(x, **self.fused)
        rectify = (lambda y: y) if self.fused else jax.nn.relu
        return kept_by_jax(lambda w, x: rectify(apply(w, state, None, x)[0]), weights, x)


class Equinox(Layer):
    def __init__(self, ours: bool, dtype: str | None = None) -> None:
        import equinox
        import jax

        import evennorm.equinox

        self.name = "evennorm.equinox" if ours else "Equinox"
        self.kind = (evennorm.equinox if ours else equinox.nn).BatchNorm
        self.jax, self.equinox, self.ours, self.dtype = jax, equinox, ours, dtype
        self.fused = {"activation": "relu"} if ours else {}
        self.layer, self.state = self._made()

    def _made(self, **options: Any) -> Any:
        settings = {"eps": EPSILON, "momentum": 0.9, "dtype": self.dtype, "mode": "batch", **options}
        return self.equinox.nn.make_with_state(self.kind)(CHANNELS, "batch", **settings)

    def of_complex(self) -> Layer:
        return Equinox(self.ours, "complex64")

    def train(self, x: np.ndarray, **options: Any) -> np.ndarray:
        if options:
            raise TypeError("no such argument")
        x = np.moveaxis(x, -1, 1)  # channels come first
        run = self.jax.vmap(self.layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        y, self.state = run(x, self.state)
        return np.asarray(y)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = (np.array(value) for value in self.state.get(self.layer.batch_state_index))
        return mean, variance

    def kept(self, x: np.ndarray) -> tuple[float, float]:
        made, state = self._made(**self.fused)
        weights, rest = self.equinox.partition(made, self.equinox.is_inexact_array)
        rectify = (lambda y: y) if self.fused else self.jax.nn.relu

        def run(weights: Any, x: Any) -> Any:
            layer = self.equinox.combine(weights, rest)
            y, _ = self.jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
            return rectify(y)

        return kept_by_jax(run, weights, x)


def arguments(layer: Layer) -> set[str]:
    """Those of the constructor and of a call, base classes included."""
    names = ("__init__", "__call__", "forward", "call")
    methods = [getattr(kind, name, None) for kind in layer.kind.__mro__ for name in names]
    return {name for method in methods if inspect.isfunction(method) for name in inspect.signature(method).parameters}


def _key() -> Any:
    import jax

    return jax.random.key(0)


def kept_by_torch(run: Callable[[Any], Any], x: np.ndarray) -> tuple[float, float]:
    """Bytes of the storages that autograd keeps, in arrays like x."""
    import torch

    found = []
    for dense in (False, True):
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaf, weights = torch.tensor(x, requires_grad=True), torch.ones(x.shape[-1], 1, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = run(leaf)
            y = y @ weights if dense else y
        found.append(sum(kept.values()) / x.nbytes)
    return found[0], found[1]


def kept_by_jax(run: Callable[..., Any], weights: Any, x: np.ndarray) -> tuple[float, float]:
    """Bytes of the arrays in the linear function that jax.vjp returns, in arrays like x."""
    import jax
    import jax.numpy as jnp

    found = []
    for dense in (False, True):

        def forward(weights: Any, kernel: Any, x: Any, dense: bool = dense) -> Any:
            y = run(weights, x)
            return y @ kernel if dense else y

        _, back = jax.vjp(forward, weights, jnp.ones((x.shape[-1], 1)), jnp.asarray(x))
        arrays = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(back) if hasattr(leaf, "nbytes")}
        found.append(sum(arrays.values()) / x.nbytes)
    return found[0], found[1]


def layers(engine: str) -> list[Callable[[], Layer]]:
    """Constructors of those that a process with this Keras backend measures."""
    warnings.filterwarnings("ignore")
    keras = [partial(Keras, True), partial(Keras, False)]
    if engine == "torch":
        return [partial(Torch, True), partial(Torch, False), *keras]
    if engine == "tensorflow":
        return keras
    flax = [partial(Nnx, True), partial(Nnx, False), partial(Nnx, False, use_fast_variance=False), Linen]
    return [*keras, *flax, *(partial(kind, ours) for kind in (Haiku, Equinox) for ours in (True, False))]
