"""The loop itself, with the engine in this process: what is drawn with which weights, and resumption to the last bit."""

import os
import re
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ares_jax.aepo import state as aepo_state
from ares_jax.aepo import updates
from ares_jax.aepo.checks import check
from ares_jax.aepo.loop import Trainer
from ares_jax.aepo.metrics import iteration_metrics
from ares_jax.aepo.producer import RolloutProducer
from ares_jax.commands.serve import make_engine
from ares_jax.errors import Preempted, UserError
from ares_jax.metrics import read_jsonl
from ares_jax.models.lora import is_lora, merged
from ares_jax.parallel.sharding import make_mesh
from ares_jax.rewards.hard_split import write_hard_split
from ares_jax.run.run import Run, open_run
from ares_jax.run.samplers import colocated
from ares_jax.sampling.local import LocalSampler
from ares_jax.sampling.rollout_tree import Trajectory, tree_of
from ares_jax.training import initial_state, make_optimizer
from configs.digits_cpu import get_config
from data_pipeline.sources import open_sources
from tests import digits


class InProcess:
    """The engine behind the client's interface. Notes how old the policy of every batch was."""

    def __init__(self, engine, preempted_at=None):
        self.engine, self.preempted_at = engine, preempted_at
        self.versions: list[int] = []
        self.pushed = {}

    def push_weights(self, params, version):
        self.pushed = {name: np.array(value) for name, value in params}  # copies: the update donates its buffers
        self.engine.load_weights(self.pushed, version)
        if version == self.preempted_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def rollouts(self, requests, on_group=lambda index, group: None):
        groups = self.engine.generate(requests)
        if requests[0].group_size > 1:
            (version,) = {int(v) for g in groups for leaf in g.leaves for v in leaf.policy_version}
            self.versions.append(version)
        return groups

    def break_off(self):
        self.broken_off = True


@pytest.fixture(scope="module")
def config():
    c = get_config()
    with c.unlocked():
        c.model.text.update(hidden_size=64, intermediate_size=96, num_layers=2, mrope_section=(2, 3, 3))
        c.data.update(validation=("digits://validation?size=3",))
        c.sampler.update(slots=32, pages=500, max_response_tokens=24)
        c.packing.update(rows=4)
        c.aepo.update(
            steps=4, prompts_per_step=2, group_size=4, root_leaves=2,
            filter={"by": "reward", "low": -9.0, "high": 9.0, "attempts": 2},
            learning_rate=1e-3, save_every=1, validate_every=2,
        )  # fmt: skip
    return c


@pytest.fixture
def trainer(config, tmp_path):
    def make(name, devices=1, lora=0, train=None, **changes):
        c = config.copy_and_resolve_references()
        c.lora.rank = lora
        c.data.train = train or c.data.train
        c.aepo.update(changes)
        (tmp_path / name).mkdir(exist_ok=True)
        workspace = open_run(c, tmp_path / name, mesh=make_mesh(devices=jax.devices()[:devices]))
        start = workspace.checkpoints("cold_start")
        if start.latest() is None:
            optimizer = make_optimizer(c.optimizer, learning_rate=0.0, steps=1)
            params = workspace.initial_params()
            params = {name: value + 0.05 if name.endswith("_lora_b") else value for name, value in params.items()}
            state = initial_state(params, optimizer, workspace.placement)
            start.save(1, state.params, state._replace(params={}), {})
            start.wait()
        return Trainer(workspace)

    return make


def run(trainer, **options):
    """Trains to the end; returns the client, which knows how old the policies were."""
    client = InProcess(make_engine(trainer.config, trainer.run.folder), **options)
    trainer.train(client)
    return client


