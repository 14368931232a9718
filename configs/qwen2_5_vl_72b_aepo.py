"""AEPO on Qwen2.5-VL-72B, with the numbers of ARES-7B: the paper has none for this size."""

from configs.qwen2_5_vl import aepo


def get_config(method: str = "aepo"):
    """`method`: one of configs/methods.py."""
    return aepo("72b", method)
