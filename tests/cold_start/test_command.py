"""The command: what cannot run is said before anything is measured, and what does not fit a row is left out."""

import re

import numpy as np
import pytest

from ares_jax.commands import cold_start as command
from ares_jax.errors import UserError
from configs.digits_cpu import get_config
from data_pipeline.errors import DataError
from data_pipeline.sources import open_sources
from data_pipeline.stream import Stream
from tests import digits


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cold_start.teacher.source": "x"}, "cold_start.teacher.source='x' is not one of data, file, endpoint"),
        ({"cold_start.teacher.source": "endpoint"}, "cold_start.teacher.endpoint.url is empty"),
        ({"cold_start.teacher.source": "file", "cold_start.teacher.files": ("gone.jsonl",)}, "gone.jsonl: no such file"),
        ({"cold_start.kl.estimator": "k2"}, "cold_start.kl.estimator='k2' is not one of k1, abs, mse, k3"),
        ({"cold_start.kl.weight": (0.1,)}, "cold_start.kl.weight=(0.1,): give three"),
        ({"packing.row_tokens": 64}, "packing.row_tokens=64: a prompt may have 64 tokens; raise it"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, change, message):
    config = get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises((UserError, DataError), match=re.escape(message)):
        command.main(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trace_longer_than_a_row_is_left_out_of_the_warm_up_and_counted(monkeypatch):
    class Run:
        config, encoder, streams = get_config(), digits.encoder(), []

        def problems(self, split):
            return open_sources(("digits://train?size=30",))

        def stream(self, source, transform, **options):
            self.streams.append(Stream(source, transform, seed=0))
            return self.streams[0]

    def take(workspace, stage, start, batches, **options):
        return [next(batches) for _ in range(40)]

    workspace = Run()
    monkeypatch.setattr(command, "fine_tune", take)
    every = [len(s.token_ids) for s in command._warm_up(workspace)]
    workspace.config.packing.row_tokens, workspace.streams = int(np.median(every)), []
    fitting = command._warm_up(workspace)
    assert 0 < workspace.streams[0].ledger.overlong < 30 and workspace.streams[0].ledger.corrupt == 0
    assert max(len(s.token_ids) for s in fitting) <= np.median(every) < max(every)
