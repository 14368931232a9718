"""An answer as its writer meant it: LaTeX wrappers, spacing commands and Unicode look-alikes removed."""

import re
import unicodedata

_UNICODE = str.maketrans(
    {
        "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "−": "-", "–": "-", "—": "-",
        "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "°": r"^\circ ", "∞": r"\infty ", "π": r"\pi ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "≈": r"\approx ",
        "∈": r"\in ", "’": "'",
    }
)  # fmt: skip
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\{,\}", ","),  # 1{,}000
        (r"\\\\\s*\[[0-9. ]+[a-z]{2}\]", r"\\\\"),  # a matrix's row that ends with some space
        (r"(?<!\\)\\[,;:!> ]|\\q?quad\b|~", " "),  # not the end of a matrix's row
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"\\[dtc]frac\b", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
        (r"\\(?:mathrm|textbf|textrm|textit|texttt|mathbf|mathit|mathsf|mbox|rm|bf)\s*\{", r"\\text{"),
        (r"\\%", "%"),
        (r"\\(?:varnothing|O)\b", r"\\emptyset"),
        (r"\\[lr]brace\b", lambda match: r"\{" if match[0][1] == "l" else r"\}"),
        (r"\\(?:leq|leqslant)\b", r"\\le"),
        (r"\\(?:geq|geqslant)\b", r"\\ge"),
        (r"\\boxed\s*\{", "{"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?", r"^\\circ "),
        (r"\\degree\b", r"^\\circ "),
        (r"\s+", " "),
    )
]
_WRAPPERS = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\text{", "}"), ("{", "}"), ("**", "**"), ("`", "`"))


def cleaned(answer: str) -> str:
    """Returns the answer without what does not change its meaning. Linear in its length."""
    text = unicodedata.normalize("NFKC", answer.translate(_UNICODE))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    previous = None
    while text != previous:
        previous = text
        text = text.strip().rstrip(".,;").strip()
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                if opening not in inner and closing not in inner and balanced(inner):
                    text = inner
    return text


def balanced(text: str) -> bool:
    """Says whether every brace that opens is closed, and the other way round."""
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0
