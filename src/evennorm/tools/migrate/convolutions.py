"""Translate old convolutions to Keras 3's: channels last, as correlations, with the padding of their backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import layers

from evennorm.errors import InputError
from evennorm.tools.migrate.arguments import SLOPE, activation
from evennorm.tools.migrate.block import Block, Task, tuple_of

_CONV = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
_PAD = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}
_CROP = {1: layers.Cropping1D, 2: layers.Cropping2D, 3: layers.Cropping3D}
Pads = list[tuple[int, int]]


def convolution(task: Task, rank: int) -> Block:
    """Translate Conv1D, 2D, 3D, dilated ones included."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    task.expect(1 + bias)
    size = tuple_of(config["kernel_size"], rank)
    strides = tuple_of(config.get("strides") or 1, rank)
    dilation = tuple_of(config.get("dilation_rate") or 1, rank)
    kernel = flipped(task, _kernel(task, task.arrays[0], size, config["filters"], rank), rank)
    pads, padding = paddings(task, size, strides, dilation)
    function = activation(config.get("activation"), task.name)
    conv = _CONV[rank](
        filters=int(config["filters"]),
        kernel_size=size,
        strides=strides,
        padding=padding,
        dilation_rate=dilation,
        groups=int(config.get("groups", 1)),
        activation=function,
        use_bias=bias,
        **task.arguments.common(config, "kernel", "bias"),
        **task.base,
    )
    values = scaled(task, function, [kernel, *task.arrays[1:]])
    before = [_PAD[rank](pads[0] if rank == 1 else pads, name=f"{task.name}_padding")] if pads else []
    return Block([*before, conv], [(conv, values)])


def scaled(task: Task, function: str, arrays: list[np.ndarray], first: int = 0) -> list[np.ndarray]:
    """Return the arrays with weights from `first` on times 1.2 where hard_sigmoid follows, whose slope Keras 3 changed."""
    if function != "hard_sigmoid":
        return arrays
    task.converted.append("weights times 1.2: hard_sigmoid had the slope 0.2 and has 1/6 in Keras 3")
    return [*arrays[:first], *(np.asarray(x, np.float64) * SLOPE for x in arrays[first:])]


def _kernel(task: Task, kernel: np.ndarray, size: tuple[int, ...], filters: int, rank: int) -> np.ndarray:
    """Return the kernel as (spatial..., in, out), from the layouts that Keras had for it."""
    channels = task.shape[-1]
    groups = int(task.config.get("groups", 1))
    wanted = (*size, None if channels is None else channels // groups, int(filters))
    spatial = tuple(range(2, rank + 2))
    first = task.config.get("data_format") == "channels_first"
    if rank == 1 and kernel.ndim == 4:
        if fits(kernel.shape, (size[0], 1, *wanted[1:])):
            return kernel[:, 0]
        if fits(kernel.shape, (wanted[2], wanted[1], size[0], 1)):
            task.converted.append("kernel turned from (out, in, length, 1), as the first releases stored it")
            return kernel.transpose(2, 3, 1, 0)[:, 0]
    old = (wanted[-1], wanted[-2], *size)
    if kernel.ndim == rank + 2 and task.origin.major == 1 and first and fits(kernel.shape, old):
        task.converted.append("kernel turned from (out, in, spatial) to (spatial, in, out)")
        return kernel.transpose(*spatial, 1, 0)
    if fits(kernel.shape, wanted):
        return kernel
    if kernel.ndim == rank + 2 and fits(kernel.shape, old):
        task.converted.append("kernel turned from (out, in, spatial) to (spatial, in, out)")
        return kernel.transpose(*spatial, 1, 0)
    raise InputError(
        f"a kernel of {task.name!r} has the shape {wanted} in Keras 3; the file holds {kernel.shape}, which is none of the "
        "old layouts of it; the file is damaged, or the architecture is another"
    )


def fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b is None or a == b for a, b in zip(shape, wanted, strict=True))


def flipped(task: Task, kernel: np.ndarray, rank: int) -> np.ndarray:
    """Reverse kernels of Theano along the spatial axes: it convolved where all others correlate."""
    task.need_backend(kernel.shape[:rank])
    if not task.origin.theano or all(size == 1 for size in kernel.shape[:rank]):
        return kernel
    task.converted.append("kernel flipped along its spatial axes: Theano convolved, Keras 3 correlates")
    return kernel[(slice(None, None, -1),) * rank]


