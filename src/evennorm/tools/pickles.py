"""Check what reading a state_dict written by torch.save would allocate.

The pickle in it is followed step by step, and nothing of it is made: names, numbers and sizes are enough to know what
torch.load would allocate.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.archives import check_growth, check_zip

_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_STEPS = 5_000_000
"""The most instructions of a pickle; a tensor takes some 30."""
_ITEM = 64
"""Bytes that an item of a list or dictionary is counted for, where one is copied."""
_LARGEST = 16
"""Bytes of the largest number."""
_SIZES = dict.fromkeys(("Double", "Long", "ComplexFloat"), 8) | dict.fromkeys(("Float", "Int", "QInt32"), 4)
_SIZES |= dict.fromkeys(("Half", "BFloat16", "Short"), 2) | {"ComplexDouble": _LARGEST}
_OF_SIZE = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
"""Functions of torch._utils called with a storage, an offset and a shape."""
_OF_NO_SIZE = ("torch.device", "torch.serialization._get_layout", "builtins.complex")
_SCALARS = (str, bytes, int, float, type(None))


class NotAStateDictError(Exception):
    """The pickle does something that torch.save never does for tensors."""


def check_state_dict(path: Path) -> None:
    """Check that a file is a state_dict that announces no more than it holds.

    Raises:
        InputError: it announces more than it holds.
        NotAStateDictError: it is no state_dict, or holds more than one.
        Exception: it is damaged.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        _check_zipped(path)
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if _Pickle(content).run() != _MAGIC:
            raise ValueError("it does not begin as torch.save does")
        _Pickle(content).run()  # the protocol
        _Pickle(content).run()  # the machine it was written on
        found = _Pickle(content)
        found.run()
        _Pickle(content).run()  # the storages' keys, in their order
        behind = len(content) - content.tell()
    stored = sum(found.storages.values())
    if stored > behind:
        raise InputError(f"{path} is not opened: its storages announce {stored:,} bytes, and {behind:,} follow")
    check_growth(str(path), "the sum of its tensors", found.announced, path.stat().st_size)


