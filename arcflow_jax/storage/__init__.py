"""Files: JSON, safetensors, the Hugging Face hub, and writing that is whole or not at all.

`atomic` (files and directories that appear complete), `files` (JSON, digests, configs), `safetensors` (tensors read by
offset), `hub` (fetching). May import errors.
"""
