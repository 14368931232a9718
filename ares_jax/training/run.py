"""What a stage of training holds besides its loop: state, reference policy, checkpoints, metrics; SFT and RL share it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from ares_jax.errors import Preempted
from ares_jax.lifecycle.step_guard import StepGuard
from ares_jax.metrics import MetricsWriter
from ares_jax.parallel.distributed import to_host
from ares_jax.params import Params, to_flat
from ares_jax.run.run import Run
from ares_jax.training.update import Trainable, abstract_state, initial_state


class TrainingRun:
    """A stage of a run, restored from its newest checkpoint or begun."""

    def __init__(
        self,
        run: Run,
        stage: str,
        optimizer: optax.GradientTransformation,
        trained: Trainable,
        start: Callable[[], Params],
        *,
        reference: str = "",
    ):
        """Args:
          stage: names its folders of metrics and of checkpoints.
          start: gives the weights to begin with; called where there is no checkpoint, or they are the reference, too.
          reference: where the weights of `start` are kept as the reference policy: "device", "host" or "" (nowhere).

        Raises `UserError` for a damaged checkpoint, or what `start` raises.
        """
        place = run.placement
        self.stage, self.folder = stage, run.folder / stage
        self._checkpoints = run.checkpoints(stage)
        self.step = self._saved = self._checkpoints.latest() or 0  # steps of the loop that the state has behind it
        first = start() if reference or not self.step else {}
        copy = to_host if reference == "host" else jnp.copy
        # Frozen parameters are shared with the policy. A copy: the update donates its buffers.
        own = {name: copy(value) for name, value in first.items() if trained(name)} if reference else None
        self.reference = own
        self.extra: Mapping[str, Any] = {}  # what `save` was given
        if self.step:
            template = abstract_state(to_flat(run.model), optimizer, place, trained)
            params, rest, self.extra = self._checkpoints.restore(self.step, template.params, template._replace(params={}))
            self.state = rest._replace(params=params)
        else:
            self.state = initial_state(first, optimizer, place, trained)
        self.guard = StepGuard(
            self.folder, watchdog=run.config.watchdog_seconds, state=self.extra.get("progress")
        )  # fmt: skip
        self.metrics = MetricsWriter(self.folder, self.step or -1)

    def save(self, extra: Mapping[str, Any], *, score: float | None = None) -> None:
        """Saves the state after `self.step` steps, with what the loop needs to go on from there (JSON)."""
        rest = self.state._replace(params={})
        progress = {**extra, "progress": self.guard.state()}
        self._checkpoints.save(self.step, self.state.params, rest, progress, score=score)
        self._saved = self.step

    def end(self) -> None:
        """Returns once everything is on disk."""
        self._checkpoints.wait()
        self._checkpoints.close()
        self.metrics.close()

    def stopped(self, extra: Mapping[str, Any], name: str, steps: int) -> Preempted:
        """Saves, if that has not been done, and returns what to raise where the process was told to go."""
        if self.step != self._saved:
            self.save(extra)
        self._checkpoints.wait()
        self.metrics.close()
        return Preempted(f"saved {name} at step {self.step} of {steps}")
