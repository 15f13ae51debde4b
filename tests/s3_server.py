"""A real S3 server for the tests: OpenStack Swift with its S3 interface, on this machine.

    .venv-s3/bin/python tests/s3_server.py FOLDER

runs four processes on free ports of the loopback interface, keeps the objects in FOLDER
(whose file system must know user xattrs), prints one line of JSON with the settings of a
client once it answers, and ends when its standard input closes. So it dies with whoever
started it, even if that one was killed. Signatures are checked, as on any S3.
"""

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).resolve()
PYTHON = PROGRAM.parents[1] / ".venv-s3/bin/python"
ACCESS_KEY, SECRET_KEY = "tests:user", "not-a-secret"
SECOND_ACCESS_KEY = "tests:second"
"""Another user of the same objects, with the same secret."""
DAEMONS = ("account", "container", "object")

SWIFT_CONF = """
[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = default
default = yes
"""
STORAGE_CONF = """
[DEFAULT]
devices = {folder}/devices
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
user = {user}
fallocate_reserve = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {folder}
"""
PROXY_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
user = {user}
[pipeline:main]
pipeline = catch_errors cache listing_formats bulk s3api tempauth copy slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
check_bucket_owner = false
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user_name} = {secret} .admin
user_{account}_second = {secret} .admin
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
"""


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: int
    client: dict[str, str]
    """What a client needs in its environment: the AWS_* settings."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server that keeps its objects in `folder`, as a process of its own."""
    command = [str(PYTHON), str(PROGRAM), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the S3 server did not start; its logs are in {folder}")
        yield Server(process.pid, json.loads(answer))
        process.stdin.close()


def make_bucket(name: str) -> None:
    """Create a bucket with the settings in the environment."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=name)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def configure(folder: Path, ports: dict[str, int]) -> None:
    """Write rings and configuration of a store with one replica on one device."""
    programs = Path(sys.executable).parent
    account, user_name = ACCESS_KEY.split(":")
    (folder / "devices/disk").mkdir(parents=True)
    (folder / "swift.conf").write_text(SWIFT_CONF)
    for kind in DAEMONS:
        ring = [str(programs / "swift-ring-builder"), str(folder / f"{kind}.builder")]
        for step in (
            ["create", "4", "1", "0"],
            ["add", f"r1z1-127.0.0.1:{ports[kind]}/disk", "1"],
            ["rebalance"],
        ):
            subprocess.run(ring + step, check=True, stdout=subprocess.DEVNULL)
        settings = {"folder": folder, "kind": kind, "port": ports[kind], "user": getpass.getuser()}
        (folder / f"{kind}-server.conf").write_text(STORAGE_CONF.format(**settings))
    settings = {"folder": folder, "port": ports["proxy"], "user": getpass.getuser(), "account": account}
    settings |= {"user_name": user_name, "secret": SECRET_KEY}
    (folder / "proxy-server.conf").write_text(PROXY_CONF.format(**settings))


def start(folder: Path, kind: str) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).parent / f"swift-{kind}-server"
    with (folder / f"{kind}.log").open("wb") as log:
        command = [str(program), str(folder / f"{kind}-server.conf"), "-v"]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def wait_until_it_answers(endpoint: str, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            break
        try:
            urllib.request.urlopen(endpoint, timeout=2)
        except urllib.error.HTTPError:
            return  # It refuses a request without signature: it answers.
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the S3 server did not start; see the *.log files in its folder")


def main() -> None:
    # Whoever ends a whole group of processes ends this one too, which has others to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    folder = Path(sys.argv[1]).resolve()
    ports = dict(zip([*DAEMONS, "proxy"], free_ports(4), strict=True))
    configure(folder, ports)
    processes = [start(folder, kind) for kind in ports]
    try:
        endpoint = f"http://127.0.0.1:{ports['proxy']}"
        wait_until_it_answers(endpoint, processes)
        client = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": endpoint,
        }
        print(json.dumps(client), flush=True)
        while os.read(sys.stdin.fileno(), 1024):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    main()
