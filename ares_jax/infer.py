"""`python -m ares_jax.infer`: ares_jax/commands/infer.py."""

from ares_jax.commands.infer import start

if __name__ == "__main__":
    start()
