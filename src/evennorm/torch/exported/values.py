"""Read the values in the file of a program: dtypes, shapes, and the arguments of its operations.

The file's format is torch's own schema, major version 8 (torch/_export/serde/schema.py), which torch writes since 2.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evennorm.errors import InputError, printable

SCHEMA = 8
"""Its major version; a minor one only adds."""

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
STRIDED = 7
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_PLAIN = ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools", "as_strings", "as_int_lists")
_SYMBOLS = ("as_sym_int", "as_sym_float", "as_sym_bool")


DEVICE = "the device of the input"
"""The name of its node."""


class UnreadError(Exception):
    """A value that stands in no program of layers and tensor operations."""


def kind_of(value: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the one entry of a union: ("as_int", 3) of {"as_int": 3}."""
    [(kind, content)] = value.items()
    return kind, content


def shape_of(meta: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a tensor in the run that the program was recorded in."""
    return tuple(_size(*kind_of(each)) for each in meta["sizes"])


def is_fixed(meta: Mapping[str, Any], axis: int) -> bool:
    """Return whether a program takes one size along an axis."""
    return "as_int" in meta["sizes"][axis]


def _size(kind: str, content: Any) -> int:
    if kind == "as_expr":  # of symbols; the hint is its value in that run
        hint = content.get("hint")
        content = hint["as_int"] if hint else 2
    if type(content) is not int or content < 0:
        raise UnreadError(f"a size of {content!r}")
    return content


def argument(value: Mapping[str, Any], nodes: Mapping[str, Any]) -> Any:
    """Return the argument of an operation; tensors and symbols are nodes, by their names.

    Raises:
        UnreadError: an object of another kind, such as a graph inside a control flow.
    """
    kind, content = kind_of(value)
    if kind in _PLAIN:
        return content
    if kind in _SYMBOLS:
        return _symbol(content, nodes)
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return nodes[content["name"]]
        case "as_tensors":
            return [nodes[each["name"]] for each in content]
        case "as_optional_tensor":
            return argument(content, nodes)
        case "as_optional_tensors":
            return [argument(each, nodes) for each in content]
        case "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
            return [_symbol(each, nodes) for each in content]
        case "as_scalar_type":
            return DTYPES[content]
        case "as_memory_format":
            return _MEMORY_FORMATS[content]
        case "as_layout" if content == STRIDED:
            return torch.strided
        case "as_device":
            return nodes[DEVICE]  # where the model is now, not where it was recorded
    raise UnreadError(f"an argument of kind {kind.removeprefix('as_')}")


def _symbol(content: Mapping[str, Any], nodes: Mapping[str, Any]) -> Any:
    kind, value = kind_of(content)
    return nodes[value] if kind == "as_name" else value


def check_schema(document: Mapping[str, Any], name: str) -> None:
    """Refuse the file of another major version.

    Raises:
        InputError: it was written for another major version.
    """
    found = document["schema_version"]["major"]
    if found != SCHEMA:
        raise InputError(
            f"programs are read in version {SCHEMA} of torch.export's schema; {name} has version {found!r}, of torch "
            f"{printable(document.get('torch_version') or 'before 2.8')}; load it by that torch and export the model again"
        )
