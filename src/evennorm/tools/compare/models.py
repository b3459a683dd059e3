"""Build a network, a model file or a function's model with fresh weights."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.tasks import activation_of
from evennorm.tools.compare.variants import options_of, variant, where_of
from evennorm.tools.imported import imported, misnamed
from evennorm.tools.models import bounded_weights, check_keras_file

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Defaults:
    """Values that are used where the user names none."""

    learning_rates: tuple[float, ...] = (0.02, 0.1)
    batch_size: int = 32


DEFAULTS = {"paper-mlp": Defaults(learning_rates=(0.1, 0.5), batch_size=60)}
"""Defaults of the networks that differ from `Defaults()`; the batch of 60 is the paper's."""


MOMENTUM = 0.9
"""Momentum of the layers that are placed: PyTorch's default. Keras's 0.99 remembers the initial moving averages for hundreds
of steps, so after a short training the test would show those instead of the placement."""


@dataclass(frozen=True)
class Architecture:
    """A model as a recipe: each `build()` gives it with fresh initial weights, drawn from the current random seed."""

    name: str
    build: Callable[[], keras.Model]
    binarize: bool = False
    """Whether it is trained on samples cut to 0 and 1."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    """Class and configuration of the optimizer, without its learning rate."""

    digest: str = ""
    """SHA-256 of the configuration."""

    def place(self, where: str) -> keras.Model:
        """Return a fresh model with batch normalization at one of the placements, whatever it had before.

        Raises:
            InputError: the model cannot be rewritten.
        """
        from evennorm.keras.place import place, sites

        model = self.build()
        if where == "as-is":
            return model
        try:
            plain = place(model, "none")
            found = variant(where)
            places = where_of(found, sites(plain) if found.mixture else ())
            return plain if where == "none" else place(plain, places, **options_of(found, momentum=MOMENTUM))
        except EvennormError as error:
            raise InputError(f"{self.name} has no placement {where!r}: {error}") from error

    def sites(self) -> list[str]:
        """Return the layers at which a mixture of placements may differ.

        Raises:
            InputError: the model cannot be rewritten.
        """
        from evennorm.keras.place import sites

        return sites(self.place("none"))


def load_model(model: str, data: Data) -> Architecture:
    """Load the architecture of that name, at that path, or of that function.

    Args:
        model: `article-cnn`, `paper-mlp`, a `.keras` file, of which only the architecture is taken, or `module:function`,
            which is called with `input_shape` and `classes` where it has arguments of these names.
        data: what it will be trained on.

    Raises:
        InputError: no such model, one that cannot be built, or one that does not fit the data.
    """
    if model in ("article-cnn", "paper-mlp"):
        from evennorm.tools.compare import networks

        network = networks.article_cnn if model == "article-cnn" else networks.paper_mlp
        name, build = model, lambda: network(data.input_shape, data.classes, activation_of(data.task))
    elif model.endswith(".keras"):
        name, build = Path(model).name, _from_file(model)
    elif re.fullmatch(r"[\w.]+:\w+", model):
        name, build = model, _from_function(model, data)
    else:
        if hint := misnamed(model):
            raise InputError(f"--model {model}: {hint}")
        raise InputError(
            f"models are article-cnn, paper-mlp, a .keras or .pt2 file, module:function, timm:NAME or torchvision:NAME; "
            f"received {model!r}, which is none of these"
        )
    built = build()
    _check(name, built, data)
    return Architecture(name, build, model == "paper-mlp", _optimizer(built), _digest(built))


def ends_in_logits(model: keras.Model) -> bool:
    """Return whether a model's outputs are scores of any size rather than probabilities: its last activation is linear."""
    import keras

    last = model.layers[-1]
    while isinstance(last, keras.Model):
        last = last.layers[-1]
    return getattr(last, "activation", None) is keras.activations.linear


