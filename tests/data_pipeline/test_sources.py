"""Every format holds the same problems; what is wrong with a URI, a file or a record is named."""

import base64
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.images import to_data_url
from data_pipeline.records import Keys
from data_pipeline.sources import open_sources

COUNT = 7
PIXELS = [np.full((4, 5, 3), 30 * i, np.uint8) for i in range(COUNT)]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def records(image):
    """The original's fields; record i has i % 3 images."""
    return [
        {
            "global_id": f"g{i}", "problem": "<image>" * (i % 3) + f"Wie groß ist {i}?", "answer": str(i),
            "images": [image(PIXELS[i])] * (i % 3), "difficulty": "hard" if i % 2 else "Level 5", "data_source": "toy",
        }
        for i in range(COUNT)
    ]  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def jsonl_data_url(folder):
    write_jsonl(folder / "a.jsonl", records(to_data_url))
    return f"jsonl://{folder}/a.jsonl"


def jsonl_base64_in_two_files(folder):
    rows = records(lambda pixels: base64.b64encode(png(pixels)).decode())
    write_jsonl(folder / "b-1.jsonl", rows[:3])
    (folder / "b-2.jsonl").write_text("\n\n" + "\n \n".join(map(json.dumps, rows[3:])))  # blank lines, no last newline
    return f"jsonl://{folder}/b-*.jsonl"


