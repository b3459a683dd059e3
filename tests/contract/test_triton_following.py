"""Running statistics follow on the device as `core.running` defines, and the answer stays there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, numpy, served, tensor  # isort: skip, may skip all

import torch

from evennorm.core import running
from evennorm.core.moments import Moments
from evennorm.numpy import xp as numpy_xp
from evennorm.torch import engine

__all__ = ["served"]


@pytest.mark.parametrize("decay", [0.99, 0.3, 0.0, 1.0])
@pytest.mark.parametrize(
    ("groups", "count", "unbiased"), [(1, 50, False), (1, 50, True), (3, 7, True), (1, 1, False), (4, 2, True)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("poison", [None, "mean", "variance"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in which the interpreter computes
def test_running_statistics_follow_as_the_core_defines(groups, count, unbiased, decay, dtype, poison) -> None:
    """On the device, and the answer too."""
    rng = np.random.default_rng(8)
    channel = 1500
    mean, low = rng.normal(1e4, 1, (groups, channel)), rng.normal(0, 1e-4, (groups, channel))
    variance = rng.uniform(0.5, 2, (groups, channel))
    if poison is not None:
        (mean if poison == "mean" else variance)[0, 1203] = np.nan if poison == "mean" else np.inf
    statistics = [values.astype(dtype) for values in (mean, low, variance)]
    kept = [rng.normal(1e4, 1, channel), rng.normal(0, 1e-3, channel), rng.uniform(0.5, 2, channel)]
    kept = [values.astype(dtype) for values in kept]
    with np.errstate(invalid="ignore"):
        batch = running.summary(numpy_xp, Moments(count, *statistics), unbiased)
        followed = running.updated_mean(numpy_xp, running.RunningMean(*kept[:2]), batch, decay)
        expected = [*followed, running.updated(numpy_xp, kept[2], batch.variance, decay, batch.has_variance)]
    tensors = tuple(tensor(values, dtype) for values in kept)
    versions = [t._version for t in tensors]
    accepted = engine.follow(tensors, Moments(count, *(tensor(s, dtype) for s in statistics)), decay, unbiased)
    assert accepted.device.type == DEVICE
    assert accepted.shape == ()
    assert accepted.item() is bool(batch.accepted)
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))
    for found, wanted in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(numpy(found), wanted, rtol=2e-6 if dtype == "float32" else 1e-14, atol=1e-9)


def test_an_empty_batch_is_not_followed() -> None:
    kept = tuple(torch.ones(3, device=DEVICE) for _ in range(3))
    nothing = Moments(0, *(torch.zeros(1, 3, device=DEVICE) for _ in range(3)))
    assert not engine.follow(kept, nothing, 0.9).item()
    assert all(torch.equal(t, torch.ones(3, device=DEVICE)) for t in kept)
