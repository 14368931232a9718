"""`python -m ares_jax.cold_start`: ares_jax/commands/cold_start.py."""

from ares_jax.commands.cold_start import start

if __name__ == "__main__":
    start()
