"""Prompts to ids, on the bundled teacher's tokenizers."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arcflow_jax.data.tokenizers import Tokenizer, load_tokenizer, token_length, tokenize
from arcflow_jax.demo import ASSETS, world
from arcflow_jax.errors import UserError
from tools.tiny_teacher.tokenizers import make_clip_tokenizer, make_t5_tokenizer

STRANGE = ["", "A FOX, naïve: 中 ring's 12", "  red\t ring\n", "<|endoftext|> a </s> <pad>", "a ring " * 40]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    make_clip_tokenizer(root / "tokenizer")
    make_t5_tokenizer(root / "tokenizer_2")
    return root


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_ids_are_those_of_diffusers(folders, name):
    """The calls in FluxPipeline._get_clip_prompt_embeds and _get_t5_prompt_embeds, on model_index.json's classes."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    theirs = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}[name].from_pretrained(folders / name)
    prompts = [*STRANGE, *map(str, world.all_captions()[::90])]
    tokenizer = load_tokenizer(folders / name)
    for length in (token_length(tokenizer), 8, 60):
        expected = theirs(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        ids, cut = tokenize(tokenizer, prompts, length)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, expected)
        assert cut.tolist() == [len(theirs(prompt).input_ids) > length for prompt in prompts]
        assert cut.any()


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
    captions = [str(caption) for caption in world.all_captions()]
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
    prompts = [*STRANGE, *map(str, world.all_captions()[::360])]
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
