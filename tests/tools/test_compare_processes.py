"""`evennorm compare` killed, interrupted, and shared by several processes: finished runs are kept, none is trained twice."""

import os
import signal
import subprocess
import sys

import pytest

from evennorm.cli.compare import remembered_interrupts
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.study import Study
from tests.tools.comparing import SOURCES, command, process, refused, selected, settings, table_of, trials, wait_for


def test_after_kill_9_the_same_command_trains_what_is_missing(finished, data, tmp_path):
    killed = process(data, tmp_path, placements="before")
    wait_for(lambda: trials(tmp_path, "COMPLETE") >= 2)
    killed.kill()
    killed.communicate()
    assert trials(tmp_path, "COMPLETE") < 6
    result = command(data, tmp_path, placements="before")
    assert result.exit_code == 0, result.output
    assert table_of(tmp_path) == selected(finished[0], "before")
    assert trials(tmp_path, "COMPLETE") == 6
    assert trials(tmp_path, "RUNNING") == trials(tmp_path, "WAITING") == 0


def test_ctrl_c_keeps_what_is_finished(data, tmp_path):
    running = process(data, tmp_path, placements="none", repeats=50)
    wait_for(lambda: trials(tmp_path, "COMPLETE") >= 1)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stdout == ""
    *_, last = stderr.splitlines()  # behind what a framework may print of an exception that met it
    assert last == "evennorm: interrupted; finished runs are kept, the same command continues from there"
    assert 1 <= trials(tmp_path, "COMPLETE") < 100


def test_ctrl_c_in_a_destructor_is_not_forgotten():
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with remembered_interrupts() as interrupted:
        interrupted()
        Interrupted()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_two_processes_share_the_runs(finished, data, tmp_path):
    result = command(data, tmp_path, placements="none", jobs=2)
    assert result.exit_code == 0, result.output
    assert table_of(tmp_path) == selected(finished[0], "none")
    assert trials(tmp_path, "COMPLETE") == trials(tmp_path) == 6


def test_workers_that_end_are_told_of(data, tmp_path, monkeypatch):
    from evennorm.tools.compare import work

    monkeypatch.setattr(work.sys, "executable", "/bin/false")
    assert "a worker ended with exit code 1; what is trained is kept" in refused(command(data, tmp_path, jobs=2))


HURRY = """
import sys
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.study import Study
from evennorm.tools.compare.train import Record

study = Study(Settings.from_json(sys.argv[1]), {"epochs": 2})
print("ready", flush=True)
sys.stdin.readline()
taken = []
while study.work_once(lambda run: taken.append(run) or Record([0.5], [1.0], [0.5], [1.0], [1.0], 0.5, False)):
    pass
print(taken)
"""


def test_processes_that_hurry_get_different_runs(tmp_path):
    """Without a lock, SQLite hands out about one run in ten twice."""
    given = settings(tmp_path, repeats=20)
    Study(given, {"epochs": 2}).enqueue_missing()
    hurried = [
        subprocess.Popen(
            [sys.executable, "-c", HURRY, given.to_json()],
            env=os.environ | {"PYTHONPATH": SOURCES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for each in hurried:
        assert each.stdout.readline() == "ready\n"
    for each in hurried:
        each.stdin.write("go\n")
        each.stdin.flush()
    runs = [run for each in hurried for run in eval(each.communicate()[0], {"Run": Run})]
    assert [each.returncode for each in hurried] == [0, 0]
    assert sorted(runs) == sorted(given.runs)
