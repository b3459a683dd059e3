"""Keras 1's convolutions and pooling in float64 NumPy, by the formulas of its Theano and TensorFlow backends."""

from __future__ import annotations

from itertools import product

import numpy as np


def channels_last(x, order):
    return np.moveaxis(x, 1, -1) if order == "th" else x


def as_ordered(x, order):
    return np.moveaxis(x, -1, 1) if order == "th" else x


def same_length(n, stride):
    return -(-n // stride)


def conv_pads(n, k, stride, mode, theano):
    """In front and behind; k is the dilated size."""
    if mode == "full":
        return k - 1, k - 1
    if mode == "valid":
        return 0, 0
    if theano:
        return k // 2, k // 2
    total = max((same_length(n, stride) - 1) * stride + k - n, 0)
    return total // 2, total - total // 2


def convolve(x, kernel, strides, mode, theano, dilation=None):
    """x (N, spatial, C), kernel (spatial, C, F)."""
    rank = x.ndim - 2
    dilation = dilation or (1,) * rank
    size = kernel.shape[:rank]
    sizes = x.shape[1:-1]
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    pads = [conv_pads(n, k, s, mode, theano) for n, k, s in zip(sizes, reach, strides, strict=True)]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    if theano:
        kernel = kernel[(slice(None, None, -1),) * rank]
    out = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    y = np.zeros((x.shape[0], *out, kernel.shape[-1]))
    for offset in product(*map(range, size)):
        where = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(offset, dilation, out, strides, strict=True)
        )
        y += x[(slice(None), *where)] @ kernel[offset]
    if theano and mode == "same":  # cut where the kernel is even
        y = y[(slice(None), *(slice(0, same_length(n, s)) for n, s in zip(sizes, strides, strict=True)))]
    return y


def deconvolve(x, kernel, strides, mode, theano, out):
    """x (N, spatial, C), kernel (spatial, C, F): the gradient of a convolution by its input, of the size `out`."""
    rank = x.ndim - 2
    size = kernel.shape[:rank]
    front = []
    for n, k, s, o in zip(x.shape[1:-1], size, strides, out, strict=True):
        if mode == "valid":
            front.append(0)
        else:
            front.append(k // 2 if theano else max((n - 1) * s + k - o, 0) // 2)
    if theano:
        kernel = kernel[(slice(None, None, -1),) * rank]
    y = np.zeros((x.shape[0], *out, kernel.shape[-1]))
    for position in product(*map(range, x.shape[1:-1])):
        for offset in product(*map(range, size)):
            where = tuple(p * s - f + o for p, s, f, o in zip(position, strides, front, offset, strict=True))
            if all(0 <= w < n for w, n in zip(where, out, strict=True)):
                y[(slice(None), *where)] += x[(slice(None), *position)] @ kernel[offset]
    if theano and mode == "same":  # cut where the kernel is even, as after a convolution
        cut = [same_length(n, s) if k % 2 == 0 else None for n, k, s in zip(x.shape[1:-1], size, strides, strict=True)]
        y = y[(slice(None), *map(slice, cut))]
    return y


def pool(x, size, strides, mode, theano, largest):
    """x (N, spatial, C)."""
    sizes = x.shape[1:-1]
    if mode == "valid":
        pads = [(0, 0)] * len(size)
    elif theano:
        pads = [((k - 2 if k % 2 else k - 1),) * 2 for k in size]
    else:
        pads = [conv_pads(n, k, s, mode, theano=False) for n, k, s in zip(sizes, size, strides, strict=True)]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=np.nan)  # what is padded counts for neither
    out = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:-1], size, strides, strict=True)]
    if mode == "same":
        out = [min(o, same_length(n, s)) for o, n, s in zip(out, sizes, strides, strict=True)]
    y = np.zeros((x.shape[0], *out, x.shape[-1]))
    for position in product(*map(range, out)):
        where = tuple(slice(p * s, p * s + k) for p, s, k in zip(position, strides, size, strict=True))
        window = padded[(slice(None), *where)]
        axes = tuple(range(1, x.ndim - 1))
        y[(slice(None), *position)] = np.nanmax(window, axes) if largest else np.nanmean(window, axes)
    return y
