"""Find the callers of each batch normalization of evennorm, and what can be fused with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from evennorm.core.activation import LINEAR, Activation
from evennorm.torch.conversion.blocks import FusedBlock, fuse, is_fused
from evennorm.torch.conversion.chains import FusedSequential, is_chain
from evennorm.torch.conversion.reading import Reading, fixed, read
from evennorm.torch.conversion.sites import Site
from evennorm.torch.conversion.steps import fused_by, is_watched, takes_more
from evennorm.torch.conversion.swap import swap


@dataclass(frozen=True)
class Outcome:
    """How a batch normalization is called in one place."""

    holder: nn.Module | None = None
    """The module whose forward calls it."""
    steps: tuple[str, ...] = ()
    """What can be computed together with it: "add", "relu", "relu6", "leaky_relu"."""
    reason: str = ""
    """Why nothing more can be fused."""

    def is_fused(self) -> bool:
        return (
            bool(self.steps)
            and self.holder is not None
            and (isinstance(self.holder, FusedSequential) or is_fused(self.holder))
        )


class Fusion:
    """The calls of all batch normalizations in one model, as it is now."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._readings: dict[int, Reading] = {}

    def apply(self, paths: Iterable[str]) -> None:
        """Let the callers of the batch normalizations at `paths` run them together with what follows."""
        for outcome in [outcome for path in paths for outcome in self.outcomes(path)]:
            if outcome.holder is None or not outcome.steps or outcome.is_fused():
                continue
            if is_chain(outcome.holder):
                swap(outcome.holder, FusedSequential)
            else:
                fuse(outcome.holder, self._reading(outcome.holder))

    def outcomes(self, path: str) -> list[Outcome]:
        """Return one outcome for each call of the batch normalization at `path`, provided that it has no activation of its
        own."""
        if not takes_more(self._model.get_submodule(path)):
            return []
        around = [place for place in _around(path) if _has_code(self._model.get_submodule(place))]
        units = [path]
        while around and self._ends_with(around[0], units[-1]):
            units.append(around.pop(0))
        chain = around[0] if around and is_chain(self._model.get_submodule(around[0])) else None
        reason = "no forward that was read calls it" if around else "its output is the model's"
        for holder in (self._model.get_submodule(place) for place in around):
            if is_chain(holder):
                continue
            reading = self._reading(holder)
            found = [site for unit in units for site in reading.calls_of(holder, self._model.get_submodule(unit))]
            if found:
                return [_of_site(site, holder) for site in found]
            if chain is not None:
                break
            if reading.failure:
                return [Outcome(holder, reason=reading.failure)]
        return [self._in_chain(chain, units) if chain is not None else Outcome(reason=reason)]

    def _reading(self, module: nn.Module) -> Reading:
        if id(module) not in self._readings:
            self._readings[id(module)] = read(module, FusedBlock)
        return self._readings[id(module)]

    def _ends_with(self, place: str, path: str) -> bool:
        module = self._model.get_submodule(place)
        return is_chain(module) and list(module._modules)[-1] == _name(path)

    def _in_chain(self, place: str, units: list[str]) -> Outcome:
        chain = self._model.get_submodule(place)
        names = list(chain._modules)
        name = names[names.index(_name(units[-1])) + 1]
        follower = chain._modules[name]
        step = word(fused_by(follower))
        reason = fixed(chain, FusedSequential)
        if step is None:
            reason = f"{name} ({type(follower).__name__}) follows"
        for seen, what in (*((unit, "output") for unit in units), (name, "input")):
            watched = follower if seen is name else self._model.get_submodule(seen)
            if is_watched(watched):
                reason = f"hooks on {seen} see its {what}"
        return Outcome(chain, () if reason or step is None else (step,), reason)


def _of_site(site: Site, holder: nn.Module) -> Outcome:
    applied = fused_by(holder.get_submodule(site.applied)) if isinstance(site.applied, str) else site.applied
    steps = ("add" if site.addition is not None else None, word(applied))
    return Outcome(holder, tuple(step for step in steps if step is not None), site.reason)


def word(activation: Activation | None) -> str | None:
    """Return the activation's name."""
    if activation is None:
        return None
    return "leaky_relu" if activation == LINEAR else activation.name


def _around(path: str) -> list[str]:
    """Return the paths of the modules that hold the one at `path`, innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in reversed(range(len(parts)))]


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _has_code(module: nn.Module) -> bool:
    """Return whether a module computes something, rather than only holding others."""
    return type(module).forward is not nn.Module.forward
