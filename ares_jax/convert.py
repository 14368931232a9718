"""`python -m ares_jax.convert`: ares_jax/commands/convert.py."""

from ares_jax.commands.convert import start

if __name__ == "__main__":
    start()
