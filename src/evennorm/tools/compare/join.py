"""Join a study by the URL of its database alone: settings, data and model are those that the study names."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evennorm.errors import ArgumentError, InputError
from evennorm.tools.compare.settings import Settings, without_password

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from evennorm.tools.compare.work import Report

FIRST_SECONDS = 300
"""How long a worker waits for its study, since the machines of a cluster start in any order."""


def join(
    url: str,
    study: str | None = None,
    data: str | None = None,
    model: str | None = None,
    jobs: int = 1,
    progress: Report | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> tuple[str, int]:
    """Train runs of a study that another machine has begun, until none is missing; return its name and the number of its
    runs.

    Args:
        url: of the storage, as `--storage` takes it.
        study: its name; None is the only one in that storage.
        data, model: where they lie on this machine; None is where the study says.
        jobs, progress, notice: as for `compare`.

    Raises:
        EvennormError: no such study, or this machine has other data, another model or other versions.
    """
    from evennorm.tools.compare.engine import choose_engine
    from evennorm.tools.compare.work import Progress, join_study, prepare, trainer_for, work, work_in_processes

    if jobs < 1:
        raise ArgumentError(f"the number of jobs must be at least 1; received {jobs}")
    settings = at_hand(described(url, study, notice), data, model)
    choose_engine(settings.engine)
    samples, architecture, fingerprint = prepare(settings)
    joined = join_study(settings, samples, fingerprint, notice)
    counted = Progress(settings, len(joined.records()), progress or (lambda done, total: None), notice)
    if jobs == 1 or not joined.enqueue_missing():
        work(joined, trainer_for(settings, samples, architecture), counted)
    else:
        work_in_processes(settings, jobs, counted)
    return joined.name, len(joined.records())


def described(url: str, study: str | None, notice: Callable[[str], None] = lambda text: None) -> Settings:
    """Return the settings of a study; wait for the study where there is none yet.

    Raises:
        InputError: there is none, there are several, or another version of evennorm described it.
    """
    from evennorm.tools.compare.named import told
    from evennorm.tools.compare.patience import RACE_SECONDS, is_race, patiently
    from evennorm.tools.compare.storage import connected, storage_errors

    shown = without_password(url)
    end, said = time.monotonic() + FIRST_SECONDS, False
    with storage_errors(shown, lambda: False):
        storage = patiently(lambda: connected(url), is_race, RACE_SECONDS)
        while (found := _description(storage, shown, study)) is None:
            if time.monotonic() > end:
                which = "no study of evennorm compare" if study is None else f"no study {study!r}"
                raise InputError(f"{shown} holds {which}; begin it by evennorm compare --storage URL, or correct --study")
            if not said:
                notice(f"{shown} holds no such study yet; waiting for {FIRST_SECONDS} seconds")
            said = True
            time.sleep(1)
    name, description = found
    try:
        return told(description, url, name)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"the study {name!r} in {shown} was begun by another version of evennorm; install that version here too"
        ) from error


def _description(storage: BaseStorage, shown: str, study: str | None) -> tuple[str, dict[str, Any]] | None:
    """Return name and description of the study; None where there is none yet."""
    from evennorm.tools.compare.named import COMPARISON, SETTINGS, listed

    ours = {
        each.study_name: each.user_attrs.get(COMPARISON)
        for each in storage.get_all_studies()
        if SETTINGS in each.user_attrs and study in (None, each.study_name)
    }
    if not ours:
        return None
    if len(ours) > 1:
        raise InputError(f"{shown} holds the studies {listed(ours)}; name one by --study")
    [(name, description)] = ours.items()
    if description is None:
        raise InputError(
            f"the study {name!r} in {shown} was begun by an older evennorm, which did not describe it; repeat the command "
            "that began it, and join it then"
        )
    return name, description


def at_hand(settings: Settings, data: str | None, model: str | None) -> Settings:
    """Return the settings with the places of data and model on this machine.

    Raises:
        InputError: they are not on this machine.
    """
    for what, asked, named in (("data", data, settings.data), ("model", model, settings.model)):
        if asked is None and Path(named).is_absolute() and not Path(named).exists():
            raise InputError(
                f"the {what} of the study {settings.study!r} are at {named}, which is not on this machine; bring them here, "
                f"and name the place by --{what}"
            )
    return replace(settings, data=data or settings.data, model=model or settings.model)
