"""PyTorch's own inputs for its batch normalization modules and function go in; cases that name themselves come out."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import evennorm.torch as ours

# These files forbid the whole process to set flags of torch's backends, which other tests may do.
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = [f"{lazy}BatchNorm{d}d" for lazy in ("", "Lazy") for d in (1, 2, 3)]
BY_RANK = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


@dataclass(frozen=True)
class UpstreamCase:
    """One input of PyTorch's own tests. `make` builds the module of a library; `x` is its input, fresh at each call."""

    name: str
    make: Callable[[Any], nn.Module]
    x: Callable[[], Tensor]


def module_cases() -> Iterator[UpstreamCase]:
    """Those of `module_db`: every input and every input that is to fail, for each dtype, in training and at inference."""
    for info in module_db:
        name = info.module_cls.__name__
        if info.module_cls is not getattr(nn, name, None) or name not in NAMES:
            continue
        for dtype in DTYPES:
            for training in (True, False):
                inputs = _inputs(info, dtype, training)
                for i, given in enumerate(inputs):
                    label = f"{name}-{given.desc or i}-{str(dtype)[6:]}-{'train' if training else 'eval'}"
                    yield UpstreamCase(label, _maker(name, given.constructor_input, dtype, training), _input(given))


def _inputs(info: Any, dtype: torch.dtype, training: bool) -> list[Any]:
    asked = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    torch.manual_seed(0)
    inputs = list(info.module_inputs_func(info, **asked))
    if info.module_error_inputs_func is not None:
        inputs += [error.module_error_input for error in info.module_error_inputs_func(info, **asked)]
    return inputs


def _maker(name: str, given: Any, dtype: torch.dtype, training: bool) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library, name)(*given.args, dtype=dtype, **given.kwargs).train(training)


def _input(given: Any) -> Callable[[], Tensor]:
    (x,) = given.forward_input.args
    return lambda: x.detach().clone().requires_grad_()


def function_cases() -> Iterator[UpstreamCase]:
    """The OpInfo samples of nn.functional.batch_norm, as calls of a module with those parameters and statistics."""
    info = next(op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
    for dtype in DTYPES:
        torch.manual_seed(0)
        for i, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=True)):
            x, name = sample.input, BY_RANK.get(sample.input.dim(), "BatchNorm1d")
            shape = "x".join(map(str, x.shape))
            label = f"function-{i}-{shape}-{str(dtype)[6:]}"
            yield UpstreamCase(label, _from_function(name, sample), lambda x=x: x.detach().clone().requires_grad_())


def _from_function(name: str, sample: Any) -> Callable[[Any], nn.Module]:
    mean, variance, weight, bias = sample.args
    options = dict(sample.kwargs)
    training = options.pop("training", False)

    def make(library: Any) -> nn.Module:
        channels = sample.input.shape[1] if sample.input.dim() > 1 else 0
        module = getattr(library, name)(channels, dtype=sample.input.dtype, **options)
        module.weight, module.bias = (None if p is None else nn.Parameter(p.detach().clone()) for p in (weight, bias))
        module.running_mean, module.running_var = (None if s is None else s.detach().clone() for s in (mean, variance))
        return module.train(training)

    return make


@dataclass(frozen=True)
class Outcome:
    """What became of one case: results, or an error."""

    results: dict[str, Tensor] | None
    error: Exception | None


def outcome(case: UpstreamCase, library: Any) -> Outcome:
    """Forward twice, backward, and the state thereafter."""
    try:
        module = case.make(library)
        for _ in range(2):
            x = case.x()
            y = module(x)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        y.backward(dy)
    except Exception as error:
        return Outcome(None, error)
    gradients = {f"gradient of {key}": p.grad for key, p in (("input", x), *module.named_parameters())}
    return Outcome({"output": y.detach(), **gradients, **module.state_dict()}, None)


def deviations(path: Path, names: set[str]) -> dict[str, str]:
    """The rows of a file, reason by case.

    Raises:
        ValueError: a row that names no case or gives no reason.
    """
    rows = {}
    for row in tomllib.loads(path.read_text()).get("deviation", []):
        for name in row["cases"]:
            if name not in names or not row.get("reason"):
                raise ValueError(f"{path.name}: every row has a reason and names cases that are there; received {name!r}")
            rows[name] = row["reason"]
    return rows


LIBRARIES = {"torch": nn, "ours": ours}
