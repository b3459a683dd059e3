"""Read a program as a graph of torch.fx: its operations, its tensors by their names, and the modules they came from."""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from evennorm.errors import InputError, printable
from evennorm.torch.exported.operations import CHECKS, name_of, operation
from evennorm.torch.exported.values import DEVICE, UnreadError, argument, check_schema, is_fixed, kind_of, shape_of

_COPIES = ("lift_fresh_copy", "lift_fresh", "detach", "detach_", "alias")
"""What torch.export puts between a constant and its readers."""

MOST = 1 << 28
"""The most values that a list of sizes may multiply to, one below which no honest program comes near."""


@dataclass(frozen=True)
class Program:
    """A program of one input and one output."""

    graph: fx.Graph
    """Its operations; tensors of the model are get_attr nodes. `meta` of a node has `shape` and `scope`: the modules whose
    code made it, as (path, class), the innermost last."""
    tensors: dict[str, Tensor]
    """Those that are read, in the order of the state_dict; parameters are nn.Parameter."""
    example: Tensor
    """An input like the one that it was recorded with."""
    any_size: bool
    """Whether it takes any number of samples."""

    @property
    def class_name(self) -> str:
        """The name of the class of the model."""
        outermost = (node.meta["scope"][0][1].rpartition(".")[2] for node in self.graph.nodes if node.meta.get("scope"))
        named = (
            name for name in outermost if name.isidentifier() and not name.startswith("_")
        )  # torch writes _empty... too
        return next(named, "ExportedModel")


