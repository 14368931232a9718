"""The URI of a source: scheme://path?option=value&option=value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl

from data_pipeline.errors import DataError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Uri:
    text: str  # as the user wrote it: what errors name
    scheme: str
    path: str
    options: Mapping[str, str]

    def check(self, *allowed: str) -> None:
        """Raises `DataError` if an option is not among those allowed."""
        for name in self.options:
            if name not in allowed:
                raise DataError(f"{self.text}: option {name!r} is not one of {', '.join(allowed)}")

    def number(self, name: str, kind: type[Number]) -> Number | None:
        """Returns an option as a positive number (a seed may be 0), or None if it is not given. Raises `DataError`."""
        if name not in self.options:
            return None
        try:
            value = kind(self.options[name])
        except ValueError:
            value = kind(-1)
        if not (value > 0 or (value == 0 and name == "seed")) or value == float("inf"):
            raise DataError(f"{self.text}: {name}={self.options[name]!r} must be a positive {kind.__name__}")
        return value


def parse_uri(text: str) -> Uri:
    """Returns the parts of a URI. Raises `DataError` if it has no scheme or no path, or an option twice."""
    scheme, separator, rest = text.partition("://")
    path, _, query = rest.partition("?")
    if not separator or not path:
        raise DataError(f"{text!r} is no source; expected scheme://path, such as jsonl:///data/train.jsonl")
    pairs = parse_qsl(query, keep_blank_values=True)
    if len(dict(pairs)) < len(pairs):
        raise DataError(f"{text}: an option stands there twice")
    return Uri(text, scheme, path, dict(pairs))