def test_problems_of_the_hard_validation_split_are_not_trained_on(trainer, tmp_path):
    uris = ("digits://train?size=6",)
    every = list(open_sources(uris))
    (tmp_path / "run" / "cold_start").mkdir(parents=True)
    write_hard_split(every, [1, 4], tmp_path / "run" / "cold_start")
    prompts = trainer("run", train=uris).prompts
    drawn = {next(prompts).problem_id for _ in range(8)}
    assert drawn == {every[i].problem_id for i in (0, 2, 3, 5)} and prompts.ledger.held_out == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"aepo.staleness": 2}, "aepo.staleness=2 is not one of 0, 1"),
        ({"aepo.kl.reference": "disk"}, "aepo.kl.reference='disk' is not one of device, host"),
        ({"aepo.kl.estimator": "k2"}, "aepo.kl.estimator='k2' is not one of k1, abs, mse, k3"),
        *(
            ({f"aepo.{name}": "mine"}, f"aepo.{name}='mine' is not one of")
            for name in ("shaping", "old_log_probs", "tau_definition", "difficulty_rule", "scale", "tree", "reduction",
                         "branch_at", "branch_choice", "filter.by")
        ),
        ({"aepo.branch_choice": "highest"}, "aepo.tree='split' with aepo.branch_at='window_end', aepo.branch_choice='hi"),
        ({"aepo.branch_at": "window_start"}, "has no fresh sample in its parent, and the gradient would be biased; take"),
        ({"aepo.root_leaves": 1}, "aepo.root_leaves=1: aepo.tree='split' compares a root with the other first roots; give"),
        ({"aepo.root_leaves": 5}, "aepo.root_leaves=5: a group has 4 leaves; give 1 to 4"),
        ({"sampler.colocated": True, "sampler.tensor": 2, "aepo.staleness": 1}, "over sampler.tensor=2 devices can only"),
        ({"packing.row_tokens": 80}, "packing.row_tokens=80: a prompt and its response may have 88; raise it"),
        ({"packing.row_patches": 40}, "packing.row_patches=40: a prompt may have 48; raise it"),
        ({"packing.row_patches": 50}, "packing.row_patches=50: a prompt may have 48; raise it to a multiple of 4"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_is_drawn(config, change, message):
    check(config)
    c = config.copy_and_resolve_references()
    c.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=re.escape(message)):
        Trainer(SimpleNamespace(config=c))


def test_off_the_cpu_a_sampler_without_a_url_is_in_the_learners_process(config, monkeypatch, tmp_path):
    c = config.copy_and_resolve_references()
    workspace = SimpleNamespace(config=c, own_engine=lambda: "engine", folder=tmp_path)
    assert not colocated(c)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with Run.sampler(workspace) as client:
        assert isinstance(client, LocalSampler)
    c.sampler.tensor, c.aepo.staleness = 4, 1
    with pytest.raises(UserError, match="a colocated sampler over sampler.tensor=4 devices can only draw"):
        check(c)
    c.sampler.url = "http://host:8000"
    check(c)
    assert not colocated(c)


def filling(rewards, **changes):
    """A trainer that draws as many groups as are missing, with these mean rewards in turn; notes how many were asked for."""
    a = get_config().aepo
    a.update(prompts_per_step=3, **changes)
    a.filter.by = "reward"
    rewards = iter(rewards)

    def draw(iteration, attempt, missing, state):
        asked.append((attempt, missing))
        return SimpleNamespace(state=state, seconds=1.0, waited=0.5, groups=[next(rewards) for _ in range(missing)])

    def scored(drawn):
        return [
            SimpleNamespace(overall=np.full(8, r), token_ids=np.zeros(40), accuracy=min(max(r, 0.0), 1.0))
            for r in drawn.groups
        ]  # fmt: skip

    asked: list[tuple[int, int]] = []
    prompts = SimpleNamespace(get_state=lambda: {"position": 9})
    trainer = SimpleNamespace(
        aepo=a, draw=draw, drawn=Future.result, scored=scored, prompts=prompts, background=ThreadPoolExecutor(1)
    )
    return trainer, asked


def completed(trainer, iteration, missing):
    """What becomes of a first draw."""
    return RolloutProducer.complete(trainer, trainer.background.submit(trainer.draw, iteration, 0, missing, None), iteration)


