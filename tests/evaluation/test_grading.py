"""Hard cases of grading, each (answer in the box, reference, verdict); whole responses, hostile ones, threads, speed."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.errors import UserError
from ares_jax.rewards import grading, verifier
from ares_jax.rewards.answer_text import cleaned
from ares_jax.rewards.exact_rules import exact_verdict
from ares_jax.rewards.grading import extract_answer, has_format, is_correct

ROOT = Path(__file__).parents[2]
SAME = {
    "numbers": [
        ("7", "7"), ("07", "7"), ("7.0", "7"), ("7.", "7"), ("+7", "7"), ("-0", "0"), ("−3", "-3"), ("７", "7"),
        ("1,234", "1234"), ("1{,}234", "1234"), (r"1\,234", "1234"), ("1 234.0", "1234"), ("12 345 678", "12,345,678"),
        (".5", "0.5"), ("1e3", "1000"), (r"1.2\times 10^{3}", "1200"), ("1.2 × 10^3", "1200"), ("2^{10}", "1024"),
        ("9" * 180, "9" * 180), ("0.333333", "0.33333333"),
    ],
    "wrappers": [
        ("$7$", "7"), (r"\(7\)", "7"), ("**7**", "7"), ("7.", "$7$"), (r"\text{7}", "7"), (r"\boxed{5}", "5"),
        (r"x=\boxed{5}", "5"), (r"\displaystyle\frac{1}{2}", "1/2"),
    ],
    "fractions": [
        (r"\frac{1}{2}", "0.5"), ("1/2", r"\frac12"), (r"\dfrac{1}{2}", "1/2"), (r"\frac{2}{4}", "1/2"), ("½", "0.5"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{-3}{-4}", "3/4"), (r"1\frac{1}{2}", "1.5"), ("1 1/2", "3/2"),
        ("1½", "1.5"), ("0.3333", "1/3"), ("1/3", "0.333333"), ("0.66667", "2/3"), (r"\frac{a}{b}", "a/b"), ("3:4", "3/4"),
    ],
    "units": [
        ("5 cm", "5"), ("5", "5 cm"), (r"5\text{ cm}", "5 cm"), (r"5\,\mathrm{cm}", "5 centimeters"), ("5 cm^2", "5 cm²"),
        ("5 square centimeters", r"5\text{ cm}^2"), (r"90^\circ", "90"), ("90°", "90 degrees"), (r"90^{\circ}", r"90^\circ"),
        (r"20^\circ C", "20"), (r"\$5", "5"), ("$5", "5 dollars"), ("12 apples", "12"), ("10 m/s", r"10\text{ m/s}"),
        (r"3\text{ meters per second}", "3 m/s"), ("3 million", "3000000"), ("2 dozen", "24"),
    ],
    "percentages": [
        ("50%", "0.5"), (r"50\%", "50"), ("50", "50%"), ("0.5", "50%"), ("12.5%", "12.5"), ("12.5 percent", r"12.5\%"),
        ("100%", "1"), (r"33.33\%", "33.33"),
    ],
    "choices": [
        ("(B)", "B"), ("B.", "B"), ("b", "B"), (r"\text{B}", "B"), (r"\textbf{(B)}", "B"), ("B. 12 cm", "B"),
        ("(B) 12 cm", "B"), ("B: because", "B"), ("Option B", "B"), ("The answer is B", "B"), ("B", "(B)"),
        ("A, C", "C, A"), ("A and C", "A, C"), ("A,B,D", "ABD"),
    ],
    "words": [
        ("Yes", "yes"), ("yes.", "Yes"), (r"\text{No solution}", "no solution"), ("the cat", "Cat"), ("blue", "Blue"),
        ("North-East", "north east"), ("New  York", "new york"),
    ],
    "intervals": [
        ("[1,2]", "[1, 2]"), (r"\left[1,2\right)", "[1,2)"), (r"(-\infty,2]", r"x\le 2"), (r"x\in[1,3]", "[1,3]"),
        ("1<x<2", "(1,2)"), (r"[1,2)\cup(3,4]", "(3,4]∪[1,2)"), ("(-∞, 5)", r"(-\infty,5)"), ("x<2", "2>x"),
        (r"(\frac{1}{2},3)", "(0.5,3)"),
    ],
    "sets": [
        (r"\{1,2\}", r"\{2,1\}"), (r"\lbrace 1,2\rbrace", r"\{1,2\}"), ("1,2", "2,1"), (r"\varnothing", r"\emptyset"),
        ("∅", r"\emptyset"), (r"\pm 2", "2,-2"), (r"x=1 \text{ or } x=2", "1,2"), ("1 and 2", "1, 2"),
    ],
    "algebra": [
        ("x=5", "5"), ("5", "x=5"), ("y=2x+1", "2x+1"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}"),
        ("x^2-1", "(x-1)(x+1)"), (r"2\sqrt3", r"\sqrt{12}"), ("2√3", r"2\sqrt{3}"), ("10^{3}", "1000"), (r"\log_2 8", "3"),
        ("5!", "120"), ("3+4i", "4i+3"), ("b+a", "a+b"), (r"\sin^2 x+\cos^2 x", "1"), ("x+y=3", "y=3-x"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\[6pt] \frac12 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}"),
        (r"\approx 3.14", "3.14"),
        ("2π", r"2\pi"), ("6.28318531", r"2\pi"),
    ],
}  # fmt: skip
DIFFERENT = {
    "numbers": [
        ("7", "8"), ("-7", "7"), ("7", "17"), ("1,234", "1.234"), ("1e3", "100"), ("2", "2.0000001"), ("7", "seven"),
        ("0.0000001", "0.0000002"), ("1234567", "1234567.4"), ("2 3", "23"), ("1e999", "5"), ("0.3", "0.33"), ("3.2", "3"),
    ],
    "fractions": [
        ("0.33", "1/3"), ("0.3332", "1/3"), ("2/3", "3/2"), ("1/0", "0"), (r"\frac{1}{0}", "1"), ("1 1/2", "11/2"),
        ("3:4", "4:3"),
    ],
    "units": [
        ("5 m", "5 cm"), ("5 cm^2", "5 cm^3"), ("5 cm", "5 cm^2"), ("5 km", "5 kg"), ("3 million", "3"), ("5x", "5"),
        ("5 or 6", "5"), (r"\$5", "5 euros"),
    ],
    "percentages": [("0.5%", "0.5"), ("50%", "5"), ("5%", "50%"), ("50%", "50 cm")],
    "choices": [
        ("A", "B"), ("A or B", "A"), ("A, B", "A"), ("A. B. C.", "A"), ("A. or B.", "A"), ("(A)(B)", "B"), ("A,B", "A,B,C"),
        ("AB", "B"), ("12", "B"), ("a", "D"),
    ],
    "words": [
        ("act", "cat"), ("no", "yes"), ("red", "blue"), ("not blue", "blue"), ("blue or red", "blue"), ("7", "blue"),
    ],
    "intervals": [
        ("[1,2]", "(1,2)"), ("[1,2)", "(1,2]"), ("(2,1)", "(1,2)"), ("x<2", r"x\le 2"), ("x<2", "x>2"), ("(3,4)", "(3,4,5)"),
    ],
    "sets": [(r"\{1,2\}", r"\{1,2,3\}"), ("5,6", "5"), ("1,2", "1,3"), ("1,2,3,4,5", "5")],
    "algebra": [
        ("a-b", "a+b"), ("x^3", "x^2"), ("x=6", "x=5"), ("2.7", "e"), (r"\sqrt{2}", "2"), ("y+1", "x+1"), ("4=5", "6"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
    "hostile": [
        ("", "5"), (" ", "5"), ("(" * 300, "5"), (r"\frac{" * 200 + "1}{2" + "}" * 200, "5"), ("9" * 5000, "5"),
        ("\\", "5"), ("\x00", "5"), ("^" * 100, "5"), ("1e-999", "5"), ("[]", "5"), ("\ud800", "5"), ("𝟝𝟝", "5"),
        (r"\input{/etc/passwd}", "5"), ("__import__('os').abort()", "5"), (r"5$ $6", "6"),
    ],
}  # fmt: skip
CASES = [
    pytest.param(
        given, answer, verdict, id=f"{kind}: {given[:30]!r} for {answer[:30]!r}".encode("ascii", "replace").decode()
    )
    for verdict, table in ((True, SAME), (False, DIFFERENT))
    for kind, pairs in table.items()
    for given, answer in pairs
]


@pytest.mark.parametrize("given, answer, verdict", CASES)
def test_answers(given, answer, verdict):
    assert is_correct(rf"<think> hm </think> \boxed{{{given}}}", answer) is verdict


@pytest.mark.parametrize(
    "response, answer, verdict",
    [
        (r"\boxed{1} and \boxed{7}", "7", True), (r"\boxed{1} and \boxed{7}", "1", False),  # the last one counts
        (r"\boxed{\frac{1}{2}}", "0.5", True), (r"\boxed{x = \boxed{7}}", "7", True), (r"\boxed {7}", "7", True),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", True), (r"\boxed{\boxed{\boxed{7}}} done", "7", True),
        (r"<think>\boxed{7}</think>\boxed{1}", "7", False), (r"<think>\boxed{7}</think>so 7", "7", False),
        (r"<think>it is \boxed{7}", "7", False), (r"a</think>\boxed{7}", "7", True),
        (r"<think>a</think><think>\boxed{7}", "7", False),
        (r"\boxed{7", "7", False), (r"\boxed{7} or \boxed{8", "7", False), ("7", "7", False), ("", "7", False),
        (r"\boxed{}", "", False), (r"\boxed{}", "7", False), (r"\boxed{7}", "", False), (r"boxed{7}", "7", False),
    ],
)  # fmt: skip
def test_responses(response, answer, verdict):
    assert is_correct(response, answer) is verdict


@pytest.mark.parametrize(
    "response, verdict",
    [
        (r"<think>a</think>\boxed{7}", True), ("\n<think>\na\n</think>\nSo \\boxed{7}, done.", True),
        (r"<think></think>\boxed{x^{2}}", True), (r"a</think>\boxed{7}", False), (r"<think>a \boxed{7}", False),
        (r"<think>\boxed{7}</think>7", False), (r"so <think>a</think>\boxed{7}", False), (r"\boxed{7}", False),
        (r"\boxed{7}<think>a</think>", False), (r"<think>a</think><think>b</think>\boxed{7}", False),
        (r"<think>a</think>\boxed{7", False), ("", False),
    ],
)  # fmt: skip
def test_the_format_is_think_and_then_a_box(response, verdict):
    assert has_format(response) is verdict


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "(10^9)!"])
def test_an_answer_that_hangs_algebra_is_wrong_in_time_and_the_next_is_graded(bomb):
    begin = time.monotonic()
    assert not is_correct(rf"\boxed{{{bomb}}}", "1")
    assert not is_correct(rf"\boxed{{{bomb}}}", "1")  # known by now
    assert time.monotonic() - begin < 30  # 2 s of CPU, on a busy machine
    assert is_correct(r"\boxed{u+v}", "v+u")


_IGNORES = """
import signal
signal.signal(signal.SIGPROF, signal.SIG_IGN)  # as libtpu leaves it
from ares_jax.rewards import verifier
verifier.CPU_SECONDS = 0.5
worker = verifier._Worker()
print(worker.ask("9^{9^{9^{9}}}", "1"), worker.ask("c+d", "d+c"))
worker.stop()
"""


def test_a_bomb_ends_also_where_the_process_that_asks_ignores_the_signal_of_the_limit():
    done = subprocess.run([sys.executable, "-c", _IGNORES], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False True\n", done.stderr


def test_a_dead_worker_costs_nothing_but_its_pair(monkeypatch):
    worker = verifier._Worker()
    assert worker.ask("c+d", "d+c")
    worker._process.kill()
    worker._process.wait()
    assert worker.ask("c+d", "d+c")
    worker.stop()
    monkeypatch.setattr(verifier.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="math-verify does not start"):
        worker.ask("c+d", "d+c")


def test_grading_works_in_threads():
    answers = [(f"{n}p+q", f"q+{n + wrong}p", not wrong) for n in range(2, 26) for wrong in (0, 1)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda a: is_correct(rf"\boxed{{{a[0]}}}", a[1]), answers))
    assert verdicts == [a[2] for a in answers]


def test_thousands_of_digit_answers_a_second(monkeypatch):
    monkeypatch.setattr(grading, "same_mathematics", lambda *arguments: pytest.fail("math-verify was asked"))
    begin = time.process_time()
    verdicts = [is_correct(rf"<think> so 1 2 3 </think> \boxed{{{n % 97}}}", str(n % 89)) for n in range(4000)]
    assert sum(verdicts) == sum(n % 97 == n % 89 for n in range(4000))
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10**4, "1 " * 5000, "A, " * 3000, r"\text{" * 1500, "$" * 10**4, "{" * 5000 + "}" * 5000, "`" * 10**4,
        "A.A " * 2500, "1," * 5000, r"\frac{1}" * 1400, "5 " + "ab " * 3000, "a_" * 5000, " " * 10**4,
    ],
)  # fmt: skip
def test_exact_rules_take_linear_time(text):
    begin = time.process_time()
    for other in ("5", "B", "A, B", "blue"):
        exact_verdict(cleaned(text), other)
        exact_verdict(other, cleaned(text))
    assert time.process_time() - begin < 0.5


def test_extraction_takes_linear_time():
    begin = time.process_time()
    assert extract_answer(r"\boxed{" * 10**5) is None
    assert extract_answer(r"\boxed{}" * 10**5) == ""
    assert not has_format("<think>" * 10**5 + r"\boxed{" * 10**5)
    assert time.process_time() - begin < 2.0


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("0123456789.,/%$ -+()[]{}\\^_abxABC=cm²°½"), max_size=12), st.text(max_size=8))
def test_exact_rules_never_raise_and_find_an_answer_equal_to_itself(given, other):
    exact_verdict(cleaned(given), cleaned(other))
    exact_verdict(cleaned(other), cleaned(given))
    assert exact_verdict(cleaned(given), cleaned(given)) is True


@settings(max_examples=150, deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(1, 999), st.integers(-(10**6), 10**6), st.integers(1, 999))
def test_fractions_are_compared_exactly(a, b, c, d):
    assert exact_verdict(rf"\frac{{{a}}}{{{b}}}", f"{c}/{d}") is (a * d == b * c)
    assert exact_verdict(f"{a} cm", rf"{a * b}/{b}\text{{ cm}}") is True
