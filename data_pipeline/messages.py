"""A problem as the parts of a chat message: the format prompt around the question, images and videos in their places."""

import re
from functools import cache

import jinja2

from data_pipeline.errors import DataError
from data_pipeline.placeholders import problem_sizes
from data_pipeline.problems import Problem

_PLACEHOLDER = re.compile("<(image|video)>")


def message_parts(problem: Problem, format_prompt: str = "") -> list[dict[str, str]]:
    """Returns {"type": "image"}, {"type": "video"} and {"type": "text", "text": ...} in the order in which they are read.

    `<image>` and `<video>` in the question say where; without any of them, images and then videos stand before the text.

    Raises:
      DataError: there are as many placeholders neither as images nor as videos, or the format prompt is no Jinja template.
    """
    text = rendered(format_prompt, problem.question) if format_prompt else problem.question
    places = _PLACEHOLDER.findall(text)
    if not places:
        kinds = ["image"] * len(problem.images) + ["video"] * len(problem.videos)
        return [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
    for kind, given in (("image", problem.images), ("video", problem.videos)):
        if places.count(kind) != len(given):
            raise DataError(
                f"problem {problem.problem_id}: {places.count(kind)} <{kind}> in the text for "
                f"{problem_sizes(problem, kind)}; it needs one each, or none at all"
            )
    parts = _PLACEHOLDER.split(text)  # text, kind, text, kind, ..., text
    return [{"type": part} if number % 2 else {"type": "text", "text": part} for number, part in enumerate(parts) if part]


def rendered(template: str, question: str) -> str:
    """Returns the Jinja template with the question as its `content`. Raises `DataError` where it is none."""
    try:
        return _compiled(template).render(content=question)
    except jinja2.TemplateError as error:
        raise DataError(
            f"the format prompt {template[:60]!r} is no Jinja template with {{{{ content }}}}: {error}"
        ) from None


@cache
def _compiled(template: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(template)
