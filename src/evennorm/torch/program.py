"""Run a torch model call by call, so that its batch normalizations can be observed and changed.

Its code is followed by torch.fx where that is the same; a model that cannot be followed is one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules import batchnorm

from evennorm.models.program import Call, Key, Observer
from evennorm.models.state import BatchNormState
from evennorm.torch.fx_graph import model_graph
from evennorm.torch.graph_code import graph_module, unwritable
from evennorm.torch.modules import _BatchNorm
from evennorm.torch.network import state_of
from evennorm.torch.roles import is_frozen_norm, name_of_function

_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "setitem"}


@dataclass(frozen=True)
class ModuleStatistics:
    """The running statistics of one module."""

    path: str
    module: Any

    @property
    def frozen(self) -> bool:
        weight = self.module.weight
        return is_frozen_norm(self.module) or (weight is not None and not weight.requires_grad)

    def state(self) -> BatchNormState:
        return state_of(self.module, self.path)

    def write(self, mean: np.ndarray, variance: np.ndarray) -> None:
        with torch.no_grad():
            _assign(self.module.running_mean, mean)
            _assign(self.module.running_var, variance)
            if isinstance(self.module, _BatchNorm) and self.module._buffers.get("running_mean_low") is not None:
                stored = self.module.running_mean.cpu().double().numpy()
                _assign(self.module.running_mean_low, mean - stored)

    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), snapshot, strict=True):
                tensor.copy_(value)

    def _tensors(self) -> list[torch.Tensor]:
        low = self.module._buffers.get("running_mean_low")
        return [self.module.running_mean, self.module.running_var, *([] if low is None else [low])]


@dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory."""

    value: torch.Tensor
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.value.nbytes


