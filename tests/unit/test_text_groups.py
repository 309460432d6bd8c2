"""open_clip.text_groups: the choice of groups, and that it does not change embeddings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import hf_cases
import open_clip
from open_clip.hf_model import HFTextEncoder
from open_clip.text_groups import GroupedText, group_by_length
from open_clip.transformer.text import TextTransformer
from training.batches import to_device
from training.objective import ContrastiveObjective
from training.precision import create
from training.trainer import Trainer
from training.unpadding import PaddingOptions, TextUnpadding, Unpadding

CPU = torch.device("cpu")
END = 49407


def ids(lengths: list[int], num_tokens: int = 77) -> torch.Tensor:
    """Return random ids that end with the highest one, followed by padding."""
    text = torch.randint(1, 1000, (len(lengths), num_tokens), generator=torch.Generator().manual_seed(0))
    for row, length in zip(text, lengths, strict=True):
        row[length - 1] = END
        row[length:] = 0
    return text


def test_groups_contain_each_text_once_and_uncut():
    lengths = [5, 77, 12, 20, 9, 14, 33, 7, 15, 11, 18, 6, 10, 13, 60, 8]
    text = ids(lengths)
    grouped = group_by_length(text, torch.tensor(lengths), 16)
    assert isinstance(grouped, GroupedText)
    assert 2 <= len(grouped.parts) <= 4
    padded = [torch.nn.functional.pad(part, (0, 77 - part.shape[1])) for part in grouped.parts]
    assert torch.equal(torch.cat(padded)[grouped.inverse], text)
    computed = sum(part.numel() for part in grouped.parts)
    assert computed < 0.6 * text.numel()


@pytest.mark.parametrize(("lengths", "num_tokens", "expected"), [
    ([77] * 16, 77, 77), ([9] * 16, 77, 16), ([3], 77, 8), ([12, 13], 12, 12), ([70] * 16, 77, 77),
])  # fmt: skip
def test_one_group_is_a_plain_tensor(lengths, num_tokens, expected):
    text = torch.ones(len(lengths), num_tokens, dtype=torch.int64)
    assert group_by_length(text, torch.tensor(lengths).clamp(max=num_tokens), 16).shape == (len(lengths), expected)


def test_another_group_must_save_more_than_it_costs():
    text, lengths = torch.ones(64, 77, dtype=torch.int64), torch.tensor([10] * 32 + [40] * 32)
    assert isinstance(group_by_length(text, lengths, group_cost=1000), GroupedText)  # the batch has 32 x 32 tokens
    assert group_by_length(text, lengths, group_cost=1100).shape == (64, 48)


def test_there_are_few_different_shapes():
    """Compilers and NPUs prepare kernels per shape."""
    generator = torch.Generator().manual_seed(1)
    shapes = set()
    for _ in range(50):
        lengths = (torch.randn(64, generator=generator).exp() * 14).long().clamp(3, 77)
        grouped = group_by_length(torch.ones(64, 77, dtype=torch.int64), lengths, 64)
        shapes |= {tuple(part.shape) for part in grouped.parts}
    assert {count % 8 for count, _ in shapes} == {0}
    assert {length for _, length in shapes} <= {8, 16, 24, 32, 48, 64, 77}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
def test_embeddings_and_gradients_do_not_change(custom, pool_type):
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text_cfg = {"context_length": 77, "width": 16, "heads": 2, "layers": 2, "pool_type": pool_type, "eos_id": END}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(8, vision, text_cfg).double()
    lengths = [5, 77, 12, 20, 9, 14, 33, 7]
    text = ids(lengths)
    assert model.text_lengths(text).tolist() == lengths
    grouped = group_by_length(text, model.text_lengths(text), 16)
    assert isinstance(grouped, GroupedText)
    gradients = []
    for given in (text, grouped):
        model.zero_grad()
        features = model(image=None, text=given)[1]
        (features * torch.arange(8)[:, None]).sum().backward()
        gradients.append([features, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, of_groups in zip(*gradients, strict=True):
        torch.testing.assert_close(of_groups, plain, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", hf_cases.KINDS)
@pytest.mark.parametrize("pooler", ["mean_pooler", "max_pooler", "cls_pooler"])
def test_towers_of_transformers(kind, pooler, tmp_path):
    name = hf_cases.write_config(tmp_path, kind)
    tower = HFTextEncoder(name, output_dim=8, pooler_type=pooler, proj_type="linear", pretrained=False).eval()
    text = hf_cases.texts(kind)
    assert tower.text_lengths(text).tolist() == [9, 5, 2]
    grouped = group_by_length(text.repeat(3, 1), tower.text_lengths(text.repeat(3, 1)), 1)
    assert isinstance(grouped, GroupedText)
    torch.testing.assert_close(grouped.encode(tower), tower(text.repeat(3, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}, {"output_tokens": True},
])  # fmt: skip
def test_towers_that_read_padding_have_no_lengths(options):
    tower = TextTransformer(context_length=16, vocab_size=50000, width=8, heads=2, layers=1, output_dim=4, **options)
    assert tower.text_lengths(ids([3, 5], 16)) is None


def test_an_edited_mask_has_no_lengths():
    tower = TextTransformer(context_length=16, vocab_size=50000, width=8, heads=2, layers=1, output_dim=4)
    assert tower.text_lengths(ids([3, 5], 16)) is not None
    tower.attn_mask = torch.zeros(16, 16)
    assert tower.text_lengths(ids([3, 5], 16)) is None


def losses_of_steps(accum_freq: int, max_groups: int) -> list[float]:
    """Return the losses of 20 steps of a tiny model, in float64."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text_cfg = {"context_length": 77, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CLIP(8, vision, text_cfg, output_dict=True).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(model, ContrastiveObjective(), optimizer, create("fp32", CPU), accum_freq=accum_freq)
    unpad = Unpadding([model], CPU, PaddingOptions(max_groups))
    generator = torch.Generator().manual_seed(2)
    losses = []
    for number in range(20):
        batches = []
        for _ in range(accum_freq):
            lengths = (torch.randn(8, generator=generator).exp() * 14).long().clamp(3, 77).tolist()
            image = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
            batches.append(to_device({"image": image, "text": ids(lengths)}, CPU, unpad=unpad))
        losses.append(trainer.step(batches, number)["loss"].item())
    return losses


