"""What supervised fine-tuning and reinforcement learning share: optimizer, training state, the accumulated update."""

from ares_jax.training.optimizer import make_optimizer, make_schedule, trainable
from ares_jax.training.update import TrainState, Update, abstract_state, initial_state

__all__ = ["TrainState", "Update", "abstract_state", "initial_state", "make_optimizer", "make_schedule", "trainable"]
