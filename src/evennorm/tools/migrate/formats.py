"""Determine the order of axes of layers that did not store it, and say why."""

from __future__ import annotations

from collections import Counter

from evennorm.tools.migrate.models import declared_shape
from evennorm.tools.migrate.provenance import Provenance
from evennorm.tools.migrate.records import OldModel

_UNSAID = ("ZeroPadding2D", "ZeroPadding3D", "UpSampling2D", "UpSampling3D", "Cropping2D", "Cropping3D")


def data_format(model: OldModel, origin: Provenance) -> tuple[str | None, str | None]:
    """Return channels_first or channels_last, and a sentence where it was concluded for a layer; None where no layer needs
    it."""
    layers = list(model.leaves())
    asking = [x for x in layers if x.kind in _UNSAID and not x.config.get("data_format")]
    votes = Counter(x.config["data_format"] for x in layers if isinstance(x.config.get("data_format"), str))
    if votes:
        return votes.most_common(1)[0][0], None
    if not asking:
        return None, None
    names = ", ".join(x.name for x in asking[:3])
    shapes = [declared_shape(x.config) for x in layers if declared_shape(x.config)]
    few = (1, 3, 4)
    for shape in shapes:
        if len(shape) > 3 and (shape[1] in few) != (shape[-1] in few):
            found = "channels_first" if shape[1] in few else "channels_last"
            return found, f"{names}: {found.replace('_', ' ')}, judged by the input shape {tuple(shape)}"
    found = "channels_first" if origin.theano else "channels_last"
    return found, f"{names}: {found.replace('_', ' ')}, the usual order of {origin.backend or 'tensorflow'}"
