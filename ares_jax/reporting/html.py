"""The page: everything in one file, nothing fetched from anywhere."""

import base64
import io
import json
import warnings
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ares_jax.metrics import goodput_sentence, write_atomic
from ares_jax.reporting import charts
from ares_jax.reporting.load import LEVELS, STAGES, RunRecords, load_run
from ares_jax.reporting.table import branching_sentence, headline_rows, overlap_sentence, problems_note
from ares_jax.reporting.tree_view import most_branched_leaf, most_instructive, tree_html, trees_to_show

_CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c2a33;background:#fff;margin:0 auto;max-width:1080px;padding:1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #dde3e7}
table{border-collapse:collapse}th,td{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #e6eaed}
.scroll{overflow-x:auto}img.plot{width:100%;height:auto}.note{color:#5a6972;font-size:.9rem}
.tree{overflow-x:auto;border:1px solid #e0e5e8;border-radius:6px;padding:.6rem}.leaf{white-space:pre;margin-bottom:.35rem}
.leaf.long{white-space:pre-wrap;overflow-wrap:anywhere}.leaf code{font:13px/1.6 ui-monospace,monospace}
.node summary{font-size:.8rem}.node .node.node>summary{padding-left:1.2rem}
summary{cursor:pointer}summary,h1{overflow-wrap:anywhere}
.right{color:#1d7a5f}.wrong{color:#a8322b}.w{text-decoration:underline 2px #264653}.record{margin:.5rem 0}
.shared{color:#8b979f}.fork{color:#c1443c;font-weight:bold}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:.8rem}
.card{border:1px solid #e0e5e8;border-radius:6px;padding:.6rem;overflow-wrap:anywhere}.card p{margin:.2rem 0}
.card img,.prompt{image-rendering:pixelated;height:56px;max-width:100%;object-fit:contain;object-position:left}
.shown{max-width:100%;max-height:360px;border-radius:6px;margin:0 .6rem .6rem 0}
.answer{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.7 ui-monospace,monospace}.h{border-bottom:2px dotted #264653}
.card code{font-size:.8rem}pre{overflow-x:auto;background:#f5f7f8;padding:.6rem;font-size:.8rem}
"""
_MISSING = '<p class="note">Not yet measured.</p>'


# What was opened stays open when a page of a run in progress loads itself again.
_RELOAD = """<script>
document.querySelectorAll("details").forEach((d, i) => {{
  const was = sessionStorage.getItem("open" + i);
  if (was !== null) d.open = was === "1";
  d.addEventListener("toggle", () => sessionStorage.setItem("open" + i, d.open ? "1" : "0"));
}});
setTimeout(() => location.reload(), {milliseconds});
</script>"""


def build_report(folder: Path, *, reload_every: int = 0) -> Path:
    """Writes `report.html` and `plots/*.png` into the run's folder and returns the page's path.

    What the run has not measured yet is said so; nothing is needed but the folder. `reload_every`: seconds after which an
    open page loads itself again; 0: it stays.
    """
    run = load_run(folder)
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)

    def plot(name: str, figure: Figure | None) -> str:
        if figure is None:
            return _MISSING
        content, png = figure_html(name, figure)
        (plots / f"{name}.png").write_bytes(png)
        return content

    record = most_instructive(run)
    sections = [
        ("Result", _headline(run)),
        ("Accuracy and length over training", plot("training", charts.training_curves(run))),
        ("Branching", f"<p>{branching_sentence(run)}</p>" + _trees(run)),
        (
            "Entropy along a response",
            plot("entropy", charts.entropy_along(record, most_branched_leaf(record)) if record else None),
        ),
        ("Rollouts by difficulty", plot("rollouts", charts.rollout_curves(run))),
        ("Reward, entropy, branches", plot("reward", charts.reward_curves(run))),
        ("Reward parts by difficulty", plot("reward_parts", charts.reward_parts(run))),
        ("KL per difficulty", plot("kl", charts.kl_curves(run))),
        ("Cold start: length follows difficulty", _curation(run) + plot("curation", charts.curation_plot(run))),
        ("Samples", _samples(run)),
        ("Staleness", plot("policy", charts.policy_curves(run))),
        ("Time and tokens", _stages(run) + _times(run) + plot("time", charts.time_curves(run))),
        ("Environment", _environments(run)),
        ("Configuration", f"<details><summary>show</summary><pre>{_pretty(run.config)}</pre></details>"),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    body += _RELOAD.format(milliseconds=1000 * reload_every) if reload_every else ""
    page = whole_page(f"ARES: {folder.resolve().name}", body)  # --workdir=. has a name, too
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def whole_page(title: str, body: str) -> str:
    """Returns a page that fetches nothing: `body` (HTML) below `title` (text)."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>"
    )


def figure_html(name: str, figure: Figure) -> tuple[str, bytes]:
    """Returns a figure as HTML, and as PNG. It is closed."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a token in a script that the font lacks is a box on the axis; the page has its text
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    # On a phone a plot scrolls rather than shrinks beyond reading.
    width = f"max-width:{110 * figure.get_figwidth():.0f}px;min-width:{65 * figure.get_figwidth():.0f}px"
    image = f'<img class="plot" style="{width}" alt="{escape(name)}" src="data:image/png;base64,{data}">'
    return f'<div class="scroll">{image}</div>', buffer.getvalue()


def _headline(run: RunRecords) -> str:
    rows = headline_rows(run)
    if not rows:
        return _MISSING
    return (
        _table(["", *LEVELS], [[label, *cells] for label, cells in rows])
        + f'<p class="note">{escape(problems_note(run))}</p>'
    )


def _trees(run: RunRecords) -> str:
    records = trees_to_show(run)
    if not records:
        return ""
    legend = (
        '<p class="note">Every leaf opens to its tokens and branches. Colour: token entropy. Underlined: a validated '
        "high-entropy window starts here. Grey: tokens a branch shares with its parent.</p>"
    )
    return legend + "".join(_tree(record, opened=number == 0) for number, record in enumerate(records))


def _tree(record: dict, *, opened: bool) -> str:
    image = f'<img class="prompt" alt="the problem\'s image" src="{escape(record["image"])}">' if record["image"] else ""
    leaves = record["leaves"]
    right, branches = sum(leaf["correct"] for leaf in leaves), sum(leaf["parent"] >= 0 for leaf in leaves)
    return (
        f'<details class="record"{" open" * opened}><summary>Step {record["step"]}, {escape(record["level"])}: '
        f"{escape(record['question'])} (answer {escape(record['answer'])}): {len(leaves)} leaves, {branches} branches, "
        f"{right} right</summary>{image}{tree_html(record, opened=opened)}</details>"
    )


def _curation(run: RunRecords) -> str:
    if not run.curation:
        return ""
    before, after = run.curation["correlation_before"], run.curation["correlation_after"]
    return f"<p>Correlation of trace length with difficulty: {before:.2f} before curation, {after:.2f} after.</p>"


def _samples(run: RunRecords) -> str:
    if not run.evaluations:
        return _MISSING
    by_stage = {name: {s["problem_id"]: s for s in e["samples"]} for name, e in run.evaluations.items()}
    latest = by_stage[next(reversed(by_stage))]
    shown = [s for level in LEVELS for s in [s for s in latest.values() if s["level"] == level][:4]]
    cards = []
    for sample in shown:
        image = f'<img alt="the problem&#39;s image" src="{escape(sample["image"])}">' if sample["image"] else ""
        answers = "".join(
            f"<p>{'&#10003;' if s['correct'] else '&#10007;'} <b>{STAGES[name]}</b>, {s['tokens']} tokens: "
            f"<code>{escape(s['response'])}</code></p>"
            for name, samples in by_stage.items()
            if (s := samples.get(sample["problem_id"]))
        )
        head = f"<p>{escape(sample['level'])}: {escape(sample['question'])} <b>{escape(sample['answer'])}</b></p>"
        cards.append(f'<div class="card">{image}{head}{answers}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _stages(run: RunRecords) -> str:
    rows = [
        [escape(s["name"]), f"{s['seconds']:.0f} s", f"{s['tokens']:,}", f"{s['tokens'] / max(s['seconds'], 1e-9):,.0f}"]
        for s in run.stages
    ]
    return _table(["stage", "time", "tokens", "tokens/s"], rows) if rows else _MISSING


def _times(run: RunRecords) -> str:
    return f"<p>{overlap_sentence(run)}</p><p>{goodput_sentence(run.metrics)}</p>"


def _environments(run: RunRecords) -> str:
    facts = {name: None for environment in run.environments.values() for name in environment}  # in order, once
    rows = [[name, *(escape(e.get(name, "")) for e in run.environments.values())] for name in facts]
    return _table(["", *map(escape, run.environments)], rows) if rows else _MISSING


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def _pretty(config: dict) -> str:
    return escape(json.dumps(config, indent=1))
