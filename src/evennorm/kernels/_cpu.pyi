"""The compiled CPU kernels (native/), on addresses. `kernels.cpu` is the only caller, and has checked everything.

Sizes and strides are those of the view (groups, outer, channel, inner), strides in elements. An address of 0 stands for an
absent array. Parameters, statistics and their derivatives are dense, float64 for float64 arrays and float32 for all others.
"""

from typing import Any

Four = tuple[int, int, int, int]

def forward(
    what: int,  # 0 moments, 1 normalize, 2 both
    dtype: int,  # 0 float32, 1 float64, 2 bfloat16, 3 float16
    sizes: Four,
    x: int,
    x_strides: Four,
    residual: int,
    residual_strides: Four,
    y: int,
    y_strides: Four,
    gamma: int,
    beta: int,
    mean: int,
    mean_low: int,
    variance: int,
    signs: int,
    epsilon: float,
    negative_slope: float,
) -> None: ...
def backward(
    what: int,  # 0 gradient sums, 1 input gradient, 2 both
    dtype: int,
    sizes: Four,
    dy: int,
    dy_strides: Four,
    x: int,
    x_strides: Four,
    dx: int,
    dx_strides: Four,
    d_residual: int,
    gamma: int,
    beta: int,
    mean: int,
    mean_low: int,
    variance: int,
    signs: int,
    d_mean: int,
    d_variance: int,
    sum_dz: int,
    sum_dz_centred: int,
    d_gamma: int,
    d_beta: int,
    epsilon: float,
    negative_slope: float,
    count: float,
) -> None: ...
def follow(
    dtype: int,
    groups: int,
    channels: int,
    count: int,
    mean: int,
    mean_low: int,
    variance: int,
    unbiased: bool,
    decay: float,
    running_mean: int,
    running_mean_low: int,
    running_variance: int,
) -> bool: ...
def sign_bytes(sizes: Four, y_strides: Four) -> int: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def set_num_threads(threads: int) -> None: ...
def num_threads() -> int: ...
def buffer(dtype: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:  # of the DLPack protocol
    ...
def set_buffer_limit(size: int) -> None: ...
def buffered_bytes() -> int: ...

PAST_CACHE: int  # bytes from which outputs are written past the cache

def write_past_cache_from(size: int) -> None: ...
def advise(address: int, size: int) -> None: ...
