"""Provide Keras 1's names for what has other names today, for programs of 2016 to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from evennorm.keras.arguments import Default
from evennorm.keras.layer import BatchNormalization as _BatchNormalization

_ZERO, _ONE = Default("zero"), Default("one")

__all__ = ["BatchNormalization", "Bidirectional", "WeightRegularizer", "hard_sigmoid", "l1", "l1l2", "l2"]


@keras.saving.register_keras_serializable(package="evennorm", name="Keras1BatchNormalization")
class BatchNormalization(_BatchNormalization):
    """`evennorm.keras.BatchNormalization` with the signature of Keras 1, in its positional order.

    Source: Keras 1.2.2, keras/layers/normalization.py.

    Example:
        >>> from evennorm.keras.legacy import BatchNormalization
        >>> BatchNormalization(1e-5, 2).mode
        2
    """

    def __init__(
        self,
        epsilon: float = 0.001,
        mode: int = 0,
        axis: int = -1,
        momentum: float = 0.99,
        weights: Sequence[Any] | None = None,
        beta_init: Any = _ZERO,
        gamma_init: Any = _ONE,
        gamma_regularizer: Any = None,
        beta_regularizer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            mode=mode,
            weights=weights,
            beta_init=None if beta_init is _ZERO else beta_init,
            gamma_init=None if gamma_init is _ONE else gamma_init,
            gamma_regularizer=gamma_regularizer,
            beta_regularizer=beta_regularizer,
            **kwargs,
        )


@keras.saving.register_keras_serializable(package="evennorm", name="Keras1Bidirectional")
class Bidirectional(keras.layers.Bidirectional):
    """`keras.layers.Bidirectional` whose sequences repeat their last output at masked steps; Keras 3's are zero there.

    Source: Keras 1.2.2 and 2.3.1, `rnn` of keras/backend/tensorflow_backend.py.

    Example:
        >>> import keras
        >>> from evennorm.keras.legacy import Bidirectional
        >>> Bidirectional(keras.layers.LSTM(4, return_sequences=True)).forward_layer.zero_output_for_mask
        False
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for layer in (self.forward_layer, self.backward_layer):
            layer.zero_output_for_mask = False


def WeightRegularizer(l1: float = 0.0, l2: float = 0.0) -> keras.regularizers.Regularizer:  # noqa: N802
    """Return the penalty l1 * sum |w| + l2 * sum w^2."""
    return keras.regularizers.L1L2(l1=l1, l2=l2)


def l1(l: float = 0.01) -> keras.regularizers.Regularizer:  # noqa: E741
    """Return the penalty l * sum |w|."""
    return WeightRegularizer(l1=l)


def l2(l: float = 0.01) -> keras.regularizers.Regularizer:  # noqa: E741
    """Return the penalty l * sum w^2."""
    return WeightRegularizer(l2=l)


def l1l2(l1: float = 0.01, l2: float = 0.01) -> keras.regularizers.Regularizer:
    """Return the penalty l1 * sum |w| + l2 * sum w^2."""
    return WeightRegularizer(l1=l1, l2=l2)


@keras.saving.register_keras_serializable(package="evennorm", name="keras1_hard_sigmoid")
def hard_sigmoid(x: Any) -> Any:
    """Return clip(0.2 x + 0.5, 0, 1), as in Keras 1 and 2; Keras 3's has the slope 1/6.

    Example:
        >>> import numpy as np
        >>> from evennorm.keras.legacy import hard_sigmoid
        >>> np.asarray(hard_sigmoid(np.array([-2.5, 0.0, 2.5]))).tolist()
        [0.0, 0.5, 1.0]
    """
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)
