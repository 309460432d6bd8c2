"""The quick start that users of open_clip on Ascend know, typed as it stands but for paths and the size of the data.

Where it says NPU, the test takes the best device present; the two-process form asks for gloo where that is the CPU.
Zero-shot ImageNet encodes 80,000 captions whatever the data, which on a CPU takes a small model instead of ViT-B-32.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import open_clip
from open_clip import device
from processes import run

CLASSES = ("n01440764", "n01443537")
COMMAND = shlex.split("""
    --save-frequency 1
    --zeroshot-frequency 1
    --report-to tensorboard
    --train-data=./data/MS_COCO_2017_URL_TEXT/traincoco.csv
    --val-data=./data/MS_COCO_2017_URL_TEXT/traincoco.csv
    --warmup 10000
    --batch-size=4
    --lr=1e-3
    --wd=0.1
    --epochs=1
    --workers=2
    --seed 0
""")
VIT_B_32 = ["--model", "ViT-B-32", "--pretrained", "./models/open_clip_pytorch_model.bin"]
SMALL_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
SMALL = ["--model", "local-dir:./models/small", "--pretrained", "./models/small.bin",
         "--imagenet-val=./data/ImageNet-1000/val/"]  # fmt: skip
INFERENCE = """
import torch
from PIL import Image
import open_clip as clip

model = clip.openai.load_openai_model('{weights}', cache_dir="{folder}")

model, _, preprocess = clip.create_model_and_transforms('ViT-B-32', pretrained='{weights}')
tokenizer = clip.get_tokenizer('ViT-B-32')

image = preprocess(Image.open("{image}")).unsqueeze(0).to("{device}")
text = tokenizer(["a diagram", "a dog", "a cat"]).to("{device}")
model = model.to("{device}")

with torch.no_grad(), torch.amp.autocast("{device}"):
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)

    text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)

print("Label probs:", text_probs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and weights where the commands look for them: images of noise, which suffice to run everything."""
    folder = tmp_path_factory.mktemp("quick_start")
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
    image(folder / "your_image.jpg")
    (folder / "models").mkdir()
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), folder / "models/open_clip_pytorch_model.bin")
    (folder / "models/small").mkdir()
    config = {"model_cfg": SMALL_MODEL, "preprocess_cfg": {}}
    (folder / "models/small/open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clip.create_model(f"local-dir:{folder}/models/small").state_dict(), folder / "models/small.bin")
    return folder


def check_run(folder: Path, *metrics: str) -> None:
    """What a finished run leaves: a checkpoint, TensorBoard's file, and an evaluation with these numbers."""
    (run_folder,) = (folder / "logs").iterdir()
    assert (run_folder / "checkpoints/epoch_1.pt").exists()
    assert list((run_folder / "tensorboard").glob("events.*"))
    last = json.loads((run_folder / "checkpoints/results.jsonl").read_text().splitlines()[-1])
    assert {"clip_val_loss", "image_to_text_R@1", "text_to_image_R@10", *metrics} <= set(last)


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    """An empty folder to run in, with the data and models where the commands look for them."""
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(folder / name)
    return tmp_path


@pytest.mark.slow
def test_training_vit_b_32(place: Path) -> None:
    run([sys.executable, "-m", "training.main", *VIT_B_32, *COMMAND], place)
    check_run(place)


@pytest.mark.slow
def test_training_with_zero_shot_imagenet(place: Path) -> None:
    run([sys.executable, "-m", "training.main", *SMALL, *COMMAND], place)
    check_run(place, "imagenet-zeroshot-val-top1", "imagenet-zeroshot-val-top5")


@pytest.mark.slow
def test_training_on_two_devices(place: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "training.main"]
    several = device.get(device.best()).count() > 1
    run([*torchrun, *SMALL, *COMMAND, *([] if several else ["--device", "cpu", "--dist-backend=gloo"])], place)
    check_run(place, "imagenet-zeroshot-val-top1", "imagenet-zeroshot-val-top5")


def test_inference(folder: Path) -> None:
    script = INFERENCE.format(
        weights=folder / "models/open_clip_pytorch_model.bin", folder=folder, image=folder / "your_image.jpg",
        device=device.best().type,
    )  # fmt: skip
    (folder / "inference.py").write_text(script)
    printed = run([sys.executable, "inference.py"], folder)
    (numbers,) = re.findall(r"Label probs: tensor\(\[\[(.*)\]\]", printed)
    probabilities = [float(number) for number in numbers.split(",")]
    assert len(probabilities) == 3
    assert sum(probabilities) == pytest.approx(1, abs=2e-3)


def test_profiler(folder: Path) -> None:
    options = ["--model", "ViT-L-14", "--results-file", "./logs/profiler_results.csv"]
    run([sys.executable, "-m", "training.profiler", *options], folder)
    assert (folder / "logs/profiler_results.csv").read_text().splitlines() == [
        "model,image_size,image_width,text_width,embed_dim,mparams,image_mparams,text_mparams,gflops,image_gflops,text_gflops",
        "ViT-L-14,224,1024,768,768,427.62,303.97,123.65,175.33,162.03,13.3",
    ]
