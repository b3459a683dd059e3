"""Show the example of a docstring as code: Griffe knows sections named Examples, and ours are named Example."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class Examples(Extension):
    """Rename the section before docstrings are parsed."""

    def on_instance(self, *, obj: Any, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
