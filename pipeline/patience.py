"""Trying again: back-off with full jitter, a deadline, credentials looked up anew.

Every answer of a network is waited for with a limit, and what failed on the way is tried
again after a pause drawn at random below a bound that doubles. A store that has answered
before gets `storage.retry_seconds` to come back, counted from the last thing that went
well; one that never answered is probably misspelt, and the user learns that within seconds.
A definite answer (no such file, no permission) is final at once. What looks like a program's mistake
could be a client's in a race with a broken connection: it is tried again for seconds only, and
then raised as what it is. A store that falters is a warning, for each process at most one every
half minute; limits.statistics() counts the rest. Who no longer wants what threads of his still
try for ends their patience (`give_up_when`).
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline import buckets
from pipeline.limits import count, limits
from pipeline.storage_errors import (
    about_credentials,
    explain,
    is_final,
    is_mistake,
    retry_after,
)
from pipeline.urls import StoreError, is_local

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

FIRST_CONTACT_SECONDS = 4.0
"""How long a store that has never answered is tried."""
FIRST_PAUSE_SECONDS = 0.2
SECONDS_BETWEEN_LINES = 30.0
"""Between two warnings of a kind."""

# Stores that answered, and those that accepted our credentials.
_answered: set[tuple[object, ...]] = set()
_accepted: set[tuple[object, ...]] = set()


_thread = threading.local()


def give_up_when(unwanted: threading.Event) -> None:
    """From now on, this thread tries nothing again once `unwanted` is set, and sleeps no longer."""
    _thread.unwanted = unwanted


def _slept(seconds: float) -> bool:
    """Whether the sleep was a whole one, and nobody has lost interest."""
    unwanted: threading.Event | None = getattr(_thread, "unwanted", None)
    if unwanted is not None:
        return not unwanted.wait(seconds)
    time.sleep(seconds)
    return True


def expect(url: str) -> None:
    """The store of `url` is known to be there: if it does not answer, it is down and not misspelt."""
    _answered.add(buckets.environment(url))


class Line:
    """A warning that a process shows now and then, with how often there was reason for it."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._what, self._clock = what, clock
        self._untold, self._told_at = 0, -SECONDS_BETWEEN_LINES
        self._renew_lock()
        # Another thread may hold the lock at the moment of a fork; nobody in the child would release it.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def say(self, error: Exception, url: str) -> None:
        """Show it, unless that was done a moment ago."""
        with self._lock:
            self._untold += 1
            if self._clock() - self._told_at < SECONDS_BETWEEN_LINES:
                return
            times, self._untold, self._told_at = self._untold, 0, self._clock()
        logger.warning("%s (%d since the last such line). %s", self._what, times, explain(error, url))


_trying_again = Line("Trying again")
_renewing = Line("Looking credentials up anew")


class Patience:
    """The tries of one piece of work on one URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = buckets.environment(url)
        self._tries = 0
        self._since = time.monotonic()

    def answered(self) -> None:
        """The store gave what was asked for, or began to."""
        _answered.add(self._store)
        _accepted.add(self._store)

    def progressed(self) -> None:
        """Something went well: pauses begin short again and the deadline is moved."""
        self.answered()
        self._tries = 0
        self._since = time.monotonic()

    def bear(self, error: Exception) -> None:
        """Sleep until the next try. Raises the StoreError that explains `error` if there is to be none."""
        if isinstance(error, StoreError):
            raise error
        if is_local(self._url) or not self._is_worth_another_try(error):
            _answered.add(self._store)
            raise explain(error, self._url) from error
        bound = min(FIRST_PAUSE_SECONDS * 2**self._tries, limits().longest_pause_seconds)
        # Jitter keeps workers that failed together from coming back together.
        pause = max(random.uniform(0, bound), retry_after(error) or 0.0)
        known = self._store in _answered and not is_mistake(error)
        allowed = limits().retry_seconds if known else min(FIRST_CONTACT_SECONDS, limits().retry_seconds)
        if time.monotonic() - self._since + pause > allowed:
            if is_mistake(error):
                raise error
            raise explain(error, self._url) from error
        (_renewing if about_credentials(error) else _trying_again).say(error, self._url)
        if not _slept(pause):
            raise explain(error, self._url) from error
        self._tries += 1
        count(retries=1, paused_seconds=pause)

    def _is_worth_another_try(self, error: Exception) -> bool:
        if self._store in _accepted and about_credentials(error):
            buckets.renew(self._url)
            return True
        return not is_final(error)


def patiently(action: Callable[[], _Result], url: str) -> _Result:
    """`action()`, again after a pause while a network is at fault.

    Raises the StoreError that explains what is at fault when patience ends.
    """
    patience = Patience(url)
    while True:
        try:
            result = action()
        except Exception as error:
            patience.bear(error)
        else:
            patience.progressed()
            return result
