"""TensorFlow tensors in, normalized tensors and their Moments out; works eagerly, in tf.function and under XLA."""

from __future__ import annotations

from evennorm.core.call import Call
from evennorm.core.engine import Engine
from evennorm.core.moments import Moments, per_channel
from evennorm.core.normalize import activate
from evennorm.errors import MissingExtra
from evennorm.kernels import choose, reference

try:
    import tensorflow as tf
except ImportError as error:
    raise MissingExtra("evennorm.tensorflow", "tensorflow") from error

from evennorm.tensorflow import compiled, composed
from evennorm.tensorflow.namespace import Tensor, xp

__all__ = ["Moments", "batch_norm", "engine", "normalize", "synchronized"]


def _device() -> str:
    """cpu where TensorFlow sees nothing else. Which of several devices will serve is not known when a graph is traced."""
    others = [device.device_type for device in tf.config.get_visible_devices() if device.device_type != "CPU"]
    return others[0].lower() if others else "cpu"


def _train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    kernel = choose("tensorflow", x.dtype.name, compiled=compiled.serves(x, gamma, beta, residual), device=_device())
    if kernel == "cpu" and mask is None and call.negative_slope >= 0:
        return compiled.train(call, x, gamma, beta, residual)
    return composed.train(call, x, gamma, beta, residual, mask)


def _inference(
    call: Call,
    x: Tensor,
    statistics: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    _, _, channel, inner = xp.shape(x)
    if choose("tensorflow", x.dtype.name, training=False, inner=inner, epsilon=call.epsilon) == "reference":
        return reference.infer(xp, call, x, statistics, gamma, beta, residual)
    # XLA turns the op into x * scale + offset, which cancels at large means, unless the mean is gone before.
    centred = reference.wide(xp, x) - per_channel(xp, statistics.mean)
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(centred, (-1, 1, 1, channel)),
        scale=tf.ones((channel,)) if gamma is None else gamma,
        offset=tf.zeros((channel,)) if beta is None else beta,
        mean=tf.zeros((channel,)),
        variance=tf.reshape(statistics.variance, (channel,)),
        epsilon=call.epsilon,
        is_training=False,
    )
    y = tf.reshape(y, xp.shape(x))
    if residual is not None:
        y = y + reference.wide(xp, residual)
    return xp.astype(activate(xp, y, call.negative_slope), x.dtype)


class _TensorFlowEngine(Engine):
    @property
    def device(self) -> str:
        """As `kernels.choose` has it."""
        return _device()


engine = _TensorFlowEngine("tensorflow", xp, _train, _inference)
synchronized = Engine("tensorflow", xp, composed.train_synchronized, _inference)
"""The same with statistics taken over all replicas of the current tf.distribute strategy."""
batch_norm = engine.batch_norm
normalize = engine.normalize
