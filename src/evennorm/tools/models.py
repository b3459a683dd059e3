"""Open a model from a file or from `module:function`, without running code that a file contains."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evennorm.errors import EvennormError, InputError, MissingExtra, first_line
from evennorm.tools.archives import check_growth, check_zip
from evennorm.tools.atomic import replacing
from evennorm.tools.hdf5 import check_hdf5_file
from evennorm.tools.imported import imported, misnamed
from evennorm.tools.programs import is_program, open_program
from evennorm.tools.weights import as_safetensors, load_weights
from evennorm.tools.without_tensorflow import leave_tensorflow_out
from evennorm.tools.zoo import is_of_library, maker

_HDF5 = b"\x89HDF\r\n\x1a\n"
_FORMS = "a .keras file, a .h5 file of a whole model, a .pt2 file, module:function, timm:NAME or torchvision:NAME"


@dataclass(frozen=True)
class Opened:
    """A model and where it came from."""

    name: str
    framework: str
    """keras, torch or flax."""
    model: Any
    """keras.Model, torch.nn.Module or flax.nnx.Module."""
    path: Path | None = None
    """The file it was read from."""
    notes: tuple[str, ...] = ()
    """What could not be read, one sentence each."""


def open_model(model: Any, weights: str | os.PathLike[str] | None = None) -> Opened:
    """Open the model of a command's MODEL argument.

    Args:
        model: a keras.Model, a torch.nn.Module or an nnx module of Flax; the path of a `.keras` file, of a `.h5` file of a
            whole model, or of a `.pt2` file of torch.export, whose layers are rebuilt; or `module:function`, the user's own
            code, which is imported from the current folder and called without arguments. It may also name a model that the
            module holds. `timm:NAME` and `torchvision:NAME` are models of these libraries, with fresh weights. What was
            opened before is given back.
        weights: a file to load into it: a state_dict for torch (`.pt`, `.pth`, `.safetensors`), `.weights.h5` for Keras.

    Raises:
        InputError: there is no such model, or it cannot be opened without running code that a file brings along.
        MissingExtra: the framework is not installed.

    Example:
        >>> import torch
        >>> open_model(torch.nn.BatchNorm1d(3)).framework
        'torch'
    """
    if isinstance(model, Opened):
        opened = model
    elif isinstance(model, str | os.PathLike):
        text = os.fspath(model)
        library = is_of_library(text) and not os.path.exists(text)
        function = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)", text)
        if library:
            opened = _from_library(text, trained=weights is not None)
        else:
            opened = _from_function(*function.groups()) if function and not os.path.exists(text) else _from_file(Path(text))
    else:
        opened = _recognized(model, getattr(model, "name", None) or type(model).__name__)
    if weights is not None and opened.framework == "flax":
        raise InputError(f"weights are loaded into models of Keras and torch; let the function of {opened.name} load them")
    if weights is not None:
        load_weights(opened.model, opened.framework, opened.name, Path(weights))
    return opened


def save_model(opened: Opened, model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model whole or not at all: Keras as `.keras` or `.h5`, a state_dict of torch as `.safetensors` or `.pt`.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    check_output(opened.framework, path)
    suffix = Path(path).suffix
    with replacing(path) as partial:
        if opened.framework == "keras":
            with quiet():  # that .h5 is an old format
                model.save(partial)
        elif suffix == ".safetensors":
            partial.write_bytes(as_safetensors(model.state_dict()))
        else:
            import torch

            torch.save(model.state_dict(), partial)


def check_output(framework: str, path: str | os.PathLike[str]) -> None:
    """Check that a model can be written to a path, before a command works for minutes.

    Raises:
        InputError: no model of that framework is written with this suffix, or there is no such folder.
    """
    if framework == "flax":
        raise InputError(
            f"no files of whole nnx models are written; call the tool from Python and keep nnx.state of its model; received "
            f"{os.fspath(path)!r}"
        )
    suffixes = {"keras": (".keras", ".h5"), "torch": (".safetensors", ".pt", ".pth")}[framework]
    if Path(path).suffix not in suffixes:
        what = "Keras models" if framework == "keras" else "state_dicts of torch models"
        raise InputError(f"{what} are written to {' or '.join(suffixes)}; received {os.fspath(path)!r}")
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise InputError(
            f"cannot write {os.fspath(path)!r}: it is a folder, or in none; name a file in a folder that is there"
        )


def prepare_keras() -> None:
    """Make `import keras` use the engine of KERAS_BACKEND, or the lightest that is installed, without log output.

    Raises:
        MissingExtra: Keras is not installed, or no engine.
    """
    if "keras" in sys.modules:
        return
    from evennorm.tools.compare.engine import choose_engine

    if importlib.util.find_spec("keras") is None:
        raise MissingExtra("reading Keras models", "keras", "keras")
    if os.environ.get("KERAS_BACKEND") is None:
        os.environ["KERAS_BACKEND"] = choose_engine()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _recognized(model: Any, name: str) -> Opened:
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.Model):
        leave_tensorflow_out()
        return Opened(name, "keras", model)
    if torch is not None and isinstance(model, torch.nn.Module):
        if isinstance(model, torch.jit.ScriptModule):
            raise InputError(
                f"{name} is a TorchScript program, whose layers cannot be observed; give the module it was made from"
            )
        inner = getattr(model, "_orig_mod", model)  # of torch.compile
        parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
        return Opened(name, "torch", inner.module if isinstance(inner, parallel) else inner)
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module):
        return Opened(name, "flax", model)
    raise InputError(f"a model is {_FORMS}, a keras.Model or a torch.nn.Module; received {name!r} of {type(model).__name__}")


def _from_function(module: str, function: str) -> Opened:
    prepare_keras_if_installed()
    name = f"{module}:{function}"
    found = imported(name, name, f"{function!r}; it is to return, or to be, a model")
    try:
        return _recognized(found, name)
    except InputError:
        if not callable(found):
            raise
    try:
        made = found()
    except Exception as error:
        raise InputError(f"{name}: calling it without arguments fails: {first_line(error)}") from error
    return _recognized(made, name)


def _from_library(name: str, trained: bool) -> Opened:
    make = maker(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how weights are drawn
            model = make()
    except EvennormError:
        raise
    except Exception as error:
        raise InputError(f"{name}: building it fails: {first_line(error)}") from error
    notes = () if trained else (f"the weights of {name} are fresh ones; give trained ones by --weights",)
    return replace(_recognized(model, name), notes=notes)


def prepare_keras_if_installed() -> None:
    """Prepare Keras, if it is installed, for user's code that may import it."""
    if importlib.util.find_spec("keras") is not None:
        prepare_keras()


