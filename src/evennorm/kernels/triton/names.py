"""List the arguments that differ between the launches of a kernel, by their names and in their order."""

from __future__ import annotations

UPDATED = ["running_mean", "running_mean_low", "running_variance", "batches", "skipped"]

FORWARD = [
    *("x", "residual", "gamma", "beta", "mean_in", "variance_in"),
    *UPDATED,
    *("statistics", "y", "relu_mask", "workspace", "decay", "decay_low"),
]
"""Arguments that differ between the calls of a forward plan, in their order."""

BACKWARD = [
    *("dy", "x", "relu_mask", "gamma", "beta", "statistics", "d_mean", "d_variance"),
    *("dx", "d_residual", "d_gamma", "d_beta", "workspace"),
]
READ = ["x", "dy", "residual"]
"""Arrays that are read element by element."""

UPDATE = [
    *("mean", "mean_low", "variance", *UPDATED),
    *("accepted", "decay", "decay_low", "groups", "channels", "count"),
]
