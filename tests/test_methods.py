"""The named methods: a config takes one by name, and the benchmark's rows are the same."""

import importlib

import pytest

from ares_jax.errors import UserError
from configs.digits_cpu import get_config
from configs.methods import METHODS


def test_every_method_sets_its_fields_and_nothing_else():
    plain = get_config()
    assert plain.to_dict() == get_config("aepo").to_dict()
    for name, fields in METHODS.items():
        c = get_config(name)
        for field, value in fields.items():
            assert _field(c.aepo, field) == value
            c.aepo.update_from_flattened_dict({field: _field(plain.aepo, field)})
        assert c.to_dict() == plain.to_dict()


def _field(section, field):
    for part in field.split("."):
        section = section[part]
    return section


def test_dapo_clips_apart_averages_over_tokens_filters_and_has_no_reference():
    a = get_config("dapo").aepo
    assert a.clip_low < a.clip_high and a.reduction == "token" and a.kl.weight == 0 and a.shaping == "none"
    assert 0 < a.filter.low < a.filter.high < 1 and a.root_leaves == a.group_size


@pytest.mark.parametrize("shape", ["3b", "7b", "32b", "72b"])
def test_the_papers_configs_take_them_too(shape):
    get = importlib.import_module(f"configs.qwen2_5_vl_{shape}_aepo").get_config
    assert get().to_dict() == get("aepo").to_dict()
    assert get("dapo").aepo.clip_high == METHODS["dapo"]["clip_high"] != get().aepo.clip_high


def test_an_unknown_one_is_named():
    with pytest.raises(UserError, match="method 'ppo' is not one of aepo, .*dapo"):
        get_config("ppo")
