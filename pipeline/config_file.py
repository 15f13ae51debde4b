"""From a preset, a file or a URL and KEY=VALUE overrides to a checked RunConfig, and back.

A file may name one base (`base: ffhq256`) whose settings hold where it is silent; a base has
no base of its own, so that at most two files decide a run. There is no interpolation and no
look-up in the environment: what a run was trained with stands in its files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import config_yaml, storage
from pipeline.config import RunConfig
from pipeline.config_draft import ConfigError, Draft, Given, Problem, presets, read, unknown
from pipeline.settings import Setting, flatten, resumable, search_settings, settings

__all__ = ["ConfigError", "Problem", "presets"]


def load(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset, a YAML file or a URL, put KEY=VALUE overrides over it, and check the whole.

    Raises ConfigError with every problem at once.
    """
    file = read(source)
    draft = Draft(file.name)
    draft.add_file(file)
    for override in overrides:
        draft.add_override(override)
    return draft.finish()


def from_mapping(mapping: Mapping[str, Any], origin: str = "configuration") -> RunConfig:
    """The configuration that `to_mapping` wrote; `origin` names its place in messages."""
    draft = Draft(origin)
    draft.add(Given(path, value, origin) for path, value in flatten(mapping))
    return draft.finish()


def overridden(config: RunConfig, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration with values by dotted paths in their places, then KEY=VALUE over them.

    Raises ConfigError with every problem at once.
    """
    draft = Draft("the run")
    draft.add(Given(path, value, "the run") for path, value in leaves(config).items())
    draft.add(Given(path, value, f"{path}={value}") for path, value in values.items())
    for override in overrides:
        draft.add_override(override)
    return draft.finish()


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Nested mappings of plain values, as in YAML and JSON."""
    return config.model_dump(mode="json")


def without_secrets(config: RunConfig) -> RunConfig:
    """The configuration as it may be written down: no password or signature in the place of the data."""
    data = config.data.model_copy(update={"root": storage.shown(config.data.root)})
    return config.model_copy(update={"data": data})


def to_yaml(config: RunConfig) -> str:
    """The text of a file that `load` reads back to the same configuration."""
    return config_yaml.write(to_mapping(config))


def leaves(config: RunConfig) -> dict[str, Any]:
    """Each setting's dotted path and its value, a scalar or a list."""
    return dict(flatten(to_mapping(config)))


def changed(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of the settings that differ."""
    before, after = leaves(old), leaves(new)
    return [(path, before[path], after[path]) for path in before if before[path] != after[path]]


def identity_changes(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """The changes that make another run of it: a run cannot be continued with them."""
    return [change for change in changed(old, new) if not resumable(change[0])]


@dataclass(frozen=True)
class Explanation:
    """A setting, and the value that each preset gives it."""

    setting: Setting
    presets: Mapping[str, Any]

    def __str__(self) -> str:
        setting = self.setting
        default = "required" if setting.required else f"default {as_text(setting.default)}"
        whole = "search" if setting.path.startswith("search.") else "run"
        change = (
            f"may change when a {whole} continues" if setting.resumable else f"part of the {whole}'s identity"
        )
        values = ", ".join(f"{name} {as_text(value)}" for name, value in self.presets.items())
        return f"{setting.path}: {setting.allowed}; {default}; {change}\n    {setting.description}" + (
            f"\n    Presets: {values}" if values else ""
        )


def explain(path: str) -> tuple[Explanation, ...]:
    """What a setting means, or all settings of a section; `search` is that of searches.

    Raises ConfigError for another path.
    """
    known = settings() | search_settings()
    chosen = [setting for setting in known.values() if f"{setting.path}.".startswith(f"{path}.")]
    if not chosen:
        raise ConfigError([Problem("", path, unknown(path))])
    values = {name: leaves(load(name)) for name in presets()}
    return tuple(
        Explanation(
            setting,
            {name: each[setting.path] for name, each in values.items() if setting.path in each},
        )
        for setting in chosen
    )


def as_text(value: Any) -> str:
    """One value as it is written behind KEY=."""
    return config_yaml.write(value).strip()
