"""The curation report: its numbers against a count by hand, its table and its picture."""

import json

import pytest
from PIL import Image

from ares_jax.cold_start.curation import Candidate, curate
from ares_jax.cold_start.curation_report import curation_report, write_report

POOL = [
    Candidate("a", "s", 0.0, (10, 100)), Candidate("b", "s", 0.0, (90,)), Candidate("c", "s", 0.5, (50, 60)),
    Candidate("d", "s", 1.0, (10, 20, 100)),
]  # fmt: skip
COUNTS = {"verdicts": {"kept": 7, "rewritten": 1, "wrong_answer": 3}, "problems": {"asked": 5, "selected": 4}}


def test_histograms_count_every_trace_before_and_one_a_problem_after():
    report = curation_report(POOL, curate(POOL, 4, seed=0), COUNTS)
    edges, brackets = report["histograms"]["edges"], report["histograms"]["brackets"]
    assert [b["pass_rate"] for b in brackets] == [0.0, 0.5, 1.0]
    assert [sum(b["before"]) for b in brackets] == [3, 2, 3] and [sum(b["after"]) for b in brackets] == [2, 1, 1]
    assert edges[0] == 10 and edges[-1] == 100 and len(edges) == len(brackets[0]["before"]) + 1
    assert brackets[0]["before"][0] == 1 and brackets[0]["before"][-1] == 1  # 10 and 100 tokens
    # Targets: L(0) = 90, L(1) = 20: traces of 100 (or 90), 90, 60, 20 tokens; kept ones get longer with difficulty.
    assert report["correlation_after"] > 0.9 > report["correlation_before"]
    assert report["verdicts"] == COUNTS["verdicts"]


def test_files_are_written_whole(tmp_path):
    write_report(tmp_path, curation_report(POOL, curate(POOL, 4, seed=0), COUNTS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curation.json", "curation.md", "curation.png"]
    assert json.loads((tmp_path / "curation.json").read_text())["problems"]["asked"] == 5
    text = (tmp_path / "curation.md").read_text()
    assert "| 0.500 | 1 | 1 | 55 |" in text and "| wrong_answer | 3 | the answer is not the reference |" in text
    assert "Correlation of trace length with difficulty" in text
    with Image.open(tmp_path / "curation.png") as image:
        assert min(image.size) > 200 and len(image.convert("L").getcolors()) > 10


@pytest.mark.parametrize("pool", [[Candidate("a", "s", 0.5, (7,))], [Candidate("a", "s", 0.5, (7, 7)), POOL[0]]])
def test_a_pool_of_one_length_or_one_problem_is_reported_too(tmp_path, pool):
    write_report(tmp_path, curation_report(pool, curate(pool, 9, seed=0), {}))
    assert (tmp_path / "curation.png").stat().st_size > 1000
