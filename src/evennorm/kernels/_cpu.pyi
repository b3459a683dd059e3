"""The compiled CPU kernels (native/). `kernels.cpu` is the only caller, and has checked shapes, dtypes and strides.

Sizes and strides are those of the view (groups, outer, channel, inner), strides in elements. An `Arrays` argument is an
address, None for an absent array, or a tensor of the framework that has enabled the exchange. Parameters, statistics and
their derivatives are dense, float64 for float64 arrays and float32 for all others; `statistics` is (3, groups, channel):
mean, mean_low and variance. Functions of plans answer 2 where a tensor is not as it should be: then nothing was computed.
"""

from typing import Any

Four = tuple[int, int, int, int]
Array = Any

class ForwardPlan:
    """Forward passes over arrays of one shape that lie in one way."""

    def __init__(
        self,
        dtype: int,  # 0 float32, 1 float64, 2 bfloat16, 3 float16
        sizes: Four,
        x_strides: Four,
        residual_strides: Four,
        y_strides: Four,
        epsilon: float,
        negative_slope: float,
        limit: float,  # 6 for relu6, else infinite
        /,
    ) -> None: ...
    @property
    def mask_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def forward(
        self,
        x: Array,
        residual: Array,
        y: Array,
        gamma: Array,
        beta: Array,
        statistics: Array,
        mask: Array,
        running_mean: Array,
        running_mean_low: Array,
        running_variance: Array,
        decay: float,  # below 0 for the cumulative average
        unbiased: bool,
        batches: Array,
        skipped: Array,
        /,
    ) -> int: ...  # 0 where running statistics accepted the batch or there are none, 1 where they skipped it
    def normalize(
        self,
        x: Array,
        residual: Array,
        y: Array,
        gamma: Array,
        beta: Array,
        mean: Array,
        mean_low: Array,
        variance: Array,
        mask: Array,
        /,
    ) -> int: ...
    def normalize_again(
        self, x: Array, residual: Array, y: Array, gamma: Array, beta: Array, statistics: Array, mask: Array, /
    ) -> int: ...
    def moments(self, x: Array, statistics: Array, /) -> int: ...

class BackwardPlan:
    """Backward passes over arrays of one shape that lie in one way."""

    def __init__(
        self,
        dtype: int,
        sizes: Four,
        dy_strides: Four,
        x_strides: Four,
        dx_strides: Four,
        epsilon: float,
        negative_slope: float,
        limit: float,  # 6 for relu6, else infinite
        count: float,
        /,
    ) -> None: ...
    @property
    def address(self) -> int: ...
    def backward(
        self,
        dy: Array,
        x: Array,
        dx: Array,
        d_residual: Array,
        gamma: Array,
        beta: Array,
        statistics: Array,
        mask: Array,
        d_mean: Array,
        d_variance: Array,
        d_gamma: Array,
        d_beta: Array,
        /,
    ) -> int: ...
    def gradient_sums(
        self,
        dy: Array,
        x: Array,
        gamma: Array,
        beta: Array,
        statistics: Array,
        mask: Array,
        sums: Array,  # (2, groups, channel)
        d_gamma: Array,
        d_beta: Array,
        /,
    ) -> int: ...
    def input_gradient(
        self,
        dy: Array,
        x: Array,
        dx: Array,
        d_residual: Array,
        gamma: Array,
        beta: Array,
        statistics: Array,
        mask: Array,
        sums: Array,
        d_mean: Array,
        d_variance: Array,
        count: float,
        /,
    ) -> int: ...

def enable_exchange(table: object, types: list[type], /) -> bool: ...
def update_running_stats(
    dtype: int,
    groups: int,
    channels: int,
    count: int,
    unbiased: bool,
    decay: float,
    mean: Array,
    mean_low: Array,
    variance: Array,
    running_mean: Array,
    running_mean_low: Array,
    running_variance: Array,
    /,
) -> bool: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def set_num_threads(threads: int) -> None: ...
def num_threads() -> int: ...
def buffer(dtype: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:  # of the DLPack protocol
    ...
def set_buffer_limit(size: int) -> None: ...
def buffered_bytes() -> int: ...

exported: Any  # for evennorm.kernels._torch_*
PAST_CACHE: int  # bytes from which outputs are written past the cache

def write_past_cache_from(size: int) -> None: ...
def advise(array: Array, size: int) -> None: ...
