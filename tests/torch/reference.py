"""torch's batch normalization module in float64 NumPy, as its documentation has it: what ours is compared with.

Independent of the package on purpose, as `tests.contract.textbook` is, which it takes for one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from evennorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tests.cases import Case
from tests.contract import textbook

MODULES = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


@dataclass
class Reference:
    """gamma, beta and the running statistics of one module."""

    gamma: np.ndarray
    beta: np.ndarray
    eps: float
    momentum: float | None
    group: int | None = None
    batches: int = 0
    mean: np.ndarray = field(init=False)
    variance: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.variance = np.zeros_like(self.gamma), np.ones_like(self.gamma)

    def train(
        self,
        x: np.ndarray,
        residual: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        activation: str | None = None,
    ) -> np.ndarray:
        """y; the running statistics follow, but for batches that hold nothing."""
        case = Case("", x.shape, 1, group=self.group, epsilon=self.eps)
        self._follow([statistics(part, mask_part) for part, mask_part in self._parts(x, mask)])
        return textbook.forward(case, x, self.gamma, self.beta, residual, mask, activation)

    def infer(self, x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """y by statistics that a module holds, which are float32."""
        shape = (1, -1, *(1,) * (x.ndim - 2))
        mean, scale = mean.reshape(shape), (self.gamma / np.sqrt(variance + self.eps)).reshape(shape)
        return (x - mean) * scale + self.beta.reshape(shape)

    def _parts(self, x: np.ndarray, mask: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray | None]]:
        size = self.group or max(1, len(x))
        starts = range(0, max(1, len(x)), size)
        return [(x[s : s + size], None if mask is None else mask[s : s + size]) for s in starts]

    def _follow(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        counts, means, variances = (np.array(column) for column in zip(*parts, strict=True))
        unbiased = variances * counts / np.maximum(counts - 1, 1)
        if not counts.any():
            return
        self.batches += 1
        weight = 1 / self.batches if self.momentum is None else self.momentum
        for c in range(len(self.gamma)):
            holds, varies = counts[:, c] >= 1, counts[:, c] >= 2
            if holds.any():
                self.mean[c] += weight * (means[holds, c].mean() - self.mean[c])
            if varies.any():
                self.variance[c] += weight * (unbiased[varies, c].mean() - self.variance[c])


def statistics(x: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and biased variance per channel."""
    count, mean, variance = textbook.statistics(Case("", x.shape, 1), x, mask)
    return tuple(s.reshape(x.shape[1]) for s in (count, mean, variance))


def channels_second(case: Case, arrays: dict[str, np.ndarray | None]) -> dict[str, np.ndarray | None]:
    """The arrays of a case as torch's modules take them: samples, all channels, the rest."""
    order = case.reduced + case.axes
    sizes = tuple(case.shape[a] for a in case.reduced) or (1,)

    def moved(value: np.ndarray) -> np.ndarray:
        return np.moveaxis(value.transpose(order).reshape(*sizes, -1 if value.size else case.shape[case.axes[0]]), -1, 1)

    out = {name: None if value is None else value.reshape(-1) for name, value in arrays.items()}
    for name in ("x", "residual", "dy"):
        out[name] = moved(arrays[name])
    mask = arrays["mask"]
    if mask is not None:
        out["mask"] = moved(mask) if mask.shape == case.shape else mask
    return out


def module_for(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, dtype: torch.dtype = torch.float32, **options):
    """Ours for arrays of x's rank, with these parameters."""
    module = MODULES[x.ndim](x.shape[1], dtype=dtype, **options)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(gamma))
        module.bias.copy_(torch.tensor(beta))
    return module


def array(tensor: torch.Tensor) -> np.ndarray:
    """As float64 NumPy array."""
    return tensor.detach().double().numpy()
