"""A filter of system calls for this process, for good: what is left is computing and open files.

Linux's seccomp, which needs no privilege and no library: a program of a few instructions that the
kernel runs before each call. It names what is allowed, so that a call that nobody thought of is
refused, and those of kernels to come. Allowed are memory, clocks, threads that are there, reading
and writing what is open already. Refused, with EPERM, is everything else: opening a file even
for reading, sockets, new processes and programs, signals to others, io_uring, memory that holds code.

Numbers are those of the kernel's interface, which never change.
"""

import ctypes
import platform
import struct
from collections.abc import Iterator

_NO_NEW_PRIVILEGES = 38
_SET_FILTER, _ALL_THREADS = 1, 1
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
"""What the filter answers; 1 is EPERM."""
_LOAD, _RETURN, _IF_EQUAL, _IF_ANY_BIT = 0x20, 0x06, 0x15, 0x45
"""Its instructions."""
_NUMBER, _ARCHITECTURE, _THIRD_ARGUMENT = 0, 4, 32
"""Where the kernel puts what is asked."""
_EXECUTABLE = 4

# fmt: off
_NUMBERS: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    # Architecture in the kernel's words; number of seccomp; what is allowed; what is allowed to get
    # memory unless that is to hold code (mmap, mprotect).
    "x86_64": (
        0xC000003E, 317,
        (
            0, 1, 17, 19, 20,             # read, write, pread64, readv, writev
            3, 5, 8, 262,                 # close, fstat, lseek, newfstatat
            11, 12, 25, 28,               # munmap, brk, mremap, madvise
            13, 14, 15, 131,              # rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack
            24, 202, 273, 324, 334,       # sched_yield, futex, set_robust_list, membarrier, rseq
            35, 39, 186, 96, 98, 228, 230,  # nanosleep, getpid, gettid, gettimeofday, getrusage, clock_...
            60, 231, 318,                 # exit, exit_group, getrandom
        ),
        (9, 10),
    ),
    "aarch64": (
        0xC00000B7, 277,
        (
            63, 64, 67, 65, 66,
            57, 80, 62, 79,
            215, 214, 216, 233,
            134, 135, 139, 132,
            124, 98, 99, 283, 293,
            101, 172, 178, 169, 165, 113, 115,
            93, 94, 278,
        ),
        (222, 226),
    ),
}
# fmt: on


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def restrict() -> bool:
    """Put the filter up, for all threads of this process; whether it stands.

    It does not where there is none for this system or processor, or the kernel was built without.
    """
    known = _NUMBERS.get(platform.machine()) if platform.system() == "Linux" else None
    if known is None:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    instructions = b"".join(_instructions(*known))
    program = _Program(len(instructions) // 8, instructions)
    if library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return bool(library.syscall(known[1], _SET_FILTER, _ALL_THREADS, ctypes.byref(program)) == 0)


def _instructions(
    architecture: int, _: int, allowed: tuple[int, ...], memory: tuple[int, ...]
) -> Iterator[bytes]:
    yield _instruction(_LOAD, _ARCHITECTURE)
    yield _instruction(_IF_EQUAL, architecture, 1, 0)
    # Numbers of another architecture mean other calls.
    yield _instruction(_RETURN, _KILL)
    yield _instruction(_LOAD, _NUMBER)
    for number in allowed:
        yield _instruction(_IF_EQUAL, number, 0, 1)
        yield _instruction(_RETURN, _ALLOW)
    for number in memory:
        yield _instruction(_IF_EQUAL, number, 0, 4)
        yield _instruction(_LOAD, _THIRD_ARGUMENT)
        yield _instruction(_IF_ANY_BIT, _EXECUTABLE, 1, 0)
        yield _instruction(_RETURN, _ALLOW)
        yield _instruction(_RETURN, _REFUSE)
    yield _instruction(_RETURN, _REFUSE)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Jumps are counted in instructions, from the next one on."""
    return struct.pack("<HBBI", code, if_true, if_false, value)
