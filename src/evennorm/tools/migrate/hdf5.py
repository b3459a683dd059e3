"""Read the configuration and arrays of an HDF5 file of Keras 1 or 2 without executing anything in it."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from typing import Any

import numpy as np

from evennorm.errors import InputError, MissingExtra
from evennorm.tools.migrate.records import OldFile, OldWeights


def read_file(path: str | os.PathLike[str]) -> OldFile:
    """Read a full model or a weights-only file.

    Raises:
        InputError: no such file, no HDF5, a damaged one, or one that Keras 1 or 2 did not write.
        MissingExtra: h5py is not installed.
    """
    check_kind(path)
    import h5py

    shown = os.fspath(path)
    try:
        with h5py.File(shown, "r") as file:
            return _contents(shown, file)
    except InputError:
        raise
    except Exception as error:  # h5py raises many kinds, for what damage may cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{shown!r} cannot be read as HDF5, it is damaged or cut short ({reason}); fetch or copy the file again"
        ) from None


def check_kind(path: str | os.PathLike[str]) -> None:
    """Refuse a file that is not HDF5, and say what it is.

    Raises:
        InputError: no such file, or another kind of file.
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("reading old Keras files", "keras", "h5py") from error
    shown = os.fspath(path)
    if os.path.isdir(shown):
        raise InputError(
            f"an old Keras file is one HDF5 file, and {shown!r} is a folder; TensorFlow's SavedModel is read by "
            "keras.layers.TFSMLayer"
        )
    if not os.path.isfile(shown):
        raise InputError(f"there is no file {shown!r}; give the path of an .h5 or .hdf5 file that Keras 1 or 2 wrote")
    if os.path.getsize(shown) == 0:
        raise InputError(f"{shown!r} is empty; fetch or copy the file again")
    if h5py.is_hdf5(shown):
        return
    if zipfile.is_zipfile(shown):
        with zipfile.ZipFile(shown) as archive:
            arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if arrays:
            raise InputError(
                f"{shown!r} is an archive of NumPy arrays (.npz) and no model: it holds {', '.join(arrays[:4])}"
                f"{f' and {len(arrays) - 4} more' * (len(arrays) > 4)}; give an .h5 or .hdf5 file that Keras 1 or 2 wrote"
            )
        raise InputError(f"{shown!r} is a zip archive, as Keras 3 writes .keras files; it needs no migration")
    raise InputError(f"an old Keras file is HDF5, and {shown!r} is not; give an .h5 or .hdf5 file that Keras 1 or 2 wrote")


def _contents(shown: str, file: Any) -> OldFile:
    root = file
    version = _text(file.attrs, "keras_version") or ""
    if version.startswith("3."):
        raise InputError(
            f"{shown!r} was written by Keras {version}; it needs no migration, keras.saving.load_model reads it"
        )
    config = _json(file.attrs, "model_config", shown)
    if not _names_layers(file) and "model_weights" in file:
        root = file["model_weights"]
    if not _names_layers(root):
        if "layers" in file or "_layer_checkpoint_dependencies" in file:
            raise InputError(f"{shown!r} is a .weights.h5 file of Keras 3; it needs no migration")
        found = ", ".join(sorted(file.keys())[:5]) or "nothing"
        raise InputError(
            f"files of Keras 1 and 2 name their layers in the attribute layer_names, and {shown!r} does not (it holds "
            f"{found}); it is not a Keras file"
        )
    return OldFile(
        path=shown,
        config=config,
        weights=tuple(_numbered(root, shown) if "nb_layers" in root.attrs else _named(root, shown)),
        version=_text(file.attrs, "keras_version") or _text(root.attrs, "keras_version"),
        backend=_text(file.attrs, "backend") or _text(root.attrs, "backend"),
        training=_json(file.attrs, "training_config", shown),
        optimizer_weights=len(_list(file["optimizer_weights"].attrs, "weight_names") or ())
        if "optimizer_weights" in file
        else 0,
    )


def _names_layers(group: Any) -> bool:
    return any(key in group.attrs for key in ("layer_names", "layer_names0", "nb_layers"))


def _named(root: Any, shown: str) -> list[OldWeights]:
    """Read one group per layer, as Keras wrote since 0.3.2."""
    found = []
    layers = _list(root.attrs, "layer_names") or []
    _check_once(shown, "layer", layers)
    for layer in layers:
        group = root.get(layer)
        if group is None:
            raise InputError(f"{shown!r} lists the layer {layer!r} and has no group of that name; it is damaged")
        names = _list(group.attrs, "weight_names") or []
        _check_once(shown, f"weight of {layer!r}", names)
        arrays = []
        for name in names:
            if name not in group:
                raise InputError(f"{shown!r} lists the weight {name!r} of {layer!r} and does not have it; it is damaged")
            arrays.append(_array(shown, group[name]))
        found.append(OldWeights(layer, tuple(names), tuple(arrays)))
    return found


def _check_once(shown: str, what: str, names: list[str]) -> None:
    """Check that no name is listed twice.

    Raises:
        InputError: a name stands there twice, so that its arrays would be read as often as a list is long.
    """
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{shown!r} lists the {what} {twice!r} twice; it is damaged")


def _array(shown: str, found: Any) -> np.ndarray:
    """Read the numbers of one data set.

    Raises:
        InputError: it is something else.
    """
    kind = getattr(getattr(found, "dtype", None), "kind", None)
    if kind not in ("f", "i", "u", "b"):
        raise InputError(f"{shown!r} holds no array of numbers at {found.name!r}; it is damaged")
    return np.asarray(found[()])


def _numbered(root: Any, shown: str) -> list[OldWeights]:
    """Read groups layer_0, layer_1 and so on with param_0, param_1, as Keras wrote before it named weights."""
    found = []
    for k in range(_count(shown, root, "nb_layers")):
        group = root[f"layer_{k}"]
        names = [f"param_{p}" for p in range(_count(shown, group, "nb_params"))]
        found.append(OldWeights(f"layer_{k}", tuple(names), tuple(_array(shown, group[name]) for name in names)))
    return found


def _count(shown: str, group: Any, key: str) -> int:
    """Return a count that a group states.

    Raises:
        InputError: more is counted than the group holds.
    """
    count = int(group.attrs[key])
    if not 0 <= count <= len(group):
        raise InputError(f"{shown!r} counts {key} = {count} at {group.name!r}, which holds {len(group)}; it is damaged")
    return count


def _list(attributes: Any, key: str) -> list[str] | None:
    """Read a list of names, which Keras split into key0, key1 and so on where it was long."""
    if key in attributes:
        return [_decoded(item) for item in np.ravel(attributes[key])]
    if f"{key}0" not in attributes:
        return None
    items, part = [], 0
    while f"{key}{part}" in attributes:
        items += [_decoded(item) for item in np.ravel(attributes[f"{key}{part}"])]
        part += 1
    return items


def _text(attributes: Any, key: str) -> str | None:
    return _decoded(attributes[key]) if key in attributes else None


def _decoded(value: Any) -> str:
    value = value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _json(attributes: Any, key: str, shown: str) -> Any:
    text = _text(attributes, key)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the attribute {key} of {shown!r} is no JSON ({error}); the file is damaged") from None
