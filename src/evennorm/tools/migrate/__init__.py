"""Convert a file of Keras 1 or 2 to a Keras 3 model with the same predictions, and report how."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evennorm.errors import ArgumentError, EvennormError, InputError, first_line
from evennorm.tools.hdf5 import check_hdf5_file
from evennorm.tools.imported import imported
from evennorm.tools.models import Opened, bounded_weights, check_output, open_model, prepare_keras, save_model
from evennorm.tools.outputs import refuse_inputs
from evennorm.tools.without_tensorflow import leave_tensorflow_out

if TYPE_CHECKING:
    from evennorm.tools.migrate.build import LayerReport
    from evennorm.tools.migrate.provenance import Provenance, UnsaidError
    from evennorm.tools.migrate.records import OldFile, OldModel

__all__ = ["Migration", "migrate"]

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Migration:
    """What was read, what was made of it, and what had to be assumed."""

    old: str
    new: str | None
    """The file that was written."""
    written_by: str
    evidence: tuple[str, ...]
    """The evidence for the file's author, where the file does not name it."""
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    """Notes on the file as a whole."""
    left_out: tuple[str, ...]
    """Layers that are not in the new model."""
    parameters: int
    """Numbers in the new model's weights."""
    model: Any
    """The keras.Model."""
    from_architecture: tuple[str, ...] = ()
    """What was taken from a given architecture and is not confirmed by the file."""

    @property
    def assumed(self) -> int:
        """Number of layers that hold an assumption."""
        return sum(1 for layer in self.layers if layer.assumed)

    def as_dict(self) -> dict[str, Any]:
        """Return the record for programs, without the model."""
        kept = ("old", "new", "written_by", "evidence", "notes", "left_out", "parameters", "from_architecture")
        return {key: getattr(self, key) for key in kept} | {"layers": [asdict(layer) for layer in self.layers]}


def migrate(
    old: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    architecture: Any = None,
    written_by: str | None = None,
    partial: bool = False,
    to: str = "keras",
    custom: Sequence[Any] = (),
    progress: Progress = lambda what, done, total: None,
) -> Migration:
    """Make a Keras 3 model of a file that Keras 1.0 to 1.2, Keras 2 or tf.keras 2 wrote.

    Nothing in the file is executed. Layers become Keras 3's where it has an equal, else small models of its layers; batch
    normalization of mode 1 and 2 becomes `evennorm.keras.BatchNormalization`. Channels-first models keep the shapes of their
    inputs and outputs and compute channels last inside.

    Args:
        old: an `.h5` file, of a whole model or of weights.
        out: the file to write, `.keras` or `.h5`; None for the model alone.
        architecture: for a file of weights: a JSON file that `model.to_json()` wrote, `module:function` returning a Keras 3
            model, which is imported and called, or such a model.
        written_by: release and backend, as in "keras==1.0.4,theano", where the file does not say; it counts more than what
            the file says.
        to: keras; or torch, which writes a state_dict of the layers that torch has, as `.safetensors`. For torch, `old` may
            be any Keras model, of Keras 3 too.
        partial: leave out layers that cannot be migrated, and what depends on them. The outputs are then those that are
            left, and what the layers left out would have read.
        custom: classes of layers of your own, or `module:Class`, which is imported; they are made by their from_config, of
            what the file says, and given the arrays of the file as they are.
        progress: is told what is being done, how much of it is done, and of how much, where that is known.

    Raises:
        InputError: a file that cannot be read, a layer that is not known, or a question only its author can answer.
        ArgumentError: a `written_by` that is no release and no backend.

    Example:
        >>> from evennorm.tools.migrate import migrate
        >>> migrate("no-such-file.h5")
        Traceback (most recent call last):
        evennorm.errors.InputError: there is no file 'no-such-file.h5'; give the path of an .h5 or .hdf5 file ...
    """
    prepare_keras()
    leave_tensorflow_out()
    if to not in ("keras", "torch"):
        raise ArgumentError(f"models are migrated to keras or to torch; received {to!r}")
    if out is not None:
        refuse_inputs(out, {"the old file": old, "the architecture": architecture})
    if out is not None and to == "keras":
        check_output("keras", out)
    if to == "torch" and zipfile.is_zipfile(old):
        opened = open_model(old)
        return _for_torch(_already(opened), out)
    file = _read(old)
    given = file.config if architecture is None else _architecture(architecture)
    if given is None:
        raise InputError(
            f"{file.path!r} holds weights without their model; give what it was saved from, as in --architecture FILE.json "
            "or --architecture module:function"
        )
    try:
        with bounded_weights(file.path):
            migration = _made(file, given, written_by, partial, _classes(custom), architecture is not None, progress)
    except (EvennormError, MemoryError):
        raise
    except Exception as error:  # the layers of Keras refuse wrong configurations in many ways
        raise InputError(
            f"no model can be made of {file.path!r} ({first_line(error)}); its configuration or its weights are damaged, or "
            "of another program"
        ) from error
    if out is not None:
        progress("writing", 0, None)
    if to == "torch":
        return _for_torch(migration, out)
    if out is None:
        return migration
    save_model(Opened(str(old), "keras", migration.model), migration.model, out)
    return replace(migration, new=os.fspath(out))


