"""Runs in progress and awkward content: no section fails, numbers are the files', text stays text."""

import io
import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest

from ares_jax.reporting import build_report, console_table
from ares_jax.reporting.charts import entropy_along, rollout_curves
from ares_jax.reporting.load import LEVELS
from ares_jax.reporting.tree_view import most_branched_leaf, most_instructive
from tests.reporting.test_report import write_run

SECTIONS = (
    "Result", "Accuracy and length over training", "Branching", "Entropy along a response", "Rollouts by difficulty",
    "Reward, entropy, branches", "Reward parts by difficulty", "KL per difficulty",
    "Cold start: length follows difficulty", "Samples", "Staleness", "Time and tokens", "Environment", "Configuration",
)  # fmt: skip
FILES = (
    "config.json", "stages.json", "aepo/metrics.jsonl", "aepo/rollouts.jsonl", "cold_start/curation.json",
    "evaluation/base.json", "evaluation/cold_start.json",
)  # fmt: skip


class Page(HTMLParser):
    """The tags, addresses and text of a page; an element that is not closed in its place is an error."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.styles, self.text, self._open = [], [], [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        self.styles.append(values.get("style", ""))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path)
    return tmp_path


def edit(path, change):
    """Rewrites a JSON file (or a JSONL file of one line) after `change` was made to its value."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value) + "\n")


def record_with(run, **changes):
    edit(run / "aepo" / "rollouts.jsonl", lambda record: record.update(changes))


def draw(record):
    figure = entropy_along(record, 0)
    figure.savefig(io.BytesIO())
    plt.close(figure)


def test_the_page_is_well_formed_complete_and_alone(run):
    text = build_report(run).read_text()
    page = Page(text)
    assert tuple(re.findall("<h2>(.*?)</h2>", text)) == SECTIONS
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text and "@import" not in text


@pytest.mark.parametrize("missing", FILES)
def test_any_file_may_be_missing(run, missing):
    (run / missing).unlink()
    page = build_report(run).read_text()
    assert all(f"<h2>{section}</h2>" in page for section in SECTIONS)
    console_table(run)


