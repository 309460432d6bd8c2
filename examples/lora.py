"""Fine-tune a CLIP model with LoRA through peft, and write the adapter and the merged model.

    pip install peft
    python examples/lora.py --model ViT-B-32 --pretrained laion2b_s34b_b79k --train-data train.csv --output lora

This writes the adapter to `lora/adapter`, for `peft.PeftModel.from_pretrained`, and `lora/merged.pt`, an ordinary
checkpoint for `--pretrained` that needs no peft.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import peft
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import open_clip


class Pairs(Dataset):
    """The image-text pairs of a tab-separated file with the columns `filepath` and `title`."""

    def __init__(self, path: Path, preprocess, tokenizer) -> None:
        with open(path, newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file, delimiter="\t"))
        self.preprocess, self.tokenizer = preprocess, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[index]
        return self.preprocess(Image.open(row["filepath"])), self.tokenizer([row["title"]])[0]


def find_targets(model: nn.Module) -> str:
    """Return a regular expression for the names of all attention and linear layers of the towers.

    peft adapts the input and output projections of an `nn.MultiheadAttention` together, so `out_proj` in it is left
    out. It does not support attention whose keys have another width (CoCa's pooler): only its `out_proj` is adapted.
    """
    attention = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    }
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = attention | {name for name in linear if name.rpartition(".")[0] not in attention}
    # peft compares names in a list with the end of a module's name, and an expression with the whole name.
    return "|".join(re.escape(name) for name in sorted(names))


def set_training(model: nn.Module) -> None:
    """Set training mode, except for BatchNorm (ResNets): the adapter does not contain its running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def train(model: nn.Module, batches: DataLoader, device: torch.device, args: argparse.Namespace) -> None:
    """Train the parameters that require gradients."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.0)
    steps = args.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(steps, 2), pct_start=0.1)
    loss_function = open_clip.ClipLoss()
    set_training(model)
    for epoch in range(args.epochs):
        for images, texts in batches:
            image_features, text_features, logit_scale = model(images.to(device), texts.to(device))[:3]
            loss = loss_function(image_features, text_features, logit_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"Epoch {epoch + 1}: loss of the last batch {loss.item():.4f}")
    model.eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="architecture, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--pretrained", required=True, help="tag or file of the weights to start from")
    parser.add_argument("--train-data", type=Path, required=True, help="tab-separated file: filepath, title")
    parser.add_argument("--output", type=Path, default=Path("lora"), help="folder for the results")
    parser.add_argument("--rank", type=int, default=16, help="rank of the updates (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="maximum learning rate (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = open_clip.device.resolve(args.device)
    model, preprocess_train, _ = open_clip.create_model_and_transforms(args.model, args.pretrained, device=device)
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=find_targets(model))
    tuned = peft.get_peft_model(model, config)
    tuned.print_trainable_parameters()

    pairs = Pairs(args.train_data, preprocess_train, open_clip.get_tokenizer(args.model))
    train(tuned, DataLoader(pairs, args.batch_size, shuffle=True, drop_last=len(pairs) > args.batch_size), device, args)

    tuned.save_pretrained(str(args.output / "adapter"))
    merged = tuned.merge_and_unload()
    torch.save(merged.state_dict(), args.output / "merged.pt")
    print(f"Wrote {args.output / 'adapter'} and {args.output / 'merged.pt'}.")


if __name__ == "__main__":
    main()
