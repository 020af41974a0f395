"""Text encoders: CLIP, T5, and the language models of Qwen2.5-VL and Qwen3. May import what networks may."""
