"""A converted model that is loaded: its networks on the devices, and what each of them computes."""

# B images, N tokens, C latent channels

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from arcflow_jax import schema
from arcflow_jax.checkpoints.student_formats import open_student
from arcflow_jax.checkpoints.training import AdapterDescription, checksum
from arcflow_jax.errors import UserError
from arcflow_jax.flow.sampler import Known
from arcflow_jax.generate import (
    decode_latents,
    default_dtype,
    load_of,
    memory_watched,
    merge_student,
    merges,
    sample_student,
    sample_teacher,
    sampling_mesh,
    seeded_noise,
    teacher_grid,
)
from arcflow_jax.image_to_image import ImageEncoder
from arcflow_jax.loras import StyleLoRAs
from arcflow_jax.models.model_cache import converted
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import Conditioning
from arcflow_jax.networks.kernel import Compute
from arcflow_jax.networks.lora import scaled_lora
from arcflow_jax.networks.quantization import compute_in
from arcflow_jax.networks.student import merged_graphdef, split_model
from arcflow_jax.networks.style import beside
from arcflow_jax.parallel.mesh import partition_spec, sharded
from arcflow_jax.parallel.offload import Offload, Weights, running_shardings
from arcflow_jax.sampling_settings import batch_for, image_grid
from arcflow_jax.schema import Offset

# With `offload`, batches that pass one network before the next one takes its place on the device: enough to make the
# copying cheap, few enough to keep small what waits on the device between two networks.
OFFLOADED_BATCHES = 32


