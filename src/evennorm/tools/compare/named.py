"""Find the study of a comparison by its name, whatever folder it is in, and what it says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from evennorm.errors import InputError
from evennorm.tools.compare.settings import Settings

SETTINGS = "evennorm settings"
"""Attribute of a study: what must be the same for runs to be comparable, in words."""

COMPARISON = "evennorm comparison"
"""Attribute of a study: the settings themselves, by which another process joins it."""


def name_of(storage: BaseStorage, settings: Settings, fingerprint: dict[str, Any]) -> str:
    """Return the name that is asked for, else that of the only study in a file, else the default one.

    Studies used to be named after the folder of the results; such a study continues where its settings are the same.

    Raises:
        InputError: a file holds several, and none is named.
    """
    if settings.study is not None:
        return settings.study
    ours = studies(storage)
    if settings.storage is None and len(ours) == 1:
        return next(iter(ours))
    folder = Path(settings.out).resolve().name
    if settings.default_study not in ours and ours.get(folder) == fingerprint:
        return folder
    if settings.storage is None and ours and settings.default_study not in ours:
        raise InputError(f"{settings.place} holds the studies {listed(ours)}; name one by --study")
    return settings.default_study


def studies(storage: BaseStorage) -> dict[str, Any]:
    """Return the studies of comparisons in a storage, with what must be the same in each."""
    return {each.study_name: each.user_attrs[SETTINGS] for each in storage.get_all_studies() if SETTINGS in each.user_attrs}


def listed(names: dict[str, Any]) -> str:
    """List at most ten names."""
    shown = [repr(name) for name in sorted(names)]
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def description(settings: Settings) -> dict[str, Any]:
    """Return what another machine needs to know to take part: everything but where the results and the database are.

    Example:
        >>> settings = Settings("digits", "paper-mlp", ("none",), 2, (0.1,), 1, 60, "jax", 0, "here")
        >>> told(description(settings), "sqlite:///study.sqlite3", "mine").place
        'sqlite:///study.sqlite3'
    """
    found = {name: value for name, value in asdict(settings).items() if name not in ("out", "storage", "study")}
    for name in ("data", "model"):
        if Path(found[name]).exists():
            found[name] = str(Path(found[name]).resolve())
    return found


def told(description: dict[str, Any], storage: str, study: str) -> Settings:
    """Return the settings from a study's description.

    Raises:
        TypeError: another version of evennorm described it.
    """
    return Settings.from_json(json.dumps(description | {"out": "", "storage": storage, "study": study}))
