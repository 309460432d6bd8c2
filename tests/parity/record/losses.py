"""Records fixtures/losses.pt: losses, gradients and retrieval metrics of open_clip_torch 3.3.0, in 1 and 2 processes.

python tests/parity/record losses
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from open_clip_train.train import get_clip_metrics

from open_clip import loss

FIXTURE = Path(__file__).parents[1] / "fixtures/losses.pt"
WORLD_SIZES = (1, 2)


def inputs() -> dict[str, torch.Tensor]:
    """Features of 2 ranks with 6 pairs of width 8, and those of a teacher; a captioner's logits and labels."""
    generator = torch.Generator().manual_seed(0)
    image, text, teacher_image, teacher_text = F.normalize(torch.randn(4, 2, 6, 8, generator=generator), dim=-1)
    labels = torch.randint(0, 11, (2, 6, 5), generator=generator)
    labels[:, :, 3:] *= torch.randint(0, 2, (2, 6, 2), generator=generator)
    return {
        "image": image,
        "text": text,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "logits": torch.randn(2, 6, 5, 11, generator=generator),
        "labels": labels,
    }


def answers(rank: int, world_size: int, given: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Case -> losses, then the gradients of their sum with image, text, scale and bias, as far as they have one."""
    place = {"rank": rank, "world_size": world_size}
    found = {}

    def run(name, module, *more, bias=None):
        image, text = (given[part][rank].clone().requires_grad_() for part in ("image", "text"))
        scale = torch.tensor(14.0, requires_grad=True)
        leaves = [image, text, scale]
        if bias is not None:
            leaves.append(torch.tensor(bias, requires_grad=True))
        if isinstance(module, loss.CoCaLoss):
            values = module(image, text, *more, scale)
        else:
            values = module(image, text, *leaves[2:], *more)
        values = values if isinstance(values, tuple) else (values,)
        sum(values).backward()
        found[name] = [value.detach() for value in values] + [leaf.grad for leaf in leaves]

    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            mode = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, **place}
            name = f"{local_loss} {gather_with_grad}"
            teacher = (given["teacher_image"][rank], given["teacher_text"][rank], torch.tensor(20.0))
            caption = (given["logits"][rank], given["labels"][rank])
            run(f"ClipLoss {name}", loss.ClipLoss(**mode))
            run(f"DistillClipLoss {name}", loss.DistillClipLoss(**mode), *teacher)
            run(f"CoCaLoss {name}", loss.CoCaLoss(2.0, 0.5, **mode), *caption)
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        run(f"SigLipLoss {dist_impl}", loss.SigLipLoss(**place, dist_impl=dist_impl), bias=-4.0)
    return found


def _rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world_size}", rank=rank, world_size=world_size)
    torch.save(answers(rank, world_size, inputs()), f"{folder}/{world_size}-{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    given = inputs()
    recorded = {"inputs": given, "answers": {}}
    with tempfile.TemporaryDirectory() as folder:
        for world_size in WORLD_SIZES:
            mp.spawn(_rank, (world_size, folder), world_size)
            recorded["answers"][world_size] = [torch.load(f"{folder}/{world_size}-{r}.pt") for r in range(world_size)]
    for name, image, text in (
        ("distinct", given["image"].flatten(0, 1), given["text"].flatten(0, 1)),
        ("all alike", torch.ones(40, 3), torch.ones(40, 3)),
    ):
        metrics = get_clip_metrics(image, text, torch.tensor(1.0))
        recorded[name] = {
            "image": image,
            "text": text,
            "metrics": {key: float(value) for key, value in metrics.items()},
        }
    torch.save(recorded, FIXTURE)


if __name__ == "__main__":
    main()
