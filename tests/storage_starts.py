"""A program that uses the store from threads while it starts processes that use it, too.

    python -m tests.storage_starts URL HOW COUNT

HOW is a start method of multiprocessing, or `os.fork` for a child that leaves by the front
door, through every exit handler that it inherited. Ends with 0 if all could read and write.
"""

import multiprocessing
import os
import sys
import threading

from pipeline import storage

CONTENT = b"before the start"
CHILD_SECONDS = 60


def use(url: str) -> None:
    """What a child does."""
    assert storage.read_bytes(url) == CONTENT
    storage.write_bytes(f"{url}-{os.getpid()}", CONTENT)
    assert storage.size(f"{url}-{os.getpid()}") == len(CONTENT)


def start(url: str, how: str) -> int:
    """Start one child; its exit code."""
    if how == "os.fork":
        child = os.fork()
        if not child:
            use(url)
            sys.exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    process = multiprocessing.get_context(how).Process(target=use, args=[url])
    process.start()
    process.join(CHILD_SECONDS)
    if process.exitcode is None:
        process.kill()
        return -1
    return process.exitcode


def main(url: str, how: str, count: str) -> None:
    storage.write_bytes(url, CONTENT)
    done = threading.Event()

    def keep_reading() -> None:
        while not done.is_set():
            assert storage.read_bytes(url) == CONTENT

    # A fork in the middle of a request is the worst one.
    readers = [threading.Thread(target=keep_reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        codes = [start(url, how) for _ in range(int(count))]
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert codes == [0] * int(count), codes
    assert storage.read_bytes(url) == CONTENT


if __name__ == "__main__":
    main(*sys.argv[1:])
