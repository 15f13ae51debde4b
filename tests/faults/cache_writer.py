"""Fills a cache with pieces for ever, to be killed in the midst of it.

python -m tests.faults.cache_writer FOLDER
"""

import hashlib
import sys
from pathlib import Path

from pipeline.data.cache import PieceCache

if __name__ == "__main__":
    cache, number = PieceCache(Path(sys.argv[1]), 2**26), 0
    print("x", end="", flush=True)
    while True:
        data = bytes([number % 256]) * 300_000
        cache.put(f"foreign_{hashlib.sha256(data).hexdigest()}_{number}", data)
        number += 1
