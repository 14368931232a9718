"""The commands that processes share, one after the other."""

from ares_jax import cli, evaluate, train
from ares_jax.cold_start import __main__ as cold_start


def main(config, workdir):
    for command in (cold_start, train, evaluate):
        command.main(config, workdir)


if __name__ == "__main__":
    cli.run(main)
