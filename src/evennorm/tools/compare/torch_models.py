"""Build torch models with fresh weights: from a function of the user's, a program of torch.export, timm or torchvision."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.framework import FUNCTION
from evennorm.tools.compare.variants import options_of, variant, where_of
from evennorm.tools.imported import imported, misnamed
from evennorm.tools.programs import open_program
from evennorm.tools.zoo import is_of_library, maker
from evennorm.torch.fx_graph import model_graph
from evennorm.torch.placement import place
from evennorm.torch.roles import name_of_function


@dataclass(frozen=True)
class TorchArchitecture:
    """A torch model as a recipe: each `build()` gives it with fresh initial weights, drawn from torch's current seed."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    """The shape of one sample; images have the channels first."""
    from_logits: bool
    """Whether its outputs are scores rather than probabilities."""
    digest: str
    """SHA-256 of the names and shapes of its weights, and of its layers."""
    binarize: bool = False
    optimizer: dict[str, Any] = field(default_factory=lambda: {"config": {"momentum": 0.9, "name": "SGD"}})

    def place(self, where: str) -> nn.Module:
        """Return a fresh model with batch normalization at one of the placements, whatever it had before.

        Raises:
            InputError: the model cannot be rewritten.
        """
        model = self.build()
        if where == "as-is":
            return model
        found = variant(where)
        try:
            places = where_of(found, self.sites() if found.mixture else ())
            return place(model, places, input_shape=self.input_shape, **options_of(found))
        except EvennormError as error:
            raise InputError(f"{self.name} has no placement {where!r}: {error}") from error

    def sites(self) -> list[str]:
        """Return the activations at which a mixture of placements may differ.

        Raises:
            InputError: the model cannot be rewritten.
        """
        from evennorm.torch.placement import sites

        try:
            return [site.name for site in sites(self.build(), input_shape=self.input_shape) if site.is_activation]
        except EvennormError as error:
            raise InputError(f"{self.name} has no places to mix: {error}") from error


def load_torch_model(model: str, data: Data) -> TorchArchitecture:
    """Load the architecture of that function, or of that name in a library.

    Args:
        model: `module:function`, called with `input_shape` and `classes` where it has arguments of these names; a `.pt2`
            file of torch.export, of which only the architecture is taken; `timm:NAME` or `torchvision:NAME`.
        data: what it will be trained on.

    Raises:
        InputError: no such model, one that cannot be built or trained, or one that does not fit the data.
        MissingExtra: the library is not installed.
    """
    if is_of_library(model):
        make = _of_library(model, data)
    elif FUNCTION.fullmatch(model):
        make = _of_function(model, data)
    elif Path(model).suffix == ".pt2":
        make = _of_program(model)
    else:
        raise InputError(_not_trained(model))
    build = _fresh(make, data.input_shape)
    built = build()
    _check(model, built, data)
    return TorchArchitecture(model, build, data.input_shape, not _ends_in_probabilities(built), _digest(built))


def _not_trained(model: str) -> str:
    if hint := misnamed(model):
        return f"--model {model}: {hint}"
    return (
        f"a file of torch weights holds no architecture; received {model}; give --model module:function that returns the "
        "torch.nn.Module, or a .pt2 file that torch.export.save wrote"
    )


def _of_library(model: str, data: Data) -> Callable[[], nn.Module]:
    make = maker(model, f"--model {model}", data.classes, data.input_shape[0])
    return lambda: _made(make, model)


def _of_program(path: str) -> Callable[[], nn.Module]:
    rebuilt = open_program(Path(path))
    if rebuilt.undrawn:
        name, reader = next(iter(rebuilt.undrawn.items()))
        raise InputError(
            f"each repeat starts from weights of its own, and {path} does not tell how those of its parameter {name!r} are "
            f"drawn, which is no layer's and is read by {reader}; give --model module:function that returns the "
            "torch.nn.Module"
        )

    def make() -> nn.Module:
        model = copy.deepcopy(rebuilt.model)
        for layer in rebuilt.drawn:
            model.get_submodule(layer).reset_parameters()
        return model

    return make