def parquet_bytes(folder):
    rows = records(lambda pixels: {"bytes": png(pixels), "path": "x.png"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=2)
    return f"parquet://{folder}/c.parquet"


def array_record(folder):
    writer = ArrayRecordWriter(str(folder / "d.arrayrecord"), "group_size:1")
    for row in records(to_data_url):
        writer.write(json.dumps(row).encode())
    writer.close()
    return f"arrayrecord://{folder}/d.arrayrecord"


def hub_parquet_by_name(folder):
    (folder / "data").mkdir()
    rows = records(lambda pixels: {"bytes": png(pixels), "path": None})
    for part, slice_ in enumerate((rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(slice_), folder / "data" / f"train-0000{part}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "data" / "validation-00000-of-00001.parquet")
    assert len(open_sources((f"hf://{folder}?split=validation",))) == 1
    return f"hf://{folder}"


def hub_jsonl_by_card(folder):
    (folder / "pictures").mkdir()
    for i, pixels in enumerate(PIXELS):
        (folder / "pictures" / f"{i}.png").write_bytes(png(pixels))
    (folder / "files").mkdir()
    write_jsonl(folder / "files" / "problems.jsonl", records(lambda pixels: f"pictures/{pixels[0, 0, 0] // 30}.png"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: files/none.jsonl\n- config_name: full\n  data_files:\n"
        "  - split: training\n    path:\n    - files/*.jsonl\n---\n# A card\n"
    )
    with pytest.raises(DataError, match="split 'test' is not one of training"):
        open_sources((f"hf://{folder}?config=full&split=test",))
    with pytest.raises(DataError, match="config 'x' is not one of small, full"):
        open_sources((f"hf://{folder}?config=x",))
    with pytest.raises(DataError, match="no .parquet, .jsonl, .json file of split 'train'"):
        open_sources((f"hf://{folder}",))
    return f"hf://{folder}?config=full&split=training"


def hub_json_array(folder):
    """An array over lines in one file, and in another objects a line under the same ending."""
    rows = records(to_data_url)
    (folder / "train_1.json").write_text("\n " + json.dumps(rows[:4], indent=2, ensure_ascii=False) + "\n")
    write_jsonl(folder / "train_2.json", rows[4:])
    (folder / "test.json").write_text("[ ]")
    (folder / "train").mkdir()
    (folder / "train" / "dataset_infos.json").write_text('{"default": {}}')  # of the hub, about the data
    with pytest.raises(DataError, match="holds no problem"):
        open_sources((f"hf://{folder}?split=test",))
    return f"hf://{folder}"


def tfds_builder(folder):
    import tensorflow_datasets as tfds

    class AresToy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: dict = {}  # TFDS would look for checksums in this module's package, and there is none

        def _info(self):
            text = {name: tfds.features.Text() for name in ("global_id", "problem", "answer", "difficulty", "data_source")}
            images = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3)))
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({**text, "images": images}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, row in enumerate(records(png)):
                yield i, {**row, "images": [io.BytesIO(data) for data in row["images"]]}

    AresToy(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return f"tfds://ares_toy/train?data_dir={folder}"


FORMATS = [
    jsonl_data_url, jsonl_base64_in_two_files, parquet_bytes, array_record, hub_parquet_by_name, hub_jsonl_by_card,
    hub_json_array, tfds_builder,
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize("write", FORMATS)
def test_a_round_trip_through_each_format(write, tmp_path):
    source = open_sources((write(tmp_path),))
    assert len(source) == COUNT
    # A worker process gets a pickled copy.
    for problems in (source, pickle.loads(pickle.dumps(source))):
        found = sorted((problems[i] for i in range(COUNT)), key=lambda p: p.problem_id)  # TFDS shuffles once
        for i, problem in enumerate(found):
            assert (problem.problem_id, problem.answer, problem.source) == (f"g{i}", str(i), "toy")
            assert problem.question == "<image>" * (i % 3) + f"Wie groß ist {i}?"
            assert problem.level == ("hard" if i % 2 else "medium")
            assert len(problem.images) == i % 3
            for image in problem.images:
                np.testing.assert_array_equal(image, PIXELS[i])
    with pytest.raises(IndexError):
        source[COUNT]


def test_tensorflow_is_not_needed():
    import sys

    assert "tensorflow" not in sys.modules


def test_fields_have_other_names_by_config_or_uri(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "q", "label": 3, "picture": to_data_url(PIXELS[1]), "trace": "t"}])
    uri = f"jsonl://{tmp_path}/train.jsonl"
    keys = Keys(question=("prompt",), answer=("gone", "label"), images=("picture",), responses=("trace",))
    options = "?question=prompt&answer=label&images=picture&responses=trace"
    for problem in (open_sources((uri,), keys)[0], open_sources((uri + options,))[0]):
        assert (problem.question, problem.answer, problem.responses) == ("q", "3", ("t",))
        assert (problem.problem_id, problem.source, problem.level) == ("train-0", "train", "medium")
        np.testing.assert_array_equal(problem.images[0], PIXELS[1])
    with pytest.raises(DataError, match="line 1: needs an object with question .problem or question.; it has prompt, label"):
        open_sources((uri,))[0]


def test_a_bad_record_is_named(tmp_path):
    lines = [
        '{"problem": "q", "answer": "4", "images": ["gone.png"]}', '{"problem": "q"}', "[1]", "{", '{"problem": "\xff"}',
        '{"problem": "q", "answer": "5", "videos": [["a.png"]]}', '{"problem": "q", "answer": null}',
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_bytes("\n\n".join(lines).encode("latin-1"))
    source = open_sources((f"jsonl://{tmp_path}/p.jsonl",))
    messages = [
        "line 1: image 'gone.png': no such file", "line 3: needs an object with answer", "line 5: needs an object, not list",
        "line 7: needs an object", "line 9: needs an object", "line 11: video: no such file", "line 13: .*answer",
    ]  # fmt: skip
    for index, message in enumerate(messages):
        with pytest.raises(DataError, match=f"p.jsonl, {message}"):
            source[index]


@pytest.mark.parametrize(
    "uris, message",
    [
        ([], "no source"), (["train.jsonl"], "'train.jsonl' is no source; expected scheme://path"),
        (["csv://x"], "'csv' is not one of digits, jsonl, parquet"),
        (["jsonl://{}/gone.jsonl"], "no such file .*gone.jsonl"),
        (["digits://train?sise=3"], "option 'sise' is not one of weight, size, seed"),
        (["digits://train?size=0"], "size='0' must be a positive int"), (["digits://x"], "split 'x' is not one of"),
        (["digits://train?weight=-1"], "weight='-1' must be a positive float"),
        (["digits://train?weight=nan"], "weight='nan' must be a positive float"),
        (["digits://train?size=3&size=4"], "twice"), (["digits://train?weight=1", "digits://test"], "test: has no weight"),
        (["hf://{}/gone"], "no such folder"), (["hf://{}/none"], "no .parquet, .jsonl, .json file of split 'train'"),
        (["tfds://ares_no_such/train?data_dir={}"], "ares_no_such not found.*prepare it"), (["tfds://x"], "expected tfds://name"),
        (["jsonl://{}/empty.jsonl"], "holds no problem"), (["parquet://{}/junk"], "junk: not a Parquet file"),
        (["arrayrecord://{}/junk"], "junk: not ArrayRecord"),
        (["jsonl://{}/cut.json"], "cut.json, behind the object of line 2: needs a comma or the array's end"),
        (["jsonl://{}/broken.json"], "broken.json: an array of objects cannot be read .*line 2"),
        (["jsonl://{}/two.json"], "two.json: goes on behind the array's end"),
        (["jsonl://{}/open.json"], "open.json, behind the object of line 1: needs a comma"),
    ],
)  # fmt: skip
def test_a_bad_uri_is_named(uris, message, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.json").write_text('[{"a": 1},\n {"a":\n 2} {"a": 3}]')
    (tmp_path / "broken.json").write_text('[{"a": 1},\n {"a": }]')
    (tmp_path / "two.json").write_text('[{"a": 1}]\n[{"a": 2}]')
    (tmp_path / "open.json").write_text('[{"a": 1}')
    (tmp_path / "none").mkdir()
    (tmp_path / "junk").write_bytes(b"junk" * 30)
    with pytest.raises(DataError, match=message):
        open_sources(tuple(uri.format(tmp_path) for uri in uris))


def test_a_changed_parquet_file_is_read_anew(tmp_path, cache):
    path = tmp_path / "a.parquet"
    for answers in (["1"], ["2", "3"]):
        pq.write_table(pa.table({"problem": ["q"] * len(answers), "answer": answers}), path)
        open_sources.cache_clear()
        source = open_sources((f"parquet://{path}",))
        assert [source[i].answer for i in range(len(source))] == answers
    names = [file.name for file in cache.rglob("*") if file.is_file()]
    assert len(names) == 2 and all(name.endswith(".arrow") for name in names)


def test_limit_takes_the_first(tmp_path):
    uri = jsonl_data_url(tmp_path)
    assert len(open_sources((uri + "?limit=3",))) == 3 and len(open_sources((uri + "?limit=99",))) == COUNT
    with pytest.raises(IndexError):
        open_sources((uri + "?limit=3",))[3]