def _from_file(path: Path) -> Opened:
    if (hint := misnamed(str(path))) and (path.suffix == ".py" or not path.exists()):
        raise InputError(f"{path} is no model: {hint}")
    if not path.exists():
        raise InputError(f"there is no file {path}; a model is {_FORMS}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; a model is {_FORMS}")
    if not path.is_file():
        raise InputError(f"{path} is no regular file; a model is {_FORMS}")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise InputError(f"{path} is empty; save the model again")
    if start == _HDF5:
        return _from_hdf5(path)
    if start[:2] == b"PK":
        if path.suffix == ".pt2" or _is_program(path):
            return Opened(path.name, "torch", open_program(path).model, path)
        check_keras_file(path)
        return _loaded(path)
    if start[:1] == b"\x80" or path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".joblib"):
        raise InputError(f"{path} is not opened: {_no_pickles(path)}")
    raise InputError(
        f"{path} is no model file: it is neither a zip file (.keras and .pt2 are) nor HDF5 (.h5 is); a model is {_FORMS}"
    )


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return is_program(set(archive.namelist()))
    except Exception:  # whoever reads it next says what is wrong
        return False


def _no_pickles(path: Path) -> str:
    return "it is a pickle, which runs whatever its author wrote; give module:function that builds the model" + (
        f", and the state_dict by --weights {path}" if path.suffix in (".pt", ".pth") else ""
    )


