"""Write a folded model of Keras or torch as ONNX, for any number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evennorm.errors import InputError, MissingExtra, first_line
from evennorm.tools.atomic import replacing
from evennorm.tools.models import quiet

SUFFIX = ".onnx"


def check(framework: str) -> None:
    """Check that ONNX can be written, before `fold` works.

    Raises:
        InputError: Keras's backend cannot write it here.
        MissingExtra: a package is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("writing .onnx", "onnx", (error.name or "onnx").partition(".")[0]) from error
    if framework == "keras":
        import keras

        backend = keras.backend.backend()
        if backend != "torch" and (backend == "numpy" or find_spec("tf2onnx") is None):
            raise InputError(
                f"Keras writes .onnx on its torch backend, and on jax and tensorflow with the package tf2onnx; received the "
                f"backend {backend}; repeat the command with KERAS_BACKEND=torch"
            )


def write(framework: str, folded: Any, path: Path, example: Sequence[Any], metadata: dict[str, str]) -> None:
    """Write the file whole or not at all; the number of samples stays open, other sizes are those of `example`.

    Raises:
        InputError: the model cannot be exported.
    """
    with replacing(path) as partial:
        try:
            with quiet("torch.onnx", "torch.export", "onnxscript", "tf2onnx"):
                if framework == "keras":
                    folded.export(partial, format="onnx", verbose=False)
                else:
                    partial.write_bytes(_exported(folded, example, metadata))
        except Exception as error:  # exporters refuse in many ways
            other = ".keras" if framework == "keras" else ".pt2"
            raise InputError(
                f"the folded model cannot be exported to .onnx ({first_line(error)}); write it to {other}"
            ) from error


def _exported(folded: Any, example: Sequence[Any], metadata: dict[str, str]) -> bytes:
    """Return a torch model as the bytes of a file, without the paths of this machine that the exporter notes."""
    import onnx
    import torch

    from evennorm.torch.exported.silence import silence

    samples = torch.export.Dim("samples")
    shapes = [{0: samples} for _ in example]
    folded.eval()
    with silence():
        program = torch.onnx.export(folded, tuple(example), dynamo=True, verbose=False, dynamic_shapes=shapes)
    model = program.model_proto
    for part in (model.graph, *model.functions):
        for node in part.node:
            del node.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)
