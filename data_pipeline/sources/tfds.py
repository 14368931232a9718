"""TensorFlow Datasets through its random-access data source: no TensorFlow, no graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sources.uri import Uri


class TfdsRecords:
    """Random access to one split of a prepared builder (ArrayRecord or Parquet). Images stay encoded until they are used.

    `tfds://name/split`, `tfds://name/config:version/split`; `data_dir` where it was prepared (default: TFDS's own).
    """

    def __init__(self, uri: Uri):
        import tensorflow_datasets as tfds

        name, _, split = uri.path.strip("/").rpartition("/")
        if not name:
            raise DataError(f"{uri.text}: expected tfds://name/split")
        self.name = name.split("/")[0].split(":")[0]
        self._uri = uri
        data_dir = uri.options.get("data_dir")
        try:
            # What was prepared is on disk, whether or not its builder's code can be imported.
            builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
            decoders = {
                field: _KeepEncoded()
                for field, feature in builder.info.features.items()
                if _is_image(tfds.features, feature)
            }
            self._records = tfds.data_source(name, split=split, data_dir=data_dir, download=False, decoders=decoders)
        except Exception as error:  # TFDS raises its own, ValueError, AssertionError and NotImplementedError
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{uri.text}: {reason} (prepare it with download_and_prepare(file_format='array_record'), "
                "and name its folder with ?data_dir=)"
            ) from None

    def __reduce__(self):
        return TfdsRecords, (self._uri,)  # a builder does not always pickle

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._records[index]

    def place(self, index: int) -> str:
        return f"{self._uri.text}, example {index}"

    def folders(self, index: int) -> Sequence[Path]:
        return ()


class _KeepEncoded:
    """A TFDS decoder that does nothing, also within sequences, where its own `SkipDecoding` fails without TensorFlow."""

    def setup(self, *, feature) -> None:
        pass

    def decode_example_np(self, value):
        return value

    def decode_batch_example_np(self, value):
        return value


def _is_image(features, feature) -> bool:
    inner = getattr(feature, "feature", feature)  # of a sequence
    return isinstance(inner, features.Image)
