"""Which implementation of a kernel runs: the one rule, for the sampler's kernels and the learner's.

None is "xla", everywhere: no Pallas kernel here has been timed on the device it is for. The day one has won there, this is
the place that says so. Callers who want one before that name it.
"""

IMPLEMENTATIONS = ("tpu", "gpu", "xla", "tpu_interpret", "gpu_interpret")


def chosen(implementation: str | None) -> tuple[str, bool]:
    """Returns "tpu", "gpu" or "xla", and whether Pallas' interpreter runs it. Raises ValueError for other names."""
    if implementation not in (*IMPLEMENTATIONS, None):
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}, None")
    name, _, interpret = (implementation or "xla").partition("_")
    return name, bool(interpret)
