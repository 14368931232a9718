"""The commands: what `python -m ares_jax.<name>` does, with its flags. Everything else is a library."""
