"""YAML as plain data with line numbers: the one file that imports `yaml`.

Mappings, lists, text, numbers (1e-2 is one), true, false and null; nothing else. Tags, aliases
and deep nesting are refused rather than interpreted, because a configuration may come from a
URL. PyYAML's own rules for plain values are those of YAML 1.1, where 1e-2 and 12:30 and 010
and `no` are not what they look like; they are replaced by those of YAML 1.2.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

_LARGEST_CHARACTERS = 256 * 1024
_DEEPEST_NESTING = 20


class PlainYAMLError(ValueError):
    """Text that is no YAML, or more than plain data; `line` is 0 where there is none."""

    def __init__(self, message: str, line: int = 0) -> None:
        self.message = message
        self.line = line
        super().__init__(f"line {line}: {message}" if line else message)


@dataclass(frozen=True)
class Entry:
    """A value, the dotted path of the keys above it, and the line of its key."""

    path: str
    value: Any
    line: int


def read(text: str, path: str = "") -> list[Entry]:
    """Everything in a document that is no mapping itself, below `path`, in the order of the text.

    A key that stands twice is returned twice. Empty mappings are values. Raises PlainYAMLError.
    """
    if len(text) > _LARGEST_CHARACTERS:
        raise PlainYAMLError(f"has {len(text)} characters; a configuration has at most {_LARGEST_CHARACTERS}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node and not path and not isinstance(node, yaml.MappingNode):
            raise PlainYAMLError("must be a mapping of settings, KEY: VALUE", node.start_mark.line + 1)
        return list(_entries(loader, node, path, line=1)) if node else []
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise PlainYAMLError(str(error.problem), line) from error
    except yaml.YAMLError as error:
        raise PlainYAMLError(" ".join(str(error).split())) from error


def write(value: Any) -> str:
    """The text that `read` turns back into the same plain data; lists stay on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000).removesuffix("...\n")


def _entries(loader: "_Loader", node: yaml.Node, path: str, line: int) -> Iterator[Entry]:
    if not isinstance(node, yaml.MappingNode) or (path and not node.value):
        yield Entry(path, loader.construct_object(node, deep=True), line)
        return
    for key, value in node.value:
        key_line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise PlainYAMLError("a key must be one word", key_line)
        yield from _entries(loader, value, f"{path}.{key.value}" if path else key.value, key_line)


class _Loader(yaml.SafeLoader):
    """Composes nodes of plain data only."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not supported; write the value out", event.start_mark
            )
        if event.tag:
            raise yaml.composer.ComposerError(
                None, None, f"tags are not supported: {event.tag}", event.start_mark
            )
        if self.depth == _DEEPEST_NESTING:
            raise yaml.composer.ComposerError(None, None, "is nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line and never an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_list(dumper: _Dumper, values: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


# What a plain (unquoted) word is: the name of its type, its form, the characters it begins with.
# Underscores may part the digits of whole numbers (YAML 1.1 has them, 1.2 not). Numbers longer
# than thirty digits stay text: Python refuses to read numbers without bound.
_PLAIN_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9](_?[0-9]){0,29})", list("-+0123456789")),
    (
        "float",
        r"[-+]?(([0-9]{1,30}\.[0-9]{0,30}|\.[0-9]{1,30})([eE][-+]?[0-9]{1,4})?|[0-9]{1,30}[eE][-+]?[0-9]{1,4}"
        r"|\.inf|\.nan)",
        list("-+.0123456789"),
    ),
)

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, _form, _first in _PLAIN_WORDS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_form})\Z"), _first)
_Dumper.add_representer(list, _write_list)
