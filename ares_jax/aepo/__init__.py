"""AEPO, adaptive entropy policy optimisation: pure functions of the algorithm, then the learner and its loop.

Equations: docs of each function; numbers and disagreements of paper and released code: method.md, sections 1 to 3.
"""
