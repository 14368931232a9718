"""The commands that processes share, one after the other."""

from ares_jax.commands import cli, cold_start, evaluate, train


def main(config, workdir):
    for command in (cold_start, train, evaluate):
        command.main(config, workdir)


if __name__ == "__main__":
    cli.run(main)