def _already(opened: Opened) -> Migration:
    """Return the record of a model that is Keras 3's already, with nothing to report."""
    version = "Keras 3"
    return Migration(opened.name, None, version, (), (), opened.notes, (), int(opened.model.count_params()), opened.model)


def _for_torch(migration: Migration, out: str | os.PathLike[str] | None) -> Migration:
    if out is None:
        raise ArgumentError("a state_dict for torch is a file; give the path of a .safetensors file")
    from evennorm.tools.to_torch import write_state_dict

    found = write_state_dict(migration.model, out)
    notes = [f"{path}: {what}" for path, what in found.written.items()]
    notes += [f"{path} is not in the state_dict: {why}" for path, why in found.left.items()]
    return replace(migration, new=os.fspath(out), notes=(*migration.notes, *notes), left_out=migration.left_out)


def _read(path: str | os.PathLike[str]) -> OldFile:
    from evennorm.tools.migrate.hdf5 import check_kind, read_file

    check_kind(path)
    check_hdf5_file(path, os.fspath(path))
    return read_file(path)


def _classes(custom: Sequence[Any]) -> dict[str, Any]:
    """Return the user's layers by their names."""
    found = {}
    for entry in custom:
        own = entry
        if isinstance(entry, str):
            if not all(entry.partition(":")):
                raise InputError(f"--custom takes module:Class, as in my_layers:LRN2D; received {entry!r}")
            own = imported(entry, f"--custom {entry}", f"{entry.partition(':')[2]!r}; it is to be the class of a layer")
        if not isinstance(own, type) or not hasattr(own, "from_config"):
            raise InputError(f"--custom names classes of Keras layers; received {entry!r}")
        found[own.__name__] = own
    return found


def _made(
    file: OldFile,
    given: Any,
    written_by: str | None,
    partial: bool,
    custom: Mapping[str, Any],
    chosen: bool,
    progress: Progress,
) -> Migration:
    import keras

    from evennorm.tools.migrate.build import Builder, unknown_layers
    from evennorm.tools.migrate.formats import data_format
    from evennorm.tools.migrate.into import as_old, fill
    from evennorm.tools.migrate.matching import match
    from evennorm.tools.migrate.models import read_model
    from evennorm.tools.migrate.provenance import UnsaidError, provenance

    own = isinstance(given, keras.Model)
    described = as_old(given) if own else read_model(given)
    stated = None if own or not isinstance(given, dict) else given.get("keras_version")
    origin = provenance(file, described, stated, written_by, configured=not own)
    taken = _taken_from_architecture(file, described, given) if chosen else []
    notes: list[str] = []
    matched = None

    def build(origin: Provenance) -> tuple[Any, list[Any], list[str], str | None]:
        assert matched is not None
        done = itertools.count(1)
        steps = described.steps()

        def step() -> None:
            progress("building", next(done), steps)

        if own:
            return given, fill(given, described, matched, origin, step), [], None
        default, why = data_format(described, origin)
        builder = Builder(origin, matched, default, partial, custom, step=step)
        return builder.model(described), builder.reports, builder.left_out, why

    if not own:
        unknown = unknown_layers(described, custom)
        if unknown and not partial:
            raise InputError(
                f"{'; '.join(unknown)}; rebuild {'it' if len(unknown) == 1 else 'them'} in Keras 3, or hand in your own "
                "class with --custom module:Class, or take what can be exported with --partial"
            )
    matched = match(described, file)
    try:
        model, reports, left_out, why = build(origin)
    except UnsaidError as first:
        raise _asking_for_all(first, origin, build) from None
    notes += [why] if why else []
    notes += matched.notes
    if file.training is not None:
        notes.append("compile the model anew: loss, metrics and optimizer are not carried over" + _optimizer(file.training))
    return Migration(
        old=file.path,
        new=None,
        written_by=origin.text(),
        evidence=origin.evidence,
        layers=tuple(reports),
        notes=tuple(notes),
        left_out=tuple(left_out),
        parameters=int(model.count_params()),
        model=model,
        from_architecture=tuple(taken),
    )


