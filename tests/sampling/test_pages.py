import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ares_jax.sampling.branching import forks
from ares_jax.sampling.pages import OutOfPages, PagePool


class Pages(RuleBasedStateMachine):
    """Sequences that allocate, fork and end; the pool must agree with counting."""

    def __init__(self):
        super().__init__()
        self.pool, self.sequences = PagePool(12), []

    @rule(count=st.integers(1, 6))
    def begin(self, count):
        if count > self.pool.free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(count)
        else:
            self.sequences.append(self.pool.allocate(count))

    @rule(index=st.integers(0, 9), keep=st.integers(0, 6))
    def fork(self, index, keep):
        if self.sequences and self.pool.free:
            shared = self.sequences[index % len(self.sequences)][:-1][:keep]  # the last is copied: both will write to it
            self.sequences.append(self.pool.share(shared) + self.pool.allocate(1))

    @rule(index=st.integers(0, 9))
    def end(self, index):
        if self.sequences:
            self.pool.release(self.sequences.pop(index % len(self.sequences)))

    @invariant()
    def counts_agree(self):
        used = [page for sequence in self.sequences for page in sequence]
        assert 0 not in used
        assert all(self.pool.references(page) == used.count(page) for page in range(1, 12))
        assert self.pool.free == 11 - len(set(used))

    @invariant()
    def no_writer_shares_its_last_page(self):
        assert all(self.pool.references(sequence[-1]) == 1 for sequence in self.sequences)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_double_release_is_an_error():
    pool = PagePool(4)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(pages)


def test_branches_are_the_highest_windows_far_enough_apart():
    means = [np.array([9.0, 5.0, 4.9, 1.0, 4.0]), np.array([0.0, 5.0, 0.0, 0.0, 3.0])]
    masks = [np.array([1, 1, 1, 0, 1], bool), np.array([0, 1, 0, 0, 1], bool)]
    rule = {"known": np.inf, "window": 2, "branch_at": "window_start", "branch_choice": "highest"}
    chosen = forks(means, masks, slots=4, max_per_root=2, **rule)
    assert chosen == [(0, 1), (1, 1), (0, 4), (1, 4)]  # position 0 is no branch; (0, 2) is too near to (0, 1)
    assert forks(means, masks, slots=3, max_per_root=1, **rule) == [(0, 1), (1, 1)]
