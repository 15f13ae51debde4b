"""A query for models: conditions on what versions say of themselves.

    data=ffhq256 and validation.bits_per_dim < 0.75 and objective.spectral_coefficient <= 0.1
    alias=best or not (run ~ try or ended=diverged)

`=` (or `==`), `!=`, `<`, `<=`, `>`, `>=` compare; `~` asks whether a text contains another, upper and
lower case alike. Values are numbers, words, 'quoted' or "quoted" texts, true, false, and lists as
in YAML: [4, 4, 8]. `not` binds more tightly than `and`, `and` than `or`.

What a version does not have, or is not finite, fulfils no comparison, not even `!=`; so a model that was
never evaluated is neither better nor worse than 0.75. Of several aliases one has to match, and
none may with `!=`. `created` compares as ISO 8601: created >= 2026-11.

A query is read by the parser below and by nothing else: it is no Python, no SQL and no MLflow filter.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from pipeline.errors import InputError
from pipeline.models.fields import Field, FieldError, field
from pipeline.models.versions import Version

MAX_CHARACTERS = 10_000
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<list>\[[^\[\]]*\])
    | (?P<quoted>'[^']*'|"[^"]*")
    | (?P<operator><=|>=|!=|==|=|<|>|~)
    | (?P<bracket>[()])
    | (?P<word>[^\s()=<>!~'"\[\]]+)
    )""",
    re.VERBOSE,
)
_ORDERING: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class QueryError(InputError):
    """A query that cannot be read; the message points at the place."""


class Condition(Protocol):
    """A query or a part of one."""

    def matches(self, version: Version) -> bool: ...

    def fields(self) -> Iterator[Field]:
        """All that it asks for."""


@dataclass(frozen=True)
class Comparison:
    """NAME OPERATOR VALUE."""

    field: Field
    operator: str
    value: Any

    def matches(self, version: Version) -> bool:
        found = [value for value in self.field.values(version) if not _is_nan(value)]
        if self.operator == "!=":
            return bool(found) and not any(self._equal(value) for value in found)
        return any(self._holds(value) for value in found)

    def fields(self) -> Iterator[Field]:
        yield self.field

    def _holds(self, found: Any) -> bool:
        if self.operator == "=":
            return self._equal(found)
        if self.operator == "~":
            return str(self.value).lower() in str(found).lower()
        return _same_kind(found, self.value) and _ORDERING[self.operator](found, self.value)

    def _equal(self, found: Any) -> bool:
        if self.field.by_prefix and found == found.lower() and re.fullmatch(r"[0-9a-f]{64}", found):
            return len(self.value) >= 6 and found.startswith(self.value)
        return _same_kind(found, self.value) and bool(found == self.value)


@dataclass(frozen=True)
class Not:
    """What does not fulfil the condition."""

    condition: Condition

    def matches(self, version: Version) -> bool:
        return not self.condition.matches(version)

    def fields(self) -> Iterator[Field]:
        return self.condition.fields()


@dataclass(frozen=True)
class Joined:
    """All of several conditions, or any of them."""

    conditions: tuple[Condition, ...]
    all: bool

    def matches(self, version: Version) -> bool:
        whether = (condition.matches(version) for condition in self.conditions)
        return all(whether) if self.all else any(whether)

    def fields(self) -> Iterator[Field]:
        for condition in self.conditions:
            yield from condition.fields()


