"""torch.fx, torchvision's feature extraction, TorchScript and torch.compile by the user's own hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

import open_clip


@pytest.fixture(params=["vit", "resnet"])
def any_visual(request, model) -> torch.nn.Module:
    if request.param == "vit":
        return model.visual
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text).visual.eval()


def test_fx(any_visual, images):
    traced = torch.fx.symbolic_trace(any_visual)
    torch.testing.assert_close(traced(images), any_visual(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(traced(images[:1]), any_visual(images[:1]), atol=1e-5, rtol=1e-4)


def test_fx_of_texts(model, tiny_name, texts, images):
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images, texts)[1], model(images, texts)[1], atol=1e-5, rtol=1e-4)
    tower = open_clip.create_model(tiny_name, force_custom_text=True).text.eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(tower)(texts), tower(texts), atol=1e-5, rtol=1e-4)


def test_feature_extraction(model, images):
    nodes = {"transformer.resblocks.1": "block", "transformer.resblocks.2.mlp.c_proj": "mlp", "ln_post": "norm"}
    found = create_feature_extractor(model.visual, return_nodes=nodes)(images)
    assert {name: tuple(x.shape) for name, x in found.items()} == dict.fromkeys(nodes.values(), (3, 65, 192))
    expected = model.visual.forward_intermediates(images, indices=[1], output_fmt="NLC", output_extra_tokens=True)
    torch.testing.assert_close(found["block"][:, 1:], expected["image_intermediates"][0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace(any_visual, images):
    traced = torch.jit.trace(any_visual, images)
    torch.testing.assert_close(traced(images), any_visual(images), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_jit_true(tiny_name, images, texts):
    torch.manual_seed(0)
    expected = open_clip.create_model(tiny_name).eval()
    torch.manual_seed(0)
    model = open_clip.create_model_and_transforms(tiny_name, jit=True)[0].eval()
    torch.testing.assert_close(model(images, texts), expected(images, texts))


@pytest.mark.ours_only("it compiles the model to TorchScript")
def test_jit_true_is_one_warning(tiny_name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_clip.create_model_and_transforms(tiny_name, jit=True)
    assert [str(warning.message) for warning in caught if "jit" in str(warning.message)] == [
        "jit=True has no effect: TorchScript is deprecated. Use torch.compile(model) on the result."
    ]


@pytest.mark.ours_only("it compiles the model to TorchScript")
@pytest.mark.filterwarnings("ignore")
def test_jit_script_says_what_to_use(model):
    for module in (model, model.visual, model.transformer, model.transformer.resblocks[0]):
        with pytest.raises(NotImplementedError, match=r"Use torch.jit.trace .*, torch.export.export or torch.compile"):
            torch.jit.script(module)


@pytest.mark.parametrize("hooked", [False, True])
def test_compile_without_graph_breaks(model, images, texts, hooked):
    expected = model(images, texts)
    if hooked:
        model.visual.ln_post.register_forward_hook(lambda module, args, output: None)
        model.transformer.resblocks[0].attn.register_forward_hook(lambda module, args, output: None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, texts), expected)


def test_export(model, images, texts):
    exported = torch.export.export(model, (images, texts), strict=False)
    torch.testing.assert_close(exported.module()(images, texts)[1], model(images, texts)[1], atol=1e-5, rtol=1e-4)
