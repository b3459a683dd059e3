"""Train runs for another process: settings come on standard input, and progress goes to standard output as lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from evennorm.errors import EvennormError
from evennorm.tools.compare.settings import Settings


def main() -> int:
    """Work until no run is missing; end at once when the process that started it is gone."""
    told, sys.stdout = sys.stdout, sys.stderr  # output of a library must not be taken for an event

    def tell(event: str, detail: Any = None) -> None:
        print(json.dumps([event, detail]), file=told, flush=True)

    settings = Settings.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(settings, tell)
    except (EvennormError, OSError) as error:
        tell("error", str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _work(settings: Settings, tell: Any) -> None:
    from evennorm.tools.compare.work import Progress, join_study, prepare, trainer_for, work

    class Told(Progress):
        """A progress that passes each step on instead of adding it up."""

        def epoch(self, worker: int = 0) -> None:
            tell("epoch")

        def run(self, worker: int = 0) -> None:
            tell("run")

        def expect(self, total: int) -> None:
            tell("total", total)

    data, architecture, fingerprint = prepare(settings)
    study = join_study(settings, data, fingerprint, lambda text: tell("notice", text))
    work(study, trainer_for(settings, data, architecture), Told(settings, 0, lambda done, total: None))


def _end_with_parent() -> None:
    """End with the parent: standard input closes when it ends, even by kill -9. The run is taken for dead and trained
    again."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
