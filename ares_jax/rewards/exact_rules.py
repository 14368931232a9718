r"""Answers that need no algebra: numbers with units and percentages, choices, words. Microseconds each, and strict.

What these rules decide, math-verify is not asked: it drops units (5 m would equal 5 cm) and takes words for products of
letters (cat would equal act).
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 200  # characters of a number: int() of a text takes quadratic time
_FRACTION_DIGITS = 4  # significant digits that a decimal needs to stand for a fraction: 0.3333 for 1/3
_DECIMAL_DIGITS = 6  # and to stand for a longer decimal

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:[ ][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>\\?\$|€|£)?\s*(?P<inner>[-+]?)\s*
    (?:(?P<whole>[0-9]+)\s*(?:\\frac\{{|\s(?=[0-9]+/))(?P<part>[0-9]+)(?:\}}\{{|/)(?P<of>[0-9]+)\}}?
     |\\frac\{{\s*(?P<top>[-+]?\s*(?:{_PLAIN}))\s*\}}\{{\s*(?P<bottom>[-+]?\s*(?:{_PLAIN}))\s*\}}
     |(?P<over>{_PLAIN})\s*/\s*(?P<under>{_PLAIN})
     |(?P<number>{_PLAIN})(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?(?P<power>[-+]?[0-9]{{1,3}})\}}?
        |[eE](?P<exponent>[-+]?[0-9]{{1,3}}))?)
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_ASSIGNED = re.compile(r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\s*\([a-z]\))?\s*)?(?:=|\\approx)\s*(?P<value>[^=]+)", re.DOTALL)
_SCALE = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_UNITS = {
    "%": "% percent percentage pct",
    "deg": r"degree degrees deg ^\circ",
    "rad": "rad radian radians",
    "celsius": r"celsius ^\circ C",
    "fahrenheit": r"fahrenheit ^\circ F",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "dm": "dm decimeter decimeters",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "t": "t ton tons tonne tonnes",
    "ml": "ml mL milliliter milliliters",
    "l": "l L liter liters litre litres",
    "ms": "ms millisecond milliseconds",
    "s": "s sec second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "$": "$ dollar dollars usd USD",
    "cent": "cent cents",
    "€": "€ euro euros EUR",
    "£": "£ GBP",
    "N": "N newton newtons",
    "J": "J joule joules",
    "kJ": "kJ",
    "W": "W watt watts",
    "kW": "kW",
    "V": "V volt volts",
    "A": "A ampere amperes amp amps",
    "ohm": r"\Omega ohm ohms",
    "Hz": "Hz hertz",
    "Pa": "Pa pascal pascals",
    "kPa": "kPa",
    "K": "K kelvin",
    "mol": "mol mole moles",
}  # of a line: the name used here, then what it is written as
_UNIT = {spelling: name for name, line in _UNITS.items() for spelling in re.split(r"(?<!\\circ) ", line)}
_POWERS = re.compile(  # of a unit, perhaps over another: square cm, cm^2, m/s^2, meters per second
    r"(?:(square|sq|cubic|cu)\.? )?([A-Za-z]+)(?: ?\^ ?(-?[0-9]))?(?: ?(?:/|per) ?([A-Za-z]+)(?: ?\^ ?([0-9]))?)?"
)
_NO_UNIT = re.compile(r"\b(?:or|and|to|mod|more|less|than|not|pi|sqrt|sin|cos|tan|log|ln|exp|x|y|z|i|e)\b")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")

_LETTER = re.compile(r"[(\[]?([A-J])[)\].:]?[)]?")
_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:?\s*)?"
    r"[(\[]?(?P<letter>[A-Ja-j])(?:[)\].:]+|$)(?P<text>.*)",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(r"(?:^|[\s(\[,])[A-J](?:[)\].:]|$)|^\s*(?:or|and)\b")
_LETTERS = re.compile(r"[(\[]?[A-J](?:[)\]]?\s*(?:[,;&]|\band\b|\s)\s*(?:and\s+)?[(\[]?[A-J])+[)\]]?")
_RUN = re.compile(r"[A-J]{2,10}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' ,\-]*")
_FUNCTIONS = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|lim|det|gcd|lcm)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number with its unit."""

    value: Fraction
    unit: str  # "": none, or a noun that counts ("apples")
    is_fraction: bool
    decimals: int  # places after the point; -1: no point

    @property
    def real(self) -> float:
        """The value as a float; infinite where that has no room for it (1e999)."""
        try:
            return float(self.value)
        except OverflowError:
            return math.inf if self.value > 0 else -math.inf


def exact_verdict(given: str, wanted: str) -> bool | None:
    """Says whether two cleaned answers are the same; None where only algebra can tell."""
    if _squeezed(given) == _squeezed(wanted):
        return True
    given, wanted = _value(given, wanted), _value(wanted, given)
    if (letter := _LETTER.fullmatch(wanted)) is not None:
        return _chosen(given) == letter[1]
    if (letters := _letters(wanted, given)) is not None:
        return letters == _letters(given, wanted)
    if (ours := quantity(given)) is not None and (theirs := quantity(wanted)) is not None:
        return _same_quantity(ours, theirs)
    if _is_words(wanted):
        return _words(given) == _words(wanted)
    return None


