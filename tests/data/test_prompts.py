"""Prompts from files, folders and the hub: what is read, in which order, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from arcflow_jax.data.prompts import check_prompts, read_prompts
from arcflow_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

STRANGE = ['a "red" ring', "línea, 中 字", "two\nlines", "a" * 5000]


def write_json_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, columns: dict[str, object], **settings: object) -> Path:
    parquet.write_table(pa.table(columns), path, **settings)
    return path


def test_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa fox\r\n\n  línea, 中 \n \t\nlast".encode())
    prompts = read_prompts(tmp_path / "a.txt")
    assert prompts.texts == ["a fox", "línea, 中", "last"]
    assert str(prompts) == f"3 prompts from {tmp_path / 'a.txt'}, 2 empty ones left out"
    (tmp_path / "b.txt").write_text("a fox\n")
    assert str(read_prompts(tmp_path / "b.txt")) == f"1 prompts from {tmp_path / 'b.txt'}"


def test_json_lines(tmp_path):
    records = [{"prompt": text, "caption": f"{i}"} for i, text in enumerate(STRANGE)]
    file = write_json_lines(tmp_path / "a.jsonl", [*records, {"prompt": " "}, {"prompt": None}])
    with file.open("a") as more:
        more.write("\n")  # no record at all
    prompts = read_prompts(file)
    assert prompts.texts == STRANGE
    assert prompts.empty == 2
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_prompts(tmp_path / "b.jsonl", "caption").texts == ["0", "1", "2", "3"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    texts = [*STRANGE, "", None, *(f"prompt {i % 7}" for i in range(100))]
    columns = {"prompt": pa.array(texts).cast(kind), "id": list(range(106))}
    prompts = read_prompts(write_parquet(tmp_path / "a.parquet", columns, row_group_size=17))
    assert prompts.texts == [text for text in texts if text]
    assert prompts.empty == 2


@pytest.mark.parametrize("prompt", ["a \udcff", b"a fox", None], ids=["half a surrogate pair", "bytes", "None"])
def test_a_prompt_that_is_not_text(prompt):
    """The first is what Python makes of a command line that is not in UTF-8; the tokenizer raised a TypeError."""
    with pytest.raises(UserError, match=r"prompt is .*, but has to be a text"):
        check_prompts(["a fox", prompt])


def test_an_empty_source_is_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("not a prompt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a path is empty: name a file or a folder"):
        read_prompts("")
    assert read_prompts(".").texts == ["not a prompt"]


def test_folder_of_all_kinds_in_the_order_of_paths(tmp_path):
    folder = tmp_path / "prompts"
    for name in ("b", ".cache"):
        (folder / name).mkdir(parents=True)
    write_parquet(folder / "b" / "0.parquet", {"prompt": ["3", "4"]})
    write_json_lines(folder / "a.jsonl", [{"prompt": "1"}, {"prompt": ""}])
    (folder / "a.txt").write_text("2\n")
    (folder / "c.txt").write_text("\n5")
    (folder / "empty.txt").write_text("")
    (folder / "README.md").write_text("not a prompt")
    (folder / ".cache" / "x.txt").write_text("not a prompt")
    prompts = read_prompts(folder)
    assert prompts.texts == ["1", "2", "3", "4", "5"]
    assert prompts.empty == 2


def test_large_files_are_read_once(tmp_path, monkeypatch):
    """A column at a time, not the images beside it, and each file once."""
    opened, columns = [], []
    path_open = Path.open
    iter_batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, **settings: columns.append(settings["columns"]) or iter_batches(self, **settings),
    )
    (tmp_path / "a.txt").write_text("1")
    write_json_lines(tmp_path / "b.jsonl", [{"prompt": "2"}])
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self) or path_open(self, *args))
    write_parquet(tmp_path / "c.parquet", {"image": [b"0" * 1000], "prompt": ["3"]})
    assert len(read_prompts(tmp_path).texts) == 3
    assert opened == [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"]
    assert columns == [["prompt"]]


def refused(source: object, message: str, field: str = "prompt") -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(source, field)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a fox\n\xff\xfe\n", r"a\.txt, line 2 is not text in UTF-8: invalid start byte"),
        ("a.txt", b" \n\n", r"a\.txt holds no prompts, only 2 empty ones$"),
        ("a.txt", b"", r"a\.txt holds no prompts$"),
        ("a.csv", b"a fox", r"a\.csv: its name does not end in \.txt, \.jsonl, \.parquet"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"a\.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl, line 1 is not valid JSON: 'utf-8' codec can't decode"),
        ("a.jsonl", b'"a fox"\n', r"a\.jsonl, line 1 does not hold a JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b", "id": 1}', r"line 2 has no field 'prompt', only text, id: name"),
        ("a.jsonl", b"{}", r"line 1 has no field 'prompt', only none at all: name"),
        ("a.jsonl", b'{"prompt": ["a", "b"]}', r"line 1: prompt is not a text but \['a', 'b'\]"),
        ("a.jsonl", b'{"prompt": "\\ud83d"}', r"line 1 is not valid JSON"),
        ("a.parquet", b"PAR1 and more", r"a\.parquet is damaged, or not a Parquet file"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


def test_parquet_that_does_not_fit(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"prompt": [1, 2], "caption": ["a", "b"]})
    refused(file, r"a\.parquet has no column 'text', only prompt, caption: name", "text")
    refused(file, r"a\.parquet: column prompt is not of texts but of int64")
    file.write_bytes(file.read_bytes()[:-20])
    refused(file, "a.parquet")


def test_what_is_not_there(tmp_path):
    refused(tmp_path / "a.txt", r"a\.txt is missing")
    refused("data/a.jsonl", r"data/a\.jsonl is missing")  # not a hub id
    refused(
        "prompts",
        "prompts does not exist, and a hub id has the form owner/name; sets known by name are hpsv2 and coco-10k",
    )
    refused(tmp_path, r"no file in it ends in \.txt, \.jsonl, \.parquet")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "a.txt").write_text("a fox")
    refused(tmp_path, r"broken\.jsonl, line 1 is not valid JSON")


def test_libraries_that_are_missing(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", {"prompt": ["a"]})
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(file, r"^Parquet files need pyarrow: pip install pyarrow, or arcflow_jax\[data\]$")
    refused("owner/name", r"^data sets of the hub need datasets: pip install datasets")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets` itself, which finds one data set on the hub: a folder here, as the hub would send it."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "hub"
    folder.mkdir()
    write_json_lines(folder / "train.jsonl", [{"prompt": text, "id": i} for i, text in enumerate([*STRANGE, ""])])
    write_json_lines(folder / "test.jsonl", [{"prompt": "a test", "id": 0}])
    load = datasets.load_dataset

    def load_dataset(name: str, split: str) -> object:
        if name == "owner/offline":
            raise ConnectionError("Couldn't reach 'owner/offline' on the Hub\n(LocalEntryNotFoundError)")
        if name != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist or cannot be accessed.")
        return load(str(folder), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    datasets.disable_progress_bars()


def test_data_set_of_the_hub(hub):
    prompts = read_prompts("owner/name")
    assert (prompts.texts, prompts.empty) == (STRANGE, 1)
    assert read_prompts("owner/name:test").texts == ["a test"]
    assert read_prompts("owner/name:train[:2]").texts == STRANGE[:2]
    refused("owner/name", "owner/name has no column 'text', only prompt, id: name", "text")
    refused("owner/name", "owner/name: column id is not of texts but of Value", "id")
    refused("owner/name:dev", r'cannot read data set owner/name:dev: Unknown split "dev"')
    refused("owner/other", r"there is no file or folder owner/other, and the hub shows no such .*hf auth login")
    refused("owner/offline", r"^cannot read data set owner/offline: Couldn't reach 'owner/offline' on the Hub \(Local")


def test_sets_known_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> object:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"prompt": ["a fox", "a hare"], "id": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read_prompts("hpsv2").texts == ["a fox", "a hare"]
    assert read_prompts("coco-10k").source == "coco-10k"
    assert asked == [("Lakonik/t2i-prompts-hpsv2", "test"), ("Lakonik/t2i-prompts-coco-10k", "test")]
    (tmp_path / "hpsv2").mkdir()  # what lies here comes first
    (tmp_path / "hpsv2" / "a.txt").write_text("mine")
    assert read_prompts("hpsv2").texts == ["mine"]


SIZED = [{"prompt": "a fox", "height": 512, "width": 768}, {"prompt": "a hare", "height": 1024, "width": 1024}]
SIZES = [(512, 768), (1024, 1024)]


def test_sizes(tmp_path):
    empty = {"prompt": " ", "height": 64, "width": 64}
    lines = write_json_lines(tmp_path / "a.jsonl", [SIZED[0], empty, SIZED[1]])
    columns = {name: [record[name] for record in (SIZED[0], empty, SIZED[1])] for name in empty}
    table = write_parquet(tmp_path / "b.parquet", columns, row_group_size=2)
    for source in (lines, table):
        prompts = read_prompts(source)
        assert (prompts.texts, prompts.sizes) == (["a fox", "a hare"], SIZES)
        assert str(prompts) == f"2 prompts from {source}, each with height and width, 1 empty ones left out"
    assert read_prompts(tmp_path).sizes == [*SIZES, *SIZES]


def test_sources_without_sizes(tmp_path):
    (tmp_path / "a.txt").write_text("a fox")
    write_json_lines(tmp_path / "a.jsonl", [{"prompt": "a", "height": None, "width": None}, {"prompt": "b"}])
    write_parquet(tmp_path / "a.parquet", {"prompt": ["a"], "id": [1]})
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        assert read_prompts(tmp_path / name).sizes is None


def test_sizes_of_a_data_set_on_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {name: [record[name] for record in SIZED] for name in SIZED[0]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict(columns))
    assert read_prompts("owner/name").sizes == SIZES
    columns["height"] = ["512", "1024"]
    refused("owner/name", "owner/name, row 1: height is '512', but has to be a whole number from 1 to 65536")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": None}, r"line 2 has a height but no width: a prompt has both or neither$"),
        ({"height": None}, r"line 2 has a width but no height: a prompt has both or neither$"),
        ({"height": None, "width": None}, r"line 2 has no height and width, but the prompts before it: either all"),
        ({"height": "64"}, r"line 2: height is '64', but has to be a whole number from 1 to 65536$"),
        ({"width": 64.5}, r"line 2: width is 64\.5, but has to be a whole number from 1 to 65536$"),
        ({"width": True}, r"line 2: width is True, but has to be a whole number from 1 to 65536$"),
        ({"width": 0}, r"line 2: width is 0, but has to be a whole number from 1 to 65536$"),
    ],
)
def test_sizes_that_are_refused(tmp_path, changes, message):
    refused(write_json_lines(tmp_path / "a.jsonl", [SIZED[0], SIZED[1] | changes]), message)


def test_parquet_sizes_that_are_refused(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, {"prompt": ["a", "b"], "height": [64, 64]})
    refused(file, r"a\.parquet, row 1 has a height but no width")
    write_parquet(file, {"prompt": ["a", "b"], "height": [64, 64], "width": [64, None]})
    refused(file, r"a\.parquet, row 2 has a height but no width")


def test_sources_with_and_without_sizes_are_not_mixed(tmp_path):
    write_json_lines(tmp_path / "b.jsonl", SIZED)
    (tmp_path / "a.txt").write_text("a fox")
    refused(tmp_path, r"b\.jsonl, line 1 has a height and width, but not the prompts before it: either all prompts")


def test_prefix_of_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_prompts("hf:owner/name:test").texts == ["a test"]
    assert read_prompts("hf:owner/name").texts == STRANGE
    refused("owner/name:test", r"owner/name does not exist; it is taken for a local path because owner exists")