def read(document: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Program:
    """Read a program.

    Args:
        document: what its file says, from JSON.
        tensors: its parameters, buffers and constants.
        name: what errors call it.

    Raises:
        InputError: a program of several inputs or outputs, or with more than operations on tensors.
        Exception: the document is damaged; whatever it does not hold.
    """
    check_schema(document, name)
    try:
        return _Reader(document["graph_module"], tensors, name).program()
    except UnreadError as error:
        raise InputError(
            f"{name} is no program of layers and operations on tensors alone: it holds {printable(error)}; give "
            "module:function that returns the torch.nn.Module"
        ) from error


class _Reader:
    def __init__(self, module: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str):
        self.signature, self.calls = module["signature"], module["module_call_graph"]
        self.source = module["graph"]
        self.values = self.source["tensor_values"]
        self.tensors, self.name = tensors, name
        self.graph = fx.Graph()
        self.nodes: dict[str, Any] = {}

    def program(self) -> Program:
        inputs = [
            self._input(spec, arg) for spec, arg in zip(self.signature["input_specs"], self.source["inputs"], strict=True)
        ]
        given = [each for each in inputs if each is not None]
        if len(given) != 1:
            raise InputError(f"models of one input are read from a .pt2 file; {self.name} has {len(given)}")
        for node in self.source["nodes"]:
            self._node(node)
        self.graph.output(self.nodes[self._output()])
        if not self.nodes[DEVICE].users:
            self.graph.erase_node(self.nodes[DEVICE])
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr" and node.users}
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        counted = {f"{each.rpartition('.')[0]}.num_batches_tracked" for each in used if each.endswith(".running_mean")}
        kept = {key: value for key, value in self.tensors.items() if key in used | counted}
        meta = self.values[given[0]]
        any_size = bool(meta["sizes"]) and not is_fixed(meta, 0)
        device = next((value.device for value in kept.values()), torch.device("cpu"))
        return Program(self.graph, kept, _example(meta, any_size).to(device), any_size)

    def _input(self, spec: Mapping[str, Any], arg: Mapping[str, Any]) -> str | None:
        """Make the node of an input; return its name if it is the user's."""
        kind, content = kind_of(spec)
        if kind == "user_input":
            form, value = kind_of(arg)
            if form != "as_tensor":
                raise UnreadError(f"an input of kind {form.removeprefix('as_')}")
            name = str(value["name"])
            plain = name.isidentifier() and not keyword.iskeyword(name)  # it becomes the name of an argument in code
            node = self.graph.placeholder(name if plain else "input")
            self._keep(name, node, {})
            self.nodes[DEVICE] = self.graph.call_function(getattr, (node, "device"))
            return name
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise UnreadError(f"an input of kind {kind}")
        path = str(content[f"{kind}_name"])
        if path not in self.tensors:
            raise UnreadError(f"no values of {path!r}")
        self._keep(content["arg"]["name"], self.graph.get_attr(path), {})
        return None

    def _keep(self, name: str, node: fx.Node, metadata: Mapping[str, str]) -> None:
        if name in self.nodes:
            raise UnreadError(f"the name {name!r} twice")
        self.nodes[name] = node
        node.meta["scope"] = _scope(metadata.get("nn_module_stack", ""))
        if name in self.values:
            node.meta["shape"] = shape_of(self.values[name])

    def _node(self, node: Mapping[str, Any]) -> None:
        found = operation(node["target"])
        if name_of(found) in CHECKS:
            return
        args, kwargs = [], {}
        for each in node["inputs"]:
            value = argument(each["arg"], self.nodes)
            self._check_size(node["target"], value)
            if each.get("kind") == 2:
                kwargs[str(each["name"])] = value
            else:
                args.append(value)
        if args and isinstance(args[0], fx.Node) and args[0].op == "get_attr" and _leaves(found, str(args[0].target)):
            self.nodes[node["outputs"][0]["as_tensor"]["name"]] = args[0]
            return
        if name_of(found).endswith("_") and isinstance(args[0], fx.Node) and args[0].op == "get_attr":
            raise UnreadError(f"the step {node['target']} that overwrites {args[0].target!r}")
        if all(type(each) is int for each in args):
            self._check_size(node["target"], args)  # torch.arange(size)
        made = self.graph.call_function(found, tuple(args), kwargs)
        self._results(made, node["outputs"], node["metadata"])

    def _results(self, made: fx.Node, outputs: list[Mapping[str, Any]], metadata: Mapping[str, str]) -> None:
        named = [kind_of(each) for each in outputs]
        match named:
            case []:
                return
            case [("as_tensor", content)] if len(_returns(made)) == 1:
                self._keep(content["name"], made, metadata)
            case [(("as_sym_int" | "as_sym_float" | "as_sym_bool"), content)]:
                self._keep(content["as_name"], made, metadata)
            case _:
                parts = named[0][1] if named[0][0] == "as_tensors" and len(named) == 1 else [each for _, each in named]
                made.meta["scope"] = _scope(metadata.get("nn_module_stack", ""))
                for index, part in enumerate(parts):
                    if isinstance(part, Mapping) and "name" in part:
                        self._keep(part["name"], self.graph.call_function(operator.getitem, (made, index)), metadata)

    def _output(self) -> str:
        outputs = [kind_of(each) for each in self.signature["output_specs"]]
        other = [kind for kind, _ in outputs if kind != "user_output"]
        if other:
            raise InputError(
                f"programs are read as torch.export.export gives them; {self.name} returns {printable(other[0])} "
                "too, as after run_decompositions; save it before that"
            )
        tree = next(each["signature"]["out_spec"] for each in self.calls if each["fqn"] == "")
        given = self.source["outputs"]
        if len(given) != 1 or "as_tensor" not in given[0] or '"type": null' not in tree.partition("children_spec")[0]:
            raise InputError(f"models that return one tensor are read from a .pt2 file; {self.name} returns something else")
        return str(given[0]["as_tensor"]["name"])

    def _check_size(self, target: str, value: Any) -> None:
        sizes = [abs(each) for each in value if type(each) is int and each] if isinstance(value, list) else []
        if math.prod(sizes) > MOST:
            raise InputError(f"{self.name} is not opened: its operation {target} asks for {math.prod(sizes):,} values")


def _leaves(found: Any, path: str) -> bool:
    """Return whether an operation leaves a tensor of the model as it is, or is the count of batches that the layers do
    themselves."""
    counts = name_of(found) == "add_" and path.rpartition(".")[2] == "num_batches_tracked"
    return counts or name_of(found) in _COPIES


def _returns(made: fx.Node) -> list[Any]:
    schema = getattr(made.target, "_schema", None)
    return [None] if schema is None else list(schema.returns)


def _scope(stack: str) -> list[tuple[str, str]]:
    """Return (path, class) of each module from "key,path,class;key,path,class"."""
    found = []
    for entry in stack.split(";") if stack else []:
        parts = entry.split(",")
        found.append((",".join(parts[1:-1]), parts[-1]))
    return found


def _example(meta: Mapping[str, Any], any_size: bool) -> Tensor:
    shape, dtype = shape_of(meta), argument({"as_scalar_type": meta["dtype"]}, {})
    if any_size:
        shape = (2, *shape[1:])
    if math.prod(shape) > MOST:
        raise UnreadError(f"an input of {math.prod(shape):,} values")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
