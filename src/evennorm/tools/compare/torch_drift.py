"""Record how the input of one hidden unit of a torch model is distributed while it trains, as `drift` does for Keras."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from evennorm.errors import EvennormError
from evennorm.tools.compare.drift import percentiles
from evennorm.torch.fx_graph import model_graph
from evennorm.torch.graph_code import graph_module
from evennorm.torch.network import propagate
from evennorm.torch.placement.sites import Graph


class UnitInput:
    """The input of the first unit of the last hidden activation, over training samples, in inference mode.

    Activations are modules, functions and methods alike, so the steps up to the last one are run, with the weights of the
    model as they are; a hook would see modules alone.

    Args:
        model: the one that trains, on its device.
        samples: as it takes them.
    """

    def __init__(self, model: nn.Module, samples: Tensor):
        self._samples = samples
        self._found = _in_front_of_the_last_activation(model, samples[:2])

    def __call__(self) -> list[float] | None:
        """Return the percentiles now; None where the model has no hidden activation, or torch.fx cannot follow it."""
        if self._found is None:
            return None
        probe, axis = self._found
        probe.eval()
        with torch.no_grad():
            values = probe(self._samples).select(axis, 0)
        return percentiles(values.cpu().double().numpy())


def _in_front_of_the_last_activation(model: nn.Module, example: Tensor) -> tuple[nn.Module, int] | None:
    """Return the steps of a model up to the last hidden activation, on the same modules, and the channel axis there."""
    steps = model_graph(model).graph
    if steps is None:
        return None
    try:
        propagate(model, steps, [example])
        graph = Graph(model, steps)
        last = next((site for site in reversed(graph.sites()) if site.is_activation), None)
        read = None if last is None else graph.data_input(last.node)
        if read is None:
            return None
        axis = graph.channel_axis(read)
    except EvennormError:  # nothing tells the channel axis, or what it computes is no graph of these steps
        return None
    return _until(model, steps, read), axis


def _until(model: nn.Module, steps: fx.Graph, last: fx.Node) -> nn.Module:
    *others, output = steps.nodes
    output.args = (last,)
    for node in reversed(others[others.index(last) + 1 :]):
        steps.erase_node(node)
    return graph_module(model, steps)
