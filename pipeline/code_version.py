"""Which code this is."""

import shutil
import subprocess
from importlib import metadata
from pathlib import Path


def code_version() -> str:
    """The release, and the commit where the code is a git working tree of its own."""
    release = metadata.version("nvae-cluster")
    root = Path(__file__).parents[1]
    git = shutil.which("git")
    # Without a .git right here, git would describe whatever repository the installation lies in.
    if git is None or not (root / ".git").exists():
        return release
    command = [git, "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{release}+{found.stdout.strip()}" if found.returncode == 0 else release
