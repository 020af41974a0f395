"""Files: JSON, safetensors, the Hugging Face hub, and atomic writing.

`atomic` writes files and directories that appear complete or not at all. `lock` lets one process write an output at a
time. `files` reads and writes JSON, computes
digests and reads configs. `safetensors` reads tensors by their offset in the file. `hub` downloads. This room may
import errors only.
"""
