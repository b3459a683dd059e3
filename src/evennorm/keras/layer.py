"""Provide the Keras layer: casting, weights and state around the backends' batch normalization."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from evennorm.core.activation import LINEAR
from evennorm.core.call import Call, checked_epsilon
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.sample import normalize_samples
from evennorm.keras import arguments, moving
from evennorm.keras.arguments import ONES, ZEROS
from evennorm.keras.engine import check_synchronized, current_engine, replicas_apart, synchronized_engine
from evennorm.keras.state import Bookkeeping
from evennorm.kernels import choose

Shape = tuple[int | None, ...]


@keras.saving.register_keras_serializable(package="evennorm")
class BatchNormalization(keras.layers.Layer):
    """Normalization of each channel to mean 0 and variance 1 over the batch, followed by a scale and an offset.

        y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

    In training (mode 0) mean and variance are those of the batch, and the moving statistics follow them:
    `moving = momentum * moving + (1 - momentum) * batch`. At inference, and where `trainable` is False, they are the moving
    ones.

    Everything that Keras 3's layer takes means the same here, and so does everything that Keras 1's took. Weights, their
    names and order, and the files they are saved in are those of Keras 3.

    Args:
        axis: the channel axis, which keeps its own statistics; a tuple for several. Channels-last is -1, channels-first 1.
        momentum: weight of the old average, 0 to 1 (torch's is 1 minus it); None for the plain average of all batches.
        epsilon: added to the variance, 0 or more.
        center, scale: whether there is a beta, a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: initial values.
        beta_regularizer, gamma_regularizer: penalties; objects, names, or the dicts that Keras 1 saved.
        beta_constraint, gamma_constraint: projections after each update.
        renorm, renorm_clipping, renorm_momentum: batch renormalization (Ioffe 2017); clipping has the keys rmax, rmin, dmax.
        synchronized: take the statistics over all devices that train together: the replicas of a tf.distribute strategy, the
            processes of torch.distributed. On JAX, arrays that keras.distribution spreads are normalized as one in any case.
        mode: Keras 1's. 0: as above. 1: each sample on its own, over the last axis, with
            `gamma * (x - mean) / (sqrt(variance + epsilon) + epsilon) + beta`. 2: batch statistics at inference too.
        weights: initial values, [gamma, beta] or [gamma, beta, moving mean, moving variance].
        beta_init, gamma_init: Keras 1's names of the initializers, by its names for them or as `f(shape, name=...)`.
        activation: applied last; any that Keras knows. relu, relu6 and leaky_relu are computed together with the
            normalization.
        virtual_batch_size: samples per ghost batch, each normalized by its own statistics (Hoffer et al. 2017).
        unbiased_variance: let the moving variance follow variance * n / (n - 1), as PyTorch does.
        **kwargs: name, dtype, trainable, and `input_shape` on a first layer.

    Call arguments:
        inputs: a float tensor of any rank; sizes other than the channel's may be unknown.
        training: whether to use the statistics of this batch and update the moving ones.
        mask: true (or nonzero) where a value counts. It holds one value per position, that is the axes that are averaged
            over in their order: (N, T) for inputs (N, T, C), and (N, T) for inputs (N, C, T) with axis 1. One of the inputs'
            rank broadcasts against them, one of fewer axes does not. Masked values are normalized, but act on no statistic;
            a NaN among them acts on no gradient either.
        residual: a tensor like the inputs, added before the activation.

    A batch that would poison the moving statistics (NaN or infinity in any channel, no values, everything masked) leaves
    them as they were; `skipped_batches` counts such batches. With one value per channel a variance cannot be told: the layer
    warns once, and the moving variance stays as it was. It warns at build, too, under a strategy of several replicas whose
    statistics it is not to synchronize.

    Raises:
        ArgumentError: a value outside its range, an old and a new name for one thing, arguments that exclude each other,
            complex inputs, statistics to be synchronized where that is not possible.
        ShapeError: an axis, a mask, a residual or weights that do not fit.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; arguments after Keras 3.15 and Keras 1.2.2.

    Example:
        >>> import numpy as np
        >>> from evennorm.keras import BatchNormalization
        >>> layer = BatchNormalization(epsilon=0.0, momentum=0.5)
        >>> y = layer(np.array([[1.0], [3.0]], "float32"), training=True)
        >>> np.asarray(y).ravel().tolist(), np.asarray(layer.moving_mean).tolist()
        ([-1.0, 1.0], [1.0])
    """

    def __init__(
        self,
        axis: int | Iterable[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = ZEROS,
        gamma_initializer: Any = ONES,
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float | None] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        mode: int = 0,
        weights: Sequence[Any] | None = None,
        beta_init: Any = None,
        gamma_init: Any = None,
        activation: str | Callable[..., Any] | None = None,
        virtual_batch_size: int | None = None,
        unbiased_variance: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**arguments.drop_keras_1_input(kwargs))
        arguments.refuse_complex(dtype=self.variable_dtype)
        self.axis = tuple(int(a) for a in axis) if isinstance(axis, Iterable) else int(axis)
        self.momentum = arguments.momentum(momentum)
        self.epsilon = checked_epsilon(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = arguments.initializer("beta", beta_initializer, beta_init)
        self.gamma_initializer = arguments.initializer("gamma", gamma_initializer, gamma_init)
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(moving_variance_initializer)
        self.beta_regularizer = arguments.regularizer(beta_regularizer)
        self.gamma_regularizer = arguments.regularizer(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.renorm = renorm
        self.renorm_clipping = arguments.renorm_clipping(renorm_clipping) if renorm else renorm_clipping
        self.renorm_momentum = arguments.old_weight("renorm_momentum", renorm_momentum) if renorm else renorm_momentum
        self.synchronized = synchronized
        self.mode = arguments.mode(mode)
        self.activation = keras.activations.get(activation)
        self.virtual_batch_size = arguments.virtual_batch_size(virtual_batch_size)
        self.unbiased_variance = unbiased_variance
        self.supports_masking = True
        if synchronized:
            check_synchronized()
        arguments.refuse_together(mode=bool(mode), renorm=renorm, virtual_batch_size=virtual_batch_size is not None)
        arguments.refuse_together(
            mode=bool(mode), synchronized=synchronized, virtual_batch_size=virtual_batch_size is not None
        )
        # Keras variables from build on.
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.moving_stddev: Any = None
        self.renorm_mean: Any = None
        self.renorm_stddev: Any = None
        self.num_batches: Any = None
        self._initial_weights = None if weights is None else [ops.convert_to_numpy(value) for value in weights]
        self._given_weights: dict[str, Any] = {}
        self._bookkeeping: Any = None
        self._engine: Any = None
        self._built_shape: Shape | None = None
        self._warned: set[str] = set()

    # State

    def build(self, input_shape: Shape) -> None:
        self._engine = current_engine()
        self._built_shape = tuple(input_shape)
        geometry = self._geometry(self._built_shape)
        shape = geometry.parameter_shape
        self._given_weights = arguments.by_name(self._initial_weights, shape, self.scale, self.center)
        if self.scale:
            self.gamma = self._parameter("gamma", shape)
        if self.center:
            self.beta = self._parameter("beta", shape)
        self.moving_mean = self._statistic("moving_mean", shape, self._initializer("moving_mean"))
        self.moving_variance = self._statistic("moving_variance", shape, self._initializer("moving_variance"))
        if self.renorm:
            self.moving_stddev = self._statistic("moving_stddev", shape, self._initial_stddev)
            self.renorm_mean = self._statistic("renorm_mean", shape, self._initializer("moving_mean"))
            self.renorm_stddev = self._statistic("renorm_stddev", shape, self._initial_stddev)
        if self.momentum is None:
            self.num_batches = self.add_weight((), name="num_batches", dtype="int32", initializer="zeros", trainable=False)
        self._bookkeeping = Bookkeeping(shape, self.moving_mean.dtype)
        self.input_spec = keras.layers.InputSpec(ndim=geometry.rank, axes=dict(zip(geometry.axis, shape, strict=True)))
        self._warn_of_replicas()

    def _parameter(self, name: str, shape: Shape) -> Any:
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=self._initializer(name),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            trainable=True,
            autocast=False,
        )

    def _statistic(self, name: str, shape: Shape, initializer: Any) -> Any:
        return self.add_weight(shape=shape, name=name, initializer=initializer, trainable=False, autocast=False)

    def _initial_stddev(self, shape: Shape, dtype: Any = None) -> Any:
        return ops.sqrt(self._initializer("moving_variance")(shape, dtype=dtype))

    def _initializer(self, name: str) -> Any:
        """Return the argument of that name, or the value that `weights=` gave: a lazy build would overwrite a later
        assignment."""
        value = self._given_weights.get(name)
        own = getattr(self, f"{name}_initializer")
        return own if value is None else (lambda shape, dtype=None: ops.convert_to_tensor(value, dtype))

    @property
    def variables(self) -> list[Any]:
        """Keras's list of all state; on JAX, whose steps are functions of it, followed by the layer's bookkeeping."""
        functional = keras.backend.backend() == "jax" and self._bookkeeping is not None
        return super().variables + (self._bookkeeping.variables if functional else [])

    @property
    def skipped_batches(self) -> int:
        """Number of training batches that left the moving statistics alone: not finite, empty or masked throughout."""
        return 0 if self._bookkeeping is None else int(ops.convert_to_numpy(self._bookkeeping.skipped_batches))

    # Computation

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None, residual: Any = None, inputs_mask: Any = None
    ) -> Any:
        # Keras fills in `mask` for calls with one tensor, and `inputs_mask` for those with a residual too.
        mask = inputs_mask if mask is None else mask
        x = inputs
        arguments.refuse_complex(inputs=x, residual=residual)
        if not keras.backend.is_float_dtype(x.dtype):  # integers: 257 is no bfloat16
            x = ops.cast(x, keras.backend.result_type(x.dtype, "float32", self.variable_dtype))
        geometry = self._geometry(tuple(x.shape))
        if self.mode == 1:
            y = self._finished(self._per_sample(x, geometry), residual)
        elif self.mode == 2 or (training and self.trainable):
            y = self._by_batch(x, geometry, mask, residual)
        else:
            y = self._by_moving_statistics(x, geometry, residual)
        return ops.cast(y, self.compute_dtype)

    def _by_moving_statistics(self, x: Any, geometry: Geometry, residual: Any) -> Any:
        values = self.moving_mean, self.moving_variance, self.gamma, self.beta
        rows = [self._wide(value, x) for value in values]
        return self._activated(self._engine.infer(self._call(x, geometry, fixed_stats=True), x, *rows, residual=residual))

    def _by_batch(self, x: Any, geometry: Geometry, mask: Any, residual: Any) -> Any:
        if mask is not None:
            self._check_mask(geometry, mask)
        engine = synchronized_engine() if self.synchronized else self._engine
        if self.renorm:
            plain = replace(self._call(x, geometry), activation=LINEAR)
            xhat, moments = engine.train(plain, x, None, None, mask=mask)
            y = self._finished(moving.renormalized(self, self._engine.xp, xhat, geometry, moments, mask), residual)
        else:
            gamma, beta = self._wide(self.gamma, x), self._wide(self.beta, x)
            y, moments = engine.train(self._call(x, geometry), x, gamma, beta, mask=mask, residual=residual)
            y = self._activated(y)
        if message := self._engine.range_warning(moments):
            self._warn_once("range", f"{self.name}: {message}")
        if self.mode == 0:
            self._warn_of_single_values(moments)
            moving.update_moving_stats(self, self._engine, self._bookkeeping, moments)
        return y

    def _per_sample(self, x: Any, geometry: Geometry) -> Any:
        wide = self._wide(x, x)
        gamma, beta = self._wide(self.gamma, x), self._wide(self.beta, x)
        return normalize_samples(self._engine.xp, wide, gamma, beta, self.epsilon, geometry)

    def _call(self, x: Any, geometry: Geometry, fixed_stats: bool = False) -> Call:
        """Return the settings of a call for the engine, with the activation where kernels fuse it."""
        activation = arguments.fused(self.activation) or LINEAR
        group_size = None if fixed_stats else self.virtual_batch_size
        dtype = keras.backend.standardize_dtype(x.dtype)
        return self._engine.make_call(geometry, dtype, self.epsilon, activation, group_size, fixed_stats)

    def _activated(self, y: Any) -> Any:
        """Apply an activation that no kernel fuses."""
        return y if arguments.fused(self.activation) is not None else self.activation(y)

    def _finished(self, y: Any, residual: Any) -> Any:
        return self.activation(y if residual is None else y + ops.cast(residual, y.dtype))

    # Shapes, dtypes, configuration

    def _geometry(self, shape: Shape) -> Geometry:
        """Return the geometry of an input, with the channel sizes that a graph may have lost."""
        axis = -1 if self.mode == 1 else self.axis
        shape = tuple(size if isinstance(size, int) else None for size in shape)  # exporters replace sizes by symbols
        if self._built_shape is not None:
            kept = Geometry(self._built_shape, axis).axis
            shape = tuple(self._built_shape[a] if a in kept else size for a, size in enumerate(shape))
        return Geometry(shape, axis)

    def _wide(self, value: Any, x: Any) -> Any:
        """Return `value` in the precision that `x` is computed in; None stays None."""
        dtype = "float64" if keras.backend.standardize_dtype(x.dtype) == "float64" else "float32"
        return None if value is None else ops.cast(value, dtype)

    def _check_mask(self, geometry: Geometry, mask: Any) -> None:
        axes = geometry.mask_axes(tuple(mask.shape))
        if len(mask.shape) < geometry.rank and set(axes) & set(geometry.axis):
            self._warn_once(
                "mask",
                f"{self.name}: the mask of shape {tuple(mask.shape)} covers the channel axis of inputs {geometry.shape} "
                f"(axis={self.axis}), as masks from keras.layers.Masking do; one per position has the axes "
                f"{geometry.reduced}",
            )

    def _warn_of_single_values(self, moments: Moments) -> None:
        if isinstance(moments.count, int) and moments.count == 1:
            self._warn_once(
                "single",
                f"{self.name}: training with one value per channel: its variance is 0 and the output beta, "
                "whatever the input. The moving variance is left alone; use larger batches, or freeze the layer",
            )

    def _warn_of_replicas(self) -> None:
        number = replicas_apart()
        if number > 1 and self.mode == 0 and self.trainable and not self.synchronized:
            ghosts = "without virtual_batch_size and " if self.virtual_batch_size is not None else ""
            self._warn_once(
                "replicas",
                f"{self.name}: each of the {number} replicas normalizes its part of the batch by itself, and the moving "
                f"statistics follow the first one alone; build the layer {ghosts}with synchronized=True",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=2)

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        arguments.refuse_complex(inputs=inputs, residual=kwargs.get("residual"))
        return super().compute_output_spec(inputs, *args, **kwargs)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        self._geometry(tuple(input_shape))
        return input_shape

    def __repr__(self) -> str:
        engine = keras.backend.backend()
        device = getattr(self._engine, "device", "cpu")
        training, inference = (
            choose(engine, self.compute_dtype, training=training, device=device) for training in (True, False)
        )
        kernel = training if training == inference else f"{training}, at inference {inference}"
        return f"<BatchNormalization name={self.name}, axis={self.axis}, built={self.built}, kernel={kernel} on {engine}>"

    def get_config(self) -> dict[str, Any]:
        """Return Keras 3's keys, and others only where they differ from their default, so that Keras's layer can read it."""
        own = {
            "mode": (self.mode, 0),
            "activation": (keras.activations.serialize(self.activation), "linear"),
            "virtual_batch_size": (self.virtual_batch_size, None),
            "unbiased_variance": (self.unbiased_variance, False),
        }
        return {
            **super().get_config(),
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "moving_mean_initializer": keras.initializers.serialize(self.moving_mean_initializer),
            "moving_variance_initializer": keras.initializers.serialize(self.moving_variance_initializer),
            "beta_regularizer": keras.regularizers.serialize(self.beta_regularizer),
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "beta_constraint": keras.constraints.serialize(self.beta_constraint),
            "gamma_constraint": keras.constraints.serialize(self.gamma_constraint),
            "renorm": self.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": self.renorm_momentum,
            "synchronized": self.synchronized,
            **{key: value for key, (value, default) in own.items() if value != default},
        }
