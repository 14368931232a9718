"""A bucket that is a folder here: fsspec's local file system under gs://, and TensorStore's beside it."""

import os
import shutil
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Bucket(LocalFileSystem):
    """gs://name/... as folder/name/... Like a bucket it has no folders: one is there as long as a file is in it."""

    protocol = ("gs", "gcs")
    cachable = False
    folder: str  # of one test
    written: list[str]

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        return os.path.join(cls.folder, path.removeprefix("gs://").strip("/")) if path.startswith("gs://") else path

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rename(self, *_, **__):
        raise NotImplementedError("a bucket knows no renaming")

    mv = mv_file = rename

    def listdir(self, path, detail=True, **more):
        return self.ls(path, detail=detail, **more)

    def glob(self, path, **more):
        return [os.path.relpath(found, self.folder) for found in super().glob(path, **more)]

    def exists(self, path, **_):
        path = Path(self._strip_protocol(path))
        return path.is_file() or any(file.is_file() for file in path.rglob("*"))

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        if not self.exists(path):
            raise FileNotFoundError(path)
        shutil.rmtree(path) if recursive else os.remove(path)

    def _open(self, path, mode="rb", **more):
        if "w" in mode:
            self.written.append(os.path.relpath(path, self.folder))
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return super()._open(path, mode, **more)


def mount(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Bucket:
    """Makes gs:// that folder, for etils and for Orbax's arrays."""
    Bucket.folder, Bucket.written = str(folder), []
    bucket = Bucket()
    known = backend.fsspec_backend._get_filesystem
    monkeypatch.setattr(
        backend.fsspec_backend, "_get_filesystem", lambda name: bucket if name == "gcs" else known(name), raising=True
    )
    monkeypatch.setattr(
        gcs_utils, "get_kvstore_for_gcs", lambda path: {"driver": "file", "path": bucket._strip_protocol(path) + "/"}
    )
    return bucket
