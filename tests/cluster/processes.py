"""Real processes for tests to kill: the command, the workers that Ray started for it, whole nodes.

Every wait has a limit and says what it waited for. Worker processes are found by their name
among the descendants of the process that started their Ray, so that other clusters of the
machine are left alone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray.cluster_utils import Cluster

from tests.tiny_run import NVAE

Found = TypeVar("Found")

WAIT_SECONDS = 240.0
"""Longest wait for what takes seconds on a quiet machine."""
NODE_MEMORY_BYTES = 80 * 2**20
"""Object store of a node: training needs next to none."""
_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


def wait_for(
    what: str, look: Callable[[], Found | None], seconds: float = WAIT_SECONDS, every: float = 0.1
) -> Found:
    """What `look` returns once that is true. Raises TimeoutError saying what never came."""
    limit = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > limit:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
    return found


class Command:
    """`nvae ...` as a process group of its own, whose lines are collected as they come."""

    def __init__(self, *arguments: str, program: tuple[str, ...] = (NVAE,), **environment: str) -> None:
        self.lines: list[tuple[float, str]] = []
        """(time.monotonic(), line) of all it said so far, standard error and output together."""
        self._process = subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def said(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def line_with(self, text: str, after: float = 0.0, seconds: float = WAIT_SECONDS) -> float:
        """When it said the first line that holds `text`, after the moment `after`; waits for it."""

        def look() -> float | None:
            told = next((at for at, line in list(self.lines) if text in line and at > after), None)
            if told is None and self._process.poll() is not None and not self._reader.is_alive():
                raise AssertionError(f"ended before saying {text!r}:\n{self.said}")
            return told

        try:
            return wait_for(f"a line with {text!r}", look, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it said:\n{self.said}") from None

    def workers(self, count: int = 1) -> list[int]:
        """Process numbers of the Ray Train workers of the Ray that this command started."""
        return wait_for(f"{count} workers", lambda: at_least(count, train_workers(self.pid)))

    def processes(self, name: str) -> list[int]:
        """Process numbers of those whose command line holds `name`, among all that it started."""
        return [pid for pid in family(self.pid) if name in _title(pid)]

    def send(self, number: signal.Signals, to_group: bool = False) -> None:
        """A signal to the command alone, or to every process that belongs to it, as a terminal does."""
        (os.killpg if to_group else os.kill)(self.pid, number)

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """The exit code of the command; all its lines are there then."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not ended within {seconds:.0f} s; it said:\n{self.said}") from None
        self._reader.join(10)
        return code

    def end(self) -> None:
        """Leave nothing of it behind, whatever it is doing."""
        kill(*family(self.pid))
        self._process.wait(WAIT_SECONDS)


@contextmanager
def command(*arguments: str, program: tuple[str, ...] = (NVAE,), **environment: str) -> Iterator[Command]:
    """`nvae ARGUMENTS`, ended when the test is over."""
    started = Command(*arguments, program=program, **environment)
    try:
        yield started
    finally:
        started.end()


def family(pid: int) -> list[int]:
    """A process and all its descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for number, parent in _parents():
        children.setdefault(parent, []).append(number)
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all processes."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name before it, in brackets, may itself hold blanks and brackets.
            parent = status.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # Ended since it was listed.
        yield int(status.parent.name), int(parent)


def train_workers(ancestor: int) -> list[int]:
    """The Ray Train workers among the descendants of a process."""
    return [pid for pid in family(ancestor) if "RayTrainWorker" in _title(pid)]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def at_least(count: int, found: list[int]) -> list[int] | None:
    return found if len(found) >= count else None


def kill(*pids: int) -> None:
    """SIGKILL, to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Nodes:
    """A Ray cluster of several raylets on this machine: a head without CPUs, and nodes.

    Its address is for RAY_ADDRESS. A node that is killed is noticed by the head after 4 s.
    """

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args=_node(0, _system_config=_HEALTH_CHECKS),
        )
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, cpus: int = 1) -> int:
        """Starts a node; returns the process number of its raylet."""
        node = self._cluster.add_node(**_node(cpus))
        self._nodes.append(node)
        return self.raylet(len(self._nodes) - 1)

    def __len__(self) -> int:
        """How many there have been, the killed ones too."""
        return len(self._nodes)

    def raylet(self, number: int) -> int:
        """Process number of the raylet of the node that was the `number`th to be added, from 0."""
        processes = self._nodes[number].all_processes["raylet"]
        return int(processes[0].process.pid)

    def workers(self, number: int) -> list[int]:
        """Ray Train workers on that node."""
        return train_workers(self.raylet(number))

    def kill(self, number: int) -> None:
        """SIGKILL to the raylet alone: its workers notice by themselves."""
        kill(self.raylet(number))

    def drain(self, number: int, seconds: int = 60) -> None:
        """Announce that a node is going to be taken away, as a provider of machines does."""
        options = ["--node-id", self._nodes[number].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        options += ["--reason-message", "reclaimed", "--deadline-remaining-seconds", str(seconds)]
        ray = str(Path(sys.executable).with_name("ray"))
        subprocess.run([ray, "drain-node", "--address", self.address, *options], check=True)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _node(cpus: int, **more: Any) -> dict[str, Any]:
    return {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": NODE_MEMORY_BYTES,
        **more,
    }


@contextmanager
def nodes(*cpus: int) -> Iterator[Nodes]:
    """A cluster with nodes of so many CPUs each."""
    cluster = Nodes()
    try:
        for count in cpus:
            cluster.add(count)
        yield cluster
    finally:
        cluster.shutdown()
