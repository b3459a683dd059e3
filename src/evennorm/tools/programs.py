"""Open a .pt2 file, a program of torch.export, as a torch.nn model.

Its parts are read as JSON and raw numbers. torch.export.load is not used: it unpickles parts of the file, evaluates the
expressions of sizes, compiles guards, and looks up the names of functions in all of torch, even those of the operating
system.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.tools.archives import check_growth, check_zip

if TYPE_CHECKING:
    import torch

    from evennorm.torch.exported.rebuild import Rebuilt

_LARGEST = 1 << 28
"""The most bytes of the text that describes a program."""


def is_program(members: set[str]) -> bool:
    """Return whether a zip file with these members is a program of torch.export, or compiled from one."""
    return any(name.endswith(("/archive_format", "/models/model.json")) or name == _OLD for name in members)


_OLD = "serialized_exported_program.json"


def open_program(path: Path) -> Rebuilt:
    """Open a program as a model.

    Raises:
        InputError: there is no such file, it is no program, a damaged one, or one that holds more than layers and operations
            on tensors.
    """
    if not path.is_file():
        raise InputError(f"there is no model file {path}; save one by torch.export.save, or name another model")
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, str(path))
            parts = _Parts(archive, path)
            document = parts.document()
            tensors = parts.tensors("weights") | parts.tensors("constants")
    except EvennormError:
        raise
    except Exception as error:  # damage causes many kinds
        raise _damaged(path, error) from error
    from evennorm.torch.exported.rebuild import rebuild

    try:
        return rebuild(document, tensors, path.name)
    except EvennormError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    said = first_line(error) if str(error).strip() else type(error).__name__
    return InputError(f"{path} is no whole program of torch.export ({said}); fetch it or save it again by torch.export.save")


class _Parts:
    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self.archive, self.path = archive, path
        members = set(archive.namelist())
        if _OLD in members:
            raise InputError(f"{path} was written by torch before 2.8; load it by that torch and export the model again")
        models = [name for name in members if name.partition("/")[2].startswith("models/") and name.endswith(".json")]
        if any("/data/aotinductor/" in name for name in members) and not models:
            raise InputError(f"{path} is compiled for one machine, and no layers are left in it; give module:function")
        if len(models) != 1:
            found = f"{len(models)} programs" if is_program(members) else ", ".join(sorted(members)[:4]) or "nothing"
            raise InputError(f"a .pt2 file holds one program, as torch.export.save writes it; {path} holds {found}")
        self.root, _, self.model = models[0].removesuffix(".json").partition("/models/")
        order = self.root + "/byteorder"
        if order in members and archive.read(order) != b"little":
            raise InputError(
                f"{path} was written on a machine with the other byte order; export the model again on this one"
            )

    def document(self) -> dict[str, Any]:
        return dict(self._json(f"models/{self.model}.json"))

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Read the weights or the constants; those that share numbers in the file share them again."""
        entries = self._json(f"data/{kind}/{self.model}_{kind}_config.json")["config"]
        stored = sum(each.compress_size for each in self.archive.infolist())
        announced = sum(_bytes_of(each["tensor_meta"]) for each in entries.values() if not self._is_object(each))
        check_growth(str(self.path), f"the sum of its {kind}", announced, stored)
        made: dict[str, torch.Tensor] = {}
        return {name: self._tensor(name, kind, entry, made) for name, entry in entries.items()}

    def _is_object(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry.get("use_pickle")) or not str(entry["path_name"]).startswith(("weight_", "tensor_"))

    def _tensor(self, name: str, kind: str, entry: Mapping[str, Any], made: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch

        from evennorm.torch.exported.values import DTYPES, STRIDED, shape_of

        if self._is_object(entry):
            raise InputError(
                f"{self.path} is not opened: it holds {name!r} as a pickle, which runs whatever its author wrote; give "
                "module:function that builds the model"
            )
        meta = entry["tensor_meta"]
        key = json.dumps([entry["path_name"], entry["is_param"], meta], sort_keys=True)
        if key in made:
            return made[key]
        if meta["layout"] != STRIDED:
            raise InputError(f"dense tensors are read from a .pt2 file; {self.path} holds {name!r} in another layout")
        content = bytearray(self.archive.read(f"{self.root}/data/{kind}/{entry['path_name']}"))
        dtype, shape = DTYPES[meta["dtype"]], shape_of(meta)
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.zeros(0, dtype=dtype)
        strides = [each["as_int"] for each in meta["strides"]]
        value = torch.as_strided(flat, shape, strides, meta["storage_offset"]["as_int"])
        if entry["is_param"]:
            value = torch.nn.Parameter(value, requires_grad=bool(meta["requires_grad"]) and dtype.is_floating_point)
        made[key] = value
        return value

    def _json(self, name: str) -> Any:
        member = f"{self.root}/{name}"
        if self.archive.getinfo(member).file_size > _LARGEST:
            raise InputError(f"{self.path} is not opened: its member {member!r} is a text of more than 256 MB")
        return json.loads(self.archive.read(member))


def _bytes_of(meta: Mapping[str, Any]) -> int:
    return 16 * math.prod(each["as_int"] for each in meta["sizes"])
