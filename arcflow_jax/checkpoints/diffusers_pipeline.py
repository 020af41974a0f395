"""A few-step ArcFlow student, sampled in PyTorch with diffusers (SPDX-License-Identifier: Apache-2.0).

    pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=FOLDER, trust_remote_code=True)
    image = pipe("a red fox in the snow").images[0]

FOLDER, or a hub id, has this file, config.json and diffusion_pytorch_model.safetensors. The student is the base model
with LoRA and another output layer, which predicts the velocity on a whole segment of noise levels σ. The scheduler
integrates that velocity in closed form. All else is the base model's own pipeline.
"""

# B batch, N tokens, K modes, C latent channels, 4 pixels of a token's 2×2 patch

import functools
import inspect
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline as BasePipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

# What the base pipeline takes, and a student has no use for
REFUSED = {"sigmas", "true_cfg_scale", "negative_prompt", "negative_prompt_2", "negative_prompt_embeds"}


def phi(z):
    """φ(z) = (e^z − 1) / z, φ(0) = 1: the mean of e^(z·u) over u in [0, 1]."""
    return torch.where(z == 0, 1.0, torch.expm1(z) / z)


def momentum(output, modes, length):  # [B, N, K·4C + K·4 + (K − 1)·4] -> [B, N, 4C]
    """The mean over a segment of v(σ) = Σ_k π_k · m_k · exp(g_k · (σ_start − σ)).

    Means m are per channel; the weights π, a softmax, and the log-momenta g are shared by the channels. The first mode
    has no momentum, g = 0.
    """
    sizes = [output.shape[-1] - (8 * modes - 4), 4 * modes, 4 * (modes - 1)]
    means, logits, g = output.float().split(sizes, dim=-1)
    means = means.unflatten(-1, (modes, -1, 4))  # [B, N, K, C, 4]
    weights = logits.unflatten(-1, (modes, 1, 4)).softmax(2)
    g = torch.nn.functional.pad(g, (4, 0)).unflatten(-1, (modes, 1, 4))
    return (weights * phi(g * length) * means).sum(2).flatten(2)


def legendre(output, modes, length):  # [B, N, 4C] -> [B, N, 4C]
    """The mean over a segment of v(σ) = Σ_j c_j · P_j(2u − 1), u from 0 to 1 along the segment: it is c_0.

    Over the whole segment the mean of every other Legendre polynomial is 0. So the output layer here computes c_0 only.
    """
    return output.float()


class ArcFlowScheduler(SchedulerMixin, ConfigMixin):
    """The student's noise levels, and its steps.

    Args:
      curve: "momentum" or "legendre", how the velocity depends on σ.
      modes: K.
      shift: the timestep shift s: σ = s·t / (1 + (s − 1)·t).
      final_step_ratio: length of the last segment in t, relative to the others.
    """

    order = 1

    @register_to_config
    def __init__(self, curve="momentum", modes=16, shift=3.2, final_step_ratio=1.0):
        self.sigmas, self.timesteps, self.index = [], None, 0

    def set_begin_index(self, begin_index=0):
        self.index = begin_index

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        """Of the base pipeline's `sigmas` only the number counts, and μ does not: the student has its own schedule."""
        steps, s = num_inference_steps or len(sigmas), self.config.shift
        length = 1 / (steps - 1 + self.config.final_step_ratio)
        timesteps = [*(1 - length * i for i in range(steps)), 0.0]
        self.sigmas = [s * t / (1 + (s - 1) * t) for t in timesteps]
        self.timesteps = 1000 * torch.tensor(self.sigmas[:-1], dtype=torch.float32, device=device)
        self.index = 0

    def step(self, model_output, timestep, sample, return_dict=False):
        """From the start of a segment to its end: x − (σ_start − σ_end) · mean velocity, exact, in float32."""
        length = self.sigmas[self.index] - self.sigmas[self.index + 1]
        self.index += 1
        mean = {"momentum": momentum, "legendre": legendre}[self.config.curve](model_output, self.config.modes, length)
        return ((sample.float() - length * mean).to(sample.dtype),)


