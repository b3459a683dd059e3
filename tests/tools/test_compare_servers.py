"""A study that machines share through PostgreSQL, or through a gRPC proxy in front of a database."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evennorm.errors import InputError, MissingExtra
from evennorm.tools.compare import storage
from evennorm.tools.compare.study import Study
from tests.tools import servers
from tests.tools.servers import crew, finished, said, settings, wait_for


@pytest.fixture(scope="module")
def postgres():
    if reason := servers.missing():
        pytest.skip(reason)
    with servers.server() as running:
        yield running


def trained(log: Path) -> list[int]:
    return sorted(repeat for _, word, repeat in said(log) if word == "ends")


def test_a_server_that_is_stopped_and_started_again(postgres, tmp_path):
    """Four workers go on, and train each run once; what was trained while it was away is kept."""
    given, log = settings(postgres.url, "restarted", 16, tmp_path), tmp_path / "log"
    with crew(given, 4, log, seconds=0.3) as working:
        for mode in ("fast", "immediate"):
            before = len(trained(log))
            wait_for(lambda before=before: len(trained(log)) >= before + 3)
            postgres.stop(mode)
            postgres.start()
        finished(working)
    assert trained(log) == list(range(16))
    assert len({process for process, _, _ in said(log)}) == 4
    study = Study(given, {"epochs": 1})
    assert len(study.records()) == 16
    study._storage.remove_session()
    study._storage.engine.dispose()


def host(name: str) -> tuple[str, ...]:
    """Puts a command on a host of that name with process numbers of its own, as in a container, where that is allowed."""
    prefix = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c", f'hostname {name}; exec "$@"', "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return prefix


def test_two_hosts_in_two_time_zones(postgres, tmp_path):
    """A run of a process that was killed on one host is trained on the other; that of one that lives long is not."""
    given = settings(postgres.url, "hosts", 2, tmp_path)
    logs = [tmp_path / name for name in ("a", "b")]
    for name in ("tmp-a", "tmp-b"):
        (tmp_path / name).mkdir()
    folders = [{"TMPDIR": str(tmp_path / name)} for name in ("tmp-a", "tmp-b")]
    with crew(given, 2, logs[0], 2.5 * servers.STALE, host("a"), TZ="Pacific/Auckland", **folders[0]) as east:
        wait_for(lambda: len(said(logs[0])) == 2)
        os.kill(workers_of(logs[0])[-1], signal.SIGKILL)
        with crew(given, 1, logs[1], 0.1, host("b"), TZ="America/Los_Angeles", **folders[1]) as west:
            finished(west)
        east.communicate(timeout=60)
    [alive], [taken] = trained(logs[0]), trained(logs[1])
    assert {alive, taken} == {0, 1}


def workers_of(log: Path) -> list[int]:
    """The numbers of a crew's processes on this host, the forked ones last."""
    lines = subprocess.run(["ps", "-wwAo", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(int(line.split()[0]) for line in lines if str(log) in line and "unshare" not in line)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """Of a SQLite file, by the command."""
    pytest.importorskip("grpc", reason="the gRPC proxy needs grpcio: pip install 'evennorm[grpc]'")
    folder = tmp_path_factory.mktemp("proxy")
    url = f"grpc://127.0.0.1:{servers.free_port()}"
    command = [sys.executable, "-m", "evennorm", "compare", "--serve", url, "--storage", f"sqlite:///{folder / 'study.db'}"]
    environment = os.environ | {"PYTHONPATH": servers.SOURCES}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == f"serving {url}; Ctrl-C ends it\n"
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_workers_behind_a_proxy(proxy, tmp_path):
    """They take each run once, and that of a process that was killed after it had said nothing for long."""
    given, log = settings(proxy, "proxied", 8, tmp_path), tmp_path / "log"
    with crew(given, 1, log, seconds=100, TMPDIR=str(tmp_path)) as dying:
        wait_for(lambda: said(log))
        [(process, _, repeat)] = said(log)
        os.kill(process, signal.SIGKILL)
        dying.communicate(timeout=20)
    log.unlink()
    for lock in tmp_path.glob("evennorm-*.lock"):
        lock.unlink()  # as on another machine
    with crew(given, 4, log, seconds=0.1) as working:
        finished(working)
    assert trained(log) == list(range(8))
    assert [each for _, word, each in said(log) if word == "ends"][-1] == repeat, "the others had not to wait for it"


def test_the_driver_that_is_installed(monkeypatch):
    present = {"psycopg2"}
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name if name in present else None)
    assert storage.with_driver("postgresql://me@host/x") == "postgresql+psycopg2://me@host/x"
    present.add("psycopg")
    assert storage.with_driver("postgres://me@host/x") == "postgresql+psycopg://me@host/x"
    assert storage.with_driver("postgresql+psycopg2://me@host/x") == "postgresql+psycopg2://me@host/x"
    present.clear()
    for url in ("postgresql://me:secret@host/x", "postgresql+psycopg://me:secret@host/x"):
        with pytest.raises(MissingExtra, match=r"psycopg, which is not installed; .*evennorm\[postgres\]") as refusal:
            storage.with_driver(url)
        assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["grpc://", "grpc://host", "grpc://host:x", "grpc://me@host:1", "grpc://host:1/x"])
def test_a_proxy_that_is_named_wrongly(url):
    with pytest.raises(InputError, match="named by grpc://HOST:PORT"):
        storage.host_and_port(url)


def test_nothing_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "PROXY_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"nothing answers at grpc://127.0.0.1:1; start the proxy by"):
        Study(settings("grpc://127.0.0.1:1", "x", 1, tmp_path), {})
    with pytest.raises(InputError, match=r"//me:\*\*\*@127.0.0.1:1/x cannot be used: .*refused.* start that database"):
        Study(settings("postgresql://me:secret@127.0.0.1:1/x", "x", 1, tmp_path), {})
