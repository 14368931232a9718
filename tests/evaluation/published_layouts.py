"""A few rows of every benchmark in its published layout, made by us: files, columns and types as on the hub."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.evaluation.images import png


def image(path="0.png", **kwargs):
    return {"bytes": png(**kwargs), "path": path}


def parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mathverse(folder):
    def row(index, version, kind, answer):
        question = "As shown, find BC.\nChoices:\nA:2\nB:2√3" if kind == "multi-choice" else "Find the perimeter."
        return {
            "sample_index": str(index), "problem_index": "1", "problem_version": version, "question": question,
            "image": image(), "answer": answer, "question_type": kind,
            "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Length"},
            "query_wo": "Directly: " + question, "query_cot": "Reason first. Question: " + question,
            "question_for_eval": question,
        }  # fmt: skip

    rows = [row(1, "Text Dominant", "multi-choice", "B"), row(2, "Vision Only", "multi-choice", "B")]
    parquet(folder / "testmini.parquet", [*rows, row(3, "Vision Only", "free-form", "6\\sqrt{2}")])


def mathvision(folder):
    common = {"image": "images/1.jpg", "decoded_image": image(), "solution": None}
    choice = {"id": "1", "question": "How many? <image1>", "options": ["1/2", "3", "7", "5", "6"], "answer": "C"}
    drawn = {"id": "3", "question": "Which one? <image1>", "options": list("ABCDE"), "answer": "D"}
    free = {"id": "2", "question": "How long?", "options": [], "answer": "2.5"}
    rows = [
        {**choice, **common, "level": 2, "subject": "counting"},
        {**free, **common, "level": 5, "subject": "metric geometry - length"},
        {**drawn, **common, "level": 1, "subject": "logic"},
    ]
    parquet(folder / "data" / "test-00000-of-00001-3532b8d3f1b4047a.parquet", rows)


def mathvista(folder):
    metadata = {
        "category": "math-targeted-vqa", "context": "table", "grade": "high school", "img_height": 8, "img_width": 8,
        "language": "english", "skills": ["algebraic reasoning"], "source": "CLEVR-Math", "split": "testmini",
        "task": "figure qa",
    }  # fmt: skip

    def row(pid, kind, answer_type, answer, choices=None, precision=None):
        return {
            "pid": pid, "question": "Q", "image": f"images/{pid}.jpg", "decoded_image": image(), "choices": choices,
            "unit": None,
            "precision": precision, "answer": answer, "question_type": kind, "answer_type": answer_type,
            "metadata": metadata,
            "query": f"Hint: Please answer the question and provide the final value.\nQuestion: Q{pid}",
        }  # fmt: skip

    rows = [
        row("1", "multi_choice", "text", "smaller than", ["larger than", "equal to", "smaller than"]),
        row("2", "free_form", "float", "1.45", precision=2.0),
        row("3", "free_form", "integer", "14"),
        row("4", "free_form", "list", "[2007, 2008]"),
    ]
    parquet(folder / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", rows)
    parquet(folder / "data" / "test-00000-of-00002-6b81bd7f7e2065e6.parquet", [row("9", "free_form", "integer", "")])


def dynamath(folder):
    for variant in (1, 2):
        rows = [
            {
                "id": str(seed), "question": f"Variant {variant} of {seed}", "image": f"image{seed}.png",
                "decoded_image": image(), "ground_truth": truth, "answer_type": kind, "subject": "algebra",
                "knowledge_level": "high school",
            }
            for seed, kind, truth in ((1, "float", "2.0944"), (2, "multiple choice", "B"), (3, "text", "5:0 May"))
        ]  # fmt: skip
        parquet(folder / "data" / f"sample{variant}-00000-of-{variant:05}.parquet", rows)


def wemath(folder):
    def row(problem, key):
        return {
            "ID": problem, "split": "testmini", "knowledge concept": "Area", "question": "How large?",
            "option": "A. 1; B. 2; C. 3; D. 4; E. No correct answer", "answer": "B", "image_path": image(), "key": key,
            "question number": 1, "knowledge concept description": "Area: ...",
        }  # fmt: skip

    rows = [row(p, f"2steps_{step}") for p in ("1", "2", "3") for step in (1, 2, "multi")]
    rows += [row("1", f"3steps_{step}") for step in (1, 2, 3, "multi")]
    parquet(folder / "data" / "testmini-00000-of-00001-adbfe22dcd3558e6.parquet", rows)


def logicvista(folder):
    rows = [
        {
            "id": f"v1_{i}", "question": f"Which comes next? Select from {choices}", "answer": answer, "image": image(),
            "reasoning": "...", "skill": ["inductive"], "broad_capability": ["diagram"], "specific_capability": ["ocr"],
            "imagesource": "x", "sourcelink": "https://x", "liscenced": "no",
        }
        for i, (choices, answer) in enumerate((("A, B, C, and D", "C"), ("A-D", "A, C"), ("1-5", "3")))
    ]  # fmt: skip
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def logicvista_of_the_authors(folder):
    row = {
        "imagename": "v1_1.png", "question": "Which are green?", "answer": "A, C", "reasoning": "...",
        "skill": ["inductive"], "capability": ["diagram"], "imagesource": "x", "sourcelink": "https://x",
    }  # fmt: skip
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "data" / "images" / "v1_1.png").write_bytes(image()["bytes"])
    (folder / "data" / "dataset.json").write_text(json.dumps({"v1_1": row}))


def mmmu(folder):
    def row(name, kind, question, options, answer):
        images = {f"image_{i}": image(width=4 + i) if i <= 2 else None for i in range(1, 8)}
        return {
            "id": name, "question": question, "options": str(options), "explanation": "", **images, "img_type": "['Tables']",
            "answer": answer, "topic_difficulty": "Easy", "question_type": kind, "subfield": "Financial Accounting",
        }  # fmt: skip

    rows = [
        row("validation_Accounting_1", "multiple-choice", "See <image 1>. What is it?", ["$6", "<image 2>", "$8"], "B"),
        row("validation_Accounting_2", "open", "In <image 1> and <image 2>, how much?", [], "['24/7', '3.429']"),
    ]
    parquet(folder / "Accounting" / "validation-00000-of-00001.parquet", rows)
    parquet(folder / "Accounting" / "test-00000-of-00001.parquet", rows)


def mmmu_pro(folder):
    options = [f"option {c}" for c in "abcdefghij"]
    standard = {
        "id": "test_History_1", "question": "<image 1> Who?", "options": str(options), "explanation": "?",
        **{f"image_{i}": image() if i == 1 else None for i in range(1, 8)}, "img_type": "['Photographs']", "answer": "J",
        "topic_difficulty": "Hard", "subject": "History",
    }  # fmt: skip
    vision = {"id": "test_History_1", "image": image(), "options": str(options), "answer": "J", "subject": "History"}
    parquet(folder / "standard (10 options)" / "test-00000-of-00002.parquet", [standard])
    parquet(folder / "vision" / "test-00000-of-00004.parquet", [vision])


def charxiv(folder):
    def row(number, kind, answer):
        return {
            "image": image(), "category": "cs", "year": "20", "original_figure_path": "f.png", "original_id": "2001.1",
            "figure_path": f"images/{number}.jpg", "num_subplots": 1, "subplot_row": 0, "subplot_col": 0,
            "subplot_loc": None,
            **{f"descriptive_q{i}": i for i in range(1, 5)}, **{f"descriptive_a{i}": "x" for i in range(1, 5)},
            "reasoning_q": "Which curve?", "reasoning_a": answer, "reasoning_q_source": 2, "reasoning_a_type": kind,
        }  # fmt: skip

    parquet(folder / "val.parquet", [row(0, 1, "alpha, beta"), row(1, 2, "increasing"), row(2, 3, "10"), row(3, 4, "1.50")])


def mmstar(folder):
    row = {
        "index": 0, "question": "Which? Options: A: cat, B: dog, C: cow, D: hen", "image": png(), "answer": "B",
        "category": "math", "l2_category": "geometry", "meta_info": {"source": "MMBench", "split": "val",
        "image_path": "0.jpg"},
    }  # fmt: skip
    parquet(folder / "mmstar.parquet", [row])


def olympiadbench(folder):
    def row(number, answer, **values):
        return {
            "id": number, "question": "Determine $C$.<image_1>", "solution": ["..."], "final_answer": [answer],
            "context": None,
            **{f"image_{i}": None for i in range(1, 10)}, "modality": "Text-only", "difficulty": "Competition",
            "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": None,
            "question_type": "Open-ended",
            "subfield": "Algebra", "subject": "Math", "language": "English", **values,
        }  # fmt: skip

    root = folder / "OlympiadBench"
    several = row(2, "$1$,$\\frac{1}{2}$", is_multiple_answer=True, question="Find all $x$.")
    maths = [row(1, "$\\frac{1}{2}$", question="Determine $C$."), several]
    parquet(root / "OE_TO_maths_en_COMP" / "OE_TO_maths_en_COMP.parquet", maths)
    values = {"unit": "m/s", "error": "1e-1", "context": "A ball falls.", "image_1": image()}
    parquet(root / "OE_MM_physics_zh_CEE" / "OE_MM_physics_zh_CEE.parquet", [row(3, "9.8", **values)])
    parquet(root / "TP_TO_maths_en_COMP" / "TP_TO_maths_en_COMP.parquet", [row(4, "proof")])


def aime24(folder):
    row = {"id": 60, "problem": "Find $n$.", "solution": "...", "answer": "033", "url": "https://x", "year": "2024"}
    parquet(folder / "data" / "train-00000-of-00001.parquet", [row])


def aime25(folder):
    jsonl(folder / "test.jsonl", [{"problem": "Find $n$.", "answer": "70", "id": "0"}])


def math_500(folder):
    row = {"problem": "Solve.", "solution": "..", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus"}
    jsonl(folder / "test.jsonl", [{**row, "level": 2, "unique_id": "test/precalculus/807.json"}])


def gsm8k(folder):
    row = {"question": "How many eggs?", "answer": "She has 16 - 3 = <<16-3=13>>13.\n#### 1,018"}
    parquet(folder / "main" / "test-00000-of-00001.parquet", [row])


def gpqa(folder):
    columns = ["Record ID", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "High-level domain", "Subdomain"])
        writer.writeheader()
        values = ["rec0", "Which energy,\nin eV?", "10^-4 eV", "10^-9 eV", "10^-8 eV", "10^-11 eV", "Physics", "Quantum"]
        writer.writerow(dict(zip(writer.fieldnames, values, strict=True)))


def mmlu_pro(folder):
    def row(number, answer, worked=""):
        return {
            "question_id": number, "question": "What is it?", "options": ["one", "two", "N/A", "three"], "answer": answer,
            "answer_index": 1, "cot_content": worked, "category": "law", "src": "ori_mmlu",
        }  # fmt: skip

    worked = "A: Let's think step by step. It is two. The answer is (B)."
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [row(0, "B", worked)])
    parquet(folder / "data" / "test-00000-of-00001.parquet", [row(70, "B")])


def bbeh(folder):
    rows = [
        {"task": "word sorting", "input": "Sort.", "target": "apple, pear", "mini": 1},
        {"task": "zebra puzzles", "input": "Who?", "target": "(b)", "mini": 0},
    ]
    jsonl(folder / "train.jsonl", rows)


def ares_hard(folder):
    row = {"id": "7", "question": "<image>What is x?", "answer": "3", "source": "ViRL", "image": [image()]}
    parquet(folder / "data" / "train-00000-of-00001.parquet", [row])
