"""Write the results of a comparison, each file completely or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from evennorm import notebook
from evennorm.errors import InputError
from evennorm.tools.atomic import write_text
from evennorm.tools.compare.advantages import Advantages, advantages
from evennorm.tools.compare.best import Best
from evennorm.tools.compare.racing import Race, race, rate_differences, scaled
from evennorm.tools.compare.search import Found
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.statistics import Difference
from evennorm.tools.compare.table import Row, rows
from evennorm.tools.compare.train import Record, seed_of
from evennorm.tools.compare.verdict import verdict

PAGE = "report.html"


@dataclass(frozen=True)
class Comparison:
    """What was compared, with what, and what it shows."""

    settings: Settings
    data: str
    """The data set, in words."""

    fingerprint: dict[str, Any]
    """What the runs have in common."""

    device: str
    records: Mapping[Run, Record]
    table: list[Row]
    differences: list[Difference]
    verdict: str
    race: Race
    advantages: list[Advantages]
    scaled: Mapping[Run, Record]
    """Records of runs from other initial weights."""

    at_rates: dict[float, list[Difference]]
    """Every pair at each learning rate by itself."""
    search: Found | None = None
    """The result of a search for a mixture of placements."""

    best: Best | None = None
    """The model that was handed over."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        data: str,
        fingerprint: dict[str, Any],
        device: str,
        records: Mapping[Run, Record],
        step: float,
    ) -> Comparison:
        """Make the comparison that a finished study shows; `step` is the accuracy that one test sample is worth."""
        found = race(settings, records, step)
        extra = {run: records[run] for run in scaled(settings, found)}
        records = {run: records[run] for run in found.runs}
        table = rows(settings, records, found, step)
        return cls(
            settings,
            data,
            fingerprint,
            device,
            records,
            table,
            found.differences,
            verdict(settings, records, found),
            found,
            advantages(settings, records, extra, found, step),
            extra,
            rate_differences(settings, records, step),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON data; unknown numbers are None."""
        settings = asdict(self.settings) | {"storage": self.settings.place}
        return {
            "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
            "data": self.data,
            "fingerprint": self.fingerprint,
            "device": self.device,
            "table": [{self._called(name): value for name, value in asdict(row).items()} for row in self.table],
            "differences": [asdict(pair) for pair in self.differences],
            "advantages": [asdict(found) for found in self.advantages],
            "at_learning_rates": {f"{rate:g}": [asdict(pair) for pair in pairs] for rate, pairs in self.at_rates.items()},
            "verdict": self.verdict,
            "search": None if self.search is None else asdict(self.search),
            "model": None if self.best is None else self.best.as_dict(),
            "files": {name: str(Path(self.settings.out, name)) for name in self.file_names},
        }

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: the verdict, and a row for each placement at each learning rate; `report.html` has all
        of it."""
        from evennorm.tools.compare.page import cells_of

        settings = self.settings
        measured = settings.measure.short + (" %" if settings.measure.is_share else "")
        rows = [
            (cells["placement"], cells["rate"] + ("*" if cells["chosen"] else ""), cells["mean"], cells["interval"])
            for cells in map(cells_of(self), self.table)
        ]
        search = self.search.lines if self.search else []
        return notebook.titled(
            f"{Path(settings.model).name} on {self.data}",
            notebook.paragraphs([*self.verdict.splitlines(), *search]),
            notebook.table(("placement", "learning rate", f"test {measured}", "95 % interval"), rows),
            notebook.paragraphs(["* the learning rate that validation chose", f"More: {Path(settings.out, PAGE)}"]),
        )

    @property
    def file_names(self) -> list[str]:
        """The names of the files in the folder of the results."""
        return ["runs.csv", "summary.json", "curves.png", PAGE, *(self.best.files if self.best is not None else ())]

    def write(self) -> None:
        """Write the files into the folder of the results.

        Raises:
            InputError: one cannot be written; the older one of that name is as it was.
        """
        from evennorm.tools.compare.curves import draw_curves
        from evennorm.tools.compare.page import page

        out = Path(self.settings.out)
        write_text(out / "runs.csv", self._runs_csv())
        write_text(out / "summary.json", json.dumps(self.as_dict(), indent=2) + "\n")
        write_text(out / PAGE, page(self))
        partial = out / f".{token_hex(8)}.part"
        try:
            title = f"{self.settings.model} on {Path(self.settings.data).name}"
            draw_curves(self.settings, self.records, title, partial)
            partial.replace(out / "curves.png")
        except OSError as error:
            raise InputError(
                f"cannot write {out / 'curves.png'}: {error.strerror}; make room and repeat the command, "
                "nothing is trained twice"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _runs_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                *Run._fields,
                "seed",
                *map(self._called, ("test_accuracy", "validation_accuracy", "train_accuracy")),
                *("test_loss", "train_loss", "epochs"),
                *("diverged", "learned", "seconds_per_epoch"),
            ]
        )
        records = {**self.records, **self.scaled}
        for run in sorted(records, key=self._order):
            record = records[run]
            later = record.seconds[1:]
            writer.writerow(
                [
                    *run,
                    seed_of(self.settings.seed, run.repeat),
                    *(record.test_accuracy[-1], record.validation_accuracy, record.train_accuracy[-1]),
                    *(record.test_loss[-1], record.train_loss[-1], len(record.seconds), int(record.diverged)),
                    int(record.learned),
                    f"{math.fsum(later) / len(later):.4f}" if later else "",
                ]
            )
        return text.getvalue()

    def _called(self, column: str) -> str:
        """Return the name of a column of accuracies, or of what was measured in their place."""
        return column.replace("_accuracy", f"_{self.settings.measure.name}")

    def _order(self, run: Run) -> tuple[int, int, float, int]:
        settings = self.settings
        rate = settings.learning_rates.index(run.learning_rate)
        return settings.placements.index(run.placement), rate, run.scale, run.repeat
