"""Tests of open_clip.model_traits, and of objectives that ask a model for its traits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import open_clip
from open_clip.model_inputs import example_inputs
from open_clip.model_traits import IMAGE_TEXT, ModelTraits, traits_of
from towers import FP32, data_of, state_of, train_epoch
from training import flops, profiler
from training.objective import (
    CaptioningObjective,
    ContrastiveObjective,
    DistillationObjective,
    SigmoidObjective,
    create_objective,
    is_captioner,
)
from training.params import ObjectiveConfig
from training.scale import activations
from training.trainer import Trainer

VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}


def coca(kind: type[open_clip.CoCa] = open_clip.CoCa) -> open_clip.CoCa:
    tower = {"output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    vision = VISION | tower | {"attentional_pool": True, "attn_pooler_heads": 2}
    return kind(16, decoder, TEXT | tower | {"embed_cls": True}, vision)


class Sounds(nn.Module):
    """Two towers for sounds and texts. Its inputs and outputs have names of their own."""

    traits = ModelTraits(("audio", "text"), "audio", features=("audio_features", "text_features"))

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.ears, self.words = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if bias else None

    def forward(self, audio=None, text=None):
        features = F.normalize(self.ears(audio), dim=-1), F.normalize(self.words(text), dim=-1)
        bias = () if self.logit_bias is None else (self.logit_bias,)
        return *features, self.logit_scale.exp(), *bias


def sounds(size: int = 4) -> dict:
    generator = torch.Generator().manual_seed(0)
    audio, text = torch.randn(size, 6, generator=generator), torch.randn(size, 5, generator=generator)
    return {"audio": audio, "text": text, "key": list("abcdefgh"[:size])}


def losses_of(objective, model, batch) -> dict[str, torch.Tensor]:
    return objective.losses({**objective.features(model, batch), **objective.targets(batch)})


def test_our_classes_declare_their_traits():
    assert traits_of(open_clip.CLIP(16, VISION, TEXT)) is IMAGE_TEXT
    assert open_clip.CustomTextCLIP.traits is IMAGE_TEXT
    assert open_clip.CoCa.traits.objective == "captioning"
    assert is_captioner(coca())


def test_the_objective_follows_from_the_class_whatever_it_is_called():
    """open_clip's main branch chooses by name, and trains a CoCa that is not called coca as a CLIP."""

    class Plain(open_clip.CoCa):
        pass

    class CocaClip(open_clip.CLIP):
        pass

    assert isinstance(create_objective(ObjectiveConfig(), coca(Plain)), CaptioningObjective)
    assert isinstance(create_objective(ObjectiveConfig(), CocaClip(16, VISION, TEXT)), ContrastiveObjective)


def test_a_model_without_traits_is_judged_by_its_structure():
    class WithDecoder(open_clip.CLIP):
        def __init__(self) -> None:
            super().__init__(16, VISION, TEXT)
            self.text_decoder = nn.Linear(2, 2)

    class Declared(WithDecoder):
        traits = IMAGE_TEXT

    assert traits_of(nn.Linear(2, 2)) is IMAGE_TEXT
    assert traits_of(WithDecoder()).objective == "captioning"
    assert traits_of(Declared()).objective == "contrastive"


def test_one_tower_may_be_encoder_and_decoder():
    """A class like MaMMUT has no `text_decoder`: it says that it writes captions."""

    class OneTower(open_clip.CLIP):
        traits = ModelTraits(objective="captioning")
        pad_id = 3

    objective = create_objective(ObjectiveConfig(), OneTower(16, VISION, TEXT))
    assert isinstance(objective, CaptioningObjective)
    assert objective.pad_id == 3


def test_impossible_traits_are_refused():
    with pytest.raises(ValueError, match=r"objective 'clap' is unknown. Use one of contrastive, captioning"):
        ModelTraits(objective="clap")
    with pytest.raises(ValueError, match=r"sample_key 'image' is not an input. Use one of audio, text"):
        ModelTraits(("audio", "text"))