def _check_zipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        check_zip(archive, str(path))
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        pickles = [name for name in sizes if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise NotAStateDictError(f"{len(pickles)} pickles")
        with archive.open(pickles[0]) as content:
            found = _Pickle(content)
            found.run()
    folder = pickles[0].removesuffix("data.pkl")
    for key, size in found.storages.items():
        held = sizes.get(f"{folder}data/{key}")
        if held is not None and held != size:
            raise InputError(f"{path} is not opened: its storage {key!r} announces {size:,} bytes, and holds {held:,}")
    check_growth(str(path), "the sum of its tensors", found.announced, path.stat().st_size)


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass(frozen=True)
class _Storage:
    item: int


class _Made:
    """What a call would make, with its size in bytes; or a list or dictionary, which grows by its items."""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.deep = False
        """Whether it holds tuples of more than scalars, of which a hash may take for ever."""


class _Pickle:
    """The machine of a pickle, with placeholders on its stack. Instructions are those that torch.load follows."""

    def __init__(self, content: Any):
        self.content = content
        self.storages: dict[str, int] = {}
        """Bytes of each, by key."""
        self.announced = 0
        """Bytes of all that is made but for the storages."""
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return what the pickle describes: a number as it is, everything else as a placeholder."""
        for step, (opcode, argument, _) in enumerate(pickletools.genops(self.content)):
            if step > _MOST_STEPS:
                raise NotAStateDictError(f"more than {_MOST_STEPS:,} instructions")
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _VALUES:
                self.stack.append(argument)
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "STOP"):
                raise NotAStateDictError(opcode.name)
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def tuple(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def empty(self, _: Any) -> None:
        self.stack.append(_Made())

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def get(self, number: int) -> None:
        self.stack.append(self.memo[number])

    def name(self, argument: str) -> None:
        self.stack.append(_Name(argument.replace(" ", ".", 1)))

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self.fill([item])

    def appends(self, _: Any) -> None:
        items = self.since_mark()
        self.fill(items)

    def set_item(self, _: Any) -> None:
        self.stack.pop()
        self.keys([self.stack.pop()])

    def set_items(self, _: Any) -> None:
        items = self.since_mark()
        self.keys(items[::2])

    def keys(self, keys: list[Any]) -> None:
        if any(map(_is_deep, keys)):
            raise NotAStateDictError("a key of tuples")
        self.fill(keys)

    def fill(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], _Made):
            self.stack[-1].size += _ITEM * len(items)
            self.stack[-1].deep |= any(map(_is_deep, items))

    def persistent(self, _: Any) -> None:
        identity = self.stack.pop()
        if not isinstance(identity, tuple) or len(identity) < 5 or not isinstance(identity[4], int) or identity[4] < 0:
            raise NotAStateDictError("a reference to no storage")
        item = _item_size(identity[1])
        key = str(identity[2])
        self.storages[key] = max(self.storages.get(key, 0), identity[4] * item)
        self.stack.append(_Storage(item))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, _Name):
            raise NotAStateDictError("a call of no function")
        if function.text == "torch.Size" and len(arguments) == 1:
            self.stack.append(arguments[0])
            return
        size = _made_by(function.text, arguments)
        self.announced += size
        self.stack.append(_Made(size))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        size = sum(map(_copied, state)) if isinstance(state, tuple) else _copied(state)
        if isinstance(state, tuple) and len(state) > 2 and isinstance(state[0], _Storage):  # a tensor of the first releases
            size += _count(state[2]) * state[0].item
        self.announced += size


def _item_size(kind: Any) -> int:
    name = kind.text.rsplit(".", 1)[-1] if isinstance(kind, _Name) else ""
    return _SIZES.get(name.removesuffix("Storage"), 1)


def _made_by(function: str, arguments: tuple[Any, ...]) -> int:
    """Return the most bytes that a call makes; functions that torch.load refuses do not matter."""
    while function == "torch._tensor._rebuild_from_type_v2" and len(arguments) > 2:  # another call, and attributes
        if not isinstance(arguments[0], _Name) or not isinstance(arguments[2], tuple):
            raise NotAStateDictError("a call of no function")
        function, arguments = arguments[0].text, arguments[2]
    copied = sum(map(_copied, arguments))
    if function in _OF_NO_SIZE:
        return 0
    if function.removeprefix("torch._utils.") in _OF_SIZE and len(arguments) > 2:
        known = isinstance(arguments[0], _Storage) and function.endswith(("tensor", "v2"))
        return _count(arguments[2]) * (arguments[0].item if known else _LARGEST)
    if function.startswith("torch._utils."):
        return copied
    if any(map(_is_deep, arguments)):
        raise NotAStateDictError("a call with tuples of tuples")
    numbers = [max(each, 1) for each in arguments if isinstance(each, int)]
    shapes = [math.prod(each) for each in arguments if isinstance(each, tuple) and all(isinstance(x, int) for x in each)]
    return _LARGEST * ((math.prod(numbers) if numbers else 0) + sum(max(each, 0) for each in shapes)) + copied


def _count(shape: Any) -> int:
    """Return the number of values of a tensor."""
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise NotAStateDictError("a shape of no numbers")
    return math.prod(shape)


def _copied(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return value.size if isinstance(value, _Made) else 0


def _is_deep(value: Any) -> bool:
    """Return whether a value is a tuple that holds tuples: its hash takes twice as long with each level."""
    if isinstance(value, _Made):
        return value.deep
    return isinstance(value, tuple) and not all(isinstance(each, _SCALARS) for each in value)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1")
_STEPS: dict[str, Callable[[_Pickle, Any], None]] = {
    "MARK": _Pickle.mark,
    "TUPLE": _Pickle.tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _Pickle.empty),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Pickle.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Pickle.get),
    "GLOBAL": _Pickle.name,
    "APPEND": _Pickle.append,
    "APPENDS": _Pickle.appends,
    "SETITEM": _Pickle.set_item,
    "SETITEMS": _Pickle.set_items,
    "BINPERSID": _Pickle.persistent,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Pickle.call),
    "BUILD": _Pickle.build,
}
