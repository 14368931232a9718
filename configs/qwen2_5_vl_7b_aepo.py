"""AEPO of ARES-7B, as in the paper."""

from configs.qwen2_5_vl import aepo


def get_config(method: str = "aepo"):
    """`method`: one of configs/methods.py."""
    return aepo("7b", method)
