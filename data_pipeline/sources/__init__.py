"""Problems by URI.

| URI | what it opens |
|---|---|
| `digits://train?size=20000&seed=0` | the generated digits task: a split, how many problems |
| `jsonl:///data/*.jsonl` | JSONL, one object a line; or `.json`, an array of them |
| `parquet:///data/*.parquet` | Parquet |
| `arrayrecord:///data/*.arrayrecord` | ArrayRecord, each record one JSON object |
| `hf:///data/geometry3k?split=train&config=default` | a data set's folder as downloaded from the Hugging Face hub |
| `tfds://name/split?data_dir=/data` | a prepared TensorFlow Datasets builder; `name` may hold config and version |

Two slashes and a name are a path relative to the working folder. Every URI takes `weight` (share of a mixture); all but
digits take `limit` (the first so many records) and the fields of `data_pipeline.records.Keys`, such as `question=prompt`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache

from data_pipeline.digits import DigitsSource
from data_pipeline.errors import DataError
from data_pipeline.records import Keys, Records, RecordSource
from data_pipeline.sources.array_record import ArrayRecords
from data_pipeline.sources.files import matching_files
from data_pipeline.sources.hub_folder import hub_records
from data_pipeline.sources.jsonl import JsonlRecords
from data_pipeline.sources.mixture import Mixture, Source
from data_pipeline.sources.parquet import ParquetRecords
from data_pipeline.sources.tfds import TfdsRecords
from data_pipeline.sources.uri import Uri, parse_uri

__all__ = ["Mixture", "Source", "open_sources"]

_FORMATS: Mapping[str, tuple[Callable[[Uri], Records], tuple[str, ...]]] = {  # and the options that a format takes
    "jsonl": (lambda uri: JsonlRecords(matching_files(uri)), ()),
    "parquet": (lambda uri: ParquetRecords(matching_files(uri)), ()),
    "arrayrecord": (lambda uri: ArrayRecords(matching_files(uri)), ()),
    "hf": (hub_records, ("split", "config")),
    "tfds": (TfdsRecords, ("data_dir",)),
}
_DEFAULT_KEYS = Keys()
_KEYS = tuple(field.name for field in fields(Keys))


@lru_cache(maxsize=32)  # opening counts records: once a process
def open_sources(uris: tuple[str, ...], keys: Keys = _DEFAULT_KEYS) -> Mixture:
    """Returns the problems of all URIs as one source. Raises `DataError` naming the URI, the option or the file at fault."""
    if not uris:
        raise DataError("no source; data.train, data.validation and data.test hold URIs such as jsonl:///data/train.jsonl")
    parsed = [parse_uri(uri) for uri in uris]
    weights = [uri.number("weight", float) for uri in parsed]
    sources = [_open(uri, keys) for uri in parsed]
    for uri, source in zip(uris, sources, strict=True):
        if not len(source):
            raise DataError(f"{uri}: holds no problem")
    return Mixture(sources, _all_or_none(uris, weights))


def _open(uri: Uri, keys: Keys) -> Source:
    if uri.scheme == "digits":
        uri.check("weight", "size", "seed")
        size, seed = uri.number("size", int), uri.number("seed", int)
        return DigitsSource(uri.path, 20_000 if size is None else size, seed or 0)
    if uri.scheme not in _FORMATS:
        raise DataError(f"{uri.text}: {uri.scheme!r} is not one of digits, {', '.join(_FORMATS)}")
    open_records, options = _FORMATS[uri.scheme]
    uri.check("weight", "limit", *options, *_KEYS)
    named = {name: (value,) for name, value in uri.options.items() if name in _KEYS}
    return RecordSource(open_records(uri), replace(keys, **named), uri.number("limit", int))


def _all_or_none(uris: Sequence[str], weights: Sequence[float | None]) -> list[float] | None:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        without = next(uri for uri, weight in zip(uris, weights, strict=True) if weight is None)
        raise DataError(f"{without}: has no weight, but others of the mixture do; give each of them ?weight=, or none")
    return given