class LoadedModel(StyleLoRAs):
    """The part of `ArcFlowPipeline` that has the weights. It runs on its own mesh, whatever mesh the caller has set.

    Attributes:
      directory: the converted model.
      mesh: the devices that it runs on.
      student: the adapter's description; None for the teacher.
      origin: which weights made an image, as it stands in the image's `info`.
      transformer, vae: the weights; of the VAE only the decoder's.
      prompt_encoder: turns prompts into conditioning.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        adapter: str | Path | None,
        dtype: Any,
        mesh: Mesh,
        *,
        offload: Offload | None = None,
        raw: bool = False,
        merge: bool | None = None,
        adapter_scale: float = 1.0,
        compute: Compute | None = None,
        vae_tiling: bool | None = None,
    ):
        super().__init__()
        self.directory, self.mesh, self.offload, self.vae_tiling = directory, mesh, offload is not None, vae_tiling
        self.dtype = dtype
        self._load = functools.partial(load_of, directory, dtype, mesh, offload=offload, tiled=vae_tiling)
        self._image_encoder = functools.cache(functools.partial(ImageEncoder, directory, dtype, mesh, offload))
        self.student: AdapterDescription | None = None
        self.origin = {
            "model": str(directory.path),
            "base": directory.fingerprint,
            "version": f"arcflow_jax {version('arcflow_jax')}",
        }

        def load(component: str, abstract: nnx.State, part: str = "") -> nnx.State:
            return directory.load(component, abstract, running_shardings(mesh, abstract, offload), part)

        # One after the other, so that an offloaded network has left the device before the next one is loaded
        self.prompt_encoder = directory.family.prompts(directory, dtype, mesh, offload)
        vae: Any = directory.abstract("vae", dtype)
        self.vae_graphdef, decoder = nnx.split(vae.decoder_alone())
        self.vae = Weights(load("vae", decoder, part="decoder"), self.offload)
        if adapter is None:
            network = directory.abstract("transformer", dtype)
            compute_in(network, compute)
            self.graphdef, base = nnx.split(network)
            self.transformer = Weights(load("transformer", base), self.offload)
            return
        self.student, restore = open_student(adapter, directory)
        network = directory.student(self.student.adapter, dtype)
        compute_in(network, compute)
        self.graphdef, base, trained = split_model(network)
        merge = merges(directory, merge, offload)
        merged = merged_graphdef(self.graphdef, base, trained) if merge else None
        trained = restore(sharded(mesh, trained), raw)
        self.origin |= {"adapter": str(adapter), "weights": "raw" if raw else "EMA"}
        self.origin |= {"lora": "merged" if merge else "apart", "adapter_checksum": f"{int(checksum(trained)):08x}"}
        if adapter_scale != 1:
            self.origin["adapter_scale"] = f"{adapter_scale:g}"
            trained = scaled_lora(trained, schema.converted(Offset, adapter_scale, "adapter_scale"))
        if merged is None:
            # In the precision in which they are multiplied, which changes no result, and takes half the memory
            trained = jax.tree.map(lambda x: x.astype(dtype), trained)
            trained = jax.device_put(trained, running_shardings(mesh, trained, offload))
        state = load("transformer", base)
        if merged is None:
            state = nnx.merge_state(state, trained)
        else:
            state, self.graphdef = merge_student(self.graphdef, state, trained, mesh), merged
        self.transformer = Weights(state, self.offload)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        adapter: str | Path | None = None,
        *,
        dtype: Any = None,
        mesh: str | Mesh = "",
        offload: bool | Offload | None = None,
        raw: bool = False,
        merge: bool | None = None,
        adapter_scale: float = 1.0,
        compute: Compute | None = None,
        vae_tiling: bool | None = None,
    ) -> Self:
        """Loads a model and, if given, its student. Of a run that is still training, it takes the last checkpoint.

        Args:
          path_or_id: a directory that `arcflow convert` wrote; or a PyTorch model, a diffusers folder or a hub id,
            owner/name, which is converted on first use, see `model_cache.converted`.
          adapter: a directory that `arcflow train` wrote, or a student in the ArcFlow authors' layout, which may be on
            the hub: owner/name or owner/name/folder.
          dtype: precision of computation; by default what suits the device, see `generate.default_dtype`.
          mesh: how to use several devices, e.g. "tensor=4" (splits attention heads and MLPs) or
            "tensor=2,sequence=4" (image tokens as well), see `parallel.mesh.parse_mesh`; by default one device. Or a
            `jax.sharding.Mesh`, see `generate.sampling_mesh`.
          offload: "networks" or True keeps text encoders, transformer and VAE decoder in host memory, each on the
            device only while it runs: for a device that can hold the transformer, but not all of them. "blocks" also
            keeps their blocks there while they run, and copies each to the device just before its turn: for a device
            that cannot hold the transformer.
          raw: takes the weights of the last training step instead of the EMA weights.
          merge: adds LoRA to the base model's weights, see `merge_student`; False computes it beside them. By default
            True, unless the base model is quantized, or its blocks are in host memory.
          adapter_scale: strength of the student's LoRA; its head stays as it is.
          compute: "int8" or "fp8" multiplies activations in 8 bits as well, of a model with such weights: for chips
            that have such products.
          vae_tiling: decodes in tiles, the same images with less memory (`networks.vaes.vae`); None: large ones.

        Raises:
          UserError: if model or adapter is missing or damaged, the adapter was trained on another base model, there is
            no adapter but an option of one, the mesh does not fit the devices, or they run out of memory.
        """
        of_student = {"raw": raw, "merge": merge is not None, "adapter_scale": adapter_scale != 1}
        if adapter is None and (given := [name for name, is_given in of_student.items() if is_given]):
            raise UserError(f"{given[0]} is an option of a student: name its adapter, or leave {given[0]} out")
        directory = ModelDirectory.open(converted(path_or_id))
        mesh = sampling_mesh(mesh)
        offload = "networks" if offload is True else offload or None
        dtype = default_dtype() if dtype is None else dtype
        load = functools.partial(load_of, directory, dtype, mesh, offload=offload, tiled=vae_tiling)
        options = {"offload": offload, "raw": raw, "merge": merge, "compute": compute, "vae_tiling": vae_tiling}
        options["adapter_scale"] = adapter_scale
        with memory_watched(offload is not None, load), jax.set_mesh(mesh):
            return cls(directory, adapter, dtype, mesh, **options)

    def together(self, batch_size: int | None = None) -> int:
        """How many images pass each network together. Raises UserError if the batch size does not fit the mesh."""
        return batch_for(self.mesh, batch_size) * (OFFLOADED_BATCHES if self.offload else 1)

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of tokens; by default of the model's own size. Raises UserError if a side does not fit."""
        return image_grid(self.directory, height, width)

    def encode(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> Conditioning:
        """The conditioning of B prompts, see `families.text.PromptEncoder`."""
        with self._running():
            return self.prompt_encoder(prompts, guidance=guidance, rows=rows, columns=columns)

    def noise(self, seed: int, count: int, rows: int, columns: int, first: int = 0) -> jax.Array:
        """The noise that images `first` … of a seed start from, [B, N, 4C]."""
        with self._running():
            return seeded_noise(seed, count, rows * columns, self.directory.config("transformer").in_channels, first)

    def denoise(
        self, latents: jax.Array, conditioning: Any, steps: int, final_step_ratio: float | None = None
    ) -> jax.Array:
        """From noise to latent tokens, [B, N, 4C]: the student's segments, or the teacher's Euler steps.

        The teacher's timestep shift is the one of the model's scheduler, the student's the one that it was trained
        with; so is, by default, the student's final-step ratio.
        """
        with self._running():
            return self.transformer.run(
                lambda state: self._denoise(state, latents, conditioning, steps, final_step_ratio)
            )

    def decode(self, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        """Pixels [B, H, W, 3], uint8, of latent tokens [B, N, 4C]."""
        with self._running():
            return np.asarray(self.vae.run(lambda state: self._decode(state, tokens, rows, columns)))

    def _denoise(
        self,
        state: nnx.State,
        latents: jax.Array,
        conditioning: Any,
        steps: int,
        final_step_ratio: float | None,
        start: jax.Array | None = None,
        known: Known | None = None,
    ) -> jax.Array:
        spec = partition_spec(self.mesh, ("batch", "tokens", None), latents.shape)
        latents, known = jax.device_put((latents, known), NamedSharding(self.mesh, spec))
        network = beside(self.graphdef, state, self.style)
        if self.student is None:
            grid = teacher_grid(self.directory, latents.shape[1], steps)
            return sample_teacher(*network, latents, conditioning, *grid, start, known, steps=steps)
        settings = self.student.distillation
        shift, ratio = jnp.float32(settings.shift), jnp.float32(final_step_ratio or settings.final_step_ratio)
        return sample_student(*network, latents, conditioning, shift, ratio, start, known, steps=steps)

    def _decode(self, state: nnx.State, tokens: jax.Array, rows: int, columns: int) -> jax.Array:
        size = {"rows": rows, "columns": columns, "tiled": self.vae_tiling}
        return decode_latents(self.vae_graphdef, state, tokens, **size)

    @contextlib.contextmanager
    def _running(self) -> Generator[None]:
        with memory_watched(self.offload, self._load), jax.set_mesh(self.mesh):
            yield
