"""The commands of the quick start for Ascend users, and the other commands, in child processes.

The data is small. `few_captions` shortens ImageNet's class names and templates, because the commands have no flag for
it. Single-card training and inference use ViT-B-32; the other tests use a small model.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import ROOT
from PIL import Image

import modern_text_cases
import open_clip
import processes
import tiny_clip
import tiny_naflex
import train_runs

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]  # the module of the command `torchrun`
CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475")

SINGLE_CARD = shlex.split("""
    -m training.main
    --model ViT-B-32
    --save-frequency 1
    --zeroshot-frequency 1
    --report-to tensorboard
    --train-data="./data/MS_COCO_2017_URL_TEXT/traincoco.csv"
    --val-data="./data/MS_COCO_2017_URL_TEXT/traincoco.csv"
    --imagenet-val="./data/ImageNet-1000/val/"
    --pretrained "./models/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K/open_clip_pytorch_model.bin"
    --warmup 10000
    --batch-size=4
    --lr=1e-3
    --wd=0.1
    --epochs=1
    --workers=2
    --seed 0
""")
TWO_CARDS = shlex.split("""
    --nproc_per_node 2 -m training.main
    --save-frequency 1
    --zeroshot-frequency 1
    --report-to tensorboard
    --train-data="./data/MS_COCO_2017_URL_TEXT/traincoco.csv"
    --val-data="./data/MS_COCO_2017_URL_TEXT/traincoco.csv"
    --imagenet-val="./data/ImageNet-1000/val/"
    --pretrained "./models/small.bin"
    --warmup 10000
    --batch-size=2
    --lr=1e-3
    --wd=0.1
    --epochs=1
    --workers=2
    --seed 0
    --model local-dir:./models/small
    --dist-backend="hccl"
""")
INFERENCE = """
import torch
import torch_npu
from PIL import Image
import open_clip as clip

model = clip.openai.load_openai_model('{weights}', cache_dir="{folder}")

model, _, preprocess = clip.create_model_and_transforms('ViT-B-32', pretrained='{weights}')
tokenizer = clip.get_tokenizer('ViT-B-32')

# put inputs and model to npu
image = preprocess(Image.open("{folder}/your/image.jpg")).unsqueeze(0).to("npu")
text = tokenizer(["a diagram", "a dog", "a cat"]).to("npu")
model = model.to("npu")

with torch.no_grad(), torch.npu.amp.autocast():
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)

    text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)

print("Label probs:", text_probs)  # prints: [[1., 0., 0.]]
"""
# A sitecustomize.py that Python imports at start. It first runs the one that makes torchvision importable.
FEW_CAPTIONS = """
import runpy, sys
runpy.run_path({shim!r})
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