@pytest.mark.parametrize("siglip", [False, True])
def test_losses_of_other_modalities_are_those_of_images(siglip):
    model, batch = Sounds(bias=siglip), sounds()
    objective = create_objective(ObjectiveConfig(siglip=siglip), model)
    assert isinstance(objective, SigmoidObjective if siglip else ContrastiveObjective)
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    outputs = dict(zip(names, model(batch["audio"], batch["text"]), strict=False))
    loss = open_clip.SigLipLoss() if siglip else open_clip.ClipLoss()
    assert torch.equal(losses_of(objective, model, batch)["loss"], loss(**outputs))


def test_distillation_of_other_modalities():
    torch.manual_seed(0)
    model, teacher, batch = Sounds(), Sounds(), sounds()
    objective = create_objective(ObjectiveConfig(), model, teacher)
    assert isinstance(objective, DistillationObjective)
    names = ("image_features", "text_features", "logit_scale")
    student = dict(zip(names, model(batch["audio"], batch["text"]), strict=True))
    taught = dict(zip((f"dist_{n}" for n in names), teacher(batch["audio"], batch["text"]), strict=True))
    assert losses_of(objective, model, batch)["loss"] == sum(open_clip.DistillClipLoss()(**student, **taught))


def test_a_model_of_another_modality_trains_with_accumulation():
    torch.manual_seed(0)
    model = Sounds()
    objective = create_objective(ObjectiveConfig(), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, objective, optimizer, FP32, accum_freq=2)
    before = losses_of(objective, model, sounds())["loss"].item()
    state, data = state_of(model, 2, accum_freq=2), data_of(0)
    data.dataloader.extend([sounds(4), sounds(3)])
    train_epoch(trainer, data, state)
    assert state.samples_seen == 7
    assert losses_of(objective, model, sounds())["loss"].item() < before


# Example inputs


def test_the_examples_have_the_sizes_of_the_towers():
    model = open_clip.CLIP(16, VISION | {"image_size": (16, 32)}, TEXT)
    inputs = example_inputs(model, 2, dtype=torch.bfloat16)
    assert {name: (value.shape, value.dtype) for name, value in inputs.items()} == {
        "image": ((2, 3, 16, 32), torch.bfloat16),
        "text": ((2, 8), torch.int64),
    }
    assert example_inputs(model, device="meta")["image"].is_meta


def test_a_tower_or_a_model_makes_its_own_examples():
    model = open_clip.CustomTextCLIP(16, VISION, TEXT)
    model.visual.example_image = lambda batch_size, device, dtype: {"patches": torch.ones(batch_size, 5, 12)}
    assert example_inputs(model, 3)["image"]["patches"].shape == (3, 5, 12)
    with pytest.raises(ValueError, match="Sounds takes 'audio', and its size is unknown"):
        example_inputs(Sounds())


class PatchTower(nn.Module):
    """An image tower that takes nothing but dicts of patches. It says so with `example_image`."""

    image_size = 16
    output_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)

    def example_image(self, batch_size, device, dtype):
        return {"patches": torch.ones(batch_size, 5, 12, device=device, dtype=dtype)}

    def forward(self, image):
        return self.embed(image["patches"]).mean(dim=1)


def test_flops_and_activations_of_a_tower_that_takes_dicts_are_counted():
    model = open_clip.CustomTextCLIP(16, VISION, TEXT, output_dict=True)
    model.visual = PatchTower()
    image = 2 * 5 * 12 * 16
    assert flops.profile_torch_image(model, None, 2) == image
    text = flops.profile_torch_text(model, None)
    assert flops.profile_torch(model, None, None) == image + text
    assert flops.training_flops(model) > 2 * (image + text)
    assert activations.count(model.train(), None).all.per_sample > 0


def test_a_forward_pass_of_any_model_is_measured(monkeypatch):
    model = open_clip.CustomTextCLIP(16, VISION, TEXT, output_dict=True)
    model.visual = PatchTower()
    monkeypatch.setattr(profiler, "_build", lambda *args: model)
    assert profiler.measure_model("name", 1.0, 2, torch.device("cpu"), "fp32")["images_per_s"] > 0
