"""A stored shard from front to back, in memory that does not depend on its size.

It is fetched in pieces, each retried by the store as any other request; every byte goes into
the SHA-256 of the whole.
"""

import hashlib

from pipeline import storage

PIECE_BYTES = 2**22


class ShardStream:
    """The bytes of one file in order, and their SHA-256."""

    def __init__(self, url: str) -> None:
        """Raises MissingError or StoreError if there is no such file."""
        self.bytes = storage.size(url)
        self._url = url
        self.fetched = 0
        """How many of them have been asked for so far."""
        self._piece = memoryview(b"")
        self._digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end."""
        if count <= len(self._piece):
            return self._from_piece(count)
        parts = [self._from_piece(len(self._piece))]
        missing = count - len(parts[0])
        while missing and self.fetched < self.bytes:
            self._fetch()
            parts.append(self._from_piece(missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal; what was not read yet is fetched for it."""
        while self.fetched < self.bytes:
            self._fetch()
        self._piece = memoryview(b"")
        return self._digest.hexdigest()

    def _from_piece(self, count: int) -> bytes:
        data = bytes(self._piece[:count])
        self._piece = self._piece[count:]
        return data

    def _fetch(self) -> None:
        end = min(self.fetched + PIECE_BYTES, self.bytes)
        data = storage.read_bytes(self._url, self.fetched, end)
        self._digest.update(data)
        self.fetched, self._piece = end, memoryview(data)
