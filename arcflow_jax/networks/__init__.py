"""The networks: layers and attention, one file per network, and the student on its frozen base model.

`layers`, `lora`, `attention`, `transformer` and `head` are shared; `kernel` has quantized kernels, `quantization` which
layers have them. `backbones` has the diffusion transformers, `text` text encoders, `vaes` VAEs. `student` has the model
with its two modes, teacher and student, `conditioning` what a velocity depends on. Networks know no files and no
prompts. May import flow, parallel, schema and errors.
"""
