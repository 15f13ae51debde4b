"""An HTTP proxy that harms what passes through it, by rule: the network and the store on a bad day.

    with FaultProxy("http://127.0.0.1:8080", seed=1) as proxy:
        proxy.add(Fail(503, "SlowDown"), probability=0.1)
        proxy.add(Reset(after=5_000_000), where=lambda request: request.method == "GET")
        ...  # a client that uses proxy.url in place of the server's
    proxy.injected  # Counter({"Fail 503": 12, "Reset": 3})

It forwards requests as they are, their Host too, so that signatures made for the proxy's
address stay valid for a server that verifies what it receives (Swift does). For each request
the first rule that applies is chosen when it arrives; the draw depends on the seed and the
number of the request alone. What is counted as injected did bite. With `tls` it speaks https to
its clients.
"""

import fcntl
import random
import re
import socket
import socketserver
import ssl
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.http_faults import (
    Cut,
    Fail,
    Fault,
    Flip,
    Request,
    Reset,
    Response,
    Rule,
    Shifted,
    Stall,
    Trickle,
    Whole,
)

_PIECE = 64 << 10


class FaultProxy:
    """A proxy in threads of this process, in front of one server."""

    def __init__(self, upstream: str, seed: int = 0, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname and parts.port, f"{upstream} names no host and port"
        self.upstream = (parts.hostname, parts.port)
        self.rules: list[Rule] = []
        self.injected: Counter[str] = Counter()
        """How often each kind of fault bit."""
        self.requests: list[Request] = []
        self.sent_bytes = 0
        """Bytes of bodies that were handed to clients' connections."""
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._seed = seed
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.proxy, self._server.tls = self, tls
        # By name with TLS: certificates are made for names.
        host = "localhost" if tls else "127.0.0.1"
        self.url = f"{'https' if tls else 'http'}://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        fault: Fault,
        where: Callable[[Request], bool] = lambda request: True,
        probability: float = 1.0,
        every: int = 1,
        times: int | None = None,
    ) -> Rule:
        """Let a fault strike from now on; returns the rule, whose `struck` counts the strikes.

        One that did not bite is among them, but not among `injected`.
        """
        rule = Rule(fault, where, probability, every, times)
        with self._lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Let everything pass unharmed from now on."""
        with self._lock:
            self.rules.clear()

    def reset(self) -> None:
        """No rules, and nothing counted."""
        with self._lock:
            self.rules.clear()
            self.requests.clear()
            self.injected.clear()
            self.sent_bytes = 0

    def fault_for(self, method: str, target: str, headers: dict[str, str]) -> tuple[Request, Fault | None]:
        """Number a request and choose what befalls it."""
        parts = urlsplit(target)
        with self._lock:
            request = Request(len(self.requests), method, unquote(parts.path), parts.query, headers)
            self.requests.append(request)
            for place, rule in enumerate(self.rules):
                draw = random.Random(f"{self._seed} {request.number} {place}").random()
                if rule.strikes(request, draw):
                    return request, rule.fault
        return request, None

    def bites(self, fault: Fault) -> None:
        """Before its client can know."""
        with self._lock:
            self.injected[fault.name] += 1

    def sent(self, count: int) -> None:
        with self._lock:
            self.sent_bytes += count


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy
    tls: ssl.SSLContext | None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is daily bread here."""


class _GoneError(OSError):
    """The peer closed its connection."""


