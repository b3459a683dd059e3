"""Write a folded model, so that the same model gives the same bytes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evennorm.errors import InputError, first_line
from evennorm.tools.atomic import replacing
from evennorm.tools.fold import onnx_file
from evennorm.tools.models import Opened, check_output, quiet, save_model
from evennorm.tools.weights import as_safetensors

_BEGIN = (1980, 1, 1, 0, 0, 0)
"""The first date that a zip file can hold."""
_SAVED, _SHARED = "date_saved", "shared_object_id"


def check(framework: str, path: str | os.PathLike[str]) -> None:
    """Check that a folded model can be written to a path, before `fold` works.

    Raises:
        InputError: no model of that framework is written with this suffix, or there is no such folder.
    """
    if Path(path).suffix == onnx_file.SUFFIX and framework != "flax":
        onnx_file.check(framework)
        check_output(framework, Path(path).with_suffix(".keras" if framework == "keras" else ".pt"))
        return
    if framework == "torch" and Path(path).suffix not in (".pt2", ".safetensors", ".pt", ".pth"):
        raise InputError(
            "folded torch models are written to .pt2 or .onnx, as a program that runs without the model's code, or to "
            f".safetensors, .pt or .pth, as a state_dict; received {os.fspath(path)!r}"
        )
    if framework == "flax" and Path(path).suffix != ".safetensors":
        raise InputError(
            f"folded nnx models are written to .safetensors, their arrays by their paths; received {os.fspath(path)!r}"
        )
    if framework == "flax":
        framework = "torch"  # state_dicts of either are such files
    program = framework == "torch" and Path(path).suffix == ".pt2"
    check_output(framework, Path(path).with_suffix(".pt") if program else path)


FOLDED_FOR = "folded_for"
"""The metadata in torch's files for the ranks of the inputs that a model was folded for: a state_dict cannot refuse
others."""


def write(opened: Opened, folded: Any, path: str | os.PathLike[str], example: Sequence[Any], inputs: str) -> None:
    """Write a folded model whole or not at all; files of torch hold `inputs`, which says what it was folded for.

    Keras: `.keras` or `.h5`, which load without evennorm. torch: `.pt2`, a program of torch.export for any number of
    samples, and any size of images that the model takes; or the state_dict, whose keys are those of the model without its
    batch normalizations. Both: `.onnx`, for any number of samples.

    Raises:
        InputError: the file cannot be written, or the model not be exported.
    """
    suffix = Path(path).suffix
    if suffix == onnx_file.SUFFIX:
        onnx_file.write(opened.framework, folded, Path(path), example, {FOLDED_FOR: inputs})
    elif suffix in (".pt", ".pt2", ".pth"):
        content = _exported(folded, example, inputs) if suffix == ".pt2" else _pickled(folded, inputs)
        with replacing(path) as partial:
            partial.write_bytes(content)
    elif suffix == ".safetensors":
        state = folded.state_dict() if opened.framework == "torch" else _nnx_state(folded)
        content = as_safetensors(state, {FOLDED_FOR: inputs})
        with replacing(path) as partial:
            partial.write_bytes(content)
    elif suffix == ".keras":
        with replacing(path) as partial:
            with quiet():
                folded.save(partial)
            _settle(partial)
    else:
        with quiet():
            save_model(opened, folded, path)


def _nnx_state(model: Any) -> dict[str, Any]:
    """Return the arrays of an nnx model by their paths: "layers.0.kernel"."""
    import numpy as np
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def _settle(path: Path) -> None:
    """Rewrite a file of Keras without what differs each time: the hour, and addresses in memory."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in sorted(archive.namelist())}
    metadata = json.loads(members["metadata.json"])
    members["metadata.json"] = json.dumps(metadata | {_SAVED: "1980-01-01@00:00:00"}).encode()
    members["config.json"] = json.dumps(_numbered(json.loads(members["config.json"]), {})).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, _BEGIN), content)


def _numbered(config: Any, numbers: dict[int, int]) -> Any:
    """Return a configuration with its shared objects numbered in the order they occur."""
    if isinstance(config, list):
        return [_numbered(each, numbers) for each in config]
    if not isinstance(config, dict):
        return config
    return {
        key: numbers.setdefault(each, len(numbers) + 1) if key == _SHARED else _numbered(each, numbers)
        for key, each in config.items()
    }


def _pickled(folded: Any, inputs: str) -> bytes:
    """Return the state_dict as bytes: given a path, torch.save would store its name."""
    import torch

    state = folded.state_dict()
    state._metadata[FOLDED_FOR] = {"inputs": inputs}  # beside the versions of the modules
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _exported(folded: Any, example: Sequence[Any], inputs: str) -> bytes:
    import torch

    from evennorm.torch.exported.silence import silence

    any_size = torch.export.Dim.AUTO  # which becomes fixed where the model asks for one
    shapes = [dict.fromkeys(range(each.dim()), any_size) for each in example]
    try:
        with silence():
            program = torch.export.export(folded, tuple(example), dynamic_shapes=shapes)
    except Exception as error:  # torch.export refuses in many ways
        raise InputError(
            f"the folded model cannot be exported to .pt2 ({first_line(error)}); write its state_dict to .safetensors"
        ) from error
    for node in program.graph.nodes:
        for key in ("stack_trace", "from_node"):  # these hold paths and addresses of this process
            node.meta.pop(key, None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={FOLDED_FOR: inputs})
    return file.getvalue()
