"""Record by torch.export a model whose code torch.fx cannot follow.

torch.export runs the code with a symbol for the number of samples only, so the code may ask for all other sizes; the graph
holds for these. It also holds for one mode. Layers that know a mode take part in both again; whether the rest is the same in
the other mode remains to be checked.
"""

from __future__ import annotations

import copy
import io
import json
import operator
import zipfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from evennorm.errors import InputError
from evennorm.torch.exported.rebuild import rebuild
from evennorm.torch.exported.silence import silence


def recorded(model: nn.Module, inputs: Sequence[Any], training: bool) -> fx.GraphModule:
    """Return a module of torch.fx that computes what `model` does in one mode, and refuses inputs of other sizes.

    Its layers are modules of torch.nn with the names, tensors and modes of the model's.

    Args:
        model: any module that can be copied.
        inputs: one tensor, of two samples or more.
        training: the mode to record.

    Raises:
        InputError: a program of more than layers and operations on tensors, or of several inputs.
        Exception: whatever torch.export raises.
    """
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise InputError(f"models of one input are recorded; received {len(inputs)}")
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    copied = copy.deepcopy(model, shared)  # on which its code may leave symbols
    with silence():
        size = torch.export.Dim.AUTO  # which becomes fixed where the code asks for it
        program = torch.export.export(copied.train(training), tuple(inputs), dynamic_shapes=({0: size},))
        tensors = program.state_dict | {name: x for name, x in program.constants.items() if isinstance(x, Tensor)}
        made = rebuild(_document(program), tensors, type(model).__name__).model
    modes, kept = {path: module.training for path, module in model.named_modules()}, model.state_dict().keys()
    for path, module in made.named_modules():
        module.training = modes.get(path, model.training)
        prefix = f"{path}." if path else ""
        module._non_persistent_buffers_set |= {name for name in module._buffers if prefix + name not in kept}
    x = next(node for node in made.graph.nodes if node.op == "placeholder")
    _refuse_other_sizes(made.graph, x, tuple(inputs[0].shape[1:]))
    made.recompile()
    return made


def _refuse_other_sizes(graph: fx.Graph, x: fx.Node, sizes: tuple[int, ...]) -> None:
    """Let the graph begin with an assertion, which is lost neither by tracing it again nor by torch.export."""
    said = (
        f"the model was placed for samples of shape {sizes}, whose sizes its code uses; place it again for samples of others"
    )
    with graph.inserting_after(x):
        shape = graph.call_function(getattr, (x, "shape"))
    with graph.inserting_after(shape):
        given = graph.call_function(operator.getitem, (shape, slice(1, None)))
    with graph.inserting_after(given):
        same = graph.call_function(operator.eq, (given, sizes))
    with graph.inserting_after(same):
        graph.call_function(torch._assert, (same, said))


def _document(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Return what a file of the program says."""
    file = io.BytesIO()
    torch.export.save(program, file)
    with zipfile.ZipFile(file) as archive:
        member = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        return dict(json.loads(archive.read(member)))