def _from_file(path: str) -> Callable[[], keras.Model]:
    import keras

    import evennorm.keras  # noqa: F401  # registers the layer for loading

    if not os.path.isfile(path):
        raise InputError(f"there is no model file {path}; save one by model.save({path!r}), or name another model")
    check_keras_file(Path(path))
    try:
        with warnings.catch_warnings(), bounded_weights(path):
            warnings.simplefilter("ignore")  # about the state of its optimizer, of which only the settings are taken
            model = keras.saving.load_model(path, compile=True, safe_mode=True)
    except InputError:
        raise
    except Exception as error:  # Keras raises many kinds; a file of unknown origin may cause any
        raise InputError(
            f"{path} cannot be loaded as a Keras model: {first_line(error)}; save it again by this Keras"
        ) from error

    def build() -> keras.Model:
        fresh = keras.models.clone_model(model)
        fresh.optimizer = getattr(model, "optimizer", None)
        return fresh

    return build


def _from_function(name: str, data: Data) -> Callable[[], keras.Model]:
    import keras

    _, function_name = name.split(":")
    function = imported(name, f"--model {name}", f"function {function_name!r}")
    given = {"input_shape": data.input_shape, "classes": data.classes}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"--model {name}: {function_name} is not a function") from error
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    arguments = given if takes_all else {key: value for key, value in given.items() if key in named}
    unmet = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unmet = [parameter for parameter in unmet if parameter not in given]
    if unmet:
        raise InputError(
            f"--model {name}: it is called with input_shape and classes, as far as it has these; "
            f"{', '.join(unmet)} needs a default"
        )

    def build() -> keras.Model:
        try:
            model = function(**arguments)
        except Exception as error:
            raise InputError(f"--model {name}: calling it fails: {first_line(error)}") from error
        if not isinstance(model, keras.Model):
            raise InputError(
                f"--model {name}: it must return a keras.Model (or a torch.nn.Module, and say so by its return annotation); "
                f"received {type(model).__name__}"
            )
        if not model.built:
            model.build((None, *data.input_shape))
        return model

    return build


def _check(name: str, model: keras.Model, data: Data) -> None:
    wanted_in, wanted_out = (None, *data.input_shape), (None, data.classes)
    try:
        shape_in, shape_out = model.input_shape, model.output_shape
    except AttributeError:  # a subclassed model has shapes only once it is called
        shape_in, shape_out = wanted_in, tuple(model.compute_output_shape(wanted_in))
    if (
        not isinstance(shape_in, tuple)
        or len(shape_in) != len(wanted_in)
        or any(size not in (None, wanted) for size, wanted in zip(shape_in[1:], wanted_in[1:], strict=True))
    ):
        raise InputError(f"{name} takes inputs of shape {shape_in}; {data.name} has samples of shape {data.input_shape}")
    if shape_out != wanted_out:
        raise InputError(
            f"{name} gives outputs of shape {shape_out}; {data.name} has {data.outputs_in_words}, which needs {wanted_out}"
        )


def _optimizer(model: keras.Model) -> dict[str, Any]:
    """Return the optimizer of a compiled model, else stochastic gradient descent with momentum."""
    import keras

    optimizer = getattr(model, "optimizer", None) or keras.optimizers.SGD(momentum=0.9)
    serialized = keras.optimizers.serialize(optimizer)
    serialized["config"] = {
        key: value for key, value in serialized["config"].items() if key not in ("learning_rate", "name")
    }
    return serialized


def _digest(model: keras.Model) -> str:
    import keras

    try:
        description = json.dumps(keras.saving.serialize_keras_object(model)["config"], sort_keys=True, default=str)
    except NotImplementedError:  # a subclassed model without get_config
        description = json.dumps([type(model).__name__, [[weight.path, list(weight.shape)] for weight in model.weights]])
    # Keras numbers names by what else was built in the process: dense_3 is the dense of another one.
    return hashlib.sha256(re.sub(r"_\d+(?=[\"/])", "", description).encode()).hexdigest()