def check_keras_file(path: Path) -> None:
    """Check that a file is a `.keras` file that is safe to read.

    Raises:
        InputError: it is no `.keras` file, a damaged one, or announces far more than it stores.
        MissingExtra: h5py is not installed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, str(path))
            members = set(archive.namelist())
            if any(name.endswith(("/data.pkl", "data.pickle")) or name == "data.pkl" for name in members):
                raise InputError(f"{path} is not opened: {_no_pickles(path)}")
            if is_program(members):
                raise InputError(f"{path} is a program of torch.export under another name; rename it to .pt2")
            if "config.json" not in members or not members & {"model.weights.h5", "model.weights.npz"}:
                raise InputError(
                    f"{path} is a zip file, but no .keras file, which holds config.json and model.weights.h5; "
                    f"it holds {', '.join(sorted(members)[:4]) or 'nothing'}"
                )
            damaged = archive.testzip()
            if damaged:
                raise InputError(
                    f"{path} is damaged: its member {damaged!r} is not what was written; fetch or save it again"
                )
            if "model.weights.h5" in members:
                check_hdf5_file(io.BytesIO(archive.read("model.weights.h5")), str(path))
            if "model.weights.npz" in members:
                with zipfile.ZipFile(io.BytesIO(archive.read("model.weights.npz"))) as inside:
                    check_zip(inside, str(path))
    except EvennormError:
        raise
    except Exception as error:  # damage causes many kinds
        raise InputError(f"{path} is damaged or cut short ({first_line(error)}); fetch or save it again") from error


def _from_hdf5(path: Path) -> Opened:
    check_hdf5_file(path, str(path))
    import h5py

    try:
        with h5py.File(path, "r") as file:
            groups, attributes = set(file), set(file.attrs)
            version = file.attrs.get("keras_version", b"")
            version = version.decode() if isinstance(version, bytes) else str(version)
    except Exception as error:  # damage causes many kinds
        raise InputError(f"{path} is damaged or cut short ({first_line(error)}); fetch or save it again") from error
    if "model_config" not in attributes:
        if attributes & {"layer_names", "nb_layers"} or groups & {"layers", "_layer_checkpoint_dependencies", "vars"}:
            raise InputError(
                f"{path} holds weights without their model; give module:function that builds it, with --weights {path}, "
                "or make a model of it: evennorm migrate --architecture"
            )
        raise InputError(f"{path} is HDF5, but not of Keras: it holds neither model_config nor layer_names")
    if version.startswith(("0.", "1.")):
        raise InputError(f"{path} was written by Keras {version}; first: evennorm migrate {path} -o {path.stem}.keras")
    return _loaded(path)


def _loaded(path: Path) -> Opened:
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise InputError(f"{path} holds a Keras model under another name; rename it to .keras (zip) or .h5 (HDF5)")
    prepare_keras()
    leave_tensorflow_out()
    import keras

    import evennorm.keras
    import evennorm.keras.legacy  # noqa: F401  # registers the layers for loading

    def load(compiled: bool) -> Any:
        with quiet(), bounded_weights(path):  # quiet about the state of an optimizer
            return keras.saving.load_model(path, compile=compiled, safe_mode=True)

    try:
        return Opened(path.name, "keras", load(True), path)
    except InputError:
        raise
    except Exception as error:  # Keras raises many kinds; a file of unknown origin may cause any
        without = f"opened without its optimizer, loss and metrics, which cannot be read: {first_line(error)}"
    try:
        return Opened(path.name, "keras", load(False), path, (without,))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be loaded: {_reason(error)}") from error


@contextmanager
def bounded_weights(path: str | os.PathLike[str]) -> Iterator[None]:
    """Bound the weights that a file's configuration asks for by the file's size: a layer of 10 billion units is a lie.

    Raises:
        InputError: the weights of Keras's layers take far more than the file.
    """
    import keras

    original, stored, announced = keras.layers.Layer.add_weight, os.path.getsize(path), 0

    def add_weight(self: Any, shape: Any = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal announced
        sizes = (shape,) if isinstance(shape, int) else shape or ()
        announced += 4 * math.prod(size for size in sizes if isinstance(size, int))
        check_growth(os.fspath(path), f"its layer {self.name!r}", announced, stored)
        return original(self, shape, *args, **kwargs)

    keras.layers.Layer.add_weight = add_weight
    try:
        yield
    finally:
        keras.layers.Layer.add_weight = original


@contextmanager
def quiet(*others: str) -> Iterator[None]:
    """Suppress Keras's warnings, both kinds, and those of other loggers by their names."""
    loggers = [logging.getLogger(name) for name in ("absl", *others)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    text = str(error)
    own = "load it in a function of your own and give module:function"
    if "safe_mode" in text or "unsafe" in text.lower():
        return f"it brings code along (a Lambda layer or function), which only you can trust; {own}"
    unknown = re.search(r"Could not locate (?:class|function) '([^']+)'|Unknown layer: '?([\w>]+)", text)
    if unknown:
        return f"it uses {next(filter(None, unknown.groups()))!r}, which Keras does not know; {own}"
    return f"{first_line(error)}; save it again by this Keras, or {own}"
