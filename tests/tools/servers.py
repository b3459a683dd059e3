"""A PostgreSQL server of the tests' own, on loopback, and crews of processes that share a study and train nothing."""

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import evennorm
from evennorm.tools.compare.settings import Settings

SOURCES = str(Path(evennorm.__file__).parents[1])
STALE = 5
"""Seconds after which a crew takes a process for dead; 20 elsewhere."""


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, from PATH or where Debian puts them."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += map(Path, sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True))
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


def missing() -> str | None:
    """Why no server can be started here; None where it can."""
    if programs() is None:
        return "PostgreSQL is not installed: there is no initdb on PATH or in /usr/lib/postgresql; on Debian: .ci/services"
    if os.getuid() == 0 and not (shutil.which("runuser") and any(user.pw_name == "postgres" for user in pwd.getpwall())):
        return "PostgreSQL does not run as root, and there is no user postgres, or no runuser to become it"
    return None


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Server:
    """One that can be stopped and started; its clock is told in a time zone a day ahead of others."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.port = free_port()
        self.url = f"postgresql://evennorm@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-A", "trust", "-U", "evennorm", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()

    def start(self) -> None:
        settings = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        zone = "-c timezone=Pacific/Kiritimati -c max_connections=100"
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", f"{settings} {zone}", "start")

    def stop(self, mode: str) -> None:
        """`fast` ends the sessions, `immediate` does not even do that."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def _run(self, program: str, *arguments: str) -> None:
        folder = programs()
        assert folder is not None
        command = [str(folder / program), "-D", str(self._folder / "data"), *arguments]
        if os.getuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        subprocess.run(command, check=True, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="evennorm-postgres-", ignore_cleanup_errors=True) as name:
        if os.getuid() == 0:
            shutil.chown(name, "postgres")
        running = Server(Path(name))
        try:
            yield running
        finally:
            running.stop("immediate")


CREW = """
import os, sys, time
from evennorm.tools.compare import storage, study
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.train import Record

given, workers, stale, seconds, log = sys.argv[1], *map(float, sys.argv[2:5]), sys.argv[5]
for module in (storage, study):
    module.HEARTBEAT_SECONDS, module.STALE_SECONDS = 0.5, int(stale)
record = Record(**{name: [0.5] for name in ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "seconds")},
                validation_accuracy=0.5, diverged=False)
lines = open(log, "a", buffering=1)

def train(run):
    lines.write(f"{os.getpid()} begins {run.repeat}\\n")
    time.sleep(seconds)
    lines.write(f"{os.getpid()} ends {run.repeat}\\n")
    return record

def work():
    shared = study.Study(Settings.from_json(given), {"epochs": 1})
    while shared.enqueue_missing():
        if not shared.work_once(train):
            time.sleep(0.1)

children = []
for _ in range(int(workers)):
    children.append(os.fork())
    if not children[-1]:
        work()
        os._exit(0)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@contextmanager
def crew(
    settings: Settings, workers: int, log: Path, seconds: float = 0.2, prefix: tuple[str, ...] = (), **environment: str
) -> Iterator["subprocess.Popen[str]"]:
    """Processes that take runs of a study until none is missing; they write to the log when each begins and ends."""
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", CREW, settings.to_json(), *map(str, (workers, STALE, seconds, log))],
        env=os.environ | {"PYTHONPATH": SOURCES} | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finished(process: "subprocess.Popen[str]", seconds: float = 60) -> None:
    _, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors


def said(log: Path) -> list[tuple[int, str, int]]:
    """Process, word and repeat of each whole line."""
    if not log.exists():
        return []
    lines = (line.split() for line in log.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return [(int(process), word, int(repeat)) for process, word, repeat in lines]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def settings(url: str, study: str, repeats: int, out: Path) -> Settings:
    return Settings("points", "stub", ("none",), repeats, (0.1,), 1, 16, "jax", 0, str(out), storage=url, study=study)
