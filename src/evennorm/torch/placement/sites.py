"""Find in a graph where batch normalization can stand: activations, what they are computed from, and channel axes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import batchnorm, conv, dropout, instancenorm, padding, pooling

from evennorm.errors import ArgumentError
from evennorm.models.network import Role
from evennorm.torch.fx_graph import is_leaf
from evennorm.torch.network import joined
from evennorm.torch.roles import asks_for_size, name_of_function, role_of_function, role_of_module

LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers with a linear map and a bias, of exactly these classes; derived classes may compute anything else."""

_NO_ACTIVATION = ("clamp", "clip", "threshold")
"""Functions that the roles count among activations, and that as often only bound a value."""

_CHANNELS_FIRST = (
    conv._ConvNd,
    batchnorm._BatchNorm,
    instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Upsample,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    *(vars(pooling)[name] for name in pooling.__all__),
    *(vars(padding)[name] for name in padding.__all__),
)
_CHANNELS_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention)
_FIRST_WORDS = re.compile(
    r"(conv|conv_transpose|max_pool|avg_pool|adaptive_avg_pool|adaptive_max_pool|lp_pool|dropout)[123]d"
    r"|(batch|instance|group)_norm|interpolate|pixel_(un)?shuffle"
)
_PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "einsum")
_KEEPS_AXES = ("contiguous", "clone", "to", "float", "detach")
_LAST_WORDS = ("linear", "embedding", "layer_norm", "scaled_dot_product_attention")


@dataclass(frozen=True, eq=False)
class Site:
    """A hidden step of a model: a call of a module, or of a function on tensors."""

    name: str
    """Path of the module, or "path:function" after the module whose code calls it, followed by "#2" for a second call."""
    kind: str
    """Name of the class or function."""
    module: nn.Module | None
    """The module in the copy that is rewritten; None for a function."""
    is_activation: bool
    """Whether it has a place before it."""
    node: fx.Node


