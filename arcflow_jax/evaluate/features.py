"""The networks that judge images: Inception for FID, CLIP for the agreement with prompts, DINOv2 for diversity.

They run in PyTorch, in float32. Published FIDs come from one TorchScript file, and transformers has CLIP's vision
encoder and DINOv2 for PyTorch only. Nothing else in the package needs PyTorch.
"""

# B images, F features

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from arcflow_jax.data.prompts import library
from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.hub import fetch, is_repository

# The network of Heusel et al. 2017 as the authors of StyleGAN2-ADA publish it; later papers compare with the same file
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLIP = "openai/clip-vit-large-patch14-336"
DINO = "facebook/dinov2-base"
MODEL_FILES = ("*.json", "merges.txt", "model*.safetensors")
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
    """CLIP's features of images and of prompts.

    Args:
      source: a folder with a CLIP model as transformers saves it, including tokenizer and preprocessor, or its hub id.
      whole: an image that is not square is filled up to a square with black. By default it is cropped, as CLIP does.

    Raises:
      UserError: if PyTorch is not installed, or the model does not exist or is incomplete.
    """

    def __init__(self, source: str, whole: bool = False):
        self.torch, self.device = torch_and_device()
        folder = model_folder(source, "CLIP model")
        self.tokenizer, self.whole = load_tokenizer(folder), whole
        self.preprocess, self.model = load(folder, "CLIPModel", "CLIP model")
        self.length = token_length(self.tokenizer, self.model.config.text_config.max_position_embeddings)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:  # [B, F] float32
        """The features of images, of length 1."""
        if self.whole:
            size = self.preprocess.crop_size["width"], self.preprocess.crop_size["height"]
            images = [ImageOps.pad(image, size, Image.Resampling.BICUBIC) for image in images]
        pixels = self.preprocess(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        with self.torch.inference_mode():
            return self._unit(self.model.get_image_features(pixel_values=pixels))

    def prompts(self, prompts: Sequence[str]) -> np.ndarray:  # [B, F] float32
        """The features of prompts, of length 1. A prompt is cut to the model's length."""
        ids, _ = tokenize(self.tokenizer, prompts, self.length)
        with self.torch.inference_mode():
            return self._unit(self.model.get_text_features(self.torch.from_numpy(ids).long().to(self.device)))

    def _unit(self, output: Any) -> np.ndarray:
        features = output.pooler_output
        return (features / features.norm(dim=-1, keepdim=True)).cpu().numpy()


class Dino:
    """DINOv2's features of images: the class token after the last norm. Arguments and errors as for `Clip`."""

    def __init__(self, source: str):
        self.torch, self.device = torch_and_device()
        self.preprocess, self.model = load(model_folder(source, "DINOv2 model"), "Dinov2Model", "DINOv2 model")

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:  # [B, F] float32
        """The features of images."""
        pixels = self.preprocess(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        with self.torch.inference_mode():
            return self.model(pixel_values=pixels).pooler_output.cpu().numpy()


def image_network(source: str) -> Clip | Dino:
    """The CLIP or DINOv2 model in a folder or on the hub. Raises UserError as `Clip`, and if it is another model."""
    kind = read_json(model_folder(source, "CLIP or DINOv2 model") / "config.json").get("model_type")
    if kind not in ("clip", "dinov2"):
        raise UserError(f"{source} is a model of type {one_line(repr(kind))}, but has to be of type clip or dinov2")
    return Clip(source) if kind == "clip" else Dino(source)


def model_folder(source: str, kind: str) -> Path:
    """A folder with a model as transformers saves it, downloaded if `source` is a hub id. Raises UserError."""
    if Path(source).is_dir():
        return Path(source)
    if not is_repository(source):
        raise UserError(f"there is no {kind} {source}: give a folder, or OWNER/NAME on the hub")
    folder = fetch(source, None, MODEL_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    # PyTorch loads nothing but tensors from this pickle
    return fetch(source, None, [*MODEL_FILES, "pytorch_model.bin"])


def load(folder: Path, name: str, kind: str) -> tuple[Any, Any]:
    """The preprocessor of images and the model, of transformers' class `name`, in a folder, in float32.

    Raises:
      UserError: if they cannot be loaded, or weights are missing.
    """
    torch, device = torch_and_device()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        # DINOv2's preprocessor has the same options as CLIP's
        preprocess = transformers.CLIPImageProcessorPil.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        model, loaded = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"transformers cannot load a {kind} from {folder}: {one_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would initialize them at random
        raise UserError(f"the {kind} in {folder} is incomplete: it lacks {one_line(missing)}")
    return preprocess, model.eval().to(device)
