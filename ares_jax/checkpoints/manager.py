"""Training checkpoints: one Orbax step holds parameters, optimizer state and everything else a run needs to go on."""

import math
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ares_jax.checkpoints.checksums import checksums
from ares_jax.checkpoints.folders import reason
from ares_jax.checkpoints.orbax_params import save_arguments
from ares_jax.errors import UserError

BEST_METRIC = "score"
LONGEST_SAVE = 1200  # seconds; of several processes one that cannot save keeps the others waiting for so long


class Checkpoints:
    """Steps under one folder: the newest `keep`, and the best by `score` besides. Saves are atomic and asynchronous.

    A step has four parts, so that a reader can take the parameters alone:
    `params` (flat dict of arrays), `optimizer` (pytree of arrays), `extra` (JSON), `checksums` (of every array).

    Raises:
      UserError: the folder cannot be made; and from any method, a save has failed. Earlier steps are as they were.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder = folder.absolute()
        best = checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(n=keep), best])
        self._whole: int | None = None  # the newest step that is known to be on disk
        self._started: int | None = None  # and the newest of which a save has begun
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    best_fn=_score,
                    enable_async_checkpointing=True,
                    async_options=ocp.AsyncOptions(timeout_secs=LONGEST_SAVE),
                ),  # fmt: skip
            )

        self._whole = self._started = self.latest()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the highest score; None if none has one. Of equal ones, the newest."""
        scores = {step: _score(self._manager.metrics(step) or {}) for step in self.steps()}
        return max((step for step in scores if scores[step] > -math.inf), key=lambda s: (scores[s], s), default=None)

    def save(
        self, step: int, params: Mapping[str, jax.Array], optimizer: Any, extra: Any, *, score: float | None = None
    ) -> None:
        """Starts saving `step`; `score` (higher is better) makes it a candidate for the best one."""
        chunks = {name: save_arguments(name, value.ndim) for name, value in params.items()}
        parts = ocp.args.Composite(
            params=ocp.args.StandardSave(dict(params), chunks),
            optimizer=ocp.args.StandardSave(optimizer),
            extra=ocp.args.JsonSave(extra),
            checksums=ocp.args.JsonSave({"params": checksums(dict(params)), "optimizer": checksums(optimizer)}),
        )
        with self._writing():
            self._manager.save(step, args=parts, metrics={} if score is None else {BEST_METRIC: score}, force=True)
        self._whole, self._started = self._started, step  # Orbax has waited for the save before

    def restore(self, step: int, params: Mapping[str, Any], optimizer: Any) -> tuple[dict[str, jax.Array], Any, Any]:
        """Returns the three parts of `step`, laid out like the arrays (or ShapeDtypeStructs) given.

        Raises:
          UserError: the step is damaged, or of another model.
        """
        parts = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(dict(params))),
            optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
            extra=ocp.args.JsonRestore(),
            checksums=ocp.args.JsonRestore(),
        )
        restored = self._read(step, parts)
        self._verify(step, restored, "params", "optimizer")
        return restored["params"], restored["optimizer"], restored["extra"]

    def restore_params(self, step: int, params: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters of `step` alone. Raises `UserError` as `restore` does."""
        target = ocp.args.StandardRestore(_abstract(dict(params)))
        restored = self._read(step, ocp.args.Composite(params=target, checksums=ocp.args.JsonRestore()))
        self._verify(step, restored, "params")
        return restored["params"]

    def wait(self) -> None:
        """Returns once every started save is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
        self._whole = self._started

    def close(self) -> None:
        self._manager.close()

    def _read(self, step: int, parts: ocp.args.Composite):
        try:
            return self._manager.restore(step, args=parts)
        except Exception as error:
            raise self._unreadable(step, reason(error)) from error

    def _verify(self, step: int, restored, *parts: str) -> None:
        for part in parts:
            names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(restored[part])]
            sums = zip(names, checksums(restored[part]), restored["checksums"][part], strict=True)
            if damaged := [name for name, mine, saved in sums if mine != saved]:
                raise self._unreadable(step, f"{part}{damaged[0]} has not the checksum it was saved with")

    def _unreadable(self, step: int, reason: str) -> UserError:
        others = [other for other in self.steps() if other != step]
        remedy = f"remove that folder to go on from step {max(others)}" if others else "remove it to start afresh"
        return UserError(f"checkpoint {self.folder / str(step)} cannot be read ({reason}); {remedy}")

    @contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # Orbax's, tensorstore's and the system's own
            self._started, last = self._whole, "none was saved yet"
            if self._whole is not None:
                last = f"step {self._whole} is whole, and the same command resumes from it"
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({reason(error)}); make room or allow writing there; {last}"
            ) from error


def _score(metrics: Mapping[str, float]) -> float:
    return metrics.get(BEST_METRIC, -math.inf)


def _abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
