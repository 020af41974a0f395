"""Files, on a disk or in a bucket: JSON, safetensors, the Hugging Face hub, and atomic writing.

`paths` makes a path from what a user names; in a bucket it is a `bucket.BucketPath`. `atomic` writes files and
directories that appear complete or not at all. `lock` lets one process write an output at a time, in a bucket by a
`lease`. `files` reads and writes JSON. `safetensors` reads tensors by their offset in the file. `hub` downloads. This
room may import errors and schema only.
"""
