"""Inputs and outputs: prompts, images with captions, tokenizers, cached text embeddings, batches, PNG files.

`prompts` and `images` read data sets. `tokenizers` turns text into ids. `embeddings` has the files of a cache of text
embeddings. `batches` draws the examples of a training step. `output` writes images with their settings. This room may
import parallel, storage and the rooms below them.
"""
