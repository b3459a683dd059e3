"""docs/placement.md shows what its programs print."""

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "placement.md"


def printed(text):
    """What each python block prints, run one after another as a reader would."""
    space, found = {}, []
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(program, space)
        found.append(out.getvalue())
    return found


def test_the_page_shows_real_output():
    text = PAGE.read_text()
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 10
    lines = [[line.rstrip() for line in block.splitlines()] for block in printed(text)]
    assert lines == [block.splitlines() for block in shown]