def quantity(text: str) -> Quantity | None:
    """Returns the number that a cleaned answer is, None if it is anything else."""
    if len(text) > _LONGEST or (match := _NUMBER.fullmatch(text)) is None:
        return None
    unit = _unit(match["rest"])
    if unit is None or (match["currency"] and unit[0]):
        return None
    decimals, fraction = -1, True
    if match["whole"] is not None:
        denominator = int(match["of"])
        value = int(match["whole"]) + Fraction(int(match["part"]), denominator) if denominator else None
    elif match["number"] is not None:
        power = int(match["power"] or match["exponent"] or 0)
        value, fraction = _fraction(match["number"]) * Fraction(10) ** power, False
        decimals = len(match["number"].partition(".")[2]) - power if "." in match["number"] else -1
    else:
        top, bottom = (_fraction(match[a] or match[b]) for a, b in (("top", "over"), ("bottom", "under")))
        value = top / bottom if bottom else None
    if value is None:
        return None
    if "-" in (match["sign"], match["inner"]) and match["sign"] != match["inner"]:
        value = -value
    name = match["currency"].lstrip("\\") if match["currency"] else unit[0]
    return Quantity(value * unit[1], name, fraction, decimals)


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ]", "", text).rstrip(".") or "0")


def _unit(rest: str) -> tuple[str, int] | None:
    """Returns the unit's name and the scale that words such as "million" give; None if the rest is no unit."""
    bare = _TEXT.sub(r" \1 ", rest) if "\\text" in rest else rest
    text = " ".join(bare.replace("{", "").replace("}", "").replace("\\$", "$").split())
    scale = 1
    first, _, others = text.partition(" ")
    if first in _SCALE:
        scale, text = _SCALE[first], others
    if not text:
        return "", scale
    if (name := _UNIT.get(text)) is not None:
        glued = len(text) == 1 and text.isalpha() and bare[:1].isalpha()  # 5m: a product, perhaps
        return None if glued else (name, scale)
    parts = _POWERS.fullmatch(text)
    if parts and parts[2] in _UNIT and not (len(parts[2]) == 1 and bare[:1].isalpha()):
        power = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}.get(parts[1], parts[3] or "1")
        below = f"/{_UNIT.get(parts[4], parts[4])}^{parts[5] or 1}" if parts[4] else ""
        return f"{_UNIT[parts[2]]}^{power}{below}", scale
    noun = re.fullmatch(r"[A-Za-z][A-Za-z \-]+", text) and (bare[:1] == " ") and max(map(len, text.split())) > 2
    return ("", scale) if noun and not _NO_UNIT.search(text) else None


def _same_quantity(given: Quantity, wanted: Quantity) -> bool:
    units = {given.unit, wanted.unit}
    if "%" in units:
        if units == {"%"}:
            return _same_number(given, wanted)
        bare = given if wanted.unit == "%" else wanted
        if bare.unit:
            return False
        decimals = bare.decimals - 2 if bare.decimals >= 2 else bare.decimals
        hundredth = Quantity(bare.value * 100, "%", bare.is_fraction, decimals)
        percent = wanted if bare is given else given
        return _same_number(hundredth, percent) or (abs(bare.value) > 1 and _same_number(bare, percent))
    return (given.unit == wanted.unit or "" in units) and _same_number(given, wanted)


def _same_number(a: Quantity, b: Quantity) -> bool:
    """Equal, or one is a decimal of enough digits that the other rounds to."""
    if a.value == b.value:
        return True
    for short, long in ((a, b), (b, a)):
        if short.decimals < 0 or (long.decimals >= 0 and long.decimals <= short.decimals):
            continue
        if not long.is_fraction and long.decimals < 0:
            continue
        digits = len(str(abs(int(short.value * Fraction(10) ** short.decimals))))
        enough = digits >= (_FRACTION_DIGITS if long.is_fraction else _DECIMAL_DIGITS)
        if enough and abs(short.value - long.value) * 2 <= Fraction(10) ** -short.decimals:
            return True
    return False


def _value(text: str, other: str) -> str:
    """Returns what stands behind "x =" if the other side names no variable."""
    if "=" not in other and "\\approx" not in other and (match := _ASSIGNED.fullmatch(text)) is not None:
        return match["value"].strip()
    return text


def _chosen(text: str) -> str | None:
    match = _CHOICE.fullmatch(text)
    return None if match is None or _ANOTHER.search(match["text"]) else match["letter"].upper()


def _letters(text: str, other: str) -> frozenset[str] | None:
    """Returns the letters of a multiple choice; a run such as "ABD" is one if the other side is a list, too."""
    if _LETTERS.fullmatch(text):
        return frozenset(re.findall(r"[A-J]", text))
    if _RUN.fullmatch(text) and list(text) == sorted(set(text)) and _LETTERS.fullmatch(other):
        return frozenset(text)
    return None


def _is_words(text: str) -> bool:
    text = _TEXT.sub(r"\1", text)
    longest = max((word for word in re.findall(r"[A-Za-z]+", text)), key=len, default="")
    plausible = len(longest) > 2 and not longest.isupper() and re.search("[aeiou]", longest, re.IGNORECASE)
    return bool(plausible and _WORDS.fullmatch(text) and not _FUNCTIONS.search(text))


def _words(text: str) -> str:
    text = _TEXT.sub(r"\1", text).casefold().replace("-", " ")
    return re.sub(r"^(?:the|an?) ", "", " ".join(re.sub(r"[,'.!]", " ", text).split()))


def _squeezed(text: str) -> str:
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)  # 1 1/2 is not 11/2