class Program:
    """The calls of a torch model in evaluation; see `models.program`.

    Example:
        >>> from torch import nn
        >>> from evennorm.torch.program import Program
        >>> program = Program(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
        >>> [call.name for call in program.calls], list(program.layers)
        (['0', '1'], ['1'])
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers: dict[str, ModuleStatistics] = {}
        self.skipped: dict[str, str] = {}
        for path, module in model.named_modules():
            if isinstance(module, batchnorm._BatchNorm) or is_frozen_norm(module):
                if module.running_mean is None:
                    self.skipped[path] = "it keeps no running statistics (track_running_stats=False)"
                elif nn.parameter.is_lazy(module.running_mean):
                    self.skipped[path] = "it is lazy and has never seen a batch"
                else:
                    self.layers[path] = ModuleStatistics(path, module)
        first = next((p for p in model.parameters() if p.is_floating_point() and not nn.parameter.is_lazy(p)), None)
        self._dtype = torch.get_default_dtype() if first is None else first.dtype
        self._device = torch.device("cpu") if first is None else first.device
        self._graph = _followed(model)
        placeholders = [] if self._graph is None else [n for n in self._graph.nodes if n.op == "placeholder"]
        self._inputs = {str(node.target): node.name for node in placeholders}
        self.calls: list[Call] = self._traced() if self._graph is not None else [self._whole()]

    # The calls

    def _traced(self) -> list[Call]:
        assert self._graph is not None
        interpreter = fx.Interpreter(graph_module(self.model, self._graph))
        made: list[Call] = []
        written: dict[str, tuple[Key, ...]] = {}
        for node in self._graph.nodes:
            if node.op not in ("placeholder", "output"):
                sources = [source.name for source in node.all_input_nodes]
                # A reader of a value that was written in place waits for the write.
                waits = [key for source in sources for key in written.get(source, ())]
                made.append(_call(interpreter, node, tuple(dict.fromkeys([*sources, *waits]))))
                if _writes(self.model, node) and sources:
                    written[sources[0]] = (*written.get(sources[0], ()), node.name)
        return made

    def _whole(self) -> Call:
        def run(values: Mapping[Key, Any]) -> Sequence[Any]:
            return (self._apply(values["input"]),)

        return Call(type(self.model).__name__, ("input",), ("output",), run)

    def verify(self, x: Any) -> None:
        if self._graph is None:
            return
        with self.running():
            try:
                values = self.begin(x)
                for call in self.calls:
                    values.update(zip(call.outputs, call.run(values), strict=True))
                output = next(node for node in self._graph.nodes if node.op == "output")
                traced = fx.node.map_arg(output.args[0], lambda node: values[node.name])
            except Exception:  # either the graph or the data is wrong: running the model itself will tell
                self.untraced()
                return
            given = list(_tensors_in(self._apply(x)))
        same = [
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
            for a, b in zip(given, _tensors_in(traced), strict=False)
        ]
        if len(same) != len(given) or not all(same):
            self.untraced()

    def untraced(self) -> None:
        """Take the model as one call from now on."""
        self._graph = None
        self.calls = [self._whole()]

    def begin(self, x: Any) -> dict[Key, Any]:
        if self._graph is None:
            return {"input": x}
        values = (
            dict(x) if isinstance(x, dict) else dict(zip(self._inputs, x if isinstance(x, tuple) else (x,), strict=False))
        )
        if set(values) != set(self._inputs):
            self.untraced()  # the graph leaves out arguments that have a default
            return {"input": x}
        return {self._inputs[name]: self._tensor(value) for name, value in values.items()}

    def predict(self, x: Any) -> list[np.ndarray]:
        with self.running():
            return [_to_numpy(tensor) for tensor in _tensors_in(self._apply(x))]

    def apply(self, x: Any) -> list[np.ndarray]:
        return self.predict(x)

    def _apply(self, x: Any) -> Any:
        if isinstance(x, dict):
            return self.model(**{name: self._tensor(value) for name, value in x.items()})
        return self.model(*(self._tensor(value) for value in (x if isinstance(x, tuple) else (x,))))

    def _tensor(self, value: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(value))  # a copy, since data may be mapped from a file and models may write
        # Whole numbers may be indices; bytes and booleans are values.
        floating = tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.bool)
        return tensor.to(self._device, self._dtype if floating else None)

    # Watching

    @contextmanager
    def running(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def watched(self, paths: Sequence[str], observer: Observer) -> Iterator[None]:
        with ExitStack() as stack:
            for path in paths:
                hook = self.layers[path].module.register_forward_pre_hook(_observed(path, observer), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    # Keeping values

    def pack(self, value: Any) -> HostTensor | None:
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        return HostTensor(value.detach().clone().cpu(), value.device)

    def unpack(self, packed: HostTensor) -> torch.Tensor:
        return packed.value.clone().to(packed.device)  # calls may write in place


def _followed(model: nn.Module) -> fx.Graph | None:
    graph = model_graph(model).graph
    alone = graph is None or any(node.op == "call_module" and node.target == "" for node in graph.nodes)
    return None if alone or graph is None or unwritable(graph) else graph


def _call(interpreter: fx.Interpreter, node: fx.Node, inputs: tuple[Key, ...]) -> Call:
    def run(values: Mapping[Key, Any]) -> Sequence[Any]:
        interpreter.env = {source: values[source.name] for source in node.all_input_nodes}
        return (interpreter.run_node(node),)

    return Call(str(node.target), inputs, (node.name,), run)


def _writes(model: nn.Module, node: fx.Node) -> bool:
    """Return whether a call writes its result over its first input."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = name_of_function(node.target)
    own = name.endswith("_") and not name.endswith("__")
    return node.op != "get_attr" and (own or name in _IN_PLACE or bool(node.kwargs.get("inplace", False)))


def _observed(path: str, observer: Observer) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
        mask = kwargs.get("mask")
        observer(path, _to_numpy(x), None if mask is None else _to_numpy(mask))

    return hook


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def _assign(tensor: torch.Tensor, value: np.ndarray) -> None:
    tensor.copy_(torch.from_numpy(np.ascontiguousarray(value, "float64")).reshape(tensor.shape))
