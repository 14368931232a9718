"""A data set's folder as downloaded from the Hugging Face hub: Parquet or JSON, split by the card or by file names.

Rules of the hub (huggingface.co/docs/hub/datasets-file-names-and-splits): the card's `configs` list patterns per split;
without them, a file belongs to the split that its path names as a word; if none names one, all files are "train".
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from data_pipeline.errors import DataError
from data_pipeline.records import Records
from data_pipeline.sources.jsonl import JsonlRecords
from data_pipeline.sources.parquet import ParquetRecords
from data_pipeline.sources.uri import Uri

_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
_NO_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")  # about them
_SUFFIXES = (".parquet", ".jsonl", ".json")  # the first of which there are files


def hub_records(uri: Uri) -> Records:
    """Returns the records of one split ("train" if the URI names none). Raises `DataError` if the folder has none."""
    folder = Path(uri.path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{uri.text}: no such folder {folder}; `hf download --repo-type dataset NAME` fetches one")
    split = uri.options.get("split", "train")
    files = _by_card(folder, split, uri) or _by_name(folder, split, uri)
    records = (ParquetRecords if files[0].suffix == ".parquet" else JsonlRecords)(files, [folder])
    records.name = folder.resolve().name
    return records


def _by_card(folder: Path, split: str, uri: Uri) -> list[Path]:
    """Returns the files that the card lists for the split; empty if the card lists none at all."""
    configs = {str(c.get("config_name", "default")): c.get("data_files") for c in _card(folder).get("configs", ())}
    name = uri.options.get("config", "default" if "default" in configs or not configs else next(iter(configs)))
    if configs and name not in configs:
        raise DataError(f"{uri.text}: config {name!r} is not one of {', '.join(configs)}")
    listed = configs.get(name)
    if not listed:
        return []
    if isinstance(listed, (str, list)) and not (isinstance(listed, list) and isinstance(listed[0], dict)):
        listed = [{"split": "train", "path": listed}]
    patterns = {item["split"]: item["path"] for item in listed}
    if split not in patterns:
        raise DataError(f"{uri.text}: split {split!r} is not one of {', '.join(patterns)}, which the card lists")
    chosen = [patterns[split]] if isinstance(patterns[split], str) else patterns[split]
    return _one_format((path for pattern in chosen for path in folder.glob(pattern)), uri)


def _by_name(folder: Path, split: str, uri: Uri) -> list[Path]:
    config = uri.options.get("config", "")
    files = [
        path for path in (folder / config).rglob("*")
        if path.suffix in _SUFFIXES and path.name not in _NO_RECORDS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]  # fmt: skip
    named = {path: {s for s in _SPLITS if _names(path.relative_to(folder), _SPLITS[s])} for path in files}
    mine = [path for path in files if split in named[path] or _names(path.relative_to(folder), (split,))]
    if not mine and split == "train" and not any(named.values()):
        mine = files
    return _one_format(mine, uri)


def _names(path: Path, words: Iterable[str]) -> bool:
    return any(re.search(rf"(^|[-._ 0-9/]){re.escape(word)}([-._ 0-9/]|$)", str(path)) for word in words)


def _one_format(paths: Iterable[Path], uri: Uri) -> list[Path]:
    files = sorted(set(paths))
    for suffix in _SUFFIXES:
        if chosen := [file for file in files if file.suffix == suffix]:
            return chosen
    split = uri.options.get("split", "train")
    raise DataError(f"{uri.text}: no {', '.join(_SUFFIXES)} file of split {split!r} in {uri.path}")


def _card(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except Exception as error:  # yaml.YAMLError, or ValueError where it is no mapping
        raise DataError(f"{card}: the card's YAML cannot be read ({str(error).splitlines()[0]})") from None
