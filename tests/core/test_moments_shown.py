"""How moments are shown: on one line, whatever they are of."""

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch

import evennorm
from evennorm.core.moments import Moments


def test_few_values_are_shown() -> None:
    shown = "Moments(count=2, mean=[2. 3.], mean_low=[0. 0.], variance=[1. 1.])"
    assert repr(evennorm.numpy.moments([[1.0, 2.0], [3.0, 4.0]])) == shown


@pytest.mark.parametrize(
    ("zeros", "dtype"),
    [(np.zeros, "float64"), (torch.zeros, "torch.float32"), (jax.numpy.zeros, "float32"), (tf.zeros, "<dtype: 'float32'>")],
)
def test_many_values_are_described(zeros: object, dtype: str) -> None:
    text = repr(Moments(7, *(zeros((2, 100)) for _ in range(3))))
    assert text == f"Moments(count=7, mean=<{dtype} of shape (2, 100)>, {text.split(', ', 3)[3]}"
    assert text.count("of shape (2, 100)>") == 3
    assert "\n" not in text


def test_what_has_no_values_yet_is_described() -> None:
    seen = []
    jax.jit(lambda x: seen.append(repr(Moments(3, x, x, x))))(np.zeros(2, np.float32))
    assert "\n" not in seen[0]
    assert seen[0].startswith("Moments(count=3, mean=")
    assert "mean=<torch.float32 of shape (9,)>" in repr(Moments(1, *(torch.zeros(9, device="meta"),) * 3))
    spec = tf.TensorSpec((None, 3))
    assert "<dtype: 'float32'> of shape (None, 3)" in repr(Moments(1, spec, spec, spec))