def _asking_for_all(first: UnsaidError, origin: Provenance, build: Callable[[Provenance], Any]) -> InputError:
    """Return an error with the question that stopped migration, and the next one that would stop it."""
    from evennorm.tools.migrate.provenance import UnsaidError

    answers: list[Provenance] = [replace(origin, backend=backend) for backend in ("theano", "tensorflow")]
    if first.missing == "release":
        answers = [replace(origin, releases=(release,)) for release in (origin.releases[0], origin.releases[-1])]
    for answer in answers:
        try:
            build(answer)
        except UnsaidError as second:
            if second.missing != first.missing:
                return InputError(
                    f"{first.question}; and {second.question}; say both, as in --written-by keras==1.0.4,theano"
                )
        except InputError:
            continue
    return first


def _taken_from_architecture(file: OldFile, described: OldModel, given: Any) -> list[str]:
    """Return what is taken from an architecture because the file does not say it.

    Raises:
        InputError: the file describes its layers, and otherwise.
    """
    import keras

    from evennorm.tools.migrate.compare import differences
    from evennorm.tools.migrate.into import input_ranks
    from evennorm.tools.migrate.models import read_model

    if file.config is None:
        norms = Counter(
            f"epsilon {x.config.get('epsilon')}, axis {x.config.get('axis', -1)}, mode {x.config.get('mode', 0) or 0}"
            for x in described.leaves()
            if x.kind == "BatchNormalization"
        )
        said = "; ".join(
            f"{settings} of {count} batch normalization{'s' * (count > 1)}" for settings, count in norms.items()
        )
        return [
            "the file holds weights alone: classes, calls and all settings are the architecture's, and nothing in the file "
            "can confirm them" + (f" ({said})" if said else "")
        ]
    try:
        old = read_model(file.config)
    except InputError as error:
        return [f"the file's own configuration was not compared with the architecture: {error}"]
    found = differences(old, described, input_ranks(given) if isinstance(given, keras.Model) else None)
    if found.outputs:
        shown = "; ".join(found.outputs[:8]) + (f"; and {len(found.outputs) - 8} more" * (len(found.outputs) > 8))
        raise InputError(
            f"{file.path!r} has a configuration of its own, and the architecture says otherwise ({shown}); leave out "
            "--architecture, or correct it"
        )
    return [f"the architecture counts where the file says otherwise: {said}" for said in found.others]


def _optimizer(training: Any) -> str:
    if not isinstance(training, dict):
        return ""
    optimizer = training.get("optimizer_config") or {}
    said = [f"loss {training['loss']!r}"] if isinstance(training.get("loss"), str) else []
    said += [f"optimizer {optimizer['class_name']}"] if isinstance(optimizer, dict) and "class_name" in optimizer else []
    return f" (it had {', '.join(said)})" if said else ""


def _architecture(given: Any) -> Any:
    """Return an architecture as parsed JSON, or a Keras 3 model."""
    if not isinstance(given, str | os.PathLike):
        return given
    path = Path(given)
    if path.suffix in (".h5", ".hdf5"):
        return _read(path).config
    if not path.exists() and ":" in str(given):
        return open_model(str(given)).model
    if path.suffix == ".keras":
        return open_model(path).model
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"architectures are read from JSON; received {os.fspath(path)!r}; write it anew by model.to_json()")
    if path.exists() and not path.is_file():
        raise InputError(f"--architecture {os.fspath(path)!r} is no regular file; give the JSON that model.to_json() wrote")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
        parsed = json.loads(parsed) if isinstance(parsed, str) else parsed  # a string that was dumped once more
    except OSError as error:
        raise InputError(f"--architecture {os.fspath(path)!r} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"--architecture {os.fspath(path)!r} is no JSON ({error}); write it by model.to_json()") from None
    return parsed
