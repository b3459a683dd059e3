"""Write the model that a comparison hands over, with what is known of it inside the file, and read that back."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evennorm.tools.atomic import replacing
from evennorm.tools.compare.settings import Settings

KERAS = "best.keras"
NOTE = "evennorm.json"
"""The member of the file that says which comparison made it; Keras reads past it."""

LONGEST_NOTE = 10**6
"""Bytes; a longer one is none of ours."""


def names(settings: Settings) -> tuple[str, ...]:
    """The files that a model is handed over in."""
    return (KERAS,)


def write(settings: Settings, model: Any, key: str, values: Mapping[str, Any], input_shape: Sequence[int]) -> None:
    """Writes the model whole or not at all.

    Args:
        key: what the model was made from.
        values: what is told of it.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(Path(settings.out, KERAS)) as partial:
        model.save(partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(NOTE, json.dumps({"key": key, "model": values}, indent=2))


def read(settings: Settings, key: str) -> dict[str, Any] | None:
    """What the file in the folder of the results says of its model; None where there is none or it has another key."""
    try:
        with zipfile.ZipFile(Path(settings.out, KERAS)) as archive:
            if archive.getinfo(NOTE).file_size > LONGEST_NOTE:
                return None
            note = json.loads(archive.read(NOTE))
            return dict(note["model"]) if note["key"] == key and archive.testzip() is None else None
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError):
        return None
