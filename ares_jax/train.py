"""`python -m ares_jax.train`: ares_jax/commands/train.py."""

from ares_jax.commands.train import start

if __name__ == "__main__":
    start()
