"""Prompts to ids, on the bundled teacher's tokenizers."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcflow_jax.data import tokenizers
from arcflow_jax.data.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer, token_length, tokenize
from arcflow_jax.demo import ASSETS, shapes
from arcflow_jax.errors import UserError
from arcflow_jax.families.qwen_image import QwenPrompts
from tools.tiny_teacher.tokenizers import make_clip_tokenizer, make_t5_tokenizer

STRANGE = ["", "A FOX, naïve: 中 ring's 12", "  red\t ring\n", "<|endoftext|> a </s> <pad>", "a ring " * 40]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    make_clip_tokenizer(root / "tokenizer", shapes.CAPTIONS.words())
    make_t5_tokenizer(root / "tokenizer_2", shapes.CAPTIONS.words())
    return root


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_ids_are_those_of_diffusers(folders, name):
    """The calls in FluxPipeline._get_clip_prompt_embeds and _get_t5_prompt_embeds, on model_index.json's classes."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    theirs = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}[name].from_pretrained(folders / name)
    prompts = [*STRANGE, *map(str, shapes.CAPTIONS.all()[::90])]
    tokenizer = load_tokenizer(folders / name)
    for length in (token_length(tokenizer), 8, 60):
        expected = theirs(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        ids, cut = tokenize(tokenizer, prompts, length)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, expected)
        assert cut.tolist() == [len(theirs(prompt).input_ids) > length for prompt in prompts]
        assert cut.any()


CLASSES = {
    "tiny-flux/tokenizer": "CLIP",
    "tiny-flux/tokenizer_2": "T5",
    "tiny-flux2/tokenizer": "Qwen2",
    "tiny-qwen/tokenizer": "Qwen2",
}


def as_it_is(folder: Path, theirs: Any) -> None:
    """The bundled folder."""


def saved_by_transformers(folder: Path, theirs: Any) -> None:
    """As transformers itself writes the folder today."""
    shutil.rmtree(folder)
    theirs.save_pretrained(folder)


def added_in_the_config(folder: Path, theirs: Any) -> None:
    """tokenizer.json does not know the special tokens as such: tokenizer_config.json does."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    added = {token.pop("id"): token for token in whole["added_tokens"]}
    (folder / "tokenizer.json").write_text(json.dumps(whole | {"added_tokens": []}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if "Qwen" in config["tokenizer_class"]:  # whose added tokens are not in the vocabulary
        config["added_tokens_decoder"] = {str(number): token for number, token in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [as_it_is, saved_by_transformers, added_in_the_config])
@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_those_of_transformers(name, change, tmp_path):
    """tokenizer.json read by the tokenizers library alone, against transformers' class."""
    import transformers

    theirs = getattr(transformers, f"{CLASSES[name]}Tokenizer").from_pretrained(ASSETS / name)
    folder = shutil.copytree(ASSETS / name, tmp_path / "tokenizer")
    change(folder, theirs)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == theirs.pad_token_id
    assert tokenizer.model_max_length == theirs.model_max_length
    template = QwenPrompts.TEMPLATE if CLASSES[name] == "Qwen2" else "{}"
    prompts = [template.format(prompt) for prompt in [*STRANGE, *map(str, shapes.CAPTIONS.all()[::180])]]
    for length in (60, 200):
        options = {"padding": "max_length", "padding_side": "right", "max_length": length, "truncation": True}
        ids, cut = tokenize(tokenizer, prompts, length)
        np.testing.assert_array_equal(ids, theirs(prompts, **options).input_ids)
        assert cut.tolist() == [len(each) > length for each in theirs(prompts).input_ids]


def test_pad_token(tmp_path):
    """From the config, as a text or with settings, or from special_tokens_map.json, or the class's own."""
    folder = shutil.copytree(ASSETS / "tiny-flux" / "tokenizer_2", tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def pad(changes: dict[str, Any], special: dict[str, Any] | None) -> int:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        if special is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special))
        return load_tokenizer(folder).pad_token_id

    ids = {name: load_tokenizer(folder).backend.token_to_id(name) for name in ("<pad>", "</s>")}
    assert pad({}, None) == ids["<pad>"]
    assert pad({"pad_token": {"content": "</s>"}}, None) == ids["</s>"]
    assert pad({"pad_token": None}, {"pad_token": "</s>"}) == ids["</s>"]
    assert pad({"pad_token": None, "tokenizer_class": "T5TokenizerFast"}, None) == ids["<pad>"]
    with pytest.raises(UserError, match="names no pad_token"):
        pad({"pad_token": None, "tokenizer_class": "OtherTokenizer"}, None)
    with pytest.raises(UserError, match="names pad_token '<none>', which its vocabulary lacks"):
        pad({"pad_token": "<none>"}, None)
    with pytest.raises(UserError, match="model_max_length is 'many', but has to be a positive number"):
        pad({"model_max_length": "many"}, None)


