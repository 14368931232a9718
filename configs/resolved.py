"""The resolved config that a run wrote: `--config=configs/resolved.py:runs/digits/config.json`."""

import json

from ares_jax.config import default_config


def get_config(path: str):
    c = default_config()
    with open(path) as file, c.unlocked():
        c.update(json.load(file))
    return c
