"""Nodes for ComfyUI that sample the ArcFlow student in this folder (SPDX-License-Identifier: Apache-2.0).

Put the folder into ComfyUI/custom_nodes, and install its requirements.txt into ComfyUI's Python. The node "ArcFlow:
load" reads the base model and makes it the student, "ArcFlow: sample" makes images. The method is in pipeline.py.
"""

# B images, H, W size in pixels

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

FOLDER = Path(__file__).parent
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
STUDENT = CONFIG["arcflow_jax"]
TYPE = f"ARCFLOW_{FOLDER.name}"  # of this folder only, as each student has its own steps and guidance
BASE_MODEL = ""


class Load:
    """The base model's pipeline with the student in it."""

    CATEGORY = "ArcFlow"
    FUNCTION = "load"
    RETURN_TYPES = (TYPE,)
    RETURN_NAMES = ("student",)

    @classmethod
    def INPUT_TYPES(cls):
        base_model = f"The base model for {STUDENT['pipeline']}: a hub id or a diffusers folder."
        offload = "Keep on the GPU only the network that computes. Off is faster, if all of them fit."
        return {
            "required": {
                "base_model": ("STRING", {"default": BASE_MODEL, "tooltip": base_model}),
                "precision": (["bfloat16", "float16", "float32"], {}),
                "offload": ("BOOLEAN", {"default": True, "tooltip": offload}),
            }
        }

    def load(self, base_model, precision, offload):
        if not base_model.strip():
            raise ValueError(f"base_model is empty: name a hub id or a diffusers folder for {STUDENT['pipeline']}")
        from .pipeline import ArcFlowPipeline  # only now: diffusers would make ComfyUI start later

        comfy.model_management.unload_all_models()  # ComfyUI does not see what this one takes
        pipe = ArcFlowPipeline.from_pretrained(base_model.strip(), torch_dtype=getattr(torch, precision))
        pipe.load_student(FOLDER)
        device = comfy.model_management.get_torch_device()
        if device.type != "cpu":  # there it is already
            pipe.enable_model_cpu_offload(device=device) if offload else pipe.to(device)
        return (pipe,)


class Sample:
    """Images of a prompt, [B, H, W, 3] between 0 and 1. A seed's noise is the same on every device."""

    CATEGORY = "ArcFlow"
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        side = {"default": 1024, "min": 16, "max": 8192, "step": 16}
        inputs = {
            "student": (TYPE, {}),
            "prompt": ("STRING", {"default": "", "multiline": True}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            "width": ("INT", side),
            "height": ("INT", side),
            "steps": ("INT", {"default": STUDENT["steps"], "min": 1, "max": 100}),
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
        }
        if CONFIG.get("guidance_embeds"):
            guidance = {"default": STUDENT["guidance"], "min": 0.0, "max": 100.0, "step": 0.1}
            inputs["guidance"] = ("FLOAT", guidance)
        return {"required": inputs}

    def sample(self, student, prompt, seed, width, height, steps, batch_size, guidance=None):
        progress = comfy.utils.ProgressBar(steps)

        def after_step(pipe, step, timestep, values):
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update(1)
            return values

        images = student(
            prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            num_images_per_prompt=batch_size,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after_step,
            output_type="pt",
        ).images  # [B, 3, H, W]
        return (images.movedim(1, -1).float().cpu(),)


# ComfyUI has one list of nodes for all folders
NODE_CLASS_MAPPINGS = {f"ArcFlow load {FOLDER.name}": Load, f"ArcFlow sample {FOLDER.name}": Sample}
NODE_DISPLAY_NAME_MAPPINGS = {
    f"ArcFlow load {FOLDER.name}": f"ArcFlow: load {FOLDER.name}",
    f"ArcFlow sample {FOLDER.name}": f"ArcFlow: sample {FOLDER.name}",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
