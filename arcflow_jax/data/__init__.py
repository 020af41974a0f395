"""What goes in and comes out: prompts, images with captions, tokenizers, cached text embeddings, batches, PNG files.

`prompts` and `images` read data sets, `tokenizers` turns text into ids, `embeddings` reads a cache of text embeddings,
`batches` draws what a training step sees, `output` writes images with their settings. May import storage, parallel and
what lies below them.
"""
