"""The tiny teacher's two tokenizers, made from the words of its captions, in FLUX.1-dev's file layout.

Each caption word is one token, also in capitals. Anything else falls back to bytes (CLIP) or characters (T5).
"""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5TokenizerFast, TokenizersBackend

CLIP_LENGTH, T5_LENGTH = 32, 16  # tokens; the longest caption has 13 words
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
WORD_SCORE, CHARACTER_SCORE = -2.0, -10.0  # log-probabilities: a word always beats its spelling


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in itertools.pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(folder: Path, tokenizer: TokenizersBackend, config: dict[str, Any], special: dict[str, str]) -> None:
    """Writes the files that both tokenizers have. `save_pretrained` writes files that only its own version reads."""
    folder.mkdir(parents=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config | special)
    write_json(folder / "special_tokens_map.json", special)


def make_clip_tokenizer(folder: Path, words: list[str]) -> None:
    """Ids in OpenAI's order: bytes, bytes that end a word, merges, start, end. The end token has the highest id."""
    merges = byte_pair_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), CLIP_START, CLIP_END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": CLIP_END}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, **special)
    write(folder, tokenizer, {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH}, special)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def lowercase_map() -> bytes:
    """A SentencePiece normalisation from A … Z to a … z, in the only form that T5's class reads from a file.

    It consists of the size of a trie in bytes, the trie, and the replacements, each ended by a zero byte. The trie is a
    double array as in darts-clone: a node's unit has its character as label, and its children are at its position ^
    offset ^ character. Child 0 of a node that ends a word is a leaf, whose unit is the replacement's position.
    """
    trie = np.zeros(512, np.uint32)

    def node(label: int, offset: int, ends_word: bool) -> int:
        return offset << 10 | ends_word << 8 | label

    trie[0] = node(0, 256, False)
    for i, character in enumerate(string.ascii_uppercase.encode()):
        trie[256 ^ character] = node(character, 256, True)
        trie[character] = 1 << 31 | 2 * i
    replacements = b"".join(bytes([character, 0]) for character in string.ascii_lowercase.encode())
    return np.uint32(trie.nbytes).astype("<u4").tobytes() + trie.astype("<u4").tobytes() + replacements


def make_t5_tokenizer(folder: Path, words: list[str]) -> None:
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0, 1, 2
    characters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [
        *((token, 0.0) for token in special.values()),
        *((f"▁{word}", WORD_SCORE) for word in words),
        *((character, CHARACTER_SCORE) for character in characters),
    ]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, _spm_precompiled_charsmap=lowercase_map(), **special)
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": T5_LENGTH, "extra_ids": 0}
    write(folder, tokenizer, config, special)
