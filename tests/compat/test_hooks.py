"""Hooks on the final norms and steps of the image tower, as programs for dense features and Grad-CAM use them."""

from __future__ import annotations

import torch
from torch import nn


def shapes(module: nn.Module, run) -> list[tuple[int, ...]]:
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    run()
    handle.remove()
    return seen


def test_final_norms_see_all_tokens(model, images, texts):
    before = model.encode_image(images), model.encode_text(texts)
    assert shapes(model.visual.ln_post, lambda: model.encode_image(images)) == [(3, 65, 192)]
    assert shapes(model.ln_final, lambda: model.encode_text(texts)) == [(3, 77, 128)]
    after = model.encode_image(images), model.encode_text(texts)
    torch.testing.assert_close(after, before)


def test_grad_cam_on_the_final_norm(model, images):
    kept = {}

    def keep(module, args, output):
        output.retain_grad()
        kept["tokens"] = output

    model.visual.ln_post.register_forward_hook(keep)
    model.encode_image(images).norm(dim=-1).sum().backward()
    assert kept["tokens"].grad.shape == (3, 65, 192)


def test_backward_and_global_hooks_see_all_tokens(model, images, texts):
    seen = []
    model.ln_final.register_full_backward_hook(lambda module, ins, outs: seen.append(tuple(outs[0].shape)))
    model.encode_text(texts).sum().backward()
    assert seen == [(3, 77, 128)]
    norms = []

    def note(module, args):
        if module is model.visual.ln_post:
            norms.append(tuple(args[0].shape))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    model.encode_image(images)
    handle.remove()
    assert norms == [(3, 65, 192)]


class Keeping(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tokens = self.norm(x)
        return self.tokens


def test_modules_in_place_of_the_final_norms_see_all_tokens(model, images, texts):
    before = model.encode_image(images), model.encode_text(texts)
    model.visual.ln_post, model.ln_final = Keeping(model.visual.ln_post), Keeping(model.ln_final)
    after = model.encode_image(images), model.encode_text(texts)
    assert model.visual.ln_post.tokens.shape == (3, 65, 192)
    assert model.ln_final.tokens.shape == (3, 77, 128)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_image_tower_by_hand(model, images):
    visual = model.visual
    pooled, tokens = visual._pool(visual.transformer(visual._embeds(images)))
    torch.testing.assert_close(pooled @ visual.proj, model.encode_image(images), atol=1e-5, rtol=1e-4)
    assert tokens.shape == (3, 64, 192)
    assert [x.shape[1:] for x in visual._global_pool(torch.zeros(3, 65, 192))] == [(192,), (64, 192)]
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    visual.init_parameters()
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())
