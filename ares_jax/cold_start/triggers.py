"""`python -m ares_jax.cold_start.triggers`: ares_jax/commands/triggers.py."""

from ares_jax.commands.triggers import start

if __name__ == "__main__":
    start()
