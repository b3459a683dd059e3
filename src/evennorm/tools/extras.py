"""Say which extra of evennorm brings a package."""

from __future__ import annotations

from evennorm.errors import MissingExtra

EXTRAS = {
    **dict.fromkeys(("click", "rich", "optuna", "sqlalchemy", "scipy", "matplotlib", "PIL", "safetensors"), "tools"),
    **dict.fromkeys(("plotly", "jinja2"), "tools"),
    **dict.fromkeys(("keras", "h5py"), "keras"),
    **{name: name for name in ("jax", "torch", "tensorflow", "equinox", "flax", "haiku", "torchmetrics", "lightning")},
    **dict.fromkeys(("onnx", "onnxscript"), "onnx"),
    "sklearn": "demo",
    "tensorboardX": "tensorboard",
    "triton": "gpu",
}
"""The extra that declares a package, by the name under which it is imported."""

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def missing(what: str, error: ImportError) -> MissingExtra | None:
    """Return the error to show where an import failed; None where it is no package that an extra brings.

    Example:
        >>> print(missing("evennorm compare", ModuleNotFoundError(name="scipy.stats")))
        evennorm compare needs the package scipy, which is not installed; install it with: pip install 'evennorm[tools]'
    """
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    return MissingExtra(what, EXTRAS[package], _DISTRIBUTIONS.get(package, package))
