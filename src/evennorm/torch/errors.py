"""Define the errors that torch code catches: each is also of the type that torch's own operation raises."""

from evennorm.errors import ArgumentError, ShapeError


class TensorError(ShapeError, RuntimeError):
    """Tensors whose channels, dtypes or devices do not fit each other."""


class UnsupportedError(ArgumentError, NotImplementedError):
    """A dtype that has no mean, or a compiler that cannot take the module."""


class UnknownArgumentError(ArgumentError, TypeError):
    """An argument that the modules do not have."""


class NoTensorError(ArgumentError, TypeError, AttributeError):
    """Something other than a tensor, which lacks attributes that torch's modules read."""
