"""All commands in one process: what test_processes.py compares several processes with."""

from ares_jax import cli, convert, evaluate, train
from ares_jax.cold_start import __main__ as cold_start


def main(config, workdir):
    for command in (cold_start, train, evaluate, convert):
        command.main(config, workdir)


if __name__ == "__main__":
    cli.run(main)