class Graph:
    """One model's graph, without batch normalization."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.model = model
        self.graph = graph
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.output = next(node for node in graph.nodes if node.op == "output")

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def role(self, node: fx.Node) -> Role:
        module = self.module(node)
        if module is not None:
            return role_of_module(module) if is_leaf(module) else Role.OTHER
        if node.op not in ("call_function", "call_method") or asks_for_size(node.target, node.args):
            return Role.OTHER
        return role_of_function(node.target, len(node.all_input_nodes))

    def is_activation(self, node: fx.Node) -> bool:
        plain = self.role(node) is Role.ACTIVATION
        return plain and (node.op == "call_module" or name_of_function(node.target) not in _NO_ACTIVATION)

    def has_weights(self, node: fx.Node) -> bool:
        """Return whether a step holds parameters, or is a function that multiplies by a matrix of the model."""
        module = self.module(node)
        if module is not None:
            return next(module.parameters(), None) is not None
        multiplies = self.role(node) in (Role.LINEAR, Role.NORM) or name_of_function(node.target) in _PRODUCTS
        return multiplies and any(each.op == "get_attr" for each in node.all_input_nodes)

    def sites(self) -> list[Site]:
        """Return every hidden step that gives a tensor, in the order of execution."""
        part, counts, found = self.output_part(), dict[str, int](), []
        for node in self.graph.nodes:
            if node.op not in ("call_module", "call_function", "call_method") or asks_for_size(node.target, node.args):
                continue
            if node.meta.get("tensor_meta") is None:
                continue
            module = self.module(node)
            name = joined("", node) if module is None else str(node.target)
            counts[name] = counts.get(name, 0) + 1
            if node not in part:
                unique = name if counts[name] == 1 else f"{name}#{counts[name]}"
                kind = name_of_function(node.target) if module is None else type(module).__name__
                found.append(Site(unique, kind, module, self.is_activation(node), node))
        return found

    def output_part(self) -> set[fx.Node]:
        """Return the steps from the last ones with weights to each output, both included."""
        part: set[fx.Node] = set()
        waiting = list(self.output.all_input_nodes)
        while waiting:
            node = waiting.pop()
            if node.op in ("placeholder", "get_attr") or node in part:
                continue
            part.add(node)
            if self.is_activation(node) or not self.has_weights(node):
                waiting += node.all_input_nodes
        return part

    def data_input(self, node: fx.Node) -> fx.Node | None:
        """Return what an activation, a pooling or the like is computed from: its first tensor."""
        given = node.args[0] if node.args else node.kwargs.get("input")
        return given if isinstance(given, fx.Node) else None

    def origin(self, node: fx.Node) -> tuple[fx.Node, Any]:
        """Return what a value comes from before activations: the step with weights if there is one; and a key of both.

        A layer called on two branches gives both the same key, so that they share a normalization. An activation layer
        called after many convolutions does not.
        """
        stage, found = 0, node
        while self.is_activation(found) and (made := self.data_input(found)) is not None:
            stage, found = stage + 1, made
        module = self.module(found)
        if module is not None and self.has_weights(found):
            return found, (module, stage, len(shape_of(node)))
        return node, (node, 0, 0)

    def channel_axis(self, node: fx.Node) -> int:
        """Return the channel axis of a value, counted from 0.

        Raises:
            ArgumentError: its rank has none, or no layer beside it says which it is.
        """
        rank = len(shape_of(node))
        if rank == 2:
            return 1
        if 2 < rank < 6:
            found = next(self._declared(node, rank), None)
            if found is not None:
                return found
        raise ArgumentError(
            "gamma and beta need a channel axis, which the layers around a tensor tell (1 of convolutions, the last of "
            f"linear layers); nothing tells that of {node.name!r} in {type(self.model).__name__}, of shape "
            f"{tuple(shape_of(node))}; leave that site out by a function given as where"
        )

    def _declared(self, node: fx.Node, rank: int) -> Iterator[int]:
        """Yield what the steps say about the channel axis: those that made the value first, then those that read it."""
        made: fx.Node | None = node
        while made is not None and len(shape_of(made)) == rank:
            yield from self._own_axis(made, rank)
            made = None if self._moves_axes(made) else self.data_input(made)
        waiting, seen = [node], {node}
        while waiting:
            for reader in waiting.pop(0).users:
                if reader in seen or reader.op == "output" or self._moves_axes(reader):
                    continue
                seen.add(reader)
                yield from self._own_axis(reader, rank)
                if len(shape_of(reader)) == rank:
                    waiting.append(reader)

    def _own_axis(self, node: fx.Node, rank: int) -> Iterator[int]:
        module = self.module(node)
        if isinstance(module, _CHANNELS_FIRST):
            yield 1
        elif isinstance(module, _CHANNELS_LAST) and not isinstance(module, dropout.Dropout):
            yield rank - 1
        elif module is None and node.op != "placeholder":
            name = name_of_function(node.target)
            if _FIRST_WORDS.fullmatch(name):
                yield 1
            elif name in _LAST_WORDS:
                yield rank - 1

    def _moves_axes(self, node: fx.Node) -> bool:
        if isinstance(self.module(node), nn.Identity):
            return False
        return self.role(node) is Role.RESHAPE and name_of_function(node.target) not in (
            "contiguous",
            "clone",
            "to",
            "float",
        )

    def behind_raw_steps(self, node: fx.Node) -> fx.Node:
        """Return the first place after an input where values are final and the channel axis is known.

        Flattening makes features of (N, 28, 28), which has no channel; of (N, 3, 28, 28) the channel is known before it.
        """
        while len(readers := [each for each in node.users if shape_of(each)]) == 1:
            reader = readers[0]
            flattens = len(shape_of(node)) > 3 and len(shape_of(reader)) == 2
            identity = isinstance(self.module(reader), nn.Identity)
            if not (identity or (self._moves_axes(reader) and not flattens)):
                return node
            node = reader
        return node

    def input_axis(self, node: fx.Node) -> int:
        """Return the channel axis of an input; of images that are flattened it is 1, as everywhere in torch."""
        if len(shape_of(node)) > 3 and all(len(shape_of(each)) == 2 for each in node.users if shape_of(each)):
            return 1
        return self.channel_axis(node)

    def holds_indices(self, node: fx.Node) -> bool:
        """Return whether an embedding reads a tensor, or it holds no floating-point numbers."""
        meta = node.meta.get("tensor_meta")
        if meta is None or not meta.dtype.is_floating_point:
            return True
        reads = [isinstance(self.module(each), nn.Embedding | nn.EmbeddingBag) for each in node.users]
        return any(reads) or any(
            name_of_function(each.target) == "embedding" for each in node.users if each.op != "call_module"
        )


def shape_of(node: fx.Node) -> torch.Size:
    """Return the shape of the tensor that a step gives; () where it gives none."""
    return getattr(node.meta.get("tensor_meta"), "shape", torch.Size())
