"""The rules of the tree that the import contracts of pyproject.toml cannot say.

They are few and each has a reason (pyproject.toml, README.md): one door for each outside
library, a model that needs only torch, no pickle, settings that explain themselves, names
that say something, and a README whose tree is the tree.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config_file import load, presets
from pipeline.settings import settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("nvae", "pipeline", "cluster")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Who may import an outside library: files, or folders with all that is in them.
DOORS = {
    "click": ["cluster/"],
    "fsspec": ["pipeline/buckets.py", "pipeline/s3.py"],
    "google_crc32c": ["pipeline/data/sources/tfrecord.py"],
    "matplotlib": ["pipeline/models/figures.py", "pipeline/models/svg.py"],
    "mlflow": [
        "pipeline/training/mlflow_client.py",
        "pipeline/training/delivery.py",
        "pipeline/models/connection.py",
        "pipeline/models/pyfunc.py",
        "pipeline/models/served.py",
    ],
    "optuna": ["pipeline/search/importance.py", "pipeline/search/proposing.py"],
    "psutil": ["pipeline/training/machine.py"],
    "pydantic": ["pipeline/config.py"],
    "ray": ["cluster/"],
    "rich": ["pipeline/progress.py"],
    "s3fs": ["pipeline/buckets.py"],
    "webdataset": ["pipeline/data/"],
    "yaml": ["pipeline/config_yaml.py"],
}
NAMES_THAT_SAY_NOTHING = {
    "utils",
    "util",
    "common",
    "helpers",
    "helper",
    "core",
    "base",
    "manager",
    "engine",
    "misc",
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(file: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.mark.parametrize("library", DOORS)
def test_an_outside_library_has_one_door(library):
    doors = tuple(DOORS[library])
    strays = [name for name in map(name_of, SOURCES) if not name.startswith(doors)]
    assert [name for name in strays if library in imported(ROOT / name)] == []


def test_the_model_needs_nothing_but_torch():
    allowed = sys.stdlib_module_names | {"torch", "nvae"}
    found = {(name_of(file), name) for file in (ROOT / "nvae").glob("*.py") for name in imported(file)}
    assert {(file, name) for file, name in found if name not in allowed} == set()


def test_nothing_that_can_run_code_is_loaded():
    """No pickle and no shell; published checkpoints are read by their own rules, in one file."""
    runs_code = r"(?<![.\w])(eval|exec)\(|(?<![.\w])torch\.load\(|\.load_model\(|\.extractall\(|shell=True"
    others = [file for file in SOURCES if name_of(file) != "nvae/published.py"]
    assert [name_of(file) for file in others if re.search(runs_code, file.read_text())] == []
    assert [name_of(file) for file in others if "pickle" in imported(file)] == []


def test_the_command_line_answers_before_anything_heavy_is_imported():
    code = "import sys, cluster.cli; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "ray", "mlflow", "numpy", "fsspec", "pydantic"} & set(modules.stdout.split())


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads(name):
    load(name)


def test_every_setting_is_described_in_sentences():
    for setting in settings().values():
        assert re.fullmatch(r"[A-Z0-9`].{15,}[.]", setting.description.replace("bf16:", "Bf16:")), (
            setting.path
        )


def test_every_module_says_what_it_is_for():
    silent = [
        name_of(file)
        for file in SOURCES
        if file.stat().st_size and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert silent == []


def test_no_file_has_a_name_that_says_nothing():
    assert [name_of(file) for file in (*SOURCES, *TESTS) if file.stem in NAMES_THAT_SAY_NOTHING] == []


def test_faults_are_left_to_the_campaign():
    """Tests below tests/faults take minutes: each module marks all of its tests."""
    for file in (ROOT / "tests" / "faults").rglob("test_*.py"):
        assert re.search(r"^pytestmark = .*pytest\.mark\.campaign", file.read_text(), re.MULTILINE), file


def readme_tree() -> dict[str, str]:
    """Path -> phrase, from the first code block below the README's heading about the tree.

    Two spaces of indentation per folder, folders end with a slash, two spaces before a phrase.
    """
    readme = (ROOT / "README.md").read_text()
    block = re.search(
        r"^#+ [^\n]*\btree\b[^\n]*\n.*?^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL | re.IGNORECASE
    )
    assert block, "README.md has no heading with the word `tree` and a code block below it"
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block[1].splitlines()):
        name, _, phrase = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        found["".join(folders[:depth]) + name] = phrase.strip()
        if name.endswith("/"):
            folders[depth:] = [name]
    return found


def test_the_tree_of_the_readme_is_the_tree():
    tree, files = readme_tree(), tracked()
    gone = [
        path
        for path in tree
        if not any(file == path or (path[-1] == "/" and file.startswith(path)) for file in files)
    ]
    sources = {
        file
        for file in files
        if file.startswith(PACKAGES) and file.endswith(".py") and "__init__" not in file
    }
    top = {re.sub(r"/.*", "/", file) for file in files if file != ".gitignore"}
    assert {"listed but not there": gone, "there but not listed": sorted((sources | top) - tree.keys())} == {
        "listed but not there": [],
        "there but not listed": [],
    }
    assert [path for path, phrase in tree.items() if not phrase] == []
