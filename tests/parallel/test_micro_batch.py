"""What cannot be split over devices and processes is said before anything is drawn."""

import jax
import pytest

from ares_jax.commands import cold_start, train
from ares_jax.errors import UserError
from ares_jax.parallel.micro_batch import check_rows, row_count
from configs import qwen2_5_vl
from configs.digits_cpu import get_config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packing.rows": 8}, "packing.rows=8 cannot be split over mesh data x fsdp = 64; make it a multiple of 64, or 0"),
        ({"packing.rows": -64}, "packing.rows=-64 cannot be split"),
        ({"mesh.tensor": 3}, "tensor=3 does not fill 64 devices"),
        ({"mesh.tensor": 8}, "data x fsdp = 8 cannot be split over 16 processes: .* at most the 4 devices of a process"),
        ({"packing.halvings": 17}, "packing.halvings=17: packing.row_tokens=32768 can be halved 0 to 15"),
        ({"packing.halvings": -1}, "packing.halvings=-1: packing.row_tokens=32768 can"),
    ],
)
def test_64_chips_on_16_hosts(changes, message):
    config = qwen2_5_vl.aepo("7b")
    check_rows(config, 64, 16)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_rows(config, 64, 16)


def test_rows_that_are_not_given_are_as_few_as_the_mesh_splits():
    assert [row_count(rows, {"data": 2, "fsdp": 4, "tensor": 8}) for rows in (0, 16)] == [8, 16]


@pytest.mark.parametrize("command", [cold_start, train])
def test_both_commands_ask_first(command, tmp_path):
    assert jax.device_count() == 8
    with pytest.raises(UserError, match="packing.rows=4 cannot be split over mesh data x fsdp = 8"):
        command.main(get_config(), tmp_path)
    assert not list(tmp_path.iterdir())
