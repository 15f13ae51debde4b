"""A real MLflow server for tests, on SQLite, that can be killed, started again and denied disk space."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient


@dataclass
class MlflowServer:
    """One server on one port and one database, whoever serves it at the moment."""

    folder: Path
    """Database, artifacts and log."""
    port: int
    backend: str = ""
    """Another database than SQLite in the folder."""
    workers: int = 1
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> str:
        """The same runs without the server."""
        return self.backend or f"sqlite:///{self.folder}/mlflow.db"

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", str(self.workers), "--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | quiet, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the server and its children: nobody says goodbye."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def allow_files_of(self, bytes_: int) -> None:
        """Fills its disk: no file may be written beyond that many bytes. -1 makes room again."""
        assert self._process is not None
        for process in self._processes():
            resource.prlimit(process, resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))

    def _processes(self) -> list[int]:
        """The server's processes: all of its session."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(status.read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue  # It has ended meanwhile.
            if self._process is not None and session == self._process.pid:
                found.append(int(status.parent.name))
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def serving(folder: Path, backend: str = "", workers: int = 1) -> Iterator[MlflowServer]:
    """A running server with an empty database: SQLite in the folder, or `backend`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(folder, free_port(), backend, workers)
    # Tables that are there already save the server seconds.
    MlflowClient(server.database).search_experiments()
    server.start()
    try:
        yield server
    finally:
        server.kill()


def history(tracking_uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every point that MLflow has of a run, doubled ones twice: metric -> (images seen, value)."""
    client = MlflowClient(tracking_uri)
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in client.get_run(run_id).data.metrics
    }