class Shorten(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "open_clip.zero_shot_metadata":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module
        def shortened(module):
            run(module)
            module.IMAGENET_CLASSNAMES = module.IMAGENET_CLASSNAMES[:5]
            module.OPENAI_IMAGENET_TEMPLATES = module.OPENAI_IMAGENET_TEMPLATES[:2]
        spec.loader.exec_module = shortened
        return spec

sys.meta_path.insert(0, Shorten())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create data (images of noise) and weights at the paths of the commands."""
    folder = tmp_path_factory.mktemp("commands")
    draw = np.random.default_rng(0)

    def image(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (80, 100, 3), dtype=np.uint8)).save(path)
        return path

    coco = folder / "data/MS_COCO_2017_URL_TEXT"
    rows = [f"{image(coco / f'{n}.jpg')}\ta photo of thing number {n}" for n in range(8)]
    (coco / "traincoco.csv").write_text("filepath\ttitle\n" + "\n".join(rows) + "\n")
    for name in CLASSES:
        image(folder / "data/ImageNet-1000/val" / name / "0.JPEG")
    image(folder / "your/image.jpg")
    weights = folder / "models/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K"
    small = train_runs.write_model(folder / "models/small")
    weights.mkdir()
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), weights / "open_clip_pytorch_model.bin")
    torch.save(open_clip.create_model(small).state_dict(), folder / "models/small.bin")
    (folder / "few_captions").mkdir()
    shim = str(ROOT / "tests/npu/shim/sitecustomize.py")
    (folder / "few_captions/sitecustomize.py").write_text(FEW_CAPTIONS.format(shim=shim))
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    """Create a working directory with links to the data and models."""
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(folder / name)
    return tmp_path


def run(command: list[object], place: Path, folder: Path, devices: int = 1, **settings: str) -> str:
    path = f"{folder / 'few_captions'}:{ROOT / 'src'}"
    return processes.run(command, place, PYTHONPATH=path, CANN_EMULATOR_DEVICES=str(devices), **settings)


def check_run(place: Path) -> Path:
    """Check that a run wrote a checkpoint, TensorBoard scalars and an evaluation. Return its folder."""
    (run_folder,) = (place / "logs").iterdir()
    assert (run_folder / "checkpoints/epoch_1.pt").exists()
    assert train_runs.scalars(run_folder)["train/loss"]
    (last,) = train_runs.results(run_folder)
    assert {"clip_val_loss", "image_to_text_R@1", "text_to_image_R@10"} <= set(last)
    assert 0 <= last["imagenet-zeroshot-val-top1"] <= last["imagenet-zeroshot-val-top5"] <= 1
    return run_folder


@pytest.mark.slow
def test_training_on_a_single_card(place: Path, folder: Path) -> None:
    printed = run([PYTHON, *SINGLE_CARD], place, folder)
    run_folder = check_run(place)
    assert "on 1 x npu (Ascend910B1), precision amp" in printed
    assert "device: npu:0\n" in (run_folder / "params.txt").read_text()
    assert re.search(r"Memory: [1-9]\d*\.\d\d GiB \(peak", printed), "the device's memory"


@pytest.mark.slow
def test_distributed_training_on_two_cards(place: Path, folder: Path) -> None:
    printed = run([*TORCHRUN, *TWO_CARDS], place, folder, devices=2)
    run_folder = check_run(place)
    assert "on 2 x npu" in printed
    for rank in range(2):
        assert f"Rank {rank} of 2 on npu:{rank} (hccl)" in printed
    assert "dist_backend: hccl\n" in (run_folder / "params.txt").read_text()


@pytest.mark.slow
def test_inference(folder: Path) -> None:
    weights = folder / "models/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K/open_clip_pytorch_model.bin"
    script = INFERENCE.format(weights=weights, folder=folder)
    strict = {"CANN_EMULATOR_STRICT": "0"}  # torch prints a tensor's numbers by way of float64 on the device
    printed = run([PYTHON, "-c", script], folder, folder, **strict)
    (numbers,) = re.findall(r"Label probs: tensor\(\[\[(.*)\]\], device='npu:0'", printed)
    probabilities = [float(number) for number in numbers.split(",")]
    assert len(probabilities) == 3
    assert sum(probabilities) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("words", [["training.profiler"], ["open_clip_train.profiler", "--device", "npu"]])
def test_profiler(words: list[str], tmp_path: Path) -> None:
    options = ["--model", "ViT-L-14", "--results-file", "./logs/profiler_results.csv"]
    processes.run([PYTHON, "-m", *words, *options], tmp_path)
    assert (tmp_path / "logs/profiler_results.csv").read_text().splitlines() == [
        "model,image_size,image_width,text_width,embed_dim,mparams,image_mparams,text_mparams,gflops,image_gflops,text_gflops",
        "ViT-L-14,224,1024,768,768,427.62,303.97,123.65,175.33,162.03,13.3",
    ]


def test_scale(tmp_path: Path) -> None:
    """The torch of torch_npu is built without CUDA. The bytes are those that fake CUDA tensors give elsewhere."""
    options = ["--model", "ViT-B-32", "--ranks", 8, "--csv", "scale.csv"]
    processes.run([PYTHON, "-m", "training.scale", *options], tmp_path)
    (row,) = csv.DictReader((tmp_path / "scale.csv").read_text().splitlines())
    assert float(row["activations_gib"]) * 2**30 == pytest.approx(251396100 + 64 * 34167552, rel=1e-3)


def test_train_resume_and_evaluate(place: Path, folder: Path) -> None:
    """Train two epochs, repeat the second one resumed on another card, and evaluate the last checkpoint.

    The resumed run uses strict mode and delayed copies, and has the same losses.
    """
    rows = "data/MS_COCO_2017_URL_TEXT/traincoco.csv"
    common = [PYTHON, "-m", "training.main", "--model", "local-dir:./models/small", "--batch-size", 4, "--workers", 1]
    train = [*common, "--train-data", rows, "--warmup", 2, "--lr", 1e-3, "--epochs", 2, "--log-every-n-steps", 1]
    train += ["--report-to", "tensorboard", "--force-patch-dropout", 0.5]
    run([*train, "--name", "whole"], place, folder)
    latest = ["--resume", "logs/whole/checkpoints/epoch_1.pt", "--device", "npu:1"]
    strict = {"CANN_EMULATOR_STRICT": "1", "CANN_EMULATOR_DELAY_COPIES": "1", "CANN_EMULATOR_POISON": "1"}
    printed = run([*train, "--name", "resumed", *latest], place, folder, devices=2, **strict)
    assert "Rank 0 of 1 on npu:1" in printed
    whole, resumed = (train_runs.scalars(place / "logs" / name)["train/loss"] for name in ("whole", "resumed"))
    assert sorted(whole) == [0, 1, 2, 3]
    assert resumed == {step: whole[step] for step in (2, 3)}, "patch dropout draws the same on the NPU"

    evaluate = [*common, "--val-data", rows, "--imagenet-val", "data/ImageNet-1000/val", "--name", "evaluated"]
    run([*evaluate, "--resume", "logs/resumed/checkpoints/epoch_2.pt"], place, folder)
    (line,) = train_runs.results(place / "logs/evaluated")
    assert line["num_samples"] == 8
    assert "imagenet-zeroshot-val-top1" in line
    assert not list((place / "logs/evaluated/checkpoints").glob("*.pt"))


def test_images_of_any_shape(place: Path, folder: Path) -> None:
    """Train two steps in amp, each with images of two lengths in several micro-batches, padded and packed."""
    vocabulary = {"vocab_size": 49408, "context_length": 16, "pad_id": 0, "bos_id": 49406, "eos_id": 49407}
    modern = {**modern_text_cases.TEXT, **vocabulary}
    model = tiny_clip.write_folder(place / "naflex", tiny_naflex.config(text=modern))
    command = [PYTHON, "-m", "training.main", "--model", model, "--dataset-type", "synthetic", "--use-naflex"]
    command += ["--train-num-samples", 16, "--batch-size", 8, "--epochs", 1, "--workers", 1, "--precision", "amp"]
    command += ["--naflex-seq-lens", 9, 25, "--naflex-max-tokens-per-batch", 100, "--naflex-batch-divisor", 2]
    command += ["--report-to", "tensorboard", "--log-every-n-steps", 1, "--save-frequency", 0]
    losses = {}
    for packing in ("off", "on"):
        printed = run([*command, "--packing", packing, "--name", packing], place, folder)
        assert "on 1 x npu (Ascend910B1), precision amp" in printed
        losses[packing] = train_runs.scalars(place / "logs" / packing)["train/loss"]
    assert sorted(losses["off"]) == [0, 1]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-2)


def test_torchrun_with_a_device_and_an_output_folder(place: Path, folder: Path) -> None:
    """Run open_clip_train with --output-dir, because torchrun interprets --logs as one of its options."""
    torchrun = [*TORCHRUN, "--standalone", "--nproc_per_node", 2]
    command = [*torchrun, "-m", "open_clip_train.main", "--device", "npu", "--output-dir", place / "out"]
    options = ["--model", "local-dir:./models/small", "--dataset-type", "synthetic", "--train-num-samples", 8]
    more = ["--batch-size", 2, "--epochs", 1, "--workers", 0, "--local-loss", "--gather-with-grad", "--siglip"]
    printed = run([*command, *options, *more], place, folder, devices=2)
    assert "Rank 1 of 2 on npu:1 (hccl)" in printed
    assert list((place / "out").glob("*/checkpoints/epoch_1.pt"))


def test_doctor(tmp_path: Path) -> None:
    printed = processes.run([PYTHON, "-m", "training.doctor", "--json"], tmp_path)
    found = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert found["can_train"] is True
    assert found["default_device"].startswith("npu")
    assert "hccl" in found["backends"]
    assert found["versions"]["torch_npu"].split(".")[:2] == torch.__version__.split(".")[:2]


def test_demo_trains_on_the_npu(tmp_path: Path) -> None:
    printed = processes.run([PYTHON, ROOT / "demo/digits.py", "--output", tmp_path, "--epochs", "2"], tmp_path)
    assert "on 1 x npu" in printed
    assert "Zero-shot accuracy on 360 digits" in printed
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