class _Connection(socketserver.BaseRequestHandler):
    """One client's connection, and the one to the server that belongs to it."""

    server: _Server

    def handle(self) -> None:
        client: socket.socket = self.request
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls is not None:
            client = self.server.tls.wrap_socket(client, server_side=True)
        self.client, self.proxy = client, self.server.proxy
        try:
            with socket.create_connection(self.proxy.upstream) as upstream:
                upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with client, client.makefile("rb") as asking, upstream.makefile("rb") as answering:
                    while self._exchange(asking, upstream, answering):
                        pass
        except OSError:
            return  # One of the two has gone, or was made to go.

    def _exchange(self, asking, upstream: socket.socket, answering) -> bool:  # type: ignore[no-untyped-def]
        """One request and its answer; whether the connection can serve another."""
        line, headers, head = _read_head(asking)
        method, target, _ = line.split(" ", 2)
        request, fault = self.proxy.fault_for(method, target, headers)
        if "100-continue" in headers.get("expect", ""):
            self.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?im)^expect:.*\r\n", b"", head)
        if isinstance(fault, Reset) and fault.after is None:
            self.proxy.bites(fault)
            return self._reset()
        if isinstance(fault, Stall) and fault.after is None:
            self.proxy.bites(fault)
            self.proxy.closing.wait(fault.seconds)
            fault = None
        body = _read_body(asking, headers)
        if isinstance(fault, Fail):
            self.proxy.bites(fault)
            return self._send(fault.response(request), None)
        upstream.sendall(head + body)
        response = _read_response(method, answering)
        if fault is None or not fault.bites(response):
            return self._send(response, None)
        if isinstance(fault, Shifted | Whole):
            right, response = response, fault.upon(response, self._whole(request))
            if response == right:
                return self._send(right, None)
        self.proxy.bites(fault)
        return self._send(response, fault)

    def _send(self, response: Response, fault: Fault | None) -> bool:
        body = response.body
        if isinstance(fault, Flip):
            body = body[: fault.at] + bytes([body[fault.at] ^ fault.mask]) + body[fault.at + 1 :]
        if isinstance(fault, Cut) and fault.lying:
            response.headers["content-length"] = str(fault.after)
        head = [f"HTTP/1.1 {response.status} {response.reason}"]
        head += [f"{name}: {value}" for name, value in response.headers.items()]
        self.client.sendall("\r\n".join([*head, "", ""]).encode("latin-1"))
        after = (
            fault.after if isinstance(fault, Reset | Stall | Cut) and fault.after is not None else len(body)
        )
        if isinstance(fault, Trickle):
            self._trickle(body, fault)
        else:
            self._pass(body[:after])
        if isinstance(fault, Reset):
            return self._reset()
        if isinstance(fault, Stall):
            self.proxy.closing.wait(fault.seconds)
            self._pass(body[after:])
        if isinstance(fault, Cut):
            return False
        return response.headers.get("connection", "").lower() != "close"

    def _pass(self, body: bytes) -> None:
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            self.client.sendall(piece)
            self.proxy.sent(len(piece))

    def _trickle(self, body: bytes, fault: Trickle) -> None:
        for start in range(0, len(body), fault.bytes):
            self._pass(body[start : start + fault.bytes])
            if self.proxy.closing.wait(fault.seconds):
                return

    def _reset(self) -> bool:
        # Closing with a linger time of zero sends RST in place of FIN and drops what is not yet sent:
        # a client shall have what came before.
        deadline = time.monotonic() + 1
        while _unsent(self.client) and time.monotonic() < deadline:
            time.sleep(0.002)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _whole(self, request: Request) -> bytes:
        """All of the object of which a range is asked for, by a request with a signature of our own."""
        import boto3

        bucket, _, key = request.path.lstrip("/").partition("/")
        host, port = self.proxy.upstream
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        whole: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return whole


def _unsent(connection: socket.socket) -> int:
    """Bytes that the other side has not acknowledged, where the system can tell."""
    if not sys.platform.startswith("linux"):
        return 0
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0])


def _read_head(stream) -> tuple[str, dict[str, str], bytes]:  # type: ignore[no-untyped-def]
    """The first line, the headers and all of it as it came."""
    lines = [stream.readline()]
    while lines[-1] not in (b"\r\n", b""):
        lines.append(stream.readline())
    if not lines[-1]:
        raise _GoneError
    pairs = (line.decode("latin-1").partition(":") for line in lines[1:-1])
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return lines[0].decode("latin-1").strip(), headers, b"".join(lines)


def _read_body(stream, headers: dict[str, str]) -> bytes:  # type: ignore[no-untyped-def]
    """The body as it came, chunks included."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        body: bytes = stream.read(int(headers.get("content-length", 0)))
        return body
    raw = b""
    while True:
        size = stream.readline()
        raw += size + stream.read(int(size.split(b";")[0], 16) + 2)
        if int(size.split(b";")[0], 16) == 0:
            return raw


def _read_response(method: str, stream) -> Response:  # type: ignore[no-untyped-def]
    line, headers, _ = _read_head(stream)
    _, status, reason = (line + " ").split(" ", 2)
    empty = method == "HEAD" or status in ("204", "304")
    return Response(int(status), reason.strip(), headers, b"" if empty else _read_body(stream, headers))
