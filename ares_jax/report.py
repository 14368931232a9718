"""`python -m ares_jax.report`: ares_jax/commands/report.py."""

from ares_jax.commands.report import start

if __name__ == "__main__":
    start()
