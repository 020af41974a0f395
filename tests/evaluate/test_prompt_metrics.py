"""Diversity, retrieval and HPS end to end, with small random networks saved as the real ones are."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.data.output import save_image
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate import metrics, statistics
from arcflow_jax.evaluate.features import image_network
from arcflow_jax.evaluate.image_sets import Folder
from arcflow_jax.evaluate.measures import Networks
from tests.helpers.command_line import assert_refused, run
from tests.helpers.tiny_judges import PROMPTS, write_images

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    """Four images of each of five prompts, as a teacher makes them and as a student that ignores the seed."""
    root = tmp_path_factory.mktemp("seeds")
    write_images(root / "teacher", 20, seed=0, width=40, height=40, images_per_prompt=4)
    write_images(root / "student", 20, seed=1, width=40, height=40, images_per_prompt=4)
    shutil.copytree(root / "student", root / "collapsed")
    for i in range(20):
        shutil.copy(root / "student" / f"{i // 4 * 4:03d}.png", root / "collapsed" / f"{i:03d}.png")
    return root


def evaluate(folder: Path, out: Path, *names: str, teacher: Path | None = None, **networks: object) -> dict:
    images = Folder(folder, by_prompt="diversity" in names)
    references = {} if teacher is None else {"teacher": teacher}
    return metrics.evaluate(images, references, out, Networks(names, **networks))


def pixels(folder: Path, size: int, crop: int, mean: tuple, deviation: tuple) -> torch.Tensor:
    """The images of a folder, preprocessed by hand: resized, cropped, normalized."""
    images = [
        np.asarray(Image.open(f).resize((size, size), Image.Resampling.BICUBIC)) for f in sorted(folder.iterdir())
    ]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255
    edge = (size - crop) // 2
    x = x[..., edge : edge + crop, edge : edge + crop]
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


def clip_features(clip: Path, x: torch.Tensor | None = None, prompts: list[str] | None = None) -> np.ndarray:
    """CLIP's features of length 1, in float64."""
    model = transformers.CLIPModel.from_pretrained(clip).double()
    with torch.inference_mode():
        if x is not None:
            found = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
            ids = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in prompts]
            found = torch.cat([model.text_projection(model.text_model(input_ids=i).pooler_output) for i in ids])
    return (found / found.norm(dim=-1, keepdim=True)).numpy()


