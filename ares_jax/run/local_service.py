"""A local checkpoint behind a service that the command starts itself."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from ares_jax.config import default_config
from ares_jax.errors import UserError
from ares_jax.run.environment import save_config
from ares_jax.run.opening import published_config
from ares_jax.service.process import start_sampler

_RESOLVED = Path(__file__).parents[2] / "configs" / "resolved.py"


@dataclass(frozen=True)
class LocalService:
    """Where it answers; `model` is its name there, `identity` tells its weights from others."""

    url: str
    model: str
    identity: str


@contextlib.contextmanager
def local_service(checkpoint: Path, config: ConfigDict | None, folder: Path, max_tokens: int) -> Iterator[LocalService]:
    """Starts the sampler service with `checkpoint`: a Hugging Face folder, or the folder of a run (its newest weights).

    `config`: of the service, for a Hugging Face folder; by default one with the folder's own pixels, in which answers of
    `max_tokens` fit. Its files go to `folder`.

    Raises:
      UserError: it is neither, a run is given another config than its own, or the service does not start.
    """
    if (checkpoint / "checkpoints").is_dir() and (checkpoint / "config.json").is_file():
        if config is not None:
            raise UserError(
                f"--config does not go with --checkpoint={checkpoint}: a run has its own, {checkpoint}/config.json"
            )
        folder = checkpoint.resolve()
        sampler = {**default_config().sampler, **json.loads((folder / "config.json").read_text())["sampler"]}
    elif (checkpoint / "config.json").is_file():
        if config is None:
            config = published_config(checkpoint)
            config.sampler.max_response_tokens = max_tokens
        with config.unlocked():
            config.model.pretrained = str(checkpoint.resolve())
            config.sampler.max_response_tokens = max(config.sampler.max_response_tokens, max_tokens)
        folder = folder.resolve() / checkpoint.resolve().name
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder)
        sampler = config.sampler
    else:
        raise UserError(f"--checkpoint={checkpoint}: neither a Hugging Face folder nor a run's; both hold a config.json")
    arguments = [f"--config={_RESOLVED}:{folder / 'config.json'}", f"--workdir={folder}"]
    times = {"timeout": sampler["start_timeout"], "drain_seconds": sampler["drain_seconds"]}
    with start_sampler(arguments, folder=folder, **times) as process:
        yield LocalService(process.url, folder.name, _identity(checkpoint, folder / "config.json"))


def _identity(checkpoint: Path, config: Path) -> str:
    """Returns the checkpoint's place, the time of its newest file, and what the service makes of an image or a weight.

    Other weights, another format prompt or another dtype are asked anew.
    """
    sections = json.loads(config.read_text())
    digest = hashlib.blake2b(json.dumps([sections["data"], sections["model"]]).encode(), digest_size=6).hexdigest()
    files = list(checkpoint.glob("checkpoints/*/*")) or list(checkpoint.glob("*"))
    newest = max((path.stat().st_mtime_ns for path in files), default=0)
    return f"{checkpoint.resolve()}@{newest}/{digest}"
