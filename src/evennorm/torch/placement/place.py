"""Put batch normalization into one place of each hidden layer of a torch model, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from evennorm.errors import ArgumentError
from evennorm.torch.graph_code import graph_module
from evennorm.torch.placement import norms
from evennorm.torch.placement.removal import relying_on_beta, remove
from evennorm.torch.placement.sites import LINEAR, Graph, Site, shape_of
from evennorm.torch.placement.tracing import traced, unused_name

PLACEMENTS = ("none", "before", "after", "input")
Where = str | Callable[[Site], str | None] | Mapping[str, str | None]


def place(
    model: nn.Module,
    where: Where,
    drop_bias: bool = True,
    *,
    input_shape: Sequence[int] | None = None,
    inputs: Tensor | Sequence[Any] | None = None,
    norm: str = "batch",
    **options: Any,
) -> fx.GraphModule:
    """Return a copy of `model` with batch normalization in one place of each hidden layer, and nowhere else.

    Batch normalization that the model already has is taken out first, so that placements of one model can be compared; a
    layer whose bias that one stood in for gets its bias, zero. Everything else is copied with its weights, devices, dtypes,
    modes and keys in the state_dict. The original is left as it was. The copy is a torch.fx.GraphModule, to train and to
    save by its state_dict; it computes nothing in place.

    A hidden layer is any that comes before the output layers: the last layers with weights on the way to each output,
    with all that follows them. Activations are modules, functions and methods alike: nn.ReLU, F.relu, torch.relu, x.relu_().
    Softmax is none, since what reads it needs probabilities. Recurrent layers and attention keep theirs inside and are left
    alone, and so are modules without batch normalization whose code torch.fx cannot follow.

    Args:
        model: a module whose code torch.fx or torch.export can follow, before it is wrapped or compiled. What torch.export
            records, because the code asks for the sizes of its input, takes these sizes alone, and any number of samples.
            What is shared stays shared: a layer with weights that is called twice gets one normalization, called twice.
        where: "none"; "before", between a layer and its activation; "after", after the activation; "input", as the first
            layer after every input of numbers, but for steps that tell which axis is the channel (reshaping).
            Or a function that is called with each hidden `Site` (`name`, `kind`, `module`, `is_activation`) and returns
            None, "before" (only for activations) or "after" (directly after any); or a mapping from sites' names to these.
        drop_bias: leave out the bias of a layer whose output goes to the normalization only: beta does its work.
        input_shape: of one sample, without the batch: (3, 32, 32). The model is run on a batch of two such.
        inputs: in its place, example inputs of at least two samples, where there are several or they are no floats.
        norm: "batch"; or "layer", "group", "rms", for torch's own modules in the same places. Layer and RMS normalization
            take all of an image, otherwise the channels; group normalization at most 32 groups of two channels at least.
            Only batch normalization is taken out of the model first.
        **options: arguments for each module, such as `momentum` or `eps`. Batch normalization is BatchNorm1d, 2d or 3d. It
            normalizes axis 1 around
            convolutions and the last axis around linear layers, is named after the layer that it normalizes, and takes over
            its dtype, device, mode and `requires_grad`.

    Raises:
        ArgumentError: a model that neither can follow, a placement that does not exist or that the model has no place
            for, an axis that no layer tells, batch normalization where it cannot be taken out, inputs that do not fit.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.2, for "before" and the redundant bias.

    Example:
        >>> from collections import OrderedDict
        >>> from torch import nn
        >>> from evennorm.torch import place
        >>> layers = OrderedDict(hidden=nn.Linear(8, 4), act=nn.ReLU(), out=nn.Linear(4, 2))
        >>> [name for name, _ in place(nn.Sequential(layers), "before", input_shape=(8,)).named_children()]
        ['hidden', 'hidden_bn', 'act', 'out']
        >>> [name for name, _ in place(nn.Sequential(layers), "after", input_shape=(8,)).named_children()]
        ['hidden', 'act', 'hidden_bn', 'out']
    """
    _check_where(where)
    norms.check(norm, options)
    graph, relying = _plain(model, input_shape, inputs)
    plan = _Plan(graph, norm, options)
    if where == "input":
        plan.normalize_inputs()
    elif where != "none":
        plan.read(where)
    if where in PLACEMENTS[1:] and not plan.inserted:
        raise ArgumentError(f"model {type(model).__name__!r} has no place for where={where!r}: {_NO_PLACE[str(where)]}")
    plan.settle_biases(relying, drop_bias)
    graph.graph.lint()
    placed = graph_module(graph.model, graph.graph, type(model).__name__)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in placed.named_modules():  # torch.fx makes new modules for those that only hold others
        module.training = modes.get(name, module.training)
    return placed


def sites(
    model: nn.Module, *, input_shape: Sequence[int] | None = None, inputs: Tensor | Sequence[Any] | None = None
) -> list[Site]:
    """Return the hidden steps of a model that `place` can normalize, in the order of execution.

    Their names are the keys of a mapping given as `where`; those with `is_activation` have a place before them.

    Args:
        model, input_shape, inputs: as for `place`.

    Raises:
        ArgumentError: as for `place`.

    Example:
        >>> from torch import nn
        >>> from evennorm.torch.placement import sites
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(site.name, site.kind, site.is_activation) for site in sites(model, input_shape=(8,))]
        [('0', 'Linear', False), ('1', 'ReLU', True)]
    """
    return _plain(model, input_shape, inputs)[0].sites()


def _plain(
    model: nn.Module, input_shape: Sequence[int] | None, inputs: Tensor | Sequence[Any] | None
) -> tuple[Graph, set[nn.Module]]:
    """Return the graph of a copy without batch normalization, and the linear layers that relied on its beta."""
    copied, found = traced(model, _example(model, input_shape, inputs))
    assert found.graph is not None
    graph = Graph(copied, found.graph)
    relying = relying_on_beta(graph)
    remove(graph)
    return graph, relying


_HIDDEN = (
    "none of its hidden layers has an activation that can be told apart (those inside recurrent layers, attention and "
    "modules that torch.fx cannot follow cannot), and output layers are not touched; use where='input', or a function "
    "that names layers to normalize 'after'"
)
_NO_PLACE = {
    "before": _HIDDEN,
    "after": _HIDDEN,
    "input": "none of its inputs holds floating-point values of its own (those that go into an Embedding are indices); "
    "use 'before' or 'after'",
}


class _Target(NamedTuple):
    """A value to normalize."""

    axis: int
    base: fx.Node
    """The step that it comes from."""
    key: Any
    """A key that values with a shared normalization have in common."""
    name: str
    """The name of the site, for values that no layer names."""


class _Plan:
    """The insertion of normalizations into a graph."""

    def __init__(self, graph: Graph, norm: str, options: dict[str, Any]):
        self.inserted: dict[Any, str] = {}
        """Path of the module, by what it normalizes."""
        self._graph = graph
        self._norm = norm
        self._options = options
        self._behind: dict[fx.Node, fx.Node] = {}
        """The normalized value of a node, for the activations that read it."""
        self._norms: set[fx.Node] = set()

    def read(self, where: Where) -> None:
        """Decide for every hidden step, then insert."""
        found = self._graph.sites()
        if isinstance(where, Mapping):
            where = _chosen(where, found)
        jobs = [job for site in found if (job := self._job(site, _answer(where, site))) is not None]
        after = {node for node, _, reader in jobs if reader is None}
        for node, target, reader in jobs:
            if reader is None:
                self._put_after(node, target)
            elif node not in after:
                self._put_before(node, target, reader)

    def _job(self, site: Site, answer: str | None) -> tuple[fx.Node, _Target, fx.Node | None] | None:
        """Return what to normalize, and the one step that will read it, or None for all."""
        if answer == "after":
            if not shape_of(site.node):
                raise ArgumentError(
                    f"batch normalization takes one tensor, and {site.name!r} of class {site.kind} returns several; return "
                    "None for it"
                )
            return site.node, self._target(site.node, site.name), None
        made = self._graph.data_input(site.node) if answer == "before" else None
        return None if made is None else (made, self._target(made, site.name), site.node)

    def _target(self, node: fx.Node, name: str) -> _Target:
        return _Target(self._graph.channel_axis(node), *self._graph.origin(node), name)

    def _put_before(self, node: fx.Node, target: _Target, reader: fx.Node) -> None:
        if node not in self._behind:  # two activations of one value share a call, whose statistics move once a step
            self._behind[node] = self._normalized(node, target)
        reader.replace_input_with(node, self._behind[node])

    def _put_after(self, node: fx.Node, target: _Target) -> None:
        readers = list(node.users)
        normalized = self._normalized(node, target)
        for reader in readers:
            reader.replace_input_with(node, normalized)

    def normalize_inputs(self) -> None:
        """Insert a normalization after each input of floating-point numbers."""
        for node in self._graph.inputs:
            behind = self._graph.behind_raw_steps(node)
            if not self._graph.holds_indices(behind) and behind.users:
                axis = self._graph.input_axis(behind)
                self._put_after(behind, _Target(axis, *self._graph.origin(behind), str(node.target)))

    def _normalized(self, node: fx.Node, target: _Target) -> fx.Node:
        """Return the node of a normalization that reads `node`."""
        if target.key not in self.inserted:
            self.inserted[target.key] = self._new(node, target)
        graph, rank = self._graph.graph, len(shape_of(node))
        axis = 1 if target.axis == 1 else target.axis - rank  # -1 after linear layers, as `removal` expects it
        taken = norms.channel_axis_taken(self._norm, rank, axis)
        moved = axis % rank != taken % rank
        with graph.inserting_after(node):
            x = graph.call_method("movedim", (node, axis, taken)) if moved else node
        with graph.inserting_after(x):
            y = graph.call_module(self.inserted[target.key], (x,))
        self._norms.add(y)
        if moved:
            with graph.inserting_after(y):
                y = graph.call_method("movedim", (y, taken, axis))
            self._norms |= {x, y}
        return y

    def _new(self, node: fx.Node, target: _Target) -> str:
        """Add the module and return its path."""
        model, layer = self._graph.model, self._graph.module(target.base)
        path = str(target.base.target) if layer is not None else target.name.split("#")[0].replace(":", ".").strip(".")
        parent_path, _, word = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        name = unused_name(parent, f"{word}_bn")
        parent.add_module(name, self._module(node, layer, target.axis))
        return f"{parent_path}.{name}" if parent_path else name

    def _module(self, node: fx.Node, layer: nn.Module | None, axis: int) -> nn.Module:
        shape = shape_of(node)
        weights = [] if layer is None else list(layer.parameters())
        first = next(iter(weights or self._graph.model.parameters()), None)
        like = {"device": None if first is None else first.device, "dtype": node.meta["tensor_meta"].dtype}
        norm = norms.made(self._norm, shape, axis, **self._options, **like)
        if weights and not any(weight.requires_grad for weight in weights):
            norm.requires_grad_(False)
        return norm.train(self._graph.model.training if layer is None else layer.training)

    # Biases

    def settle_biases(self, relying: set[nn.Module], drop_bias: bool) -> None:
        """Add and remove biases of linear layers by what now follows them."""
        uses: dict[nn.Module, list[fx.Node]] = {}
        read = {str(node.target) for node in self._graph.graph.nodes if node.op == "get_attr"}
        names = {module: name for name, module in self._graph.model.named_modules()}
        for node in self._graph.graph.nodes:
            module = self._graph.module(node)
            if type(module) in LINEAR:
                uses.setdefault(module, []).append(node)
        beta = drop_bias and norms.has_beta(self._norm, self._options)
        for module, nodes in uses.items():
            normalized = all(node.users and all(reader in self._norms for reader in node.users) for node in nodes)
            if normalized and beta and f"{names[module]}.bias" not in read:
                module.bias = None
            elif module in relying and not normalized and module.bias is None:
                weight: Any = module.weight
                channels: Any = getattr(module, "out_channels", None) or module.out_features
                fresh = torch.zeros(channels, device=weight.device, dtype=weight.dtype)
                module.bias = nn.Parameter(fresh, requires_grad=weight.requires_grad)


def _example(model: nn.Module, input_shape: Sequence[int] | None, inputs: Tensor | Sequence[Any] | None) -> tuple[Any, ...]:
    if (input_shape is None) == (inputs is None):
        given = "neither" if inputs is None else "both"
        raise ArgumentError(
            f"rewriting a torch model needs its shapes, from one of input_shape, such as (3, 32, 32) for one sample, or "
            f"inputs; received {given}"
        )
    if inputs is not None:
        return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not all(isinstance(size, int) and size > 0 for size in input_shape or (0,)):
        raise ArgumentError(f"input_shape is that of one sample, sizes above 0; received {input_shape!r}")
    floats = (x for x in getattr(model, "parameters", list)() if x.is_floating_point())
    first = next(floats, torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    example = torch.randn((2, *(input_shape or ())), generator=generator, dtype=torch.float64)
    return (example.to(first.dtype).to(first.device),)


def _chosen(where: Mapping[str, str | None], found: Sequence[Site]) -> Callable[[Site], str | None]:
    names = [site.name for site in found]
    unknown = [name for name in where if name not in names]
    if unknown:
        raise ArgumentError(
            f"a mapping given as where has names of hidden sites as keys ({', '.join(names) or 'there are none'}); received "
            f"{unknown[0]!r}"
        )
    return lambda site: where.get(site.name)


def _answer(where: Any, site: Site) -> str | None:
    if not callable(where):
        return where if site.is_activation else None
    answer = where(site)
    if answer not in (None, "before", "after"):
        raise ArgumentError(
            f"the function given as where returns None, 'before' or 'after'; it returned {answer!r} for {site.name!r}"
        )
    if answer == "before" and not site.is_activation:
        raise ArgumentError(
            f"'before' is the place between a layer and its activation, and {site.name!r} of class {site.kind} has none of "
            "its own; return 'after' for it, or 'before' for the activation"
        )
    return answer


def _check_where(where: Any) -> None:
    if not callable(where) and not isinstance(where, Mapping) and where not in PLACEMENTS:
        raise ArgumentError(
            f"where is one of {', '.join(PLACEMENTS)}, a function of a site that returns None, 'before' or 'after', or a "
            f"mapping of sites' names to these; received {where!r}"
        )
