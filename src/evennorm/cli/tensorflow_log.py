"""Leave out what TensorFlow logs while it is imported, which TF_CPP_MIN_LOG_LEVEL does not stop."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from tempfile import TemporaryFile
from types import ModuleType

_LOG = re.compile(rb"WARNING: All log messages before absl::InitializeLog|[IW]\d{4} ")
"""How lines of absl's log begin whose level is below an error."""


class QuietTensorFlow(MetaPathFinder):
    """Finds TensorFlow as the other finders do, and filters stderr while it is loaded."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "tensorflow":
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _filtered_stderr():
                    load(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def _filtered_stderr() -> Iterator[None]:
    """Pass on what C++ and Python write to stderr, without the log, when the body has ended."""
    with ExitStack() as opened:
        try:
            written = opened.enter_context(TemporaryFile())
            stderr = os.dup(2)
        except OSError:  # a full disk, or stderr is closed
            yield
            return
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not _LOG.match(line)))
