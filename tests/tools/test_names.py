"""Names are data: whatever a file calls its layers, nothing of it is obeyed by a terminal, a browser or a CI service."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from evennorm.cli import main
from evennorm.errors import printable

EVIL = "bn\x1b[2J\x07\x9b31m\r\n::error::gone\n##[error]x ##vso[task.complete]\u202e\u2028\x7f\ud800"


def harmless(text: str) -> None:
    for line in text.split("\n"):
        assert not line.lstrip().startswith("::")
        assert "##[" not in line
        assert "##vso[" not in line
        assert line.isprintable(), repr(line)


def test_one_function_escapes() -> None:
    assert printable("plain, größer, 日本語 \U0001f600") == "plain, größer, 日本語 \U0001f600"
    assert printable("a\tb\nc\x1b[2J") == r"a\tb\nc\x1b[2J"
    assert printable("\ud800\u202e\u2028") == r"\ud800\u202e\u2028"
    assert printable("  ::error::x") == r"  :\x3aerror:\x3ax"
    harmless(printable(EVIL))
    assert printable(printable(EVIL)) == printable(EVIL)


ONE_LINE = EVIL.translate({ord(c): None for c in ".\r\n\u2028\ud800"})
"""What torch.fx takes for a name."""

NETS = f"""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.add_module({ONE_LINE!r}, nn.BatchNorm1d(4))
        self.last = nn.BatchNorm1d(4, eps=1e-9)

    def forward(self, x):
        x = self.first(x)
        for name, module in self.named_children():
            if name.startswith("bn"):
                x = module(x)
        return self.last(x)


def net():
    return Net()


def batches():
    return [torch.ones(8, 4), torch.zeros(8, 4)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import keras

    name = EVIL.replace("\ud800", "")
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(name=name), keras.layers.BatchNormalization(axis=1)]
    keras.Sequential([keras.Input((4,)), *layers]).save(tmp_path / "evil.keras")
    (tmp_path / "evil_nets.py").write_text(NETS, encoding="utf-8", errors="backslashreplace")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("evil_nets", None)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "evil.keras"),
        ("check", "evil.keras", "--html", "out.html"),
        ("check", "evil.keras", "--sarif"),
        ("check", "evil.keras", "--json"),
        ("recalibrate", "evil.keras", "--data", "evil_nets:batches", "-o", "out.keras"),
        ("fold", "evil.keras", "--no-speed", "-o", "out.keras"),
        ("check", "evil_nets:net"),
        ("check", "evil_nets:net", "--data", "evil_nets:batches", "--html", "out.html"),
        ("check", "evil_nets:net", "--sarif"),
        ("check", "evil_nets:net", "--json"),
        ("check", "evil_nets:net", "--fix", "-o", "out.pt"),
        ("recalibrate", "evil_nets:net", "--data", "evil_nets:batches", "-o", "out.pt"),
        ("recalibrate", "evil_nets:net", "--data", "evil_nets:batches", "--json", "-o", "out.pt"),
        ("fold", "evil_nets:net", "--no-speed", "-o", "out.pt"),
    ],
)
def test_names_of_layers(folder, arguments) -> None:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code in (0, 1), result.output
    assert "bn" in result.stdout
    harmless(result.output)
    if "--html" in arguments:
        page = (folder / "out.html").read_text(encoding="utf-8")
        assert "bn\\x1b[2J" in page
        harmless(page)


def test_names_in_old_files(tmp_path, monkeypatch) -> None:
    from tests.tools.test_hostile_files import configured

    monkeypatch.chdir(tmp_path)
    for name in ("d\x1b[2J\n::error::gone", "dense\ud800", "[/bold][link=x]d"):
        path = configured(tmp_path / "old.h5", name=name, outputs=[[name, 0, 0]])
        result = CliRunner().invoke(main, ["migrate", path.name, "-o", "out.keras"])
        assert result.exit_code in (0, 2), result.output
        assert "fault of evennorm" not in result.stderr
        harmless(result.output)


def test_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a\x1b[2J\n::error::x.svg"
    result = CliRunner().invoke(main, ["explain", "--shape", "32,10", "--svg", name])
    assert result.exit_code == 0
    harmless(result.output)
    for arguments in (("check", "no\n::error::x.keras"), ("check", "a.keras", "--html", "no\x1b/x.html")):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        harmless(result.stderr)


QUIET = """
import sys
from evennorm.cli import main
for command in (
    "recalibrate net.keras --data x.npz -o out.h5 --json",
    "check net.h5 --data x.npz --json",
    "fold net.keras -o folded.h5 --json --no-speed",
):
    try:
        main(command.split())
    except SystemExit as ended:
        assert ended.code in (0, 1, None), command
    print(flush=True)
unwanted = {"torch", "tensorflow"} - {sys.argv[1]}
assert not unwanted & set(sys.modules), sorted(unwanted & set(sys.modules))
"""


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_nothing_but_the_answer(tmp_path, backend) -> None:
    """No log line of absl, oneDNN or XLA, and no framework that was not asked for."""
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    model.compile("adam", "mse")
    model.save(tmp_path / "net.keras")
    model.save(tmp_path / "net.h5")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(64, 4)).astype("float32"))
    environment = {"PATH": "", "KERAS_BACKEND": backend, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", QUIET, backend]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    answers = done.stdout.split("\n\n")
    assert [type(json.loads(answer)) for answer in answers if answer] == [dict] * 3


def test_the_log_of_tensorflows_import(tmp_path) -> None:
    """It comes from C++ on processors with AVX-512, whatever TF_CPP_MIN_LOG_LEVEL says; all else passes."""
    log = (
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
        "I0000 00:00:1795926487.429160    9700 port.cc:153] oneDNN custom operations are on.\n"
    )
    error = "E0000 00:00:1795926487.429160    9700 cuda.cc:9] no driver\nWarning: of Python\n"
    (tmp_path / "tensorflow.py").write_text(f"import os, sys\nos.write(2, {(log + error).encode()!r})\nvalue = 7\n")
    program = (
        "import importlib.util, os, evennorm.cli.group\nassert importlib.util.find_spec('tensorflow').name == 'tensorflow'\n"
        "import tensorflow\nos.write(2, b'I0000 after\\n')\nassert tensorflow.value == 7"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, error + "I0000 after\n")
