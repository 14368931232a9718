"""`python -m ares_jax.evaluate`: ares_jax/commands/evaluate.py."""

from ares_jax.commands.evaluate import start

if __name__ == "__main__":
    start()
