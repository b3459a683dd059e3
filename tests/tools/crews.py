"""How long many workers take to share runs in which nothing is trained: python -m tests.tools.crews WORKERS RUNS."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tools import servers


def main(workers: int, runs: int) -> None:
    """By a gRPC proxy in front of PostgreSQL, all on this machine."""
    with servers.server() as postgres, tempfile.TemporaryDirectory() as folder:
        url, log = f"grpc://127.0.0.1:{servers.free_port()}", Path(folder, "log")
        command = [sys.executable, "-m", "evennorm", "compare", "--serve", url, "--storage", postgres.url]
        environment = os.environ | {"PYTHONPATH": servers.SOURCES}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as proxy:
            assert proxy.stderr is not None
            proxy.stderr.readline()
            begin = time.monotonic()
            with servers.crew(servers.settings(url, "crews", runs, Path(folder)), workers, log, 0.2) as crew:
                servers.wait_for(lambda: bool(servers.said(log)), 600)
                first = time.monotonic() - begin
                servers.finished(crew, 600)
            seconds, lines = time.monotonic() - begin, servers.said(log)
            proxy.send_signal(signal.SIGINT)
    once = sorted(repeat for _, word, repeat in lines if word == "ends") == list(range(runs))
    number = len({process for process, _, _ in lines})
    print(
        f"{runs} runs, each trained once: {once}; {number} workers; {first:.0f} s to the first one, {seconds:.0f} s in all"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