class ArcFlowPipeline(BasePipeline):
    """The base model's pipeline with a student in it.

    Attributes:
      student: the settings that it was distilled with, from its config.json; None before `load_student`.
    """

    student = None

    @functools.wraps(BasePipeline.__init__)  # diffusers reads from its signature which components to load
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if origin := custom_pipeline():
            self.load_student(*origin)

    def load_student(self, student, revision=None):
        """Makes the transformer the student in a folder, or of a hub id; `from_pretrained` does so by itself.

        Raises:
          ValueError: if it is a student of another base model.
        """
        config = json.loads(Path(file_of(student, "config.json", revision)).read_text())
        tensors = load_file(file_of(student, "diffusion_pytorch_model.safetensors", revision))
        settings, net = config["arcflow_jax"], self.transformer
        odd = [
            f"{name} {net.config[name]} instead of {value}"
            for name, value in config.items()
            if isinstance(value, int) and name in net.config and net.config[name] != value
        ]
        lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
        layers = {name for name, _ in net.named_modules()}
        odd += sorted({f"no layer {layer}" for name in lora if (layer := name.split(".lora_")[0]) not in layers})
        if settings["pipeline"] not in {each.__name__ for each in type(self).__mro__}:
            odd.insert(0, f"it needs a {settings['pipeline']}")
        if odd:
            raise ValueError(f"{student} is a student of another base model: {', '.join(odd[:3])}")

        if lora:
            net.load_lora_adapter(lora, prefix=None, adapter_name="arcflow")
        if settings["curve"] == "legendre":
            head, rows = ["proj_out_coefficients"], net.proj_out.out_features
        else:
            head, rows = [f"proj_out_{part}" for part in ("means", "logweights", "loggamma")], None
        net.norm_out.linear = output_layer(tensors, ["norm_out.linear"], None, net)
        net.proj_out = output_layer(tensors, head, rows, net)
        schedule = {name: settings[name] for name in ("curve", "modes", "shift", "final_step_ratio")}
        self.student, self.scheduler = settings, ArcFlowScheduler(**schedule)

    def __call__(self, prompt=None, *, num_inference_steps=None, guidance_scale=None, **settings):
        """Images, as the base pipeline makes and returns them; all its other arguments are taken by name.

        One of them is `image`, the reference images of a base model that reads some.

        Args:
          num_inference_steps: by default as many as the student was distilled for.
          guidance_scale: for a base model with guidance embedding; by default the one of the distillation. The
            student needs no classifier-free guidance.

        Raises:
          ValueError: if there is no student yet, or it has no use for a setting.
        """
        if self.student is None:
            raise ValueError("there is no student yet: load it with load_student(FOLDER)")
        # Some pipelines take the scale of classifier-free guidance by this name, others have one name for both
        two_scales = "true_cfg_scale" in inspect.signature(BasePipeline.__call__).parameters
        refused = REFUSED & settings.keys()
        if not two_scales and guidance_scale is not None:
            refused |= {"guidance_scale"}
        if refused:
            raise ValueError(f"a student has its own schedule and guidance: leave out {', '.join(sorted(refused))}")
        if two_scales:
            settings["true_cfg_scale"] = 1.0
            if guidance_scale is None and self.transformer.config.guidance_embeds:
                guidance_scale = self.student["guidance"]
        else:
            guidance_scale = 1.0
        # As in the distillation, where a smaller maximum of the tokenizer counts
        tokenizer = getattr(self, "tokenizer_2", self.tokenizer)
        most = tokenizer.model_max_length - getattr(self, "prompt_template_encode_start_idx", 0)
        settings = {"max_sequence_length": min(512, most), "guidance_scale": guidance_scale, **settings}
        steps = num_inference_steps or self.student["steps"]
        return super().__call__(prompt=prompt, num_inference_steps=steps, **settings)


def output_layer(tensors, names, rows, like):
    """A linear layer from those tensors' rows, one after the other, with device and precision of a network."""
    found = [name for name in names if f"{name}.weight" in tensors]  # a student of one mode has no log-momenta
    weight, bias = (torch.cat([tensors[f"{name}.{part}"] for name in found])[:rows] for part in ("weight", "bias"))
    layer = torch.nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.to(like.device, like.dtype).requires_grad_(False)


def custom_pipeline():
    """The `custom_pipeline` and `custom_revision` that `from_pretrained` was called with; None outside of it.

    diffusers runs a copy of this file and does not say where the folder is. Only its own variables know.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and frame.f_locals.get("custom_pipeline"):
            return frame.f_locals["custom_pipeline"], frame.f_locals.get("custom_revision")
        frame = frame.f_back
    return None


def file_of(student, name, revision):
    """The path of one of a student's files, downloaded if the student is on the hub."""
    folder = Path(student).parent if str(student).endswith(".py") else Path(student)
    return folder / name if folder.is_dir() else hf_hub_download(str(student), name, revision=revision)
