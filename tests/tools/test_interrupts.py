"""Ctrl-C: every command ends with 130 and one line, and writes nothing; whatever is being computed is left to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from evennorm.cli import main
from evennorm.errors import InputError
from evennorm.tools.atomic import replacing, write_text
from evennorm.tools.interrupts import between_batches, interrupted, remembered, stop_if_interrupted

NETS = """
import os, pathlib, signal, time
import numpy as np
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def slow():
    pathlib.Path("ready").touch()
    time.sleep(60)


def batches():
    for number in range(400):
        if number == 2:
            pathlib.Path("ready").touch()
        time.sleep(0.05)
        yield np.ones((8, 4), "float32")


def swallowed():
    for number in range(5):
        if number == 2:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            except KeyboardInterrupt:  # as a callback of a framework does
                pass
        yield np.ones((8, 4), "float32")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def started(folder, *arguments):
    program = "from evennorm.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(process, folder) -> None:
    out, err = process.communicate(timeout=30)  # before `slow` ends
    assert process.returncode == 130, err
    assert (out, err) == ("", "evennorm: interrupted\n")
    assert {path.name for path in folder.iterdir()} <= {"nets.py", "ready", "__pycache__"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("recalibrate", "nets:net", "--data", "nets:batches", "-o", "out.pt"),
        ("check", "nets:net", "--data", "nets:batches", "--batches", "400", "--html", "out.html"),
        ("check", "nets:slow", "--html", "out.html"),
        ("fold", "nets:slow", "-o", "out.pt"),
        ("fold", "nets:net", "--data", "nets:slow", "-o", "out.pt"),
        ("recalibrate", "nets:net", "--data", "nets:slow", "-o", "out.pt"),
        ("migrate", "weights.h5", "--architecture", "nets:slow", "-o", "out.keras"),
    ],
)
def test_ctrl_c(folder, arguments) -> None:
    if arguments[0] == "migrate":
        arguments = ("migrate", _weights(folder), *arguments[2:])
    process = started(folder, *arguments)
    try:
        wait_for(folder / "ready", process)
        process.send_signal(signal.SIGINT)
        (folder / "weights.h5").unlink(missing_ok=True)
        ended(process, folder)
    finally:
        process.kill()
        process.wait()


def _weights(folder):
    import h5py
    import numpy as np

    with h5py.File(folder / "weights.h5", "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        group = file.create_group("dense")
        group.attrs["weight_names"] = [b"dense/kernel:0"]
        group["dense/kernel:0"] = np.ones((4, 4), "float32")
    return "weights.h5"


@pytest.mark.parametrize(
    "arguments",
    [
        ("recalibrate", "nets:net", "--data", "nets:swallowed", "-o", "out.pt"),
        ("check", "nets:net", "--data", "nets:swallowed", "--html", "out.html"),
    ],
)
def test_an_interrupt_that_a_library_swallows(folder, arguments) -> None:
    ended(started(folder, *arguments), folder)


def test_a_second_one_ends_the_process_at_once(folder) -> None:
    program = (
        "import os, signal, time\nfrom evennorm.tools.interrupts import between_batches, remembered\n"
        "with remembered(), between_batches():\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01); print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01); print('never', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "goes on\n", "evennorm: interrupted\n")


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def test_at_once_but_while_a_framework_computes() -> None:
    before = signal.getsignal(signal.SIGINT)
    with remembered():
        with pytest.raises(KeyboardInterrupt):
            press()
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            stop_if_interrupted()
    assert not interrupted()
    computed = []

    def compute() -> None:
        with remembered(), between_batches():
            press()
            computed.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        compute()
    assert computed == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_is_not_written_after_an_interrupt(tmp_path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def write() -> None:
        with remembered(), between_batches(), replacing(target) as partial:
            partial.write_text("new")
            press()

    with pytest.raises(KeyboardInterrupt):
        write()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_other_threads_get_no_signals() -> None:
    before, failed = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        try:
            with remembered(), between_batches():
                stop_if_interrupted()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fault_of_ours_is_one_line_and_a_traceback_on_demand(monkeypatch) -> None:
    from click.testing import CliRunner

    def fail(*_):
        raise KeyError("a\nb")

    monkeypatch.setattr("evennorm.tools.explain.explain", fail)
    arguments = ["explain", "--shape", "32,10"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("evennorm: this is a fault of evennorm's, not of yours: KeyError: ")
    assert "--debug" in line
    for debugged in (["--debug", *arguments], [*arguments, "--debug"]):
        result = CliRunner().invoke(main, debugged)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1] == line


def test_expected_errors_are_one_line(monkeypatch) -> None:
    from click.testing import CliRunner

    def fail(*_):
        raise InputError("the layer 'a\x1b[2J\n::error::x' is odd")

    monkeypatch.setattr("evennorm.tools.explain.explain", fail)
    result = CliRunner().invoke(main, ["explain", "--shape", "32,10"])
    assert result.stderr == "evennorm: the layer 'a\\x1b[2J\\n:\\x3aerror:\\x3ax' is odd\n"
