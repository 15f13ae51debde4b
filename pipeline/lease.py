"""Who runs a run now: the lease that keeps two launches of one name apart.

Object stores have no lock that all of them honour: conditional writes are refused or ignored
by several. So each launch writes a claim of its own, RUN/leases/OWNER.json, and then looks for
others. Of two launches at the same moment at least one sees the other, and whoever sees a
living claim beside its own withdraws: both may, but never do both go on. Rejected: one shared
file that is written and read back, where the slower writer overtakes the reader.

A claim that nobody renews expires. One whose process is gone from this very machine counts for
nothing at once, so that a killed run can be started again immediately. Of one of another machine,
whose process may be alive or may have died with it a moment ago, a new launch waits to see:
renewed, it turns the launch away within seconds; not renewed, it expires. So is one that cannot be
read: whoever lives behind it writes it anew.
"""

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import storage
from pipeline.errors import InputError

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
LOOK_SECONDS = 1.0

logger = logging.getLogger(__name__)


class LeaseError(InputError):
    """Somebody else runs this run."""


@dataclass(frozen=True)
class _Claim:
    owner: str
    host: str
    boot: str
    pid: int
    started: str
    """When the process was started, by its machine's clock; the number alone is used again."""
    renewed: float
    """Seconds since the epoch, by the owner's clock."""

    @property
    def is_of_this_machine(self) -> bool:
        return self.host == socket.gethostname() and self.boot == _boot_id() != ""

    def is_alive(self) -> bool:
        if self.is_of_this_machine:
            return _started(self.pid) == self.started != ""
        return time.time() - self.renewed < LEASE_SECONDS

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


@dataclass(frozen=True)
class _DamagedClaim:
    """A claim that cannot be read: somebody's, or nobody's."""

    owner: str
    url: str

    is_of_this_machine = False

    def is_alive(self) -> bool:
        return True

    def __str__(self) -> str:
        return (
            f"somebody whose claim {storage.shown(self.url)} cannot be read (delete that file if nobody does)"
        )


def holder(url: str) -> str | None:
    """`host, process N` of whoever runs the run in the folder `url` now; None if nobody does."""
    return next((str(claim) for claim in _claims(url) if claim.is_alive()), None)


@contextmanager
def held(url: str, say: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Hold the run's lease; raises LeaseError if somebody else does.

    Whether a claim of another machine is that of a living process is waited for, for at most
    LEASE_SECONDS, with a line to `say`.
    """
    _await_the_dead(url, say)
    _refuse_another(url, "")
    for claim in _claims(url):
        if not claim.is_alive():
            storage.delete(_claim_url(url, claim.owner))
    owner = uuid.uuid4().hex
    _write(url, owner)
    done = threading.Event()
    renewal = threading.Thread(target=_renew, args=(url, owner, done), name="lease", daemon=True)
    try:
        _refuse_another(url, owner)
        renewal.start()
        yield
    finally:
        done.set()
        if renewal.ident is not None:
            renewal.join()
        try:
            storage.delete(_claim_url(url, owner))
        except storage.StoreError as error:
            # What was done is done; a claim that nobody renews expires.
            logger.warning("the lease of %s could not be given back: %s", url, error)


def _await_the_dead(url: str, say: Callable[[str], None]) -> None:
    """Wait until the claims of other machines are expired, or one of them was renewed."""

    def doubtful() -> dict[str, _Claim | _DamagedClaim]:
        return {c.owner: c for c in _claims(url) if c.is_alive() and not c.is_of_this_machine}

    first = doubtful()
    # By this machine's clock alone: that of another may be ahead.
    limit = time.monotonic() + LEASE_SECONDS
    for claim in first.values():
        say(f"{url} was being run by {claim} a moment ago; waiting to see whether it still is ...")
    while time.monotonic() < limit:
        found = doubtful()
        if all(found.get(owner) != claim for owner, claim in first.items()):
            return  # Renewed, expired or given back: what is alive now is alive.
        time.sleep(LOOK_SECONDS)
    for owner in first:
        if doubtful().get(owner) == first[owner]:
            storage.delete(_claim_url(url, owner))


def _refuse_another(url: str, owner: str) -> None:
    for claim in _claims(url):
        if claim.owner != owner and claim.is_alive():
            raise LeaseError(
                f"{url} is already being run by {claim}. Wait for it, stop it with `nvae runs stop`, "
                "or give the new run another --name."
            )


def _renew(url: str, owner: str, done: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        try:
            _write(url, owner)
        except storage.StoreError as error:
            # An outage of the store must not end the training; the next renewal may succeed.
            logger.warning("the lease of %s could not be renewed: %s", url, error)


def _claim_url(url: str, owner: str) -> str:
    return storage.join(url, "leases", f"{owner}.json")


def _claims(url: str) -> list[_Claim | _DamagedClaim]:
    """Every claim there is, of the living and the dead."""
    folder = storage.join(url, "leases")
    claims: list[_Claim | _DamagedClaim] = []
    for name in storage.list_dir(folder):
        claim_url = storage.join(folder, name)
        try:
            claims.append(_read(claim_url, name.removesuffix(".json")))
        except storage.MissingError:
            continue  # Given back since it was listed.
    return claims


def _read(claim_url: str, owner: str) -> _Claim | _DamagedClaim:
    content = storage.read_bytes(claim_url)
    try:
        claim = _Claim(**json.loads(content))
        # By its file's name it is found again; of a time that is none it would be alive for ever.
        intact = claim.owner == owner and math.isfinite(claim.renewed)
    except (ValueError, TypeError):
        intact = False
    return claim if intact else _DamagedClaim(owner, claim_url)


def _write(url: str, owner: str) -> None:
    pid = os.getpid()
    claim = _Claim(owner, socket.gethostname(), _boot_id(), pid, _started(pid), time.time())
    storage.write_bytes(_claim_url(url, owner), json.dumps(asdict(claim)).encode())


def _boot_id() -> str:
    """Identifies this machine since its last start; empty where the system does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> str:
    """Start of a process of this machine, in ticks since its boot; empty if there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The second field, the program's name in brackets, may itself hold blanks and brackets.
    return status.rpartition(")")[2].split()[19]
