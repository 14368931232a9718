"""`python -m ares_jax.plan`: ares_jax/commands/plan.py."""

from ares_jax.commands.plan import start

if __name__ == "__main__":
    start()