CLIP_PIXELS = (32, 32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def by_pairs(features: np.ndarray, together: int) -> np.ndarray:
    """The mean of 1 − cosine over the pairs of each group of neighbours."""
    x = features / np.linalg.norm(features, axis=-1, keepdims=True)
    groups = x.reshape(-1, together, x.shape[-1])
    return np.array([np.mean([1 - a @ b for a, b in itertools.combinations(group, 2)]) for group in groups])


def test_diversity_with_dinov2(seeds, dino, tmp_path):
    model = transformers.Dinov2Model.from_pretrained(dino).double()

    def expected(name: str) -> np.ndarray:
        x = pixels(seeds / name, 32, 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.inference_mode():
            return by_pairs(model(pixel_values=x).last_hidden_state[:, 0].numpy(), 4)

    found = evaluate(
        seeds / "student", tmp_path / "a.json", "diversity", teacher=seeds / "teacher", features=str(dino)
    )["diversity"]
    student, teacher = expected("student"), expected("teacher")
    assert found["score"] == pytest.approx(student.mean(), rel=1e-4)
    assert found["standard_error"] == pytest.approx(student.std(ddof=1) / np.sqrt(5), rel=1e-3)
    assert found["teacher"] == pytest.approx(teacher.mean(), rel=1e-4)
    assert found["relative"] == pytest.approx(student.mean() / teacher.mean(), rel=1e-4)
    assert (found["images_per_prompt"], found["network"]) == (4, str(dino))


def test_diversity_with_clip(seeds, clip, tmp_path):
    found = evaluate(seeds / "student", tmp_path / "a.json", "diversity", features=str(clip))["diversity"]
    expected = by_pairs(clip_features(clip, pixels(seeds / "student", *CLIP_PIXELS)), 4).mean()
    assert found["score"] == pytest.approx(expected, rel=1e-4)
    assert "relative" not in found


def test_a_student_that_ignores_the_seed_has_no_diversity(capfd, seeds, dino, tmp_path):
    common = ("evaluate", "metrics", "--metric", "diversity", "--features", dino)
    code, _, stderr = run(capfd, *common, "--images", seeds / "teacher", "--out", tmp_path / "teacher.json")
    assert code == 0, stderr
    relative = {}
    for name in ("collapsed", "teacher"):
        judged = ("--images", seeds / name, "--teacher-images", tmp_path / "teacher.npz")
        code, stdout, stderr = run(capfd, *common, *judged, "--out", tmp_path / f"{name}-2.json")
        assert code == 0, stderr
        relative[name] = json.loads((tmp_path / f"{name}-2.json").read_text())["diversity"]["relative"]
        assert f", {relative[name]:.4f} of the teacher's" in stdout
    assert relative["collapsed"] == pytest.approx(0, abs=1e-9)
    assert relative["teacher"] == pytest.approx(1, rel=1e-12)


def test_images_of_a_prompt_may_lie_apart(seeds, dino, tmp_path):
    """As after a run of each seed into a folder of its own."""
    for i in range(20):
        target = tmp_path / "apart" / f"seed-{i % 4}" / f"{i // 4}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(seeds / "student" / f"{i:03d}.png", target)
    scores = [
        evaluate(folder, tmp_path / f"{i}.json", "diversity", features=str(dino))["diversity"]["score"]
        for i, folder in enumerate((seeds / "student", tmp_path / "apart"))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_retrieval_and_hps(seeds, clip, tmp_path):
    report = evaluate(seeds / "student", tmp_path / "a.json", "retrieval", "hps", clip=str(clip), hps=str(clip))
    images = clip_features(clip, pixels(seeds / "student", *CLIP_PIXELS))
    cosines = images @ clip_features(clip, prompts=PROMPTS).T
    own = np.arange(20) // 4
    rank = (cosines > cosines[range(20), own][:, None]).sum(1)
    assert np.abs(np.diff(np.sort(cosines, 1))).min() > 1e-5  # no ties, and more than rounding
    found = report["retrieval"]
    assert found["recall_at_1"]["score"] == pytest.approx((rank < 1).mean(), abs=1e-6)
    assert found["recall_at_5"]["score"] == 1
    assert found["prompts"] == 5
    scores = 100 * cosines[range(20), own]
    assert report["hps"]["score"] == pytest.approx(scores.mean(), rel=1e-4)
    assert report["hps"]["standard_error"] == pytest.approx(scores.std(ddof=1) / np.sqrt(20), rel=1e-2)


def test_hps_sees_the_whole_image(clip, tmp_path):
    """The original scales the longer side and fills up with black, where CLIP crops."""
    wide = write_images(tmp_path / "wide", 1, seed=0, width=32, height=16)[0]  # the size of the network's input
    filled = np.zeros((32, 32, 3), np.uint8)
    filled[8:24] = wide
    image = Image.fromarray(filled)
    image.info["prompt"] = PROMPTS[0]
    (tmp_path / "filled").mkdir()
    save_image(image, tmp_path / "filled" / "0.png")
    networks = {"hps": str(clip), "clip": str(clip)}
    reports = {n: evaluate(tmp_path / n, tmp_path / f"{n}.json", "hps", "clip", **networks) for n in ("wide", "filled")}
    assert reports["wide"]["hps"]["score"] == pytest.approx(reports["filled"]["hps"]["score"], rel=1e-5)
    assert reports["wide"]["hps"]["score"] == pytest.approx(100 * reports["filled"]["clip"]["score"], rel=1e-5)
    assert reports["wide"]["hps"]["score"] != pytest.approx(100 * reports["wide"]["clip"]["score"], rel=1e-1)


def test_several_seeds_straight_from_a_sampler(capfd, tiny_flux, dino, tmp_path):
    """The images are those of `arcflow sample` with as many images of each prompt."""
    for name, count in {"prompts": 2, "more": 3}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(PROMPTS[:count]))
    sampling = ("--model", tiny_flux, "--teacher", "--steps", 1, "--seed", 3, "--batch-size", 2)
    commands = {
        "sample": ("--prompts-file", tmp_path / "prompts.txt", "--images", 3, "--out", tmp_path / "kept"),
        "made": ("--prompts", tmp_path / "more.txt", "--count", 2, "--images-per-prompt", 3),
        "kept": ("--images", tmp_path / "kept", "--teacher-images", tmp_path / "made.npz"),
    }
    for name, options in commands.items():
        metric = ("evaluate", "metrics", "--metric", "diversity", "--features", dino)
        start = (name,) if name == "sample" else (*metric, "--out", tmp_path / f"{name}.json")
        code, _, stderr = run(capfd, *start, *options, *(sampling if name != "kept" else ()))
        assert code == 0, stderr
    made, kept = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("made", "kept"))
    assert (made["images"]["count"], made["images"]["images_per_prompt"]) == (6, 3)
    assert made["diversity"]["score"] > 1e-6
    assert kept["diversity"]["relative"] == pytest.approx(1, rel=1e-5)


def test_an_interrupted_evaluation_resumes_with_whole_prompts(seeds, dino, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH", 9)  # two prompts
    whole = evaluate(seeds / "student", tmp_path / "whole.json", "diversity", features=str(dino))
    first = []

    class Breaking(Folder):
        def stream(self, start, end=None):
            first.append(start)
            for i, image in enumerate(super().stream(start, end), start):
                if len(first) == 2 and i == 13:
                    raise KeyboardInterrupt
                yield image

    def again() -> dict:
        images = Breaking(seeds / "student", by_prompt=True)
        return metrics.evaluate(images, {}, tmp_path / "a.json", Networks(["diversity"], features=str(dino)))

    with pytest.raises(KeyboardInterrupt):
        again()
    assert again() == whole
    assert first == [0, 8, 8, 16]


def test_statistics_without_diversity_stay_what_they_were(seeds, clip, dino, tmp_path):
    """The description of the older metrics has no new names, so that files of 0.2's first days resume."""
    evaluate(seeds / "student", tmp_path / "old.json", "clip", clip=str(clip))
    with np.load(tmp_path / "old.npz") as arrays:
        assert json.loads(str(arrays["description"])).keys() == {"metrics", "images", "inception", "clip"}
        assert set(arrays) == {"format", "description", "clip_count", "clip_mean", "clip_scatter"}
    with pytest.raises(UserError, match=r"old\.npz has no statistics for diversity, only clip"):
        evaluate(seeds / "student", tmp_path / "a.json", "diversity", teacher=tmp_path / "old.npz", features=str(dino))


def test_bad_input(capfd, seeds, clip, dino, tmp_path):
    def refused(message: str, *options: object) -> None:
        networks = ("--features", dino, "--clip", clip, "--out", tmp_path / "a.json")
        assert_refused(capfd, tmp_path, "evaluate", "metrics", *networks, *options, message=message)

    images = ("--images", seeds / "student")
    diversity = (*images, "--metric", "diversity")
    refused("the metric hps needs its network: name a CLIP model with --hps", *images, "--metric", "hps")
    refused("add --metric hps, or leave --hps out", *images, "--hps", clip)
    refused("are there already: leave --count out, or name --prompts", *images, "--count", 3)
    ignored = ("--steps", 4, "--teacher", "--guidance", 2, "--model", seeds)
    refused("are there already: leave --model, --teacher, --steps, --guidance out", *images, *ignored)
    refused("a reference needs fid or pfid among", *diversity, "--real", seeds / "teacher")
    refused(
        "needs fid or pfid, or diversity, among", *images, "--metric", "clip", "--teacher-images", seeds / "teacher"
    )
    few = ("--prompts", "a.txt", "--images-per-prompt", 1, "--metric", "diversity")
    refused("diversity needs at least two images of each prompt", *few)
    for name, kept in {"uneven": 19, "single": 1}.items():
        (tmp_path / name).mkdir()
        for file in sorted((seeds / "student").iterdir())[:kept]:
            shutil.copy(file, tmp_path / name)
    uneven = "has 4 images of 'a red circle', but 3 of 'a green circle': diversity needs equally many"
    refused(uneven, "--images", tmp_path / "uneven", *diversity[2:])
    refused("has one image of each prompt: diversity needs", "--images", tmp_path / "single", *diversity[2:])
    (tmp_path / "prompts.txt").write_text("a red circle")
    count = ("--prompts", tmp_path / "prompts.txt", "--count", 2, "--metric", "diversity", "--teacher")
    refused("count is 2, but has to be from 1 to 1, the prompts that .*prompts.txt has", *count)

    shutil.copytree(seeds / "student", tmp_path / "other")
    for file in sorted((tmp_path / "other").iterdir())[:4]:
        file.unlink()
    teacher = (*diversity, "--teacher-images")
    refused("other shows other prompts than the images to judge", *teacher, tmp_path / "other")
    evaluate(seeds / "teacher", tmp_path / "clipped.json", "diversity", features=str(clip))
    refused(
        "clipped.npz has the diversity of features of .*clip.*: name it with --features",
        *teacher,
        tmp_path / "clipped.npz",
    )


def test_only_known_kinds_of_networks(dino, tmp_path):
    shutil.copytree(dino, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(UserError, match="is a model of type 'vit', but has to be of type clip or dinov2"):
        image_network(str(tmp_path / "other"))
    with pytest.raises(UserError, match="there is no CLIP or DINOv2 model nothing: give a folder, or OWNER/NAME"):
        image_network("nothing")
