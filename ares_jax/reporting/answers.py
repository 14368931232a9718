"""The page of a few answers: their tokens coloured by entropy, their windows marked, entropy along each of them."""

from collections.abc import Sequence
from html import escape

from ares_jax.reporting.charts import entropy_along
from ares_jax.reporting.html import figure_html, whole_page
from ares_jax.reporting.tree_view import tokens_html


def answers_page(title: str, note: str, questions: Sequence[dict]) -> str:
    """Returns one page that fetches nothing.

    Args:
      title, note: of the page, text.
      questions: each with "question", "images" (data URLs) and "answers": leaves as `train` logs them, with "tau_high" (its
        threshold, nats) and "marks" (of each token: "h" in a high-entropy window, "w" where a validated one starts).
    """
    sections = "".join(_question(number, question) for number, question in enumerate(questions, start=1))
    legend = (
        "Colour: token entropy. Dotted: inside a high-entropy window. Underlined: one starts here with a trigger word, a "
        "place where AEPO would branch. A token's numbers show when it is pointed at."
    )
    return whole_page(title, f'<p class="note">{escape(note)}</p><p class="note">{legend}</p>{sections}')


def _question(number: int, question: dict) -> str:
    images = "".join(f'<img class="shown" alt="image {i}" src="{escape(u)}">' for i, u in enumerate(question["images"], 1))
    answers = "".join(_answer(question["question"], index, leaf) for index, leaf in enumerate(question["answers"], 1))
    text = f'<p class="answer">{escape(question["question"])}</p>'
    return f"<section><h2>Question {number}</h2>{images}{text}{answers}</section>"


def _answer(question: str, index: int, leaf: dict) -> str:
    top = max(leaf["entropies"], default=1.0) or 1.0
    mean = sum(leaf["entropies"]) / max(len(leaf["entropies"]), 1)
    note = (
        f"{len(leaf['tokens'])} tokens, {leaf['finish_reason']}; mean entropy {mean:.2f} nats, "
        f"{sum('w' in mark.split() for mark in leaf['marks'])} validated high-entropy windows (threshold "
        f"{leaf['tau_high']:.2f} nats)"
    )
    record = {"question": question, "tau_high": leaf["tau_high"], "leaves": [leaf]}
    chart, _ = figure_html(f"entropy along answer {index}", entropy_along(record, 0))
    return (
        f'<h3>Answer {index}</h3><div class="answer">{tokens_html(leaf, top, leaf["marks"])}</div>'
        f'<p class="note">{note}</p>{chart}'
    )
