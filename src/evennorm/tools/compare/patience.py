"""Tell what went wrong in a database, and retry where waiting may help."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, StorageInternalError

PATIENCE_SECONDS = 180
"""How long to wait for a database that has stopped answering."""
RACE_SECONDS = 60
"""How long two processes that make one study at the same moment retry."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 15.0
"""Seconds between two tries: each is twice the one before."""

STORAGE_ERRORS = (StorageInternalError, DuplicatedStudyError, sqlalchemy.exc.SQLAlchemyError)
T = TypeVar("T")


def patiently(
    call: Callable[[], T],
    helps: Callable[[BaseException], bool],
    seconds: float,
    notice: Callable[[BaseException], None] = lambda error: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Return the result of a call, retried for that many seconds where it fails by an error that waiting `helps`.

    Example:
        >>> tries = iter([OSError(), OSError(), "there"])
        >>> def call():
        ...     if isinstance(found := next(tries), OSError):
        ...         raise found
        ...     return found
        >>> patiently(call, lambda error: True, 60, sleep=lambda seconds: None)
        'there'
    """
    end, wait = clock() + seconds, FIRST_WAIT
    while True:
        try:
            return call()
        except Exception as error:
            if not helps(error) or clock() >= end:
                raise
            notice(error)
        sleep(min(wait, max(end - clock(), 0)))
        wait = min(2 * wait, LONGEST_WAIT)


def is_of_storage(error: BaseException) -> bool:
    """Return whether a database failed, even where Optuna raises something else while it handles that (AssertionError)."""
    return any(isinstance(each, STORAGE_ERRORS) or _code(each) for each in chain(error)) or _is_raised_by_optuna(error)


def is_lost(error: BaseException) -> bool:
    """Return whether the connection to a database server was lost, or cannot be made."""
    return any(_is_lost_connection(each) or _is_lost_proxy(each) for each in chain(error))


def is_race(error: BaseException) -> bool:
    """Return whether another process was making the same tables or the same study."""
    return any(
        isinstance(each, sqlalchemy.exc.IntegrityError | DuplicatedStudyError)
        or (
            isinstance(each, sqlalchemy.exc.DBAPIError)
            and any(words in str(each.orig) for words in ("already exists", "is locked", "schema has changed"))
        )
        for each in chain(error)
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on to the first cause.

    Example:
        >>> try:
        ...     try:
        ...         {}["key"]
        ...     finally:
        ...         assert False
        ... except AssertionError as error:
        ...     print([type(each).__name__ for each in chain(error)])
        ['AssertionError', 'KeyError']
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _is_lost_connection(error: BaseException) -> bool:
    if not isinstance(error, sqlalchemy.exc.DBAPIError) or _is_of_sqlite(error):
        return False
    kinds = sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError
    return error.connection_invalidated or isinstance(error, kinds)


def _is_of_sqlite(error: sqlalchemy.exc.DBAPIError) -> bool:
    return type(error.orig).__module__ == "sqlite3"


def _code(error: BaseException) -> str:
    """Return the status of a call to a gRPC proxy that failed, such as UNAVAILABLE; empty for any other error."""
    return str(error.code().name) if type(error).__module__.startswith("grpc") and hasattr(error, "code") else ""


def _is_lost_proxy(error: BaseException) -> bool:
    """Return whether a proxy is away, or the database that it passes to, which only its text tells."""
    code = _code(error)
    if code == "UNKNOWN":
        return any(words in str(error) for words in ("OperationalError", "InterfaceError", "raised during the commit"))
    return code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def _is_raised_by_optuna(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(f"{optuna.__name__}.")
