"""`python -m ares_jax.serve`: ares_jax/commands/serve.py."""

from ares_jax.commands.serve import start

if __name__ == "__main__":
    start()
