"""Write the model that a comparison hands over, with a note about it inside the file, and read the note back."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evennorm.tools.atomic import replacing
from evennorm.tools.compare.settings import Settings

KERAS = "best.keras"
PROGRAM = "best.pt2"
WEIGHTS = "best.pt"
NOTE = "evennorm.json"
"""The member of the file that says which comparison made it; Keras ignores it."""

LONGEST_NOTE = 10**6
"""The most bytes of a note that evennorm wrote."""


def names(settings: Settings) -> tuple[str, ...]:
    """Return the names of the files that a model is handed over in."""
    return (KERAS,) if settings.framework == "keras" else (PROGRAM, WEIGHTS)


def write(settings: Settings, model: Any, key: str, values: Mapping[str, Any], trainer: Any) -> None:
    """Write the model, each file whole or not at all; the one with the note comes last.

    Args:
        key: what the model was made from.
        values: what is told of it.
        trainer: that of the model.

    Raises:
        InputError: a file cannot be written.
    """
    note = json.dumps({"key": key, "model": values}, indent=2)
    if settings.framework == "torch":
        _write_torch(Path(settings.out), model, note, trainer.example(2))
        return
    with replacing(Path(settings.out, KERAS)) as partial:
        model.save(partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(NOTE, note)


def _write_torch(out: Path, model: Any, note: str, example: Any) -> None:
    import torch

    from evennorm.torch.exported.silence import silence

    with torch.no_grad(), silence():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with replacing(out / WEIGHTS) as partial:
        torch.save(model.state_dict(), partial)
    with replacing(out / PROGRAM) as partial:
        torch.export.save(program, partial, extra_files={NOTE: note})


def read(settings: Settings, key: str) -> dict[str, Any] | None:
    """Return the note in the file of the results' folder; None where there is none or it has another key."""
    first, *others = (Path(settings.out, name) for name in names(settings))
    try:
        with zipfile.ZipFile(first) as archive:
            [member] = [each for each in archive.infolist() if each.filename.rsplit("/", 1)[-1] == NOTE]
            if member.file_size > LONGEST_NOTE or not all(other.is_file() for other in others):
                return None
            note = json.loads(archive.read(member))
            return dict(note["model"]) if note["key"] == key and archive.testzip() is None else None
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError):
        return None