def test_a_batch_is_filled_up_with_groups_that_teach():
    trainer, asked = filling([0.5, 1.0, 0.0, 0.25, -0.1, 0.75, 0.1])
    batch = completed(trainer, 4, 3)
    assert asked == [(0, 3), (1, 2), (2, 1)] and batch.next_prompt == {"position": 9}
    assert [s.overall[0] for s in batch.kept] == [0.5, 0.25, 0.75] and len(batch.drawn) == 6
    assert (batch.tokens, batch.seconds, batch.waited) == (6 * 8 * 5, 3.0, 1.5)


def test_what_is_drawn_too_much_tells_that_less_is_enough():
    """All of six are useful where three are wanted: the share is 1, not 1/2, and the next draw is smaller."""
    trainer, _ = filling([0.5] * 6)
    batch = completed(trainer, 0, 6)
    assert (len(batch.kept), batch.useful, len(batch.drawn)) == (3, 6, 6)


def test_a_batch_that_cannot_be_filled_says_how_hard_the_problems_are():
    trainer, asked = filling([0.0, 0.5, 1.0, 1.0, 0.0, 1.0], filter={"low": 0.01, "high": 0.99, "attempts": 2})
    with pytest.raises(
        UserError, match=r"only 1 of 5 groups .* within \[0.01, 0.99\] after 2 attempts, 3 are needed; .*0/8: 2"
    ):
        completed(trainer, 0, 3)
    assert len(asked) == 2


class Named(str):
    """Stands for packed micro-batches."""

    padding = 0.0


@pytest.mark.parametrize("old", ["recomputed", "sampler"])
def test_recomputed_log_probs_are_of_the_policy_before_all_updates(monkeypatch, old):
    """They are computed before the first update, which needs none, as it is of that policy."""
    given = []

    def update(state, batches, reference, before):
        given.append((batches, before))
        return SimpleNamespace(params="later", skipped=0), dict(loss=0.0, grad_norm=0.0, skipped=0, tokens=np.ones(()))

    learner = SimpleNamespace(log_probs=lambda params, batches: f"{params} of {batches}", update=update)
    monkeypatch.setattr(updates, "packed", lambda run, part, state: ([], Named(part[0])))
    monkeypatch.setattr(updates, "update_flops", lambda *_, **__: 0.0)
    c = get_config()
    c.aepo.update(old_log_probs=old, minibatches=3)
    training = SimpleNamespace(step=0, reference=None, state=SimpleNamespace(params="now", skipped=0))
    workspace = SimpleNamespace(config=c, model=SimpleNamespace(config=digits.model().config))
    result = updates.update_policy(learner, workspace, training, ["a", "b", "c"], None)
    assert sorted(batches for batches, _ in given) == ["a", "b", "c"] and given[0][1] is None
    for batches, before in given[1:]:
        assert before == (f"now of {batches}" if old == "recomputed" else None)
    assert training.state.params == "later" and result.sums == {"tokens": 3}


def test_a_response_shorter_than_a_window_has_no_window_to_average():
    c = get_config()
    c.aepo.update(overlong_buffer=64, window=4)

    def leaf(n, means):
        return Trajectory(
            np.zeros(n, int), -np.ones(n), np.ones(n), np.array(means), np.zeros(n, bool), np.zeros(n, int), -1, 0, "stop"
        )  # fmt: skip

    leaves = (leaf(5, [1.0, 2.0, 0, 0, 0]), leaf(96, [0.0] * 96), leaf(2, [0.0, 0]))
    right = np.array([True, False, True])
    tree = tree_of("p", leaves, prompt_tokens=3, window=4)
    drawn = [replace(tree, difficulty=1, correct=right, rewards=right - np.array([0, 0.5, 0]), formatted=1)]
    sums = dict.fromkeys(("tokens", "entropy", "mismatch", "clip_low", "clip_high", "clip_dual"), np.ones(()))
    rest = {"iteration": 0, "state": aepo_state.initial_state(c.aepo), "aepo": c.aepo, "max_tokens": 128}
    values = iteration_metrics(drawn, len(drawn), sums, **rest)
    assert values["entropy/window"] == pytest.approx(3 / 95)  # two windows of the first, 93 of the second
    assert values["format"] == pytest.approx(1 / 3)
    # 96 tokens of 128: half of the buffer is taken.
    assert values["reward/overlong"] == pytest.approx(-0.5 / 3) and values["reward/shaping"] == pytest.approx(0)
    short = tree_of("p", leaves[2:], prompt_tokens=3, window=4)
    alone = [replace(short, difficulty=1, correct=right[:1], rewards=np.ones(1))]
    assert np.isnan(iteration_metrics(alone, 1, sums, **rest)["entropy/window"])


