"""Reach the database that keeps a study: a SQLite file, a server, or Optuna's proxy in front of one."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage

from evennorm.errors import EvennormError, InputError, MissingExtra
from evennorm.tools.compare.patience import PATIENCE_SECONDS, chain, is_lost, is_of_storage, is_race
from evennorm.tools.compare.settings import Settings, without_password

HEARTBEAT_SECONDS = 2
STALE_SECONDS = 20
"""How long a run's process may give no sign of life before the run is given to another one."""

LOCK_SECONDS = 60
"""How long a process waits for another one to finish writing to a SQLite file."""

PROXY_SECONDS = 10
"""How long to wait for a gRPC proxy that was never reached."""

_DRIVERS = {"psycopg": "psycopg", "psycopg2": "psycopg2"}
"""Drivers of PostgreSQL, the preferred one first: package, and its name in a URL."""


def url_of(settings: Settings) -> str:
    """Return the URL of the settings' storage: the file in their folder, where they name none."""
    if settings.storage is not None:
        return settings.storage
    url = sqlalchemy.URL.create("sqlite", database=str(Path(settings.out, "study.sqlite3").resolve()))
    return url.render_as_string(hide_password=False)


def connected(url: str) -> BaseStorage:
    """Return the storage of that URL, with new tables where it is new.

    Raises:
        InputError: it cannot be used.
        MissingExtra: the driver of that database is not installed.
    """
    if url.startswith("grpc:"):
        return _proxy(url)
    address = with_driver(url)
    is_sqlite = address.startswith("sqlite")
    # pool_pre_ping: a connection that was lost while a run was trained is made anew.
    arguments: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = RDBStorage(address, arguments, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=STALE_SECONDS)
        except (ImportError, ValueError, RuntimeError) as error:
            if is_race(error):
                raise
            raise InputError(f"the storage {without_password(url)} cannot be used: {reason(error)}") from error
    if is_sqlite:
        _lock_before_reading(storage.engine)
    else:
        _in_utc(storage.engine)
    return storage


def with_driver(url: str) -> str:
    """Return a URL of PostgreSQL with the driver that is installed; any other one as it is.

    SQLAlchemy takes psycopg2 where none is named, whose successor is psycopg.

    Raises:
        MissingExtra: there is no driver of PostgreSQL.

    Example:
        >>> with_driver("sqlite:///study.sqlite3")
        'sqlite:///study.sqlite3'
    """
    scheme, colon, rest = url.partition(":")
    if scheme in ("postgresql", "postgres"):
        for package, name in _DRIVERS.items():
            if importlib.util.find_spec(package) is not None:
                return f"postgresql+{name}{colon}{rest}"
    elif scheme != "postgresql+psycopg" or importlib.util.find_spec("psycopg") is not None:
        return url
    raise MissingExtra(f"--storage {scheme}", "postgres", "psycopg")