def paddings(
    task: Task, size: tuple[int, ...], strides: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Pads | None, str]:
    """Return explicit padding where Keras 3 has no name for it, and Keras 3's name."""
    mode = task.config.get("padding", "valid")
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    if mode == "full":
        task.converted.append('border_mode "full" became zero padding')
        return [(k - 1, k - 1) for k in reach], "valid"
    differs = any(k % 2 == 0 or (s > 1 and k > 1) for k, s in zip(reach, strides, strict=True))
    if mode == "same" and task.origin.theano and differs:
        task.converted.append('border_mode "same" became the zero padding that Theano took: half the kernel in front')
        return [(k // 2, k // 2 if k % 2 else k // 2 - 1) for k in reach], "valid"
    return None, mode


def separable(task: Task, rank: int) -> Block:
    """Translate SeparableConv1D and 2D, DepthwiseConv2D."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    depthwise_only = task.layer.kind == "DepthwiseConv2D"
    task.expect((1 if depthwise_only else 2) + bias)
    kernels = list(task.arrays[: 1 if depthwise_only else 2])
    if task.config.get("data_format") == "channels_first" and task.origin.major == 1:
        kernels = [kernel.transpose(2, 3, 1, 0) for kernel in kernels]
        task.converted.append("kernels turned to (spatial, in, out)")
    kernels[0] = flipped(task, kernels[0], rank)
    function = activation(config.get("activation"), task.name)
    size = tuple_of(config["kernel_size"], rank)
    strides = tuple_of(config.get("strides") or 1, rank)
    dilation = tuple_of(config.get("dilation_rate") or 1, rank)
    pads, padding = paddings(task, size, strides, dilation)
    kinds = ("depthwise", "bias") if depthwise_only else ("depthwise", "pointwise", "bias")
    options: dict[str, Any] = {
        "kernel_size": size,
        "strides": strides,
        "padding": padding,
        "depth_multiplier": int(config.get("depth_multiplier", 1)),
        "dilation_rate": dilation,
        "activation": function,
        "use_bias": bias,
        **task.arguments.common(config, *kinds),
        **task.base,
    }
    if depthwise_only:
        conv = layers.DepthwiseConv2D(**options)
    else:
        conv = (layers.SeparableConv1D if rank == 1 else layers.SeparableConv2D)(filters=int(config["filters"]), **options)
    # Depthwise and pointwise kernels multiply: the factor goes into the last one.
    values = scaled(task, function, [*kernels, *task.arrays[len(kernels) :]], first=len(kernels) - 1)
    before = [_PAD[rank](pads[0] if rank == 1 else pads, name=f"{task.name}_padding")] if pads else []
    return Block([*before, conv], [(conv, values)])


def transposed(task: Task, rank: int) -> Block:
    """Translate Deconvolution2D with its explicit output shape, and Keras 2's transposed convolutions."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    task.expect(1 + bias)
    size = tuple_of(config["kernel_size"], rank)
    strides = tuple_of(config.get("strides") or 1, rank)
    filters, channels = int(config["filters"]), task.shape[-1]
    kernel, spatial = task.arrays[0], tuple(range(rank))
    first = config.get("data_format") == "channels_first"
    if task.origin.major == 1:
        if first and fits(kernel.shape, (filters, channels, *size)):
            kernel = kernel.transpose(*(a + 2 for a in spatial), 0, 1)
        elif fits(kernel.shape, (*size, channels, filters)):
            kernel = kernel.transpose(*spatial, rank + 1, rank)
        task.converted.append("kernel turned to (spatial, out, in)")
    kernel = flipped(task, kernel, rank)
    function = activation(config.get("activation"), task.name)
    sides, extra = _crops(task, size, strides, first)
    class_ = layers.Conv2DTranspose if rank == 2 else layers.Conv3DTranspose
    conv = class_(
        filters=filters,
        kernel_size=size,
        strides=strides,
        padding="valid" if sides is not None else config.get("padding", "valid"),
        output_padding=extra,
        dilation_rate=tuple_of(config.get("dilation_rate") or 1, rank),
        activation=function,
        use_bias=bias,
        **task.arguments.common(config, "kernel", "bias"),
        **task.base,
    )
    values = scaled(task, function, [kernel, *task.arrays[1:]])
    after = [_CROP[rank](sides, name=f"{task.name}_cropping")] if sides and any(map(any, sides)) else []
    return Block([conv, *after], [(conv, values)])


def _crops(task: Task, size: tuple[int, ...], strides: tuple[int, ...], first: bool) -> tuple[Pads | None, Any]:
    """Return what to cut from the whole transposed convolution, and what to add to it, to get the old output shape."""
    config, mode = task.config, task.config.get("padding", "valid")
    stated = config.get("output_shape")
    if stated is None and not task.origin.theano:
        extra = config.get("output_padding")
        return None, None if extra is None else tuple_of(extra, len(size))
    lengths = [n for n in task.shape[1:-1] if n is not None]
    if len(lengths) != len(size):
        raise InputError(
            f"{task.name!r} states its output shape, and the size of its input is unknown; give the input a "
            "batch_input_shape in full"
        )
    wanted: tuple[int, ...]
    if stated is None:
        wanted = tuple(
            n * s if mode == "same" else (n - 1) * s + max(k, s) for n, s, k in zip(lengths, strides, size, strict=True)
        )
    else:
        wanted = _stated(task, lengths, size, strides, tuple(int(n) for n in (stated[2:] if first else stated[1:-1])))
    sides, extras = [], []
    for n, s, k, out in zip(lengths, strides, size, wanted, strict=True):
        whole = (n - 1) * s + k
        if mode == "valid":
            front = 0
        elif mode == "full":
            front = k - 1
        elif task.origin.theano:
            front = k // 2
        else:
            front = max(whole - out, 0) // 2
        extra = max(front + out - whole, 0)
        extras.append(extra)
        sides.append((front, whole + extra - front - out))
    task.converted.append(f"output shape {wanted} by cropping the whole transposed convolution")
    return sides, tuple(extras) if any(extras) else None


def _stated(
    task: Task, lengths: list[int], size: tuple[int, ...], strides: tuple[int, ...], stated: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the output shape of a Deconvolution2D, which releases stored differently."""
    same = task.config.get("padding", "valid") == "same"
    sizes = list(zip(lengths, size, strides, stated, strict=True))
    if same and task.origin.theano and any(k % 2 == 0 for k in size):
        task.converted.append('border_mode "same" with an even kernel: cut to the length over the stride, as Theano did')
        return tuple(min(out, -(-n // s)) if k % 2 == 0 else out for n, k, s, out in sizes)
    if task.origin.releases[-1] >= (1, 2, 0):
        return stated
    wanted = []
    for n, k, s, out in sizes:
        computed = (n - 1) * s + k - 2 * (k // 2 if same else 0)
        least = (n - 1) * s + (1 if same else k)
        usual = n * s if same else least
        wanted.append(out if least <= out < least + s and out != computed else usual)
    if tuple(wanted) != stated:
        task.assumed.append(
            f"output shape {tuple(wanted)}, size times stride: before 1.2 files held what Keras computed, here {stated}, "
            "and not the one it ran with; where the file is right, say --written-by keras==1.2.0"
        )
    return tuple(wanted)


def locally_connected(task: Task, rank: int) -> Block:
    """Translate LocallyConnected1D and 2D, as one kernel per position on the patches of the input."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    task.expect(1 + bias)
    if config.get("implementation", 1) != 1 or config.get("padding", "valid") != "valid":
        raise InputError(
            f"{task.name!r} stores its kernel as one matrix over all positions (implementation "
            f"{config.get('implementation')}); only implementation 1 without padding can be migrated"
        )
    size = tuple_of(config["kernel_size"], rank)
    strides = tuple_of(config.get("strides") or 1, rank)
    filters, channels = int(config["filters"]), int(task.shape[-1] or 0)
    if any(n is None for n in task.shape[1:]):
        raise InputError(f"{task.name!r} has a kernel for each position, and the size of its input is unknown")
    out = tuple((int(n or 0) - k) // s + 1 for n, k, s in zip(task.shape[1:-1], size, strides, strict=True))
    kernel = task.arrays[0]
    values = list(task.arrays[1:])
    if task.moved:
        kernel = kernel.reshape(-1, channels, int(np.prod(size)), filters).swapaxes(1, 2)
        values = [np.moveaxis(x.reshape(filters, *out), 0, -1) for x in values]
        task.converted.append("kernel rows and bias put in the order of channels last")
    kernel = kernel.reshape(*out, int(np.prod(size)) * channels, filters)
    places = "ij"[:rank]
    patches = patch_layer(f"{task.name}_patches", size, strides, channels)
    function = activation(config.get("activation"), task.name)
    dense = layers.EinsumDense(
        f"b{places}p,{places}pf->b{places}f",
        output_shape=(*out, filters),
        bias_axes=f"{places}f" if bias else None,
        activation=function,
        **task.arguments.common(config, "kernel", *(("bias",) if bias else ())),
        **task.base,
    )
    task.converted.append("locally connected layers left Keras 3: patches, then EinsumDense with a kernel for each position")
    identity = np.eye(int(np.prod(size)) * channels).reshape(*size, channels, -1)
    return Block([patches, dense], [(patches, [identity]), (dense, scaled(task, function, [kernel, *values]))])


def patch_layer(name: str, size: tuple[int, ...], strides: tuple[int, ...], channels: int) -> Any:
    """Return a convolution that copies each patch into the channels: rows, then columns, then channels."""
    return _CONV[len(size)](int(np.prod(size)) * channels, size, strides=strides, use_bias=False, trainable=False, name=name)
