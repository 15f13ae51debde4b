"""What a search may choose from: parameters, each drawn alone, and the settings that they give.

A parameter is a setting of RunConfig, by its dotted path, or one of the three numbers that
stand for `model.groups_per_scale` (groups.py). One that has a condition (`when`) is drawn only
where another parameter has one of the values named there; otherwise the run's own value holds.
What was drawn is kept beside the settings that it gives, because a searcher learns from the
first and a run is made of the second.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pipeline.search.groups import spread

Kind = Literal["choice", "uniform", "log_uniform", "integer"]
KINDS = get_args(Kind)
GROUPS = "model.groups_per_scale"
TOTAL = f"{GROUPS}.total"
STRUCTURE = {f"{GROUPS}.{part}": part for part in ("total", "skew", "minimum")}

Drawn = Mapping[str, Any]
"""A value for each parameter whose condition holds."""


@dataclass(frozen=True)
class Parameter:
    """One thing that is chosen."""

    name: str
    kind: Kind
    values: tuple[Any, ...]
    """The choices, or the lowest and the highest value; of `integer` both are included."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Other parameters' names, and the values of theirs with which this one is drawn."""

    def holds(self, drawn: Drawn) -> bool:
        """Whether it is drawn beside these."""
        return all(drawn.get(name) in values for name, values in self.when.items())

    def listed(self) -> tuple[Any, ...]:
        """All values, of a parameter that has a list of them. Raises ValueError for a range."""
        if self.kind == "choice":
            return self.values
        if self.kind == "integer":
            return tuple(range(self.values[0], self.values[1] + 1))
        raise ValueError(f"{self.kind} has no list of values")

    def probes(self) -> tuple[Any, ...]:
        """Values by which a mistake shows: every choice; of a range both ends and one between."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        if self.kind == "integer":
            return (low, high)
        # Not the middle: of [4, 8] that is 6.0, which would pass as a whole number.
        return (low, low + (high - low) / math.e, high)

    def draw(self, chance: random.Random) -> Any:
        """One value by chance."""
        if self.kind == "choice":
            return chance.choice(self.values)
        low, high = self.values
        if self.kind == "integer":
            return chance.randint(low, high)
        if self.kind == "uniform":
            return self.rounded(chance.uniform(low, high))
        return self.rounded(math.exp(chance.uniform(math.log(low), math.log(high))))

    def near_an_end(self, value: Any) -> bool:
        """Whether a value lies in the outer twentieth of its range, on either side."""
        if self.kind == "choice" or value is None:
            return False
        low, high = self.values
        if self.kind == "integer":
            return bool(value in (low, high))
        if self.kind == "log_uniform":
            low, value, high = map(math.log, (low, value, high))
        return bool(min(value - low, high - value) < (high - low) / 20)

    def rounded(self, value: float) -> float:
        """A value of a range with few enough digits to be read, said and typed.

        The step is below a thousandth of the range, in a logarithmic one also of the value.
        """
        low, high = self.values
        span = high - low if self.kind == "uniform" else min(value, high - low)
        decimals = 3 - math.floor(math.log10(span)) if span else 0
        return float(min(max(round(value, decimals), low), high))

    def __str__(self) -> str:
        shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.values)
        condition = "".join(f" when {name} is in {list(values)}" for name, values in self.when.items())
        return f"{self.kind} [{shown}]{condition}"


@dataclass(frozen=True)
class Space:
    """The parameters of a search; those that a condition names stand before it."""

    parameters: tuple[Parameter, ...]
    scales: int
    """Of the model that is searched for, if its groups are."""

    def draw(self, chance: random.Random) -> dict[str, Any]:
        """Each parameter by chance. The same state of `chance`, the same values."""
        drawn: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.holds(drawn):
                drawn[parameter.name] = parameter.draw(chance)
        return drawn

    @property
    def is_listed(self) -> bool:
        """Whether every parameter has a list of values."""
        return all(parameter.kind in ("choice", "integer") for parameter in self.parameters)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Every combination of listed values, the last parameter changing fastest.

        Raises ValueError if a parameter is a range.
        """
        yield from self._completed({}, self.parameters)

    def _completed(self, drawn: dict[str, Any], rest: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield drawn
        elif not rest[0].holds(drawn):
            yield from self._completed(drawn, rest[1:])
        else:
            for value in rest[0].listed():
                yield from self._completed({**drawn, rest[0].name: value}, rest[1:])

    def settings(self, drawn: Drawn) -> dict[str, Any]:
        """The settings that this draw gives, by their dotted paths."""
        plain = {name: value for name, value in drawn.items() if name not in STRUCTURE}
        structure = {STRUCTURE[name]: value for name, value in drawn.items() if name in STRUCTURE}
        return plain | ({GROUPS: spread(**structure, scales=self.scales)} if structure else {})

    def extremes(self) -> Iterator[dict[str, Any]]:
        """Every draw of the groups' structure from its probes alone."""
        parts = [parameter for parameter in self.parameters if parameter.name in STRUCTURE]
        for values in itertools.product(*(part.probes() for part in parts)):
            yield dict(zip((part.name for part in parts), values, strict=True))

    def as_plain(self) -> list[dict[str, Any]]:
        """For JSON, in the order of the file."""
        return [
            {
                "name": each.name,
                "kind": each.kind,
                "values": list(each.values),
                **({"when": {name: list(values) for name, values in each.when.items()}} if each.when else {}),
            }
            for each in self.parameters
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Mapping[str, Any]], scales: int) -> "Space":
        """What `as_plain` gave."""
        return cls(
            tuple(
                Parameter(
                    each["name"],
                    each["kind"],
                    tuple(each["values"]),
                    {name: tuple(values) for name, values in each.get("when", {}).items()},
                )
                for each in plain
            ),
            scales,
        )