def _of_function(name: str, data: Data) -> Callable[[], nn.Module]:
    function_name = name.partition(":")[2]
    function = imported(name, f"--model {name}", f"function {function_name!r}")
    given = {"input_shape": data.input_shape, "classes": data.classes}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"--model {name}: {function_name} is not a function") from error
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    arguments = {key: value for key, value in given.items() if takes_all or key in {each.name for each in parameters}}
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    unmet = [p.name for p in parameters if p.default is p.empty and p.kind not in variable and p.name not in given]
    if unmet:
        raise InputError(
            f"--model {name}: it is called with input_shape and classes, as far as it has these; "
            f"{', '.join(unmet)} needs a default"
        )
    return lambda: _made(lambda: function(**arguments), name)


def _made(make: Callable[[], Any], name: str) -> nn.Module:
    try:
        model = make()
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"--model {name}: calling it fails: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"--model {name}: it must return a torch.nn.Module (or say by its return annotation that it is a keras.Model); "
            f"received {type(model).__name__}"
        )
    return model


def _fresh(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Return a function that builds a model with other weights at every seed, even where `make` loads some or returns one
    model."""

    def seeded(seed: int) -> list[torch.Tensor]:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return [x.detach().clone() for x in make().parameters() if not nn.parameter.is_lazy(x)]

    first, second = seeded(1), seeded(2)
    same = bool(first) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def build() -> nn.Module:
        model = make()
        if same:
            _redraw(model)
        if any(nn.parameter.is_lazy(x) for x in [*model.parameters(), *model.buffers()]):
            _forward(model, shape)
        return model.train()

    return build


def _redraw(model: nn.Module) -> None:
    """Draw new weights for a model.

    Raises:
        InputError: a module holds weights and has no reset_parameters.
    """
    for name, module in model.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        elif next(module.parameters(recurse=False), None) is not None:
            raise InputError(
                "each repeat starts from weights of its own, and --model gives the same ones at every call, of which those "
                f"of {name or 'the model'!r} ({type(module).__name__}) cannot be drawn anew; give it reset_parameters()"
            )


def _forward(model: nn.Module, shape: tuple[int, ...]) -> Any:
    first = next(iter(model.parameters()), torch.empty(0))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model(torch.zeros(2, *shape, device=first.device))
    finally:
        for module, training in modes:
            module.training = training


def _check(name: str, model: nn.Module, data: Data) -> None:
    try:
        y = _forward(model, data.input_shape)
    except Exception as error:  # its code may raise anything for such samples
        raise InputError(
            f"{name} is called with samples of shape {data.input_shape}, as {data.name} has them, and fails: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(y, torch.Tensor) or tuple(y.shape) != (2, data.classes):
        got = f"shape {tuple(y.shape)[1:]}" if isinstance(y, torch.Tensor) else f"type {type(y).__name__}"
        raise InputError(
            f"{name} gives outputs of {got}; {data.name} has {data.outputs_in_words}, which needs ({data.classes},)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{name} has no weights that could be trained")


def _ends_in_probabilities(model: nn.Module) -> bool:
    """Return whether the last step is a softmax or a sigmoid; a log-softmax counts as a score."""
    graph = model_graph(model).graph
    if graph is None:
        return False
    last = next(node for node in graph.nodes if node.op == "output").args[0]
    if not hasattr(last, "op"):
        return False
    if last.op == "call_module":
        return isinstance(model.get_submodule(str(last.target)), nn.Softmax | nn.Sigmoid)
    return name_of_function(last.target) in ("softmax", "sigmoid", "special_expit")


def _digest(model: nn.Module) -> str:
    described = [str(model), [[name, list(value.shape)] for name, value in model.state_dict().items()]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