def test_overlapped_rollouts_are_one_update_old_and_the_best_validated_step_is_kept(trainer):
    one = trainer("run", staleness=1, save_every=3, validate_every=2, keep_checkpoints=1, warmup_steps=2)
    validate, accuracies = one.validate, {0: 0.9, 2: 0.5, 4: 0.25}
    one.validate = lambda: validate() | {"validation/accuracy": accuracies[one.training.step]}
    assert run(one).versions == [0, 0, 1, 2]
    checkpoints = one.run.checkpoints("aepo")
    assert checkpoints.steps() == [2, 4] and checkpoints.best() == 2
    lines = read_jsonl(one.training.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and lines[-1]["tokens/total"] == one.tokens > 0
    assert all(line["mismatch"] < 1e-5 for line in lines[1:2])  # the first batch's policy is the learner's
    for line in lines[1:]:
        assert 0 <= line["overlap"] <= 1 and line["time/step"] >= line["time/learn"] + line["time/push"]
        assert 0 <= line["format"] <= 1
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([0.0, 5e-4, 1e-3, 1e-3])
    assert [line["step"] for line in lines if line.get("time/save", 0) > 0] == [3, 4]  # of 2 and 3


def test_a_run_resumes_on_another_mesh_and_ends_with_the_same_weights(trainer):
    """Parameters split over 4 devices, then gathered on one: sums in another order, so not to the last bit."""
    one = trainer("one", steps=2, learning_rate=1e-5)
    run(one)
    split = trainer("split", devices=4, steps=1, learning_rate=1e-5)
    run(split)
    assert len(split.training.state.params["text.layers.gate_kernel"].addressable_shards[0].data[0]) == 16
    rest = trainer("split", steps=2, learning_rate=1e-5)
    assert rest.training.step == 1
    run(rest)
    for name, value in one.training.state.params.items():
        np.testing.assert_allclose(value, rest.training.state.params[name], atol=5e-5, err_msg=name)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trainer):
    whole = trainer("whole")
    assert run(whole).versions == [0, 1, 2, 3]  # on-policy
    assert all(line["overlap"] == 0 for line in read_jsonl(whole.training.folder / "metrics.jsonl")[1:])
    run(trainer("parts", steps=1))
    with pytest.raises(Preempted, match="saved AEPO at step 3 of 4"):
        run(trainer("parts", save_every=9), preempted_at=3)
    rest = trainer("parts")
    assert rest.training.step == 3
    run(rest)
    for name, value in whole.training.state.params.items():
        np.testing.assert_array_equal(value, rest.training.state.params[name], err_msg=name)
    for mine, other in zip(whole.state, rest.state, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert whole.difficulty == rest.difficulty and len(whole.difficulty) >= 8


def test_lora_alone_is_trained_from_the_cold_starts_and_the_sampler_gets_it_merged(trainer):
    one = trainer("run", lora=2, steps=3, kl={"reference": "host"}, minibatches=2, old_log_probs="recomputed")
    client = run(one)
    start = one.run.params("cold_start")
    assert set(one.training.reference) == {name for name in start if is_lora(name)}
    for name, value in start.items():
        assert np.array_equal(value, one.training.state.params[name]) != is_lora(name), name
        np.testing.assert_array_equal(one.training.reference.get(name, value), value)
    for name, value in merged(one.training.state.params, one.run.model.lora):
        np.testing.assert_array_equal(client.pushed[name], value)
    lines = read_jsonl(one.training.folder / "metrics.jsonl")[1:]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["mismatch"] < 1e-5 for line in lines)
    kl = [max(value for name, value in line.items() if name.startswith("kl/")) for line in lines]
    assert kl[-1] > 1e-6  # drift from where it began, which the second minibatch of the first step sees already
