"""Every benchmark on rows in its published layout: prompts, pictures, references; right answers, wrong ones, and tricks."""

import json

import numpy as np
import pytest

from ares_jax.errors import UserError
from ares_jax.evaluation import final_answer
from ares_jax.evaluation.benchmark import Graded, Verdict
from ares_jax.evaluation.benchmarks import BENCHMARKS, bbeh, chosen, mathvista, mmmu_pro, olympiadbench
from ares_jax.evaluation.compare import compared
from ares_jax.evaluation.published import find_folder
from ares_jax.evaluation.questions import Asked, Reply
from ares_jax.evaluation.results import Outcome, summary
from ares_jax.evaluation.scores import Answered, measured
from tests.evaluation import published_layouts

LAYOUT_OF = {"mathverse_vision_only": "mathverse", "olympiadbench_maths_en": "olympiadbench"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets, each where `hf download --local-dir <root>/<owner>/<name>` puts it."""
    root = tmp_path_factory.mktemp("datasets")
    for name, benchmark in BENCHMARKS.items():
        if benchmark.hub and not (root / benchmark.hub).exists():
            getattr(published_layouts, LAYOUT_OF.get(name, name))(root / benchmark.hub)
    return root


@pytest.fixture(scope="module")
def samples(root):
    return {
        name: list(benchmark.load(find_folder(benchmark, root)))
        for name, benchmark in BENCHMARKS.items()
        if name != "digits"
    }


def texts(sample):
    return "".join(part if isinstance(part, str) else "▢" for part in sample.parts)


def verdicts(samples, name, index, *responses):
    return [BENCHMARKS[name].grade(samples[name][index], response).correct for response in responses]


SAMPLES = {
    "mathverse": 3, "mathverse_vision_only": 2, "mathvision": 3, "mathvista": 4, "dynamath": 6, "wemath": 13,
    "logicvista": 3,
    "mmmu": 2, "mmmu_pro": 2, "charxiv": 4, "mmstar": 1, "olympiadbench": 3, "olympiadbench_maths_en": 2, "aime24": 1,
    "aime25": 1, "math_500": 1, "gsm8k": 1, "gpqa": 1, "mmlu_pro": 1, "bbeh": 2, "ares_hard": 1,
}  # fmt: skip


def test_every_benchmark_reads_all_its_rows_and_no_others(samples):
    assert {name: len(rows) for name, rows in samples.items()} == SAMPLES
    for name, rows in samples.items():
        assert len({sample.sample_id for sample in rows}) == len(rows), name


@pytest.mark.parametrize(
    "name, index, prompt",
    [
        ("mathverse", 0, "Reason first. Question: As shown, find BC.\nChoices:\nA:2\nB:2√3▢"),
        (
            "mathvision",
            0,
            'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
            'question, only one letter is allowed in the "\\boxed{}".\nHow many? <image1>\n'
            "(A) 1/2\n(B) 3\n(C) 7\n(D) 5\n(E) 6\n▢",
        ),
        ("mathvista", 2, "▢Hint: Please answer the question and provide the final value.\nQuestion: Q3"),
        ("logicvista", 0, "▢Which comes next? Select from A, B, C, and D"),
        (
            "mmmu",
            0,
            "See ▢. What is it?\n(A) $6\n(B) ▢\n(C) $8\n\nAnswer with the option's letter from the given choices directly.",
        ),
        ("mmmu", 1, "In ▢ and ▢, how much?\nAnswer the question using a single word or phrase."),
        (
            "mmstar",
            0,
            "▢Which? Options: A: cat, B: dog, C: cow, D: hen\n"
            "Answer with the option's letter from the given choices directly",
        ),
        ("aime24", 0, "Find $n$.\nPlease reason step by step, and put your final answer within \\boxed{}."),
        ("ares_hard", 0, "What is x?▢"),
    ],
)
def test_prompts(samples, name, index, prompt):
    assert texts(samples[name][index]) == prompt


def test_prompts_of_many_lines(samples):
    text = texts(samples["dynamath"][0])
    assert text.startswith("▢## Question\n Variant 1 of 1\n## Answer Instruction") and text.endswith('"[Concise Answer]"\n}')
    assert "three-digit floating-point number and provide it" in text
    text = texts(samples["wemath"][0])
    assert "Question: How large?\nOption: A. 1; B. 2;" in text and text.endswith("<Answer>: <<your option>>")
    text = texts(samples["mmmu_pro"][0])
    assert text.startswith("▢ Who?\nA. option a\nB. option b") and "Answer the preceding multiple choice question." in text
    assert texts(samples["mmmu_pro"][1]).startswith("▢Write out the multiple-choice question in the image")
    assert "full names of subplots" in texts(samples["charxiv"][0])
    assert texts(samples["charxiv"][3]).strip().endswith("* Your final answer must be a number with 2 decimal places.")
    text = texts(samples["mmlu_pro"][0])
    assert "about law" in text and text.count("Question: ") == 2 and "Answer: Let's think step by step. It is two." in text
    assert text.endswith("A. one\nB. two\nC. three\nAnswer: Let's think step by step.")
    text = texts(samples["gpqa"][0])
    assert "Which energy,\nin eV?\n\nA) 10^-" in text and samples["gpqa"][0].answer in "ABCD"
    assert texts(samples["bbeh"][0]).startswith("Sort.\nThink step by step")


def test_olympiad_prompts_name_kind_and_unit_in_either_language(samples):
    chinese, first, several = samples["olympiadbench"]
    assert "以下是中国物理竞赛中的解答题，答案类型为数值。" in texts(chinese)
    assert "\\boxed{答案}(单位)" in texts(chinese) and texts(chinese).endswith("A ball falls.\nDetermine $C$.▢")
    assert 'end your solution with "So the final answer is \\boxed{answer}."' in texts(first)
    assert "The answer of The problem should be a numerical value. Please" in texts(first)
    assert "The problem has multiple answers, each of them should be a numerical value." in texts(several)
    row = {"answer_type": "Numerical,Expression,Numerical", "is_multiple_answer": True}
    order = "with the answers in order being a numerical value, an expression, a numerical value. "
    assert order in olympiadbench.prompt(row, chinese=False, maths=True)


RIGHT_OR_WRONG = [  # benchmark, row, {response: verdict}
    ("mathverse", 0, {
        r"<think>A</think>\boxed{B}": True, r"\boxed{(B)}": True, r"\boxed{\text{B}}": True, "The answer is B.": True,
        "B": True,
        r"\boxed{A}": False, r"<think>\boxed{B}</think>\boxed{C}": False, "A or B": None, r"\boxed{A, B}": None,
        r"<think>\boxed{B}": None, "I can't tell.": None, "": None, "A good question. I can't tell.": None,
        "The answer is not clear. Option A is out, option B is out.": None, r"\boxed{2\sqrt{3}}": None,
    }),
    ("mathverse", 2, {
        r"\boxed{6\sqrt{2}}": True, r"\boxed{\sqrt{72}}": True, r"The answer is $6\sqrt{2}$.": True, r"\boxed{8.49}": None,
        r"\boxed{6\sqrt{3}}": None, r"\boxed{6\sqrt{2}": None,
    }),
    ("mathvision", 0, {
        r"\boxed{C}": True, r"\boxed{7}": True, r"\boxed{(C) 7}": True, r"\boxed{A}": False, r"\boxed{0.5}": False,
        "7": True,
        "": False, r"\boxed{C} or \boxed{D}": False, r"\boxed{}": False, "C": True,
    }),
    ("mathvision", 1, {
        r"\boxed{2.5}": True, r"\boxed{5/2}": True, r"\boxed{2.501}": True, r"\boxed{2.51}": False, r"\boxed{x=2.5}": True,
        r"\boxed{25}": False, r"\boxed{B}": False, "The length is 2.5.": True, r"\boxed{2.5\text{ cm}}": True,
        "答案：2.5": True, r"\boxed{1e999}": False,
    }),
    ("mathvision", 2, {r"\boxed{D}": True, r"\boxed{(d)}": True, r"\boxed{A}": False, r"\boxed{A, D}": False}),
    ("mathvista", 0, {
        r"\boxed{C}": True, "(C) smaller than": True, r"\boxed{smaller than}": True, r"\boxed{smaler than}": True,
        r"\boxed{larger than}": False, "The answer is (B).": False, "No idea, it could be\nanything": None,
        "**smaller than**": True, "Smaller than.": True, "equal to!": False,
    }),
    ("mathvista", 1, {r"\boxed{1.45}": True, r"\boxed{1.449}": True, r"\boxed{\$1.45}": True, r"\boxed{1.4}": False,
    "": None}),
    ("mathvista", 2, {"The answer is 14.": True, r"\boxed{14.0}": True, r"\boxed{15}": False, r"\boxed{about many}": None,
        r"\boxed{AB = 14}": True, r"\boxed{\approx 14}": True, "The answer is about 14.": True, r"\boxed{x = 15}": False,
    }),
    ("mathvista", 3, {
        r"\boxed{[2007, 2008]}": True, "The answer is [2007,2008].": True, r"\boxed{2007, 2008}": True,
        r"\boxed{[2008, 2007]}": False,
    }),
    ("dynamath", 0, {
        '{"solution": "pi", "short answer": "2.094"}': True, '```json\n{"short answer": 2.0944}\n```': True,
        r'{"solution": "\frac{2\pi}{3}", "short answer": "2.094"}': True, '{"short answer": "2.10"}': False,
        '{"short answer": "≈ 2.094 cm"}': True, '{"short answer": "x = 2π/3"}': None, '{"short answer": "0.6667π"}': True,
        r"\boxed{2.094}": True, '{"short answer": "two"}': None, "Let me see:\nno": None, '{"short answer": ""}': False,
    }),
    ("dynamath", 1, {
        '{"short answer": "B"}': True, '{"short answer": "(b) no"}': True,
        '{"short answer": "a or b"}': None, "{'solution': 'x', 'short answer': 'B'}": True,
        '{"short answer": "B. no"}': True,
        '{"short answer": "A"}': False, r"\boxed{B}": True, '{"short answer": "b"}': True, '{"short answer": "(b)"}': True,
    }),
    ("dynamath", 2, {
        '{"short answer": "It is 5:0 May"}': True, '{"short answer": "It is 15:0 May"}': False,
        '{"short answer": "5:0"}': True, '{"short answer": "6:0"}': False, '{"short answer": " "}': False}),
    ("wemath", 0, {
        "<Thought process>: <<2>> <Answer>: <<B>>": True, "<Answer>: <<B. 2>>": True, r"\boxed{B}": True,
        "<Answer>:B.": True,
        "<Answer>: <<$B$>>": True, r"<Answer>: <<\text{B}>>": True, "<Answer> B </Answer>": True,
        "<Answer> C </Answer>": False,
        "<Answer>: <<C>>": False, "Answer: Because it is large": False, "<Answer>: <<B>> no, \\boxed{C}": False, "": False,
    }),
    ("logicvista", 0, {r"\boxed{C}": True, "The answer is C.": True, r"\boxed{A, C}": False, "C": True, "Hm.\nNo.": None}),
    ("logicvista", 1, {
        r"\boxed{A, C}": True, r"\boxed{AC}": True, r"\boxed{C and A}": True, r"\boxed{A}": False, r"\boxed{A, B, C}": False,
        r"\boxed{\text{A, C}}": True, "Options A and C": True, "答案是A、C": True, r"\boxed{A}\text{ and }\boxed{C}": True,
        r"\boxed{A}? No: \boxed{C}": False, "(A), (C)": True,
    }),
    ("logicvista", 2, {
        "3": True, r"\boxed{\text{3}}": True, "**Answer:** (3)": True, "Option 3": True, "答案是3。": True,
        r"\boxed{4}": False, r"\boxed{1 and 3}": False, "C": None, "The third, for 2 reasons": None, "": None,
    }),
    ("mmmu", 0, {
        "B": True, "(B)": True, r"\boxed{B}": True, "It is (A)? No: (B)": True, "The answer is C": False, "": False,
        "I think that it's about $8 here, yes": False, r"\boxed{Z}": False, "<think>(B)": False,
    }),
    ("mmmu", 1, {
        r"\boxed{24/7}": True, r"\boxed{3.429}": True, "The result is 3.43": True, "so it is 24/7.": True, "3.5": False,
        r"\boxed{\frac{24}{7}}": True, "": False, "It is 7": False,
    }),
    ("mmmu_pro", 0, {"Hm.\nAnswer: J": True, "Answer: (J)": True, "Answer: A": False, r"\boxed{J}": True,
    "Answer: ?": False}),
    ("charxiv", 0, {r"\boxed{alpha, beta}": True, r"\boxed{beta, alpha}": None, "": None}),
    ("charxiv", 2, {r"\boxed{10}": True, r"\boxed{10^1}": True, r"\boxed{12}": False, r"\boxed{ten}": None}),
    ("mmstar", 0, {
        "B": True, "B: dog": True, "(B) dog": True, "The answer is B": True, r"\boxed{B}": True, "A cat is here": False,
        "C": False, "": False, "Both": False,
    }),
    ("olympiadbench", 1, {
        r"So the final answer is $\boxed{\frac{1}{2}}$.": True, r"\boxed{0.5}": True, r"\boxed{1/2}": True,
        r"\boxed{0.51}": False,
        r"\boxed{1} So the final answer is \boxed{\frac12}.": True, "1/2": True, r"\boxed{\frac{1}{2}": False,
    }),
    ("olympiadbench", 2, {
        r"\boxed{\frac12, 1}": True, r"So the final answer is \boxed{1} and \boxed{0.5}.": True, r"\boxed{1}": False,
        r"\boxed{1, 1}": False, r"\boxed{1, 1/2, 2}": False, r"So $x=\boxed{1}$ or $x=\boxed{\frac12}$": True,
        r"So the final answer is $1$, $\frac12$.": True, r"\boxed{1 \text{ and } \frac{1}{2}}": True,
    }),
    ("olympiadbench", 0, {
        r"所以最终答案是9.8 m/s。": True, r"所以最终答案是\boxed{9.8\text{米/秒}}。": True,
        "所以最终答案是：\n\n$$\\boxed{9.8}$$": True,
        r"\boxed{\sqrt{96}}": True, r"\boxed{3\pi}": False, r"\boxed{\sqrt{x}}": False,
        r"所以最终答案是\boxed{9.75}(m/s)。": True, r"\boxed{9.6}": False, r"\boxed{9.8}": True,
    }),
    ("aime24", 0, {
        r"\boxed{\textbf{033}}": True, r"\boxed{33} no \boxed{34}": False,
        r"\boxed{33}": True, r"\boxed{033}": True, r"\boxed{33.0}": True, r"\boxed{330}": False, "33": False,
    }),
    ("math_500", 0, {r"\boxed{(3, \pi/2)}": True, r"\boxed{(\pi/2, 3)}": False, r"<think>\boxed{(3, \pi/2)}": False}),
    ("gsm8k", 0, {
        r"\boxed{1018}": True, "#### 1,018": True, "The answer is 1018 eggs.": True, r"\boxed{\$1,018}": True,
        r"\boxed{1{,}018\text{ eggs}}": True, "### Final Answer\n\n**1,018**": True, "<answer>1018</answer>": True,
        "The answer is 1018. She sells them.": True, "The answer is 1,018, since 16 - 3 = 13.": True,
        "The answer is:\n\n$$1018$$": True, "The final answer is:\n\\[\n1018\n\\]": True, "The answer is 1, or 1018.": False,
        r"\boxed{1,0180}": False, "#### ": False, "18": False, r"\boxed{1.018}": False,
    }),
    ("mmlu_pro", 0, {
        "So the answer is (B).": True, "Answer: B": True, r"\boxed{B}": True, r"\boxed{two}": True,
        "The answer is (C)": False,
        "Because B": True, "": False,
    }),
    ("bbeh", 0, {
        "The answer is: apple, pear": True, "The answer is: apple,pear.": True, "The answer is: pear, apple": False,
        "": False,
        "Hm. The answer is: pear\nThe answer is: **apple, pear**\nBye": True, r"\boxed{apple, pear}": True,
        "<think>The answer is: apple, pear": False, "**The answer is: \\boxed{apple,  pear}**": True,
        "Ok The final answer is: \\boxed{apple, pear}.": True, "The answer is: `apple, pear`": True,
    }),
    ("bbeh", 1, {"The answer is: b": True, "The answer is: (B)": True, "The answer is: (c)": False}),
    ("ares_hard", 0, {r"\boxed{3}": True, r"\boxed{x=3}": True, r"\boxed{4}": False, "Hm.\nNo.": None}),
]  # fmt: skip


@pytest.mark.parametrize("name, index, cases", RIGHT_OR_WRONG, ids=[f"{name}-{index}" for name, index, _ in RIGHT_OR_WRONG])
def test_answers(samples, name, index, cases):
    found = {r: BENCHMARKS[name].grade(samples[name][index], r).correct for r in cases}
    assert found == cases


CHOSEN = (  # how models say that they choose X; Y is another option
    "X", "**X**", "(X)", "X)", "X. 7", "**X. 7**", "**X.** 7",
    "X\n\nExplanation: Y is too small.", "The answer is **X**.", "The answer is (X) 12",
    "**Answer: X**", "**Answer:** X", "Answer: X. because of that", "### Final Answer\n\n**X**", r"So the answer is \(X\).",
    "Options:\n(A) one\n(B) two\n(C) three\n(D) four\n\nWe compute. So the correct option is (X).",
    "The correct answer is **Option X**: 7.",
    "The answer is X because Y is too small.", "I think Y is wrong, so the answer must be X.", "Correct choice: X",
    "The answer is Y... wait, no. The answer is X.", "答案是X。", "答案：X", "正确答案为 **X**", "故选：X．",
    "因此，正确选项是 X。",
    r"$\boxed{\text{X}}$", r"\boxed{\textbf{(X)}}", r"\boxed{X.}", r"\boxed{\textbf{(X)}\ 12}", r"\boxed{Y} no: \boxed{X}",
    "<think>Maybe Y</think>\n\nX",
    r"<think>\boxed{Y}</think>**X**", "<answer>X</answer>", r"<think>Y</think><answer>\boxed{X}</answer>",
)  # fmt: skip
NOTHING = (
    "", "I'm sorry, but I can't determine the answer from the image.", "The image is missing. I cannot answer.",
    "As an AI, I can't see the picture", "None of the above", "I think that I need the image to answer this question.",
    "A closer look at the figure is needed; I cannot answer.", "无法确定。", "<think>The answer is X",
    "My answer is A question in return: where is the image?",
    r"<think>\boxed{X} But wait", r"\boxed{X", r"\boxed{}", r"<think>X</think>",
)  # fmt: skip
CHOICES = {  # row, the right option
    "mathverse": (0, "B"), "mathvision": (0, "C"), "mathvista": (0, "C"), "wemath": (0, "B"), "logicvista": (0, "C"),
    "mmmu": (0, "B"), "mmmu_pro": (0, "J"), "mmstar": (0, "B"), "mmlu_pro": (0, "B"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_chosen_letter_is_found_in_every_form_and_none_in_a_refusal(samples, name):
    index, right = CHOICES[name]
    wrong = "A"

    def found(forms, x, y):
        return {f: verdicts(samples, name, index, f.replace("X", x).replace("Y", y))[0] for f in forms}

    assert found(CHOSEN, right, wrong) == dict.fromkeys(CHOSEN, True)
    assert found(CHOSEN, wrong, right) == dict.fromkeys(CHOSEN, False)
    unknown = None if BENCHMARKS[name].judge_rule else False
    assert found(NOTHING, right, wrong) == dict.fromkeys(NOTHING, unknown)


@pytest.mark.parametrize("text", [" ", "\n", "*", "answer ", "answer is\n", "<answer>", "答案", "\\boxed{", "#\n", "A\n"])
def test_a_response_that_repeats_itself_takes_linear_time(text):
    response = "answer" + text * 100_000  # a quadratic search ends within no test's limit
    assert final_answer.letter(response, 10) == ("A" if text == "A\n" else None)
    assert len(final_answer.final_text(response) or "") <= len(response)


def test_gpqa_takes_the_letter_of_the_shuffled_answer(samples):
    (sample,) = samples["gpqa"]
    wrong = next(c for c in "ABCD" if c != sample.answer)
    cases = {
        f"Answer: {wrong}\nAnswer: {sample.answer}": True,
        r"\boxed{10^-4 eV}": True,
        f"Answer: {wrong}": False,
    }
    assert {r: BENCHMARKS["gpqa"].grade(sample, r).correct for r in cases} == cases


def test_olympiad_answers_that_are_matrices_or_sets_keep_their_rows():
    assert olympiadbench._split(r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$") == [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"]
    assert olympiadbench._split(r"\left\{1,\ 2\right\}, (3,4)") == ["1", "2", "(3,4)"]


def scored(samples, name, right):
    graded = [Graded(sample, float(right(sample))) for sample in samples[name]]
    result = measured(BENCHMARKS[name].metrics, [Answered(item, 1) for item in graded])
    return {metric: values["value"] for metric, values in result.items()}


def test_dynamath_scores_the_worst_variant_and_the_average(samples):
    found = scored(samples, "dynamath", lambda s: s.sample_id != "1/2")
    assert found == {"worst": pytest.approx(2 / 3), "average": pytest.approx(5 / 6)}


def test_wemath_follows_the_four_dimensional_metrics(samples):
    wrong = {  # mastered; rote: one step wrong, all right in the end; inadequate: steps right, the end wrong; ...
        "2/2steps_1", "3/2steps_multi", "1/3steps_2", "1/3steps_multi",
    }  # fmt: skip
    found = scored(samples, "wemath", lambda s: s.sample_id not in wrong)
    assert found == {"strict": (1 + 0 + 0.5 + 0) / 4, "loose": (1 + 1 + 0.5 + 0) / 4}
    alone = {"1/2steps_1", "1/2steps_2"}  # right in the end without any step: rote by either measure
    found = scored({"wemath": samples["wemath"][:3]}, "wemath", lambda s: s.sample_id not in alone)
    assert found == {"strict": 0, "loose": 0}


def test_bbeh_takes_the_harmonic_mean_over_tasks(samples):
    found = scored(samples, "bbeh", lambda s: s.sample_id.startswith("word"))
    assert found == {"harmonic": pytest.approx(2 / (1 / 1.01 + 1 / 0.01)), "micro": 1.0}
    assert bbeh.harmonic(np.ones(3), [{"task": t} for t in "aab"]) == pytest.approx(1.01)


@pytest.mark.parametrize("name", SAMPLES)
def test_two_evaluations_are_compared_from_their_files_alone(samples, name):
    """Both hold what every metric of the benchmark needs: side by side they score as they did."""

    def written(right):
        outcomes = [
            Outcome(sample, repeat, Reply("x", tokens=3), Verdict(right(place)))
            for place, sample in enumerate(samples[name])
            for repeat in range(BENCHMARKS[name].repeats)
        ]
        return {name: json.loads(json.dumps(summary(BENCHMARKS[name], outcomes, Asked("u", "m"), None)))}

    a, b = written(lambda place: place % 2 == 0), written(lambda place: place > 0)
    for row in compared(a, b, BENCHMARKS):
        assert row.a == pytest.approx(a[name]["metrics"]["scores"][row.metric]["value"])
        assert row.b == pytest.approx(b[name]["metrics"]["scores"][row.metric]["value"])


def test_mmmu_pro_is_the_mean_of_its_settings():
    groups = [{"setting": "vision"}] * 3 + [{"setting": "standard"}]
    assert mmmu_pro.mean_of_settings(np.array([1.0, 0, 0, 1]), groups) == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize("a, b, distance", [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)])
def test_edit_distance(a, b, distance):
    assert mathvista.edit_distance(a, b) == distance == mathvista.edit_distance(b, a)


def test_the_digits_task_is_a_benchmark_that_needs_no_files(tmp_path):
    digits = BENCHMARKS["digits"]
    sample = digits.load(find_folder(digits, tmp_path))[0]
    picture, question = sample.parts
    assert picture.startswith(b"\x89PNG") and question and not digits.scale_images
    assert digits.grade(sample, rf"<think>..</think>\boxed{{{sample.answer}}}").correct


def test_data_sets_are_found_in_every_place_where_a_download_puts_them(tmp_path, root):
    benchmark = BENCHMARKS["aime25"]
    for place in ("math-ai/aime25", "aime25", "datasets--math-ai--aime25/snapshots/abc"):
        folder = tmp_path / place.replace("/", "_") / place
        published_layouts.aime25(folder)
        assert find_folder(benchmark, tmp_path / place.replace("/", "_")) == folder


def test_a_layout_that_changed_is_named(tmp_path):
    published_layouts.jsonl(tmp_path / "aime25" / "test.jsonl", [{"task": "Find $n$."}])
    benchmark = BENCHMARKS["aime25"]
    with pytest.raises(UserError, match="a row has no id, only task; the data set's layout is another"):
        benchmark.load(find_folder(benchmark, tmp_path))
    (tmp_path / "aime25" / "test.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="test.jsonl: cannot be read"):
        benchmark.load(find_folder(benchmark, tmp_path))


def test_a_data_set_with_other_files_is_named_with_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    published_layouts.jsonl(tmp_path / "aime25" / "data" / "train.jsonl", [{}])
    with pytest.raises(UserError, match=r"aime25 has no test.jsonl; it holds data/train.jsonl\)"):
        find_folder(BENCHMARKS["aime25"], tmp_path)


def test_a_data_set_whose_file_has_another_name_is_read(tmp_path):
    published_layouts.logicvista(tmp_path)
    (tmp_path / "data" / "test-00000-of-00001.parquet").rename(tmp_path / "logicvista.parquet")
    assert len(BENCHMARKS["logicvista"].load(tmp_path)) == 3


def test_logicvista_as_its_authors_ship_it(tmp_path):
    published_layouts.logicvista_of_the_authors(tmp_path / "LogicVista")
    (sample,) = BENCHMARKS["logicvista"].load(find_folder(BENCHMARKS["logicvista"], tmp_path))
    assert sample.sample_id == "v1_1" and sample.groups == {"skill": "inductive"} and sample.answer == "A, C"
    assert sample.parts == (published_layouts.image()["bytes"], "Which are green?")


def test_names_of_data_sets():
    assert [b.name for b in chosen("math-500, gsm8k,math_500")] == ["math_500", "gsm8k"]
    assert {b.name for b in chosen("all")} == set(BENCHMARKS) - {
        "mathverse",
        "olympiadbench_maths_en",
        "ares_hard",
        "digits",
    }
    with pytest.raises(UserError, match="no benchmark mathvers; there are mathverse_vision_only,"):
        chosen("mathvers")