def run_child(program: str, *arguments: object, answer: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=answer, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("whole", [True, False])
def test_no_code_from_a_folder_runs(folders, tmp_path, whole):
    """auto_map names code in the folder, and the user would answer "y"."""
    folder = shutil.copytree(folders / "tokenizer", tmp_path / "tokenizer")
    if not whole:
        (folder / "tokenizer.json").unlink()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyTokenizer: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["code.MyTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    program = """
import sys
from pathlib import Path
from arcflow_jax.data.tokenizers import load_tokenizer, tokenize
from arcflow_jax.errors import report_errors
with report_errors():
    print(tokenize(load_tokenizer(Path(sys.argv[1])), ["a red ring"], 8)[0].tolist())
"""
    done = run_child(program, folder, answer="y\ny\ny\n")
    assert not (tmp_path / "ran").exists()
    if whole:
        ids, _ = tokenize(load_tokenizer(folders / "tokenizer"), ["a red ring"], 8)
        assert json.loads(done.stdout) == ids.tolist()
    else:
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {folder} has no tokenizer.json, and its tokenizer_class 'MyTokenizer'")


def test_every_call_of_transformers_refuses_foreign_code():
    root = Path(__file__).parents[2]
    calls = 0
    for file in (path for room in ("arcflow_jax", "tools", "benchmarks") for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                owner = ast.unparse(node.func.value)
                if "Pipeline" not in owner:  # our own
                    calls += 1
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert given.get("trust_remote_code") == "False", f"{file}: {ast.unparse(node)}"
    assert calls >= 3


def test_transformers_is_not_imported(folders):
    program = """
import sys
from pathlib import Path
from arcflow_jax.data.tokenizers import load_tokenizer
load_tokenizer(Path(sys.argv[1]))
print("transformers" in sys.modules)
"""
    assert run_child(program, folders / "tokenizer").stdout == "False\n"


def test_only_what_a_tokenizer_needs_is_copied(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders / "tokenizer", model / "tokenizer")
    (model / "tokenizer" / "code.py").write_text("")
    (model / "tokenizer" / ".git").mkdir()
    (model / "tokenizer" / "notes.txt").symlink_to("/etc/hostname")
    (model / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    copy_tokenizer(model / "tokenizer", tmp_path / "copy", model)
    copied = {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()}
    assert copied.keys() == {*(file.name for file in (folders / "tokenizer").iterdir()), "chat_template.jinja"}
    for name in copied.keys() - {"chat_template.jinja"}:
        assert copied[name] == (folders / "tokenizer" / name).read_bytes()


def test_links_from_a_tokenizer(folders, tmp_path, monkeypatch):
    """Those of the hub's cache are followed; those that could lead to the user's secrets are not."""
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    (snapshot / "tokenizer").mkdir(parents=True)
    for file in (folders / "tokenizer").iterdir():
        shutil.copy(file, cache / "blobs" / f"blob-{file.name}")
        (snapshot / "tokenizer" / file.name).symlink_to(f"../../../blobs/blob-{file.name}")
    copy_tokenizer(snapshot / "tokenizer", tmp_path / "copy", snapshot)
    for file in (folders / "tokenizer").iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
        assert not (tmp_path / "copy" / file.name).is_symlink()

    (tmp_path / "secret.json").write_text("{}")
    link = snapshot / "tokenizer" / "added_tokens.json"
    for target in (tmp_path / "secret.json", cache / "refs"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"added_tokens\.json leads to {target}, outside of {snapshot}: copy the"):
            copy_tokenizer(snapshot / "tokenizer", tmp_path / f"copy-{target.name}", snapshot)
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(UserError, match=r"added_tokens\.json is not a regular file"):
        copy_tokenizer(snapshot / "tokenizer", tmp_path / "a", snapshot)
    link.unlink()
    monkeypatch.setattr(tokenizers, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"tokenizer\.json has more than 1000 bytes"):
        copy_tokenizer(snapshot / "tokenizer", tmp_path / "b", snapshot)


def test_lengths(folders):
    clip, t5 = load_tokenizer(folders / "tokenizer"), load_tokenizer(folders / "tokenizer_2")
    assert (token_length(clip), token_length(t5)) == (32, 16)
    assert token_length(dataclasses.replace(t5, model_max_length=10**30)) == 512
    ids, cut = tokenize(clip, ["a ring", "a ring " * 16], 32)
    assert cut.tolist() == [False, True]
    start, end, *words = map(clip.backend.token_to_id, ["<|startoftext|>", "<|endoftext|>", "a</w>", "ring</w>"])
    assert ids[0].tolist() == [start, *words, *[end] * 29]
    assert ids[1, -1] == end  # the end token survives the cut


def test_every_caption_word_is_one_token(folders):
    captions = [str(caption) for caption in shapes.CAPTIONS.all()]
    for name, specials in (("tokenizer", 2), ("tokenizer_2", 1)):
        tokenizer = load_tokenizer(folders / name)
        ids, cut = tokenize(tokenizer, captions, token_length(tokenizer))
        assert not cut.any()
        words = np.array([len(caption.split()) for caption in captions])
        padding_and_end = (
            ids == tokenizer.pad_token_id if name == "tokenizer" else ids <= tokenizer.backend.token_to_id("</s>")
        )
        np.testing.assert_array_equal((~padding_and_end).sum(1), words + specials - 1)
        assert len(np.unique(ids, axis=0)) == len(captions)


def test_other_words_fall_back(folders):
    clip, t5 = load_tokenizer(folders / "tokenizer"), load_tokenizer(folders / "tokenizer_2")
    assert decode(clip, "naïve 中 zebra").replace("</w>", " ").strip() == "naïve 中 zebra"
    assert decode(t5, "zebra #7!") == "zebra #7!"


def decode(tokenizer: Tokenizer, prompt: str) -> str:
    return tokenizer.backend.decode(tokenizer.backend.encode(prompt).ids, skip_special_tokens=True)


def test_capitals_make_no_difference(folders):
    small = "a large green ring, zebra xyz"
    for prompt in ("A Large GREEN ring, zebra XYZ", small.upper()):
        for tokenizer in map(load_tokenizer, (folders / "tokenizer", folders / "tokenizer_2")):
            assert tokenizer.backend.encode(prompt).ids == tokenizer.backend.encode(small).ids


def test_the_bundled_teacher_has_these_tokenizers(folders):
    for file in sorted(file for file in folders.rglob("*") if file.is_file()):
        bundled = ASSETS / "tiny-flux" / file.relative_to(folders)
        assert (
            json.loads(bundled.read_text()) == json.loads(file.read_text())
            if file.suffix == ".json"
            else (bundled.read_text() == file.read_text())
        )


def test_vocabulary_and_merges_alone(folders, tmp_path):
    """FLUX.1-dev's tokenizer/ has no tokenizer.json."""
    whole = load_tokenizer(folders / "tokenizer")
    shutil.copytree(folders / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    prompts = [*STRANGE, *map(str, shapes.CAPTIONS.all()[::360])]
    ids, _ = tokenize(load_tokenizer(tmp_path / "tokenizer"), prompts, 32)
    np.testing.assert_array_equal(ids, tokenize(whole, prompts, 32)[0])


def test_needs_no_torch_no_sentencepiece_no_network(folders):
    (folders / "tokenizer_2" / "spiece.model").write_bytes(b"not read, tokenizer.json is there")
    program = """
import socket, sys
sys.modules.update(dict.fromkeys(("torch", "sentencepiece", "tiktoken")))
def refuse(*args): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from arcflow_jax.data.tokenizers import load_tokenizer, tokenize
for folder in sys.argv[1:]:
    print(tokenize(load_tokenizer(Path(folder)), ["a red ring"], 8)[0].tolist())
"""
    command = [sys.executable, "-c", program, folders / "tokenizer", folders / "tokenizer_2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    here = [tokenize(load_tokenizer(folders / name), ["a red ring"], 8)[0] for name in ("tokenizer", "tokenizer_2")]
    assert list(map(json.loads, done.stdout.splitlines())) == [ids.tolist() for ids in here]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer_config.json is missing"),
        ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'}, "no vocabulary"),
        ({"tokenizer_config.json": "{}", "tokenizer.json": '{"model": '}, "that tokenizers can load"),
        ({"tokenizer_config.json": '{"tokenizer_class": "CLIPTokenizer"}', "vocab.json": "{}"}, "can load"),
    ],
)
def test_broken_folder(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
