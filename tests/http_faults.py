"""What a network or a store does wrong with one request, and when: faults, and rules for them.

A fault *bites* where its client gets something else than without it, or later. Those before an
answer always do; those in a body only if it is long enough. tests/fault_proxy.py brings them about.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_CREDENTIAL = re.compile(r"Credential=([^/,\s]+)/")


@dataclass(frozen=True)
class Request:
    """What a rule may look at."""

    number: int
    """Counted from 0 over the life of the proxy."""
    method: str
    path: str
    """Decoded, without query."""
    query: str
    headers: dict[str, str]
    """By names in lower case."""

    @property
    def range(self) -> tuple[int, int | None] | None:
        """The range that is asked for as [start, end)."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return match and (int(match[1]), int(match[2]) + 1 if match[2] else None)

    @property
    def access_key(self) -> str | None:
        """Whose signature the request bears."""
        match = _CREDENTIAL.search(self.headers.get("authorization", ""))
        return match and match[1]


@dataclass
class Response:
    """The server's answer: head and body, as it came and as it is to be sent."""

    status: int
    reason: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Fail:
    """An error in place of the answer, in S3's form."""

    status: int
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"Fail {self.status}"

    def response(self, request: Request) -> Response:
        """What the client reads; to HEAD without the reason, as HTTP demands."""
        body = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>injected</Message></Error>"
        headers = {"content-type": "application/xml", "content-length": str(len(body)), **dict(self.headers)}
        return Response(self.status, "Injected", headers, b"" if request.method == "HEAD" else body.encode())


@dataclass(frozen=True)
class Reset:
    """A TCP reset: before the answer, or after that many bytes of its body."""

    after: int | None = None
    name: str = "Reset"

    def bites(self, response: Response) -> bool:
        return self.after is None or self.after < len(response.body)


@dataclass(frozen=True)
class Stall:
    """Silence with the connection open: before the answer, or after that many bytes of its body.

    Ends after `seconds`, with the proxy or with the client's patience, whichever is first.
    """

    seconds: float
    after: int | None = None
    name: str = "Stall"

    def bites(self, response: Response) -> bool:
        return self.after is None or self.after < len(response.body)


@dataclass(frozen=True)
class Cut:
    """A body that ends early with an orderly close; `lying`, its Content-Length says so, too."""

    after: int
    lying: bool = False
    name: str = "Cut"

    def bites(self, response: Response) -> bool:
        return self.after < len(response.body)


@dataclass(frozen=True)
class Trickle:
    """A body that comes a few bytes at a time."""

    bytes: int
    seconds: float
    name: str = "Trickle"

    def bites(self, response: Response) -> bool:
        return self.bytes < len(response.body)


@dataclass(frozen=True)
class Shifted:
    """The bytes of another range; honest ones say so in Content-Range, others claim to be the right ones."""

    by: int
    honest: bool = False
    name: str = "Shifted"

    def bites(self, response: Response) -> bool:
        return response.status == 206

    def upon(self, right: Response, whole: bytes) -> Response:
        """The other way where the file ends before; the right answer where it is too short for either."""
        last = len(whole) - len(right.body)
        begin = int(right.headers["content-range"].removeprefix("bytes ").partition("-")[0])
        start = next((at for at in (begin + self.by, begin - self.by) if 0 <= at <= last), begin)
        headers = dict(right.headers)
        if self.honest:
            headers["content-range"] = f"bytes {start}-{start + len(right.body) - 1}/{len(whole)}"
        return Response(206, right.reason, headers, whole[start : start + len(right.body)])


@dataclass(frozen=True)
class Whole:
    """The whole file with status 200 in place of the range that was asked for."""

    name: str = "Whole"

    def bites(self, response: Response) -> bool:
        return response.status == 206

    def upon(self, right: Response, whole: bytes) -> Response:
        headers = {name: value for name, value in right.headers.items() if name != "content-range"}
        return Response(200, "OK", {**headers, "content-length": str(len(whole))}, whole)


@dataclass(frozen=True)
class Flip:
    """Wrong bytes of the right number: `mask` upon the byte at this place of the body."""

    at: int
    mask: int = 1
    name: str = "Flip"

    def bites(self, response: Response) -> bool:
        return self.at < len(response.body)


Fault = Fail | Reset | Stall | Cut | Trickle | Shifted | Whole | Flip


@dataclass
class Rule:
    """When a fault strikes: all conditions must hold."""

    fault: Fault
    where: Callable[[Request], bool] = lambda request: True
    probability: float = 1.0
    every: int = 1
    """Only each n-th of the requests for which the rest holds, the first included."""
    times: int | None = None
    """At most so often."""
    met: int = field(default=0, init=False)
    struck: int = field(default=0, init=False)
    """Requests for which the fault was chosen; whether it bit as well, the proxy counts."""

    def strikes(self, request: Request, draw: float) -> bool:
        """Whether the fault is chosen for this request; counts."""
        if not self.where(request) or draw >= self.probability:
            return False
        self.met += 1
        if (self.met - 1) % self.every or (self.times is not None and self.struck >= self.times):
            return False
        self.struck += 1
        return True
