"""Tests of training.objective: the choice of the objective, and losses against the formulas of their papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip.model_traits import IMAGE_TEXT
from training.objective import (
    CaptioningObjective,
    ContrastiveObjective,
    DistillationObjective,
    LossModule,
    SigmoidObjective,
    concatenate,
    create_objective,
)
from training.params import ObjectiveConfig


class TwoTowers(nn.Module):
    """Linear towers for images [B, 6] and texts [B, 5]; outputs as a dict or a tuple, like CLIP's."""

    def __init__(self, bias: bool = False, as_dict: bool = True) -> None:
        super().__init__()
        self.visual = nn.Linear(6, 4)
        self.text = nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if bias else None
        self.as_dict = as_dict

    def forward(self, image=None, text=None):
        outputs = {
            "image_features": F.normalize(self.visual(image), dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.as_dict else tuple(outputs.values())


class Captioner(TwoTowers):
    """Two towers and a decoder over 7 tokens; token 0 is padding."""

    pad_id = 0

    def __init__(self) -> None:
        super().__init__()
        self.text_decoder = nn.Linear(6, 3 * 7)

    def forward(self, image=None, text=None):
        labels = torch.tensor([[3, 1, 0], [5, 0, 0], [2, 2, 2]])
        return {**super().forward(image, text), "logits": self.text_decoder(image).view(-1, 3, 7), "labels": labels}


def batch_of(size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(size, 6, generator=generator),
        "text": torch.randn(size, 5, generator=generator),
    }


def losses_of(objective, model, batch) -> dict[str, torch.Tensor]:
    return objective.losses({**objective.features(model, batch), **objective.targets(batch)})


def contrastive(outputs) -> torch.Tensor:
    logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
    truth = torch.arange(len(logits))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


@pytest.mark.parametrize("as_dict", [True, False])
def test_the_contrastive_loss_is_clips_whatever_form_the_model_answers_in(as_dict):
    model, batch = TwoTowers(as_dict=as_dict), batch_of()
    objective = create_objective(ObjectiveConfig(), model)
    assert isinstance(objective, ContrastiveObjective)
    losses = losses_of(objective, model, batch)
    assert set(losses) == {"contrastive_loss", "loss"}
    torch.testing.assert_close(losses["loss"], contrastive(IMAGE_TEXT.name_outputs(model(**batch))))


def test_the_sigmoid_loss_judges_each_pair():
    model, batch = TwoTowers(bias=True), batch_of()
    objective = create_objective(ObjectiveConfig(siglip=True), model)
    assert isinstance(objective, SigmoidObjective)
    outputs = model(**batch)
    logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T + outputs["logit_bias"]
    truth = 2 * torch.eye(3) - 1
    torch.testing.assert_close(losses_of(objective, model, batch)["loss"], -F.logsigmoid(truth * logits).sum() / 3)


def test_a_teacher_makes_it_distillation_and_learns_nothing_itself():
    torch.manual_seed(0)
    model, teacher, batch = TwoTowers(bias=True), TwoTowers(as_dict=False), batch_of()
    objective = create_objective(ObjectiveConfig(), model, teacher)
    assert isinstance(objective, DistillationObjective)
    losses = losses_of(objective, model, batch)
    outputs, targets = model(**batch), IMAGE_TEXT.name_outputs(teacher(**batch))
    expected = 0.0
    for first, second in (("image_features", "text_features"), ("text_features", "image_features")):
        student, wanted = (o["logit_scale"] * o[first] @ o[second].T for o in (outputs, targets))
        expected = expected - (wanted.softmax(1) * student.log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(losses["distill_loss"], expected)
    torch.testing.assert_close(losses["contrastive_loss"], contrastive(outputs))
    torch.testing.assert_close(losses["loss"], losses["distill_loss"] + losses["contrastive_loss"])
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # DDP waits for the gradient of every parameter, even of the bias, which softmax does not depend on.
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.logit_bias.grad == 0


def test_a_decoder_makes_it_captioning_whatever_the_model_is_called():
    model, batch = Captioner(), batch_of()
    cfg = ObjectiveConfig(coca_caption_loss_weight=3.0, coca_contrastive_loss_weight=0.5)
    objective = create_objective(cfg, model)
    assert isinstance(objective, CaptioningObjective)
    losses, outputs = losses_of(objective, model, batch), model(**batch)
    counted = outputs["labels"] != 0
    caption = F.cross_entropy(outputs["logits"][counted], outputs["labels"][counted])
    torch.testing.assert_close(losses["caption_loss"], 3 * caption)
    torch.testing.assert_close(losses["contrastive_loss"], 0.5 * contrastive(outputs))
    torch.testing.assert_close(losses["loss"], losses["caption_loss"] + losses["contrastive_loss"])


def test_a_loss_module_of_ones_own_is_an_objective():
    class Distance(nn.Module):
        def forward(self, image_features, text_features, logit_scale, output_dict=False):
            return {"distance": (image_features - text_features).square().sum()}

    model, batch = TwoTowers(), batch_of()
    losses = losses_of(LossModule(Distance()), model, batch)
    assert losses["loss"] == losses["distance"] > 0


@pytest.mark.parametrize(
    ("model", "cfg", "teacher", "words"),
    [
        (TwoTowers(), ObjectiveConfig(siglip=True), None, "init_logit_bias"),
        (TwoTowers(bias=True), ObjectiveConfig(siglip=True), TwoTowers(), "cannot be combined"),
        (Captioner(), ObjectiveConfig(siglip=True), None, "captioning loss"),
        (Captioner(), ObjectiveConfig(), TwoTowers(), "captioning loss"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(model, cfg, teacher, words):
    with pytest.raises(ValueError, match=words):
        create_objective(cfg, model, teacher)


def test_parts_of_a_batch_are_put_together_and_scalars_are_not():
    parts = [{"image_features": torch.full((n, 2), float(n)), "logit_scale": torch.tensor(math.e)} for n in (1, 2)]
    whole = concatenate(parts)
    assert whole["image_features"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert whole["logit_scale"].shape == ()
