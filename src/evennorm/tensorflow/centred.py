"""A view goes in; its moments come out, and what is left of it without the mean, piece by piece."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from evennorm.core.moments import Moments, per_channel
from evennorm.kernels import reference
from evennorm.tensorflow.chunks import Piece, Pieces, cut, later, pieces, total, total_product
from evennorm.tensorflow.namespace import Tensor, xp


class Centred(NamedTuple):
    """A view x - shift, which is stored as such only where it is one piece."""

    x: Tensor
    shift: Tensor | None
    where: Pieces

    def piece(self, piece: Piece | None) -> Tensor:
        """One piece, float32."""
        x = reference.wide(xp, cut(self.x, piece))
        return x if self.shift is None else x - per_channel(xp, self.shift)


def centred_and_moments(x: Tensor, number: int) -> tuple[Centred, Moments]:
    """A view of one group, float32 or narrower, in pieces, and its moments as `core.moments` has them; not differentiable.

    mean is the shift, and mean_low what the centred view still holds of it.
    """
    _, outer, _, inner = xp.shape(x)
    n = outer * inner
    divisor = max(n, 1) if isinstance(n, int) else tf.cast(tf.maximum(n, 1), tf.float64)
    where = pieces(x, number)
    sum_x = total(map(Centred(x, None, where).piece, where), where)
    shift = xp.rounded(tf.cast(sum_x / divisor, tf.float32))
    centred = Centred(x, shift, where)
    if number == 1:
        centred = Centred(centred.piece(None), None, where)
    parts = [centred.piece(piece) for piece in where]
    rest = total(parts, where) / divisor
    squares = total_product(((d, d) for d in parts), where) / divisor
    variance = tf.cast(tf.maximum(squares - rest * rest, 0.0), tf.float32)
    if number > 1:
        centred = centred._replace(x=later([x], [variance])[0])
    return centred, Moments(n, shift, tf.cast(rest, tf.float32), variance)
