"""Text encoders: CLIP, T5, and the language model of Qwen2.5-VL. May import what networks may."""
