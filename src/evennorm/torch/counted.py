"""Recognize a forward pass that repeats one whose batch was counted before.

Activation checkpointing and reversible networks take a forward pass once more for the backward pass. Each does so on behalf
of something that the first pass leaves behind: the node of an autograd.Function, or a frame of torch.utils.checkpoint. So
passes are noted with that, weakly, and what runs on its behalf later is compared with them. A pass that records its own
graph without hooks is never repeated, and nothing is noted. What only a gradient hook or a backward pass runs is new.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, Function
from torch.utils import checkpoint

_current_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_records_gradients = torch.is_grad_enabled


@dataclass
class _Passes:
    """The passes of one module on behalf of one node or frame."""

    made: int = 0
    replayed: dict[int, int] = field(default_factory=dict)
    """How many of these passes the backward pass with a certain number has repeated."""


_passes: WeakKeyDictionary[Any, WeakKeyDictionary[nn.Module, _Passes]] = WeakKeyDictionary()
"""Passes by the node or frame they were made for, or by a Function whose node its forward pass does not know yet."""


def repeated(module: nn.Module) -> bool:
    """Return whether this forward pass of a module repeats one that was counted; if not, note it, where it may be
    repeated."""
    if torch.compiler.is_compiling():  # after a graph break in the module's call, a compiler tries this function by itself
        return False
    if _current_task() == -1 and _hooks(False) is None and _records_gradients():
        return False
    makers, replayed = _surroundings()
    again = replayed is not None and _is_replay(module, replayed)
    for maker in makers:
        _of(maker, module).made += 1
    return again


def _is_replay(module: nn.Module, maker: Any) -> bool:
    passes = _of(maker, module)
    function = getattr(type(maker), "_forward_cls", None)
    task = _current_task()
    seen = passes.replayed.get(task, 0)
    passes.replayed[task] = seen + 1
    if seen < passes.made:
        return True
    passes.made += 1  # a later repetition repeats this pass
    if function is not None and function in _passes and (pending := _of(function, module)).made > 0:
        pending.made -= 1
        return True
    return False


def _of(maker: Any, module: nn.Module) -> _Passes:
    return _passes.setdefault(maker, WeakKeyDictionary()).setdefault(module, _Passes())


def _surroundings() -> tuple[list[Any], Any]:
    """Return what the running pass is made for, as far as it may be repeated, and what it repeats, or None.

    Looks at the calls that are running, up to those of the innermost backward pass: what lies beyond is another's.
    """
    makers = [frame for frame in [_hooked_frame()] if frame is not None]
    for maker, replays in _callers():
        if replays:
            return makers, maker
        if not any(maker is known for known in makers):
            makers.append(maker)
    return makers, None


def _callers() -> Iterator[tuple[Any, bool]]:
    inner: FrameType | None = None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _ENGINE:
            return
        if code is _APPLY:
            node = None if inner is None else _first_argument(inner)
            yield (node if isinstance(node, BackwardCFunction) else frame.f_locals["cls"]), False
        elif code is _BACKWARD:
            yield frame.f_locals["self"], True
        elif code.co_filename == checkpoint.__file__:
            if code.co_name == "unpack_hook" and "frame" in frame.f_locals:
                yield frame.f_locals["frame"], True
            elif code.co_name == "checkpoint" and (found := _frame_of(frame.f_locals.get("gen"))) is not None:
                yield found, False
        inner, frame = frame, frame.f_back


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    if not code.co_varnames:
        return None
    value = frame.f_locals.get(code.co_varnames[0])
    if code.co_argcount == 0 and code.co_flags & inspect.CO_VARARGS and value:
        return value[0]
    return value


def _frame_of(generator: Any) -> Any:
    """Return the frame of `checkpoint(..., use_reentrant=False)`, whose generator rests while the function runs."""
    running = getattr(generator, "gi_frame", None)
    return None if running is None else running.f_locals.get("new_frame")


def _hooked_frame() -> Any:
    """Return the frame whose hook was added last, where no call of `checkpoint` is running: torch's composable
    checkpointing."""
    hooks = _hooks(False)
    code: CodeType | None = None if hooks is None else getattr(hooks[0], "__code__", None)
    if code is None or code.co_filename != checkpoint.__file__ or "frame" not in code.co_freevars:
        return None
    return hooks[0].__closure__[code.co_freevars.index("frame")].cell_contents


def _code_of(function: Any) -> CodeType:
    function = inspect.unwrap(getattr(function, "__func__", function))
    return function.__code__


_ENGINE = _code_of(torch.autograd.graph._engine_run_backward)
_APPLY = _code_of(Function.apply)
_BACKWARD = _code_of(BackwardCFunction.apply)
