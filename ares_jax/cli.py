"""What every command shares: flags, the resolved config, logging, the compilation cache and errors of one line."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from ares_jax.config import to_plain
from ares_jax.errors import UserError
from data_pipeline.errors import DataError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration file, such as configs/digits_cpu.py; --config.section.field=value overrides a field"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, report")


def run(main: Callable[..., None], *, config_optional: bool = False) -> None:
    """Parses the command line and calls `main(config, workdir)`. Exits with 2 and one clear line on bad input.

    `config_optional`: without `--config` and `--workdir`, both are None.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        config, workdir = _parse(sys.argv, config_optional)
        if workdir is not None:
            prepare_jax(workdir)
        main(config, workdir)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


def _parse(argv: list[str], config_optional: bool) -> tuple[ConfigDict | None, Path | None]:
    config_file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if config_file and not Path(config_file.split(":", 1)[0]).is_file():
        raise UserError(f"--config={config_file}: no such file; the shipped ones are in configs/")
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip("\"'").splitlines()[0]
        fields = reason.find(" Other fields present")
        reason = reason if fields < 0 else reason[:fields]
        raise UserError(f"command line: {reason[:300]} (ares_jax/config.py documents every field)") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; every setting is a --flag=value")
    if config_optional and _CONFIG.value is None and not _WORKDIR.value:
        return None, None
    if _CONFIG.value is None:
        raise UserError("--config is missing; for the demo use --config=configs/digits_cpu.py")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; name the folder of the run, such as --workdir=runs/digits")
    workdir = Path(_WORKDIR.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; name a folder that can be made") from None
    return _CONFIG.value, workdir


def prepare_jax(workdir: Path) -> None:
    """Turns the compilation cache on: a second command, or a resumed one, starts in seconds."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute() / "compilation_cache"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved tree to `workdir/config.json`, whole or not at all."""
    path = workdir / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_plain(config), indent=1))
    temporary.replace(path)
