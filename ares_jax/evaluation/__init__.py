"""Grading of answers, and the harness that asks a sampler service a whole split."""