def parse(text: str) -> Condition:
    """The query in `text`; an empty one is fulfilled by every version. Raises QueryError."""
    if len(text) > MAX_CHARACTERS:
        raise QueryError(f"The query has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.")
    if not text.strip():
        return Joined((), all=True)
    return _Parser(text).whole()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _same_kind(found: Any, given: Any) -> bool:
    """Whether the two can be compared: numbers with numbers, but true is no 1."""
    numbers = [isinstance(each, int | float) and not isinstance(each, bool) for each in (found, given)]
    return all(numbers) or type(found) is type(given)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Parser:
    """One reading of one query, from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._tokenize())
        self._next = 0
        self._depth = 0

    def whole(self) -> Condition:
        condition = self._any()
        if self._peek().kind != "end":
            self._refuse(self._peek(), "expected `and`, `or` or the end")
        return condition

    def _tokenize(self) -> Iterator[_Token]:
        at = 0
        while self._text[at:].strip():
            match = _TOKEN.match(self._text, at)
            if match is None:
                start = at + len(self._text[at:]) - len(self._text[at:].lstrip())
                self._refuse(_Token("", self._text[start], start), "this is not understood; quote texts")
            kind = str(match.lastgroup)
            yield _Token(kind, match[kind], match.start(kind))
            at = match.end()
        yield _Token("end", "", len(self._text.rstrip()))

    def _any(self) -> Condition:
        return self._joined("or", self._all)

    def _all(self) -> Condition:
        return self._joined("and", self._one)

    def _joined(self, word: str, part: Callable[[], Condition]) -> Condition:
        conditions = [part()]
        while self._is_word(word):
            self._take()
            conditions.append(part())
        return conditions[0] if len(conditions) == 1 else Joined(tuple(conditions), all=word == "and")

    def _one(self) -> Condition:
        token = self._peek()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(token, f"more than {MAX_DEPTH} levels")
        try:
            if self._is_word("not"):
                self._take()
                return Not(self._one())
            if token.text == "(" and token.kind == "bracket":
                return self._bracketed()
            return self._comparison()
        finally:
            self._depth -= 1

    def _bracketed(self) -> Condition:
        opened = self._take()
        condition = self._any()
        if self._peek().text != ")":
            self._refuse(opened, "this bracket is never closed")
        self._take()
        return condition

    def _comparison(self) -> Condition:
        name = self._take()
        if name.kind != "word":
            self._refuse(name, "expected a name, such as validation.bits_per_dim")
        try:
            asked = field(name.text)
        except FieldError as error:
            self._refuse(name, str(error))
        sign = self._take()
        if sign.kind != "operator":
            self._refuse(sign, f"expected =, !=, <, <=, >, >= or ~ after {name.text}")
        given = self._take()
        if given.kind not in ("word", "quoted", "list"):
            self._refuse(given, f"expected a value after {name.text} {sign.text}")
        text = sign.text.replace("==", "=")
        return Comparison(asked, text, self._value(asked, text, given))

    def _value(self, asked: Field, sign: str, given: _Token) -> Any:
        if sign == "~" or asked.kind == "text":
            if given.kind == "list":
                self._refuse(given, f"{asked.name} is no list")
            return given.text[1:-1] if given.kind == "quoted" else given.text
        value = _literal(given)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and (asked.kind == "number" or sign in _ORDERING):
            what = f"{asked.name} is a number" if asked.kind == "number" else f"{sign} compares numbers"
            self._refuse(given, f"{what}, {given.text} is none")
        return value

    def _is_word(self, word: str) -> bool:
        token = self._peek()
        return token.kind == "word" and token.text.lower() == word

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _refuse(self, token: _Token, why: str) -> NoReturn:
        # A long query is shown around the place.
        start = max(0, token.at - 60)
        shown = re.sub(r"\s", " ", self._text[start : token.at + 60])
        raise QueryError(f"{why}\n  {shown}\n  {' ' * (token.at - start)}^")


def _literal(token: _Token) -> Any:
    """A value as YAML has it: number, true, false, text, or a list of these."""
    if token.kind == "quoted":
        return token.text[1:-1]
    if token.kind == "list":
        inner = token.text[1:-1].strip()
        return [_scalar(part.strip()) for part in inner.split(",")] if inner else []
    return _scalar(token.text)


def _scalar(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # Text like nan or inf is text: no figure of a model is compared with it.
        return number if math.isfinite(number) else text
    return text.strip("'\"")
