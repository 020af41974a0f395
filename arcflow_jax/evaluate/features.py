"""The networks that judge images: Inception for FID and pFID, CLIP for the agreement with prompts.

Both run in PyTorch, in float32. Published FIDs come from one TorchScript file, and transformers has CLIP's vision
encoder for PyTorch only. Nothing else in the package needs PyTorch.
"""

# B images, F features

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arcflow_jax.data.prompts import library
from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.hub import fetch, is_repository

# The network of Heusel et al. 2017 as the authors of StyleGAN2-ADA publish it; later papers compare with the same file
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLIP = "openai/clip-vit-large-patch14-336"
CLIP_FILES = ("*.json", "merges.txt", "model*.safetensors")
SIDE = 299  # pixels; the image size that Inception takes


def resized(image: Image.Image) -> np.ndarray:  # [299, 299, 3] uint8
    """FID's input: the whole image, resized with antialiased bicubic interpolation."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def centre(image: Image.Image) -> np.ndarray:  # [299, 299, 3] uint8
    """The input of pFID (patch FID, Lin et al. 2024): the central crop. Raises UserError if the image is smaller."""
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    if min(left, top) < 0:
        raise UserError(
            f"pfid needs images of at least {SIDE} x {SIDE} pixels, but one has {image.width} x {image.height}: "
            "leave pfid out"
        )
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


def torch_and_device() -> tuple[Any, Any]:
    """PyTorch, and the device to use. Raises UserError if it is not installed."""
    torch = library("torch", "FID and CLIP scores", extra="eval")
    return torch, torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Inception:
    """Inception's pooled features; the published network has 2048.

    Args:
      file: the network as TorchScript; by default the published one, downloaded once into PyTorch's cache.

    Attributes:
      sha256: digest of the file.

    Raises:
      UserError: if PyTorch is not installed, or the file does not exist and cannot be downloaded.
    """

    def __init__(self, file: Path | None = None):
        self.file = published_inception() if file is None else file
        try:
            with self.file.open("rb") as weights:
                self.sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read the Inception network {self.file}: {error.strerror}") from None

    @property
    def published(self) -> bool:
        """Whether this is the network behind published figures."""
        return self.sha256 == INCEPTION_SHA256

    @functools.cached_property
    def network(self) -> Any:
        torch, device = torch_and_device()
        try:
            return torch.jit.load(self.file, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.file} is not a TorchScript network like {INCEPTION_URL}: {one_line(error)}"
            ) from None

    def __call__(self, images: np.ndarray) -> np.ndarray:  # [B, F] float32
        """Features of images [B, 299, 299, 3], uint8. Raises UserError if the file is another kind of network."""
        torch, device = torch_and_device()
        network = self.network
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
            try:
                features = network(pixels, return_features=True)
            except RuntimeError as error:
                reason = one_line(error)
                raise UserError(f"{self.file} does not take images as Inception does: {reason}") from None
            return features.float().cpu().numpy()


def published_inception() -> Path:
    """The published network in PyTorch's cache, downloaded if missing. Raises UserError if that fails."""
    torch, _ = torch_and_device()
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, file, hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # no connection, or another file than expected
            raise UserError(
                f"cannot download {INCEPTION_URL}: {one_line(error)}; give a copy of it with --inception"
            ) from None
    return file


class Clip:
    """CLIP's agreement between images and prompts.

    Args:
      source: a folder with a CLIP model as transformers saves it, including tokenizer and preprocessor, or its hub id.

    Raises:
      UserError: if PyTorch is not installed, or the model does not exist or is incomplete.
    """

    def __init__(self, source: str):
        self.torch, self.device = torch_and_device()
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if Path(source).is_dir():
            folder = Path(source)
        elif is_repository(source):
            folder = fetch(source, None, CLIP_FILES)
            if not any(folder.glob("*.safetensors")):  # PyTorch loads nothing but tensors from this pickle
                folder = fetch(source, None, [*CLIP_FILES, "pytorch_model.bin"])
        else:
            raise UserError(f"there is no CLIP model {source}: give a folder, or OWNER/NAME on the hub")
        self.tokenizer = load_tokenizer(folder)
        try:
            self.preprocess = transformers.CLIPImageProcessorPil.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self.model, loaded = transformers.CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=self.torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"transformers cannot load a CLIP model from {folder}: {one_line(error)}") from None
        if missing := sorted(loaded["missing_keys"]):  # transformers would initialize them at random
            raise UserError(f"the CLIP model in {folder} is incomplete: it lacks {one_line(missing)}")
        self.model.eval().to(self.device)
        self.length = token_length(self.tokenizer, self.model.config.text_config.max_position_embeddings)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:  # [B, 1] float32
        """The cosine between each image and its prompt, which is cut to the model's length. Not scaled or clipped."""
        ids, _ = tokenize(self.tokenizer, prompts, self.length)
        ids = self.torch.from_numpy(ids).long().to(self.device)
        pixels = self.preprocess(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, pixel_values=pixels)
            return (out.image_embeds * out.text_embeds).sum(-1, keepdim=True).cpu().numpy()
