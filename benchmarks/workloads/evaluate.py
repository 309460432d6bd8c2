"""Zero-shot evaluation of ViT-B-32: seconds for the classifier of 20 classes and for 128 images that it classifies."""

import json
import logging
import time
from types import SimpleNamespace

import torch

import open_clip
from open_clip_train import zero_shot

CLASSES, IMAGES, BATCH = 20, 128, 32

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
model = open_clip.create_model("ViT-B-32").eval()
tokenizer = open_clip.get_tokenizer("ViT-B-32")
generator = torch.Generator().manual_seed(0)
batches = [
    (torch.randn(BATCH, 3, 224, 224, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator))
    for _ in range(IMAGES // BATCH)
]
start = time.perf_counter()
with torch.no_grad():
    classifier = open_clip.build_zero_shot_classifier(
        model, tokenizer, open_clip.IMAGENET_CLASSNAMES[:CLASSES], open_clip.OPENAI_IMAGENET_TEMPLATES,
        num_classes_per_batch=10, device="cpu",
    )  # fmt: skip
built = time.perf_counter()


def accuracy(logits: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Count for both packages: numpy 2.4 and later make open_clip_torch's function of this name fail."""
    found = logits.topk(max(topk), 1, True, True)[1].t() == target
    return [float(found[:k].sum()) for k in topk]


zero_shot.accuracy = accuracy
args = SimpleNamespace(precision="fp32", device="cpu", batch_size=BATCH, distributed=False, rank=0, world_size=1)
zero_shot.run(model, classifier, batches, args)
end = time.perf_counter()
print(json.dumps({"classifier [s]": built - start, "images [s]": end - built}))
