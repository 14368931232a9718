"""An engine of random trees, and a server around it in a thread of the test."""

import contextlib
import threading
import time

import jax
import numpy as np
import uvicorn

from ares_jax.errors import UserError
from ares_jax.sampling.requests import Piece, RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree, Trajectory, tree_of
from ares_jax.service.server import Limits, make_app
from ares_jax.service.worker import Worker


def request(seed: int, *, tokens: int = 60, leaves: int = 8, patches: int = 0) -> RolloutRequest:
    return RolloutRequest(
        problem_id=f"p{seed}", token_ids=np.arange(10, dtype=np.int32), patches=np.zeros((patches, 1176), np.float32),
        grid_thw=np.array([[1, 2, patches // 2]] if patches else np.zeros((0, 3)), np.int32),
        positions=np.zeros((3, 10), np.int32), rope_delta=0, seed=seed, group_size=leaves, root_leaves=leaves // 2 or 1,
        max_branches_per_sequence=2, tau_high=np.inf, branch_at="window_end", branch_choice="first", temperature=1.0,
        top_p=1.0, top_k=0, max_new_tokens=tokens,
    )  # fmt: skip


def group(r: RolloutRequest, version: int = 0) -> RolloutTree:
    """A tree that is a function of the request's seed alone."""
    rng, n = np.random.default_rng(r.seed), r.max_new_tokens
    leaves = tuple(
        Trajectory(
            token_ids=rng.integers(0, 99, n, np.int32), log_probs=rng.standard_normal(n, np.float32),
            entropies=rng.random(n, np.float32), window_means=rng.random(n, np.float32), window_mask=rng.random(n) < 0.5,
            policy_version=np.full(n, version, np.int32), parent=-1, branch_position=0, finish_reason="length",
        )
        for _ in range(r.group_size)
    )  # fmt: skip
    return tree_of(r.problem_id, leaves, prompt_tokens=len(r.token_ids), window=4, first_roots=r.root_leaves)


def piece(token: int = 1) -> Piece:
    return Piece(0, np.array([token], np.int32), *np.zeros((3, 1), np.float32), "")


class FakeEngine:
    """Finishes `slots` groups a step, the newest first; a step takes `delay` seconds. Seed 666 breaks it."""

    def __init__(self, *, delay: float = 0.0, slots: int = 10_000):
        self.policy_version, self.delay, self.slots = 0, delay, slots
        self.weights_wait, self.finish = False, False
        self.weights = {"w": np.zeros((3, 2), np.float32)}
        self.work: dict[int, RolloutRequest] = {}
        self.submitted: list[int] = []
        self.cancelled: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.work)

    def room(self, prompt_tokens: int, leaves: int) -> int:
        return 100

    def check(self, request: RolloutRequest) -> None:
        if request.max_new_tokens > 1_000_000:
            raise UserError(f"problem {request.problem_id}: too long")

    def drawn(self, number: int, seen) -> list:
        return []  # it finishes whole groups

    def submit(self, request: RolloutRequest) -> int:
        self.check(request)
        self.work[len(self.submitted)] = request
        self.submitted.append(request.seed)
        return len(self.submitted) - 1

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.work.pop(number, None)

    def step(self) -> list[tuple[int, RolloutTree]]:
        time.sleep(self.delay)
        if any(r.seed == 666 for r in self.work.values()):
            raise ValueError("boom")
        done = sorted(self.work, reverse=True)[: self.slots]
        return [(number, group(self.work.pop(number), self.policy_version)) for number in done]

    def weight_specs(self):
        return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in self.weights.items()}

    def load_weights(self, flat, version: int, *, finish: bool = False) -> None:
        self.finish = finish
        if set(flat) != set(self.weights) or flat["w"].shape != (3, 2):
            raise UserError("parameter w has another shape")
        self.weights, self.policy_version = dict(flat), version

    def stats(self) -> dict[str, int]:
        return {"live": len(self.work), "groups": len(self.submitted)}


_LIMITS = Limits()


@contextlib.contextmanager
def serving(engine, *, token: str = "", limits: Limits = _LIMITS, port: int = 0, **chat):
    """Yields the address of a server in a thread."""
    worker = Worker(engine)
    app = make_app(worker, model_name="fake", token=token, limits=limits, **chat)
    settings = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=5, proxy_headers=False)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()


def until(condition, seconds: float = 5.0) -> bool:
    """Waits for a condition; False when it never came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())
