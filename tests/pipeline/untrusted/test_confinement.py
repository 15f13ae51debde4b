"""What a confined process can no longer do: each layer by what it is there for."""

import json
import platform
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.untrusted.confinement import leave_network

LINUX = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the filter of system calls is for Linux",
)

CONFINED = """
import ctypes, json, os, pickle, socket, subprocess, sys
from pipeline.untrusted.confinement import Limits, confine

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
WHOLE = 2 ** 64 - 1
native = {
    "socket": lambda call=libc.socket: call(2, 1, 0),
    "open for reading": lambda call=libc.open: call(b"/etc/passwd", 0),
    "open for writing": lambda call=libc.open: call(b"marker", 0o101, 0o600),
    "fork": lambda call=libc.fork: call(),
    "execve": lambda call=libc.execve: call(b"/bin/true", None, None),
    "kill": lambda call=libc.kill, parent=os.getppid(): call(parent, 0),
    "ptrace": lambda call=libc.ptrace: call(16, os.getppid(), None, None),
    "unlink": lambda call=libc.unlink: call(b"there"),
    "rename": lambda call=libc.rename: call(b"there", b"marker"),
    "io_uring": lambda call=libc.syscall: call(425, 8, None),
    "setuid": lambda call=libc.setuid: call(0) if os.getuid() else -1,
    "code in memory": lambda call=libc.mmap: -1 if call(None, 4096, 7, 0x22, -1, 0) == WHOLE else 0,
    "data in memory": lambda call=libc.mmap: -1 if call(None, 4096, 3, 0x22, -1, 0) == WHOLE else 0,
}
python = {
    "open": lambda: open("there"),
    "write": lambda: open("marker", "w"),
    "system": lambda: os.system("touch marker"),
    "Popen": lambda: subprocess.Popen(["touch", "marker"]),
    "socket": lambda: socket.socket(),
    "remove": lambda: os.remove("there"),
    "import": lambda: __import__("telnetlib" if sys.version_info < (3, 13) else "this"),
    "eval": lambda: eval("1"),
    "unpickle": lambda: pickle.loads(b"cos\\ngetcwd\\n(tR."),
    "foreign": lambda: ctypes.CDLL("libc.so.6"),
}

def outcome(attempt):
    try:
        return repr(attempt())
    except BaseException as error:
        return type(error).__name__

layers = confine(Limits(memory_bytes=1 << 28, processor_seconds=20, written_bytes=1 << 16))
print(json.dumps({
    "layers": layers,
    "native": {name: attempt() for name, attempt in native.items()},
    "python": {name: outcome(attempt) for name, attempt in python.items()},
    "much memory": outcome(lambda: len(bytearray(1 << 29))),
    "some memory": outcome(lambda: len(bytearray(1 << 20))),
}), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a process found that had confined itself."""
    folder = tmp_path_factory.mktemp("confined")
    (folder / "there").write_text("there")
    ended = subprocess.run(
        [sys.executable, "-c", CONFINED], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in folder.iterdir()] == ["there"]
    found: dict[str, object] = json.loads(ended.stdout)
    return found


def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"}


@LINUX
def test_native_code_can_neither_open_nor_start_nor_send_nor_become_anything(confined):
    assert confined["layers"] == ["limits", "audit", "calls"]
    allowed = confined["native"].pop("data in memory")
    assert allowed == 0
    assert set(confined["native"].values()) == {-1}


def test_python_code_is_stopped_before_it_tries(confined):
    assert set(confined["python"].values()) == {"ConfinedError"}


@LINUX
def test_memory_has_an_end(confined):
    assert (confined["much memory"], confined["some memory"]) == ("MemoryError", str(1 << 20))


def test_processor_time_has_an_end(tmp_path):
    code = """
    from pipeline.untrusted.confinement import Limits, confine
    confine(Limits(memory_bytes=1 << 28, processor_seconds=0, written_bytes=0))
    while True: pass
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment(), timeout=30)
    assert ended.returncode < 0


def test_a_process_that_left_the_network_reaches_not_even_this_machine():
    code = """
    import socket, sys
    from pipeline.untrusted.confinement import leave_network
    if not leave_network(): sys.exit(77)
    try: socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5)
    except OSError: sys.exit(0)
    sys.exit(1)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", textwrap.dedent(code), str(server.getsockname()[1])]
        status = subprocess.run(command, env=environment(), timeout=30).returncode
    if status == 77:
        pytest.skip("this kernel lets nobody make a network namespace")
    assert status == 0


@LINUX
def test_a_process_ends_with_the_one_that_started_it():
    child = "import time; from pipeline.untrusted.confinement import end_with_parent; end_with_parent(); "
    code = f"""
    import subprocess, sys, time
    process = subprocess.Popen([sys.executable, "-c", {child + "print(1, flush=True); time.sleep(60)"!r}])
    print(process.pid, flush=True)
    time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline(), parent.stdout.readline()]
        assert "1\n" in lines
        parent.kill()
        # The child has the other end of it, too.
        assert parent.stdout.read() == ""


def test_where_there_are_no_namespaces_nothing_is_said_to_stand(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert leave_network() is False
