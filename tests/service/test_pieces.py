"""Tokens told while they are drawn: every one once and in order, also when pages are short and requests are redrawn."""

import collections
import math

from ares_jax.service.worker import Worker
from tests.sampling.test_scheduler import TABLE, expected_tree, new_engine, request

PAGES = 19  # the largest request takes 17
REQUESTS = [request(5 + i % 3, i, 3, 3, 10 + i % 5, math.inf, stop=("ab", "é")[: i % 3]) for i in range(12)]


def run():
    """Returns the engine, what was told of each leaf (tokens, log-probs, reasons), and the groups."""
    engine = new_engine(pages=PAGES)
    worker, told, futures = Worker(engine), collections.defaultdict(lambda: ([], [], [])), []

    def listener(i):
        def on_drawn(pieces):
            for p in pieces:
                tokens, log_probs, reasons = told[i, p.leaf]
                tokens += p.token_ids.tolist()
                log_probs += p.log_probs.tolist()
                reasons += [p.finish_reason] if p.finish_reason else []

        return on_drawn

    for i, r in enumerate(REQUESTS):
        futures.append(worker.rollout(r, listener(i)))
    groups = [future.result(30) for future in futures]
    worker.stop()
    return engine, told, groups


def test_the_pieces_are_the_group():
    engine, told, groups = run()
    assert engine.stats()["preempted"] > 0
    for i, (r, group) in enumerate(zip(REQUESTS, groups, strict=True)):
        for index, (leaf, expected) in enumerate(zip(group.leaves, expected_tree(r), strict=True)):
            tokens, log_probs, reasons = told[i, index]
            assert tokens == leaf.token_ids.tolist() == expected[0]
            assert log_probs == leaf.log_probs.tolist()
            assert reasons == [leaf.finish_reason]  # the end is told once
    assert engine.stats()["free_pages"] == PAGES - 1  # nothing leaked


def test_some_of_them_end_with_a_stop_string_and_others_do_not():
    texts = [(r, b"".join(TABLE[token] for token in leaf[0])) for r in REQUESTS for leaf in expected_tree(r)]
    ended = [any(text.endswith(stop.encode()) for stop in r.stop) for r, text in texts]
    assert 3 < sum(ended) < len(ended) - 3
