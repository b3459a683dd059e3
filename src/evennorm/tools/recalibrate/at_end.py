"""Recalibrate a model when its training ends, for the callbacks of Keras and Lightning."""

from __future__ import annotations

import warnings
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.data import check_fit, open_data
from evennorm.tools.models import open_model
from evennorm.tools.recalibrate import Recalibration, recalibrate


class AtEnd:
    """Data and settings of a recalibration that comes later.

    Raises:
        InputError: nothing that can be read as batches.
    """

    def __init__(self, data: Any, framework: str, settings: dict[str, Any]):
        self._data = open_data(data, framework)
        self._settings = settings

    def check(self, model: Any) -> None:
        """Before hours of training.

        Raises:
            InputError: the samples do not fit a model that says what it takes.
        """
        check_fit(self._data, open_model(model))

    def run(self, model: Any) -> Recalibration | None:
        """The recalibration; None, with a warning, where the model or the data allow none: what was trained stays."""
        try:
            return recalibrate(model, self._data, **self._settings)
        except InputError as error:
            warnings.warn(
                f"the model was not recalibrated, and its statistics are those of training: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
