"""A web server for a data set's folder that notes what is asked, and may spoil or withhold answers."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

Change = Callable[[str, int, bytearray], None]


@dataclass
class Served:
    """What is served, and what was asked so far."""

    url: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    """File name and bytes [begin, end) of each answer, in order."""

    def of_tars(self) -> list[tuple[str, int, int]]:
        return [request for request in self.asked if request[0].endswith(".tar")]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, served: Served, change: Change, *arguments) -> None:
        self._folder, self._served, self._change = folder, served, change
        super().__init__(*arguments)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        try:
            whole = (self._folder / name).read_bytes()
        except OSError:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        begin, end = 0, len(whole)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, end) if last else end
        if begin >= end:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(whole)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._served.asked.append((name, begin, end))
        data = bytearray(whole[begin:end])
        self._change(name, begin, data)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(whole)}")
        self.end_headers()
        self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str((self._folder / self.path.lstrip("/")).stat().st_size))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # All threads of a reader connect at once; who finds no place tries again after a second.
    request_queue_size = 64


@contextmanager
def serving(folder: str | Path, change: Change = lambda *_: None) -> Iterator[Served]:
    """Serve `folder`; `change` may alter the bytes of an answer from a place on, or wait."""
    served = Served()
    handler = functools.partial(_Handler, Path(folder), served, change)
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
