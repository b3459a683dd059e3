"""A torch model goes in; a copy for inference comes out, its batch normalizations made part of the layers beside them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from evennorm.core.fold_plan import Folded, Plan, plan
from evennorm.core.folding import ScaleShift
from evennorm.core.network import Step
from evennorm.errors import ArgumentError, first_line
from evennorm.torch.conversion.places import checked
from evennorm.torch.conversion.steps import is_watched
from evennorm.torch.linear import Describer, write
from evennorm.torch.network import Reading, read
from evennorm.torch.runs import Run, runs


def fold(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, Plan]:
    """A copy of `model` that computes the same in evaluation with fewer layers, and what became of each batch normalization.

    Each batch normalization becomes part of the convolution, linear layer or embedding behind or in front of which it
    stands, where that is exact; else one scale and shift. Computed in float64. Activations that our modules apply stay, as
    modules of their own.

    The copy is for inference. Where torch.fx can follow the model's code it is a torch.fx.GraphModule, in which the batch
    normalizations are gone and all that is left keeps its key in the state_dict. Where it cannot, the copy is of the model's
    own class, and an nn.Identity stands in the place of what is gone.

    Args:
        model: any module, before it is wrapped in DataParallel or the like, or compiled.
        inputs: example inputs, a tuple of tensors with at least two samples.

    Raises:
        ArgumentError: no module; one that is wrapped or compiled; one that cannot be copied or run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from evennorm.torch.fold import fold
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> folded, plan = fold(model, (torch.zeros(2, 3, 5, 5),))
        >>> sorted(folded.state_dict()), plan.folded[0].side
        (['0.bias', '0.weight'], 'behind')
    """
    checked(model, "fold")
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:  # whatever a module holds that cannot be copied
        raise ArgumentError(
            f"fold works on a copy of the model, which copy.deepcopy could not make ({first_line(error)}); give the "
            "model as it is before it is wrapped or run"
        ) from error
    try:
        ran = runs(model, inputs)
    except Exception as error:
        raise ArgumentError(
            f"fold runs the model on example inputs, which fails ({first_line(error)}); give inputs that fit it"
        ) from error
    reading = read(model, inputs)
    describer = Describer(model, reading, ran)
    rewriting = _Rewriting(model, reading, ran)
    made = plan(reading.network, describer, lambda step: rewriting.fixed(step) or _sentence(describer.miscounted(step)))
    return rewriting.by(made), made


def _sentence(clause: str) -> str:
    return f"it {clause}" if clause else ""


class _Scaled(nn.Module):
    """scale * x + shift of each channel, in the place of a batch normalization that could not be folded."""

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        return torch.addcmul(self.shift, input, self.scale)


class _Rewriting:
    """Changes a model, which nobody else holds, by a plan."""

    def __init__(self, model: nn.Module, reading: Reading, ran: dict[nn.Module, Run]):
        self._model = model
        self._reading = reading
        self._ran = ran
        self._steps = {step.layer: step for step in reversed(reading.network.steps)}

    def fixed(self, step: Step) -> str:
        """Why a batch normalization cannot be taken out of the model; "" if it can."""
        if step.handle is None:
            return "it is a function call in the model's code"
        if is_watched(step.handle):
            return "it has hooks, which see its input and output"
        node = self._reading.nodes.get(step.name)
        if node is None and len(step.inputs) > 1:
            return "it adds a residual in code that cannot be followed"
        if node is not None and len(_operands(node)) != len(set(_operands(node))):
            return "its residual is its own input"
        return ""

    def by(self, plan: Plan) -> nn.Module:
        for path, maps in plan.maps.items():
            write(self._steps[path].handle, maps)
        for found in plan.folded:
            if not found.kept:
                self._replace(found)
        if self._reading.graph is None:
            return self._model
        folded = fx.GraphModule(self._model, self._reading.graph, class_name=type(self._model).__name__)
        folded.graph.lint()
        return folded.eval()

    def _replace(self, found: Folded) -> None:
        step = self._steps[found.layer]
        calls = self._reading.network.calls(step)
        activation = _activation(step.handle)
        scaled = None if found.into else self._scaled(step)
        rest = [each for each in (scaled, activation) if each is not None]
        nodes = [self._reading.nodes[each.name] for each in calls if each.name in self._reading.nodes]
        if len(nodes) == len(calls):
            for node in nodes:
                self._rewrite(node, str(node.target), scaled is not None, activation is not None)
            holder = scaled or nn.Module()
            if activation is not None:
                holder.add_module("activation", activation)
            self._put(step.handle, holder)
        else:
            self._put(step.handle, nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest))

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        """Everywhere that the old one is held."""
        for module in list(self._model.modules()):
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new

    def _rewrite(self, node: fx.Node, path: str, scaled: bool, activated: bool) -> None:
        graph = node.graph
        y, *residual = _operands(node)
        with graph.inserting_before(node):
            if scaled:  # in torch's own words, so that nothing of evennorm is in the graph
                scale, shift = (graph.create_node("get_attr", f"{path}.{name}") for name in ("scale", "shift"))
                y = graph.call_function(torch.addcmul, (shift, y, scale))
            if residual:
                y = graph.call_function(operator.add, (y, residual[0]))
            if activated:
                y = graph.call_module(f"{path}.activation", (y,))
        node.replace_all_uses_with(y)
        graph.erase_node(node)

    def _scaled(self, step: Step) -> _Scaled:
        assert step.state is not None
        affine = ScaleShift.of(step.state)
        run = self._ran[step.handle]
        assert run.shape is not None
        shape = [-1 if axis in step.state.axis else 1 for axis in range(1, len(run.shape))]
        like = {"dtype": run.dtype, "device": step.handle.running_mean.device}
        return _Scaled(*(torch.from_numpy(values).reshape(shape).to(**like) for values in (affine.scale, affine.shift)))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The input, and the residual if there is one."""
    residual = node.kwargs.get("residual", node.args[1] if len(node.args) > 1 else None)
    input = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    return [each for each in (input, residual) if isinstance(each, fx.Node)]


def _activation(norm: Any) -> nn.Module | None:
    """What a batch normalization applies last, as a module."""
    match getattr(norm, "activation", None):
        case "relu":
            return nn.ReLU()
        case "leaky_relu":
            return nn.LeakyReLU(norm.negative_slope)
        case "elu":
            return nn.ELU(norm.alpha)
    act = norm._modules.get("act")  # timm's
    return None if act is None or type(act) is nn.Identity else act