def test_a_run_that_has_only_validated_its_cold_start(run):
    metrics = {"step": 0, "time": 0.0, "validation/accuracy/easy": 0.5, "reward/mean": None}
    (run / "aepo" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (run / "aepo" / "rollouts.jsonl").write_text('{"step": 1, "leav')
    page = build_report(run).read_text()
    assert "No rollouts yet." in page and "Not yet measured." in page
    assert (run / "plots" / "training.png").exists()


def test_the_table_holds_the_numbers_of_the_files(run):
    numbers = itertools.count(1)

    def vary(result):
        for level in result["levels"].values():
            k = next(numbers)
            level.update(accuracy=k / 100, interval=[k / 1000, k / 10], mean_tokens=k * 1.5)

    for name in ("base", "cold_start"):
        edit(run / "evaluation" / f"{name}.json", vary)
    page, table = Page(build_report(run).read_text()).text, console_table(run)
    for name, label in (("base", "base"), ("cold_start", "cold start")):
        levels = json.loads((run / "evaluation" / f"{name}.json").read_text())["levels"]
        cells = [
            f"{v['accuracy']:.1%} [{v['interval'][0]:.1%}, {v['interval'][1]:.1%}] {v['mean_tokens']:.1f} tok"
            for v in (levels[level] for level in ("easy", "medium", "hard"))
        ]
        assert label + "".join(cells) in page
        (line,) = (line for line in table.splitlines() if line.startswith(label))
        assert line.split() == [*label.split(), *" ".join(cells).split()]
    assert "300 easy, 300 medium, 300 hard problems" in table
    assert re.search(r"AEPO +12 s +345 tokens", table)


def test_stages_measured_on_different_problems_are_told_apart(run):
    edit(run / "evaluation" / "cold_start.json", lambda result: result["levels"]["easy"].update(problems=7))
    table = console_table(run)
    assert "base: test split, 300 easy" in table and "cold start: test split, 7 easy" in table


def test_text_stays_text(run):
    bad = "<script>alert('1')</script>\"&"

    def spoil(result):
        result["split"] = bad
        result["samples"][0].update(question=bad, answer=bad, response=bad)

    for name in ("base", "cold_start"):
        edit(run / "evaluation" / f"{name}.json", spoil)
    edit(run / "config.json", lambda config: config.update(name=bad))
    edit(run / "stages.json", lambda stages: stages[0].update(name=bad))
    leaf = {
        "tokens": [bad, "\n", "7"], "entropies": [0.1, 1.2, 0.3], "window_means": [0.5, 0.0, 0.0],
        "window_mask": [False, True, False], "parent": -1, "branch_position": 0, "reward": 1.0, "correct": True,
    }  # fmt: skip
    record_with(run, question=bad, answer=bad, leaves=[leaf, {**leaf, "parent": 0, "branch_position": 2}])
    page = Page(build_report(run).read_text())
    assert "script" not in page.tags
    # The table's note; the sample's question, answer and two responses; the tree's question, answer, token and prefix; the
    # stage. The configuration shows it as JSON does.
    assert page.text.count(bad) == 1 + 4 + 4 + 1
    assert json.dumps(bad) in page.text


@pytest.mark.parametrize("text", ["cost $x^$", "$\\bad$", "\\$", "word" * 400, "", "\u00e9\n\u00fc"])
def test_plots_take_any_text(run, text):
    record = json.loads((run / "aepo" / "rollouts.jsonl").read_text())
    leaves = [{**leaf, "tokens": [text] * 3} for leaf in record["leaves"]]
    draw({**record, "question": text, "leaves": leaves})


@pytest.mark.parametrize("tau", [float("inf"), float("nan")])
def test_a_run_without_a_threshold(run, tau):
    draw({**json.loads((run / "aepo" / "rollouts.jsonl").read_text()), "tau_high": tau})


def test_long_responses_are_drawn_without_a_label_a_token():
    n = 4000
    leaf = {
        "tokens": [" t"] * n, "entropies": [0.3] * n, "window_means": [0.2] * n, "window_mask": [False] * n,
        "parent": -1, "branch_position": 0, "reward": 1.0, "correct": True,
    }  # fmt: skip
    figure = entropy_along({"step": 1, "question": "q", "tau_high": 0.4, "leaves": [leaf]}, 0)
    assert len(figure.axes[0].get_xticks()) < 50 and figure.axes[0].get_xlim()[1] == n - 0.5
    plt.close(figure)


def test_a_branch_stands_under_its_place_though_the_prefix_breaks_lines(run):
    leaf = {
        "tokens": ["a\n", "b", "c"], "entropies": [0.1] * 3, "window_means": [0.1] * 3, "window_mask": [False] * 3,
        "parent": -1, "branch_position": 0, "reward": 1.0, "correct": True,
    }  # fmt: skip
    record_with(run, leaves=[leaf, {**leaf, "parent": 0, "branch_position": 2}])
    page = build_report(run).read_text()
    lines = re.findall(r'<div class="leaf">.*?<code>(.*?)</code>', page)
    root, branch = (re.sub("<.*?>", "", line) for line in lines)
    assert root == "a\u23cebc" and branch == "a\u23ceb&#8627;c"


def test_plots_keep_their_size_on_a_phone(run):
    styles = [style for style in Page(build_report(run).read_text()).styles if style]
    plots = [style for style in styles if "min-width" in style]
    assert len(plots) == len(list((run / "plots").iterdir()))


def test_a_phone_shows_what_the_colours_mean_without_scrolling():
    """It shows the first 358 pixels of a plot, at 65 pixels an inch."""

    class Made:
        metrics = [{"step": step, f"length/{level}": 1.0} for step in (1, 2) for level in LEVELS]

    figure = rollout_curves(Made)
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().x1 / figure.dpi < 358 / 65
    plt.close(figure)


def test_the_tree_with_mixed_outcomes_then_most_branches_is_drawn():
    def record(step, *leaves):
        return {"step": step, "leaves": [{"correct": right, "parent": parent} for right, parent in leaves]}

    all_right = record(1, (True, -1), (True, 0), (True, 0))
    mixed = record(2, (True, -1), (False, -1), (True, 1), (True, 1))
    fewer = record(3, (True, -1), (False, -1), (True, 0))

    class Made:
        rollouts = [all_right, mixed, fewer]

    assert most_instructive(Made) is mixed
    assert most_branched_leaf(mixed) == 1