@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize("max_groups", [1, 4])
def test_training_has_the_same_losses(accum_freq, max_groups):
    plain = losses_of_steps(accum_freq, 0)
    assert losses_of_steps(accum_freq, max_groups) == pytest.approx(plain, rel=1e-9)


def grouping(models: list, max_groups: int = 4) -> TextUnpadding:
    return TextUnpadding(models, CPU, PaddingOptions(max_groups))


def double(text_lengths) -> SimpleNamespace:
    return SimpleNamespace(takes_grouped_text=True, text_lengths=text_lengths)


def test_texts_for_two_models_keep_the_tokens_that_either_needs():
    """The teacher has another text tower, or one whose embeddings depend on padding."""
    text, longer = ids([5] * 8), double(lambda text: torch.full((len(text),), 20))
    model = double(lambda text: text.argmax(dim=-1) + 1)
    assert grouping([model], 4)(text).shape == (8, 8)
    assert grouping([model, longer], 4)(text).shape == (8, 24)
    assert grouping([model, SimpleNamespace()], 4)(text) is text
    assert grouping([model], 0)(text) is text
    strings = ["not", "tokenized"]
    assert grouping([model], 4)(strings) is strings


def small_clip(kind: type[open_clip.CLIP] = open_clip.CLIP) -> open_clip.CLIP:
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    return kind(8, vision, {"context_length": 77, "width": 16, "heads": 2, "layers": 1})


def test_programs_that_read_the_text_get_a_tensor():
    """A subclass with its own forward, a replaced method, and a hook on the model."""

    class OwnForward(open_clip.CLIP):
        def forward(self, image=None, text=None):
            return self.token_embedding(text)

    class OwnEncoder(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            return super().encode_text(text.clone(), normalize)

    text = ids([5] * 40 + [60] * 24)
    assert isinstance(grouping([small_clip()])(text), GroupedText)
    patched, hooked = small_clip(), small_clip()
    patched.encode_text = lambda text, normalize=False: text
    hooked.register_forward_pre_hook(lambda module, args: None)
    for model in (small_clip(OwnForward), small_clip(OwnEncoder), patched, hooked):
        assert grouping([model])(text) is text
        model(text=grouping([model])(text))
    hooked._forward_pre_hooks.clear()
    assert isinstance(grouping([hooked])(text), GroupedText)
