"""FID, pFID and CLIP score end to end, with small random networks saved as the real ones are."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate import features, metrics, statistics
from arcflow_jax.evaluate.features import Clip, Inception, centre, resized
from arcflow_jax.evaluate.image_sets import Folder, ImageSet
from arcflow_jax.evaluate.measures import Networks
from tests.helpers.command_line import assert_refused, run
from tests.helpers.tiny_judges import PROMPTS, write_images

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class TinyInception(torch.nn.Module):
    """Has the inputs and outputs of the published network, but a thousandth of its size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(3 * 36, 8)
        self.output = torch.nn.Linear(8, 1008)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        assert x.shape[1:] == [3, 299, 299]
        pooled = torch.nn.functional.adaptive_avg_pool2d((x.float() - 128) / 128, 6)
        found = torch.tanh(3 * self.project(pooled.flatten(1)))
        return found if return_features else self.output(found).softmax(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "tiny.pt"
    torch.jit.script(TinyInception()).save(file)
    return file


def evaluate(images: ImageSet, references: dict, out: Path, *networks: object, **more: object) -> dict:
    return metrics.evaluate(images, references, out, Networks(*networks, **more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """40 images to judge, 50 and 35 to compare them with."""
    root = tmp_path_factory.mktemp("images")
    for seed, (name, count) in enumerate({"mine": 40, "coco": 50, "teacher": 35}.items()):
        write_images(root / name, count, seed)
    return root


def by_definition(inception: Path, a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance of images [B, 299, 299, 3], in one piece and with scipy's matrix square root."""
    with torch.inference_mode():
        network = torch.jit.load(inception)
        a, b = (network(torch.from_numpy(x).permute(0, 3, 1, 2), True).double().numpy() for x in (a, b))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])


@pytest.mark.slow
def test_a_folder_against_both_references(capfd, folders, tmp_path, inception, clip):
    out = tmp_path / "reports" / "mine.json"
    common = ("evaluate", "metrics", "--inception", inception, "--clip", clip)
    code, stdout, stderr = run(
        capfd,
        *(*common, "--images", folders / "mine", "--out", out),
        *("--real", folders / "coco", "--teacher-images", folders / "teacher"),
    )
    assert code == 0, stderr
    report = json.loads(out.read_text())
    mine, coco, teacher = (pixels(folders / name) for name in ("mine", "coco", "teacher"))
    crop = np.s_[:, 5:304, 15:314]
    assert report["pfid"]["real"] == pytest.approx(by_definition(inception, mine[crop], coco[crop]), rel=1e-5)
    assert report["pfid"]["teacher"] == pytest.approx(by_definition(inception, mine[crop], teacher[crop]), rel=1e-5)

    def scaled(images: np.ndarray) -> np.ndarray:
        """PyTorch's own bicubic, antialiased resize, rounded."""
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bicubic", antialias=True)
        return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()

    assert report["fid"]["real"] == pytest.approx(by_definition(inception, scaled(mine), scaled(coco)), rel=1e-3)
    assert report["fid"]["real"] != pytest.approx(report["pfid"]["real"], rel=1e-2)
    assert report["images"]["count"] == 40
    assert report["references"]["teacher"]["count"] == 35
    assert [note.partition(":")[0] for note in report["notes"]] == ["inception"]
    assert f"pfid to the teacher images: {report['pfid']['teacher']:.3f}" in stdout
    assert f"clip score: {report['clip']['score']:.4f}" in stdout
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "mine-real.npz",
        "mine-teacher.npz",
        "mine.json",
        "mine.npz",
    ]

    # Statistics replace the images that they were made from
    again = tmp_path / "again.json"
    code, stdout, stderr = run(
        capfd,
        *(*common, "--images", folders / "mine", "--out", again, "--metric", "pfid"),
        *("--real", out.with_name("mine-real.npz"), "--teacher-images", out.with_suffix(".npz")),
    )
    assert code == 0, stderr
    second = json.loads(again.read_text())
    assert second["pfid"]["real"] == pytest.approx(report["pfid"]["real"], rel=1e-12)
    assert second["pfid"]["teacher"] == pytest.approx(0, abs=1e-6)
    assert "fid" not in second
    assert second["references"] == {"real": report["references"]["real"], "teacher": report["images"]}


def test_clip_score_is_the_mean_cosine(folders, tmp_path, clip):
    report = evaluate(Folder(folders / "mine"), {}, tmp_path / "a.json", ["clip"], clip=str(clip))
    model = transformers.CLIPModel.from_pretrained(clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    cosines = []
    with torch.inference_mode():
        for i, image in enumerate(pixels(folders / "mine")):
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
            x = torch.nn.functional.interpolate(x, size=(32, 34), mode="bicubic", antialias=True)[..., 1:33]
            mean, deviation = (
                torch.tensor(values).view(1, 3, 1, 1)
                for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
            )
            x = (x.clamp(0, 255).round() / 255 - mean) / deviation
            seen = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
            ids = torch.tensor([tokenizer(PROMPTS[i % len(PROMPTS)]).input_ids])
            said = model.text_projection(model.text_model(input_ids=ids).pooler_output)
            cosines.append(torch.nn.functional.cosine_similarity(seen, said).item())
    assert report["clip"]["score"] == pytest.approx(np.mean(cosines), abs=1e-3)
    assert report["clip"]["standard_error"] == pytest.approx(np.std(cosines, ddof=1) / np.sqrt(40), rel=0.02)


def test_straight_from_a_sampler(capfd, folders, tmp_path, tiny_flux, inception, clip):
    """Images that are not kept score the same as those that `arcflow sample` writes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    sampling = ("--model", tiny_flux, "--teacher", "--steps", 2, "--seed", 3, "--guidance", 2)
    code, _, stderr = run(
        capfd, "sample", *sampling, "--prompts-file", prompts, "--out", tmp_path / "kept", "--batch-size", 2
    )
    assert code == 0, stderr
    common = ("evaluate", "metrics", "--inception", inception, "--clip", clip, "--real", folders / "coco")
    common += ("--metric", "clip", "--metric", "fid")
    made = [*sampling, "--prompts", prompts, "--batch-size", 2]
    reports = []
    for name, judged in {"kept": ["--images", tmp_path / "kept"], "made": made}.items():
        code, _, stderr = run(capfd, *common, *judged, "--out", tmp_path / f"{name}.json")
        assert code == 0, stderr
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    kept, made = reports
    assert made["fid"]["real"] == pytest.approx(kept["fid"]["real"], rel=1e-9)
    assert made["clip"]["score"] == pytest.approx(kept["clip"]["score"], rel=1e-6)
    assert {"steps": 2, "seed": 3, "guidance": 2.0, "height": 64}.items() <= made["images"].items()
    assert made["notes"][0].startswith("images: 5 images are few for 8 features")


def test_an_interrupted_evaluation_resumes(folders, tmp_path, inception, clip, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH", 8)
    settings = {"metrics": ["fid", "clip"], "inception": inception, "clip": str(clip)}
    references = {"real": folders / "coco"}
    whole = evaluate(Folder(folders / "mine"), references, tmp_path / "whole.json", **settings)

    class Breaking(Folder):
        def stream(self, first, end):
            started.append(first)
            for i, image in enumerate(super().stream(first, end), first):
                if i == breaks_at:
                    raise KeyboardInterrupt
                yield image

    started, breaks_at = [], 21
    with pytest.raises(KeyboardInterrupt):
        evaluate(Breaking(folders / "mine"), references, tmp_path / "a.json", **settings)
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(
        UserError, match=r"a\.npz covers 16 of 40 images: the evaluation that writes it was interrupted"
    ):
        evaluate(Folder(folders / "coco"), {"real": tmp_path / "a.npz"}, tmp_path / "b.json", **settings)
    breaks_at = None
    monkeypatch.setattr(statistics, "SAVE_SECONDS", -1)  # after every batch
    assert evaluate(Breaking(folders / "mine"), references, tmp_path / "a.json", **settings) == whole
    assert started == [0, 8, 16, 16, 24, 32]
    # Complete statistics are not gathered again
    monkeypatch.setattr(Networks, "features", None)
    assert evaluate(Breaking(folders / "mine"), references, tmp_path / "a.json", **settings) == whole


def test_statistics_of_version_0_1_are_a_reference(folders, tmp_path, inception):
    """It said `pictures` for images, and called their number that, too."""
    new, old = tmp_path / "new.npz", tmp_path / "old.npz"
    evaluate(Folder(folders / "coco"), {}, new.with_suffix(".json"), ["fid"], inception)
    with np.load(new) as arrays:
        values = dict(arrays)
    description = json.loads(str(values["description"]))
    images = description.pop("images")
    description["pictures"] = {"folder": images["folder"], "pictures": images["count"]}
    np.savez(old, **values | {"description": json.dumps(description)})
    reports = [
        evaluate(Folder(folders / "mine"), {"real": file}, tmp_path / f"{file.stem}-mine.json", ["fid"], inception)
        for file in (new, old)
    ]
    assert reports[0]["fid"] == reports[1]["fid"]
    assert reports[1]["references"]["real"] == {"folder": images["folder"], "count": 50}


def test_captions_beside_the_images(tmp_path, clip):
    write_images(tmp_path / "png", 3, seed=0)
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for i, file in enumerate(sorted((tmp_path / "png").iterdir())):
        Image.open(file).convert("L").save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(PROMPTS[i])
    images = Folder(folder)
    assert [images.prompt(image) for image in images.stream(1)] == PROMPTS[1:3]
    assert [image.mode for image in images.stream(0)] == ["RGB"] * 3
    (folder / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "a red circle"}\n')
    with pytest.raises(UserError, match=r"1\.jpg has no prompt, and .*jpeg no caption of it: name all images in"):
        _ = Folder(folder).prompts
    (folder / "metadata.jsonl").unlink()
    (folder / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.jpg has no caption"):
        evaluate(Folder(folder), {}, tmp_path / "a.json", ["clip"], clip=str(clip))


def test_what_the_networks_take():
    ramp = np.arange(400, dtype=np.uint8)[None, :, None].repeat(300, 0).repeat(3, 2)
    np.testing.assert_array_equal(centre(Image.fromarray(ramp)), ramp[:299, 50:349])
    checker = np.indices((598, 598)).sum(0) % 2 * 255
    image = Image.fromarray(checker.astype(np.uint8)).convert("RGB")
    assert np.ptp(resized(image)[8:-8, 8:-8]) <= 2  # fine detail is averaged, not subsampled
    with pytest.raises(UserError, match="pfid needs images of at least 299 x 299 pixels, but one has 400 x 298: leave"):
        centre(image.resize((400, 298)))


def test_bad_input(capfd, folders, tmp_path, inception, clip, monkeypatch):
    good = {"--images": folders / "mine", "--inception": inception, "--clip": clip, "--out": tmp_path / "a.json"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("not a network")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    write_images(tmp_path / "small", 2, seed=0, width=64, height=64)

    def refused(message: str, **other: object) -> None:
        changed = {f"--{name.replace('_', '-')}": value for name, value in other.items()}
        options = [part for option in (good | changed).items() if option[1] is not None for part in option]
        assert_refused(capfd, tmp_path, "evaluate", "metrics", *options, message=message)

    refused("either --images, or what to sample with --prompts", images=None)
    refused("either --images, or what to sample with --prompts", prompts="a.txt")
    refused("leave --adapter out, or name --prompts", adapter="x")
    refused("image folder .*nothing does not exist", images=tmp_path / "nothing")
    refused("empty contains no images", images=tmp_path / "empty")
    refused(r"must be a \.json file", out=tmp_path / "a.npz")
    refused("a reference needs fid or pfid", metric="clip", real=folders / "coco")
    refused("one has 64 x 64: leave pfid out", images=tmp_path / "small")
    refused("cannot read the Inception network .*nothing: No such file", inception=tmp_path / "nothing")
    refused("a.txt is not a TorchScript network", inception=tmp_path / "a.txt")
    refused("there is no CLIP model nothing: give a folder, or OWNER/NAME", clip="nothing", metric="clip")
    refused("empty holds no tokenizer", clip=tmp_path / "empty", metric="clip")
    refused("other.npz does not contain statistics of images", real=tmp_path / "other.npz")
    refused("image folder .*nothing does not exist", real=tmp_path / "nothing")

    for metric in ("fid", "pfid"):
        evaluate(Folder(folders / "coco"), {}, tmp_path / f"{metric}.json", [metric], inception)
    changed = tmp_path / "fid.json"
    refused(
        r"fid\.npz has other statistics, with different count, files_sha256, folder:",
        out=changed,
        metric="fid",
    )
    refused("with different count, files_sha256, folder, metrics:", out=changed, metric="pfid")
    refused("pfid.npz has no statistics for fid", real=tmp_path / "pfid.npz", metric="fid")
    torch.jit.script(TinyInception().double().float()).save(tmp_path / "other.pt")
    other = {"inception": tmp_path / "other.pt", "metric": "fid"}
    refused("fid.npz was made with another Inception network than .*other.pt", real=tmp_path / "fid.npz", **other)

    monkeypatch.setitem(sys.modules, "torch", None)
    refused(r"FID and CLIP scores need torch: pip install torch, or arcflow_jax\[eval\]", metric="fid")


def test_incomplete_clip_models(clip, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "text_projection" not in k}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"CLIP model in .*clip is incomplete: it lacks \['text_projection.weight'\]"):
        Clip(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot load a CLIP model from"):
        Clip(str(folder))


def test_the_published_network_is_downloaded_once_and_checked(inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(features, "INCEPTION_URL", inception.as_uri())
    with pytest.raises(UserError, match=r"cannot download file:.*tiny.pt: invalid hash value .*; give a copy of it"):
        Inception()
    assert not list((tmp_path / "hub").rglob("*.*"))
    sha256 = hashlib.sha256(inception.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256)
    fetched = Inception()
    assert fetched.published
    assert fetched.sha256 == sha256
    assert fetched(np.zeros((2, 299, 299, 3), np.uint8)).shape == (2, 8)
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "gone" / "tiny.pt").as_uri())
    assert Inception().file == fetched.file