def host_and_port(url: str) -> tuple[str, int]:
    """Return the host and port at which a gRPC proxy listens.

    Raises:
        InputError: the URL is not grpc://HOST:PORT.

    Example:
        >>> host_and_port("grpc://login:13000")
        ('login', 13000)
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "grpc" and parts.hostname and parts.port and url.count("/") == 2 and parts.username is None:
            return parts.hostname, parts.port
    except ValueError:  # a port that is no number
        pass
    raise InputError(f"a gRPC proxy is named by grpc://HOST:PORT, as in grpc://login:13000; received {url!r}")


def _need_grpc(what: str) -> None:
    for module, package in (("grpc", "grpcio"), ("google.protobuf", "protobuf")):
        try:
            import_module(module)
        except ImportError as error:
            raise MissingExtra(what, "grpc", package) from error


def _proxy(url: str) -> BaseStorage:
    host, port = host_and_port(url)
    _need_grpc("--storage grpc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        proxy.wait_server_ready(timeout=PROXY_SECONDS)
    except ConnectionError as error:
        raise InputError(
            f"nothing answers at {url}; start the proxy by evennorm compare --serve {url} --storage URL, "
            "or correct --storage, and repeat the command"
        ) from error
    return proxy


def serve(address: str, url: str, threads: int = 20, ready: Callable[[], None] = lambda: None) -> None:
    """Pass what gRPC clients ask on to a storage, until the process is ended.

    Args:
        address: grpc://HOST:PORT to listen at.
        url: of the storage.
        threads: how many clients are answered at the same time.
        ready: called before it listens.

    Raises:
        InputError: the storage cannot be used, or the address is taken.
    """
    host, port = host_and_port(address)
    _need_grpc("--serve")
    if url.startswith("grpc:"):
        raise InputError(f"--serve needs the database itself; received --storage {url}, which is a proxy too")
    storage = optuna.storages.get_storage(connected(url))
    ready()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            optuna.storages.run_grpc_proxy_server(storage, host=host, port=port, thread_pool=ThreadPoolExecutor(threads))
        except RuntimeError as error:
            raise InputError(f"--serve {address}: {error}; choose a free port of this machine") from error


_UTC = {"postgresql": "SET TIME ZONE 'UTC'", "mysql": "SET time_zone = '+00:00'", "mariadb": "SET time_zone = '+00:00'"}


def _in_utc(engine: sqlalchemy.Engine) -> None:
    """Make all processes read the clock of the database in one time zone: Optuna compares heartbeats without time zones."""
    statement = _UTC.get(engine.dialect.name)
    if statement is None:
        return

    @sqlalchemy.event.listens_for(engine, "connect")
    def _set(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    engine.dispose()  # connections from before the change


def _lock_before_reading(engine: sqlalchemy.Engine) -> None:
    """Make "read the state of a trial, then change it" one step on SQLite too.

    Optuna asks for that by SELECT ... FOR UPDATE, which SQLite does not know: two processes were handed the same trial
    (optuna#4621). The way is that of SQLAlchemy's page on SQLite, "Serializable isolation / Savepoints / Transactional DDL".
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before the change


@contextmanager
def storage_errors(place: str, was_there: Callable[[], bool]) -> Iterator[None]:
    """Replace the traces of a database, and what Optuna makes of them, by one line.

    Args:
        place: the storage, as it may be shown.
        was_there: whether it has answered before.
    """
    try:
        yield
    except EvennormError:
        raise
    except Exception as error:
        if not is_of_storage(error):
            raise
        raise InputError(f"the study in {place} cannot be used: {reason(error, was_there())}") from error


def reason(error: Exception, was_there: bool = False) -> str:
    """Return the cause in one line, and what to do."""
    *_, cause = chain(error)
    cause = getattr(cause, "orig", None) or cause  # what the driver said
    if callable(details := getattr(cause, "details", None)):  # an error of gRPC
        cause = details()
    text = " ".join(str(cause).split()) or type(cause).__name__
    if is_lost(error) and was_there:
        return (
            f"{text}; it did not answer for {PATIENCE_SECONDS // 60} minutes; once it runs again, repeat the command, which "
            "goes on where it stopped"
        )
    if is_lost(error):
        return f"{text}; start that database, or correct --storage, and repeat the command"
    if "full" in text or "disk I/O" in text:
        return f"{text}; make room and repeat the command, which goes on where it stopped"
    if "locked" in text:
        return f"{text} for {LOCK_SECONDS} seconds by another process; end that one, or wait, and repeat the command"
    if "not a database" in text or "malformed" in text:
        return f"{text}; it is damaged or something else; move it away or choose another --out"
    if isinstance(error, ImportError):
        return f"{text}; install the driver of that database"
    if isinstance(error, sqlalchemy.exc.ArgumentError | sqlalchemy.exc.NoSuchModuleError):
        return f"{text}; a storage is a URL as in sqlite:///file.sqlite3 or postgresql://user@host/database"
    return f"{text}; choose another --out or --storage"
