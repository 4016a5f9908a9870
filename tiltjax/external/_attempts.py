"""Calls of a Python function that may fail or hang: timeouts and retries."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class TimedOut(Exception):
    """A call did not end within its time limit."""


def retry(call: Callable[[], T], retries: int, backoff: float) -> T:
    """The result of `call()`. After an exception the call is repeated up to `retries` times,
    `backoff`, `2 * backoff`, ... seconds later.

    **Raises:** the exception of the last call.
    """
    for attempt in range(retries):
        try:
            return call()
        except Exception:
            time.sleep(backoff * 2**attempt)
    return call()


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """The result of `call()`, which runs in its own thread if there is a time limit.

    **Raises:** `TimedOut`. The thread then goes on, because it cannot be stopped, but it does not
    keep the interpreter alive.
    """
    if seconds is None:
        return call()
    outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcomes.put((call(), None))
        except BaseException as error:
            outcomes.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimedOut from None
    if error is not None:
        raise error
    return result
