"""Tiny text models and tokenizers of transformers, built without a network and without random values.

Used to record the outputs of open_clip_torch (parity/record/hf_towers.py) and to compare ours with them. transformers
is imported only when it is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch

import tiny_clip

WIDTH = 16
_BERT: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
}
_T5: dict[str, Any] = {"vocab_size": 30, "d_model": WIDTH, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "roberta": _BERT | {"pad_token_id": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 1},
    "xlm-roberta": _BERT | {"pad_token_id": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 1},
    "bert": _BERT | {"pad_token_id": 0},
    "mt5": _T5,
    "t5": _T5,
    "modernbert": _BERT
    | {"pad_token_id": 0, "local_attention": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "m2m_100": {
        "vocab_size": 30,
        "d_model": WIDTH,
        "max_position_embeddings": 14,
        "encoder_layerdrop": 0.0,
        "scale_embedding": True,
        **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
        **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
        **{f"{half}_ffn_dim": 24 for half in ("encoder", "decoder")},
    },
}
_NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT: dict[str, dict[str, float]] = {
    **dict.fromkeys(("roberta", "xlm-roberta", "bert"), _NO_BERT_DROPOUT),
    "t5": {"dropout_rate": 0.0},
    "mt5": {"dropout_rate": 0.0},
    "m2m_100": {"dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": {},
}
KINDS = tuple(SIZES)
POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
PROJECTIONS = (None, "linear", "mlp")


def config(kind: str, **changes: Any) -> Any:
    """Return the transformers configuration of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **(SIZES[kind] | changes))


def write_config(folder: Path, kind: str, **changes: Any) -> str:
    """Write the configuration of a tiny model to a folder. Return its path, for hf_model_name."""
    config(kind, **changes).save_pretrained(folder)
    return str(folder)


def write_clip(folder: Path, kind: str, text: dict[str, Any] | None = None, **changes: Any) -> str:
    """Write the configuration of a tiny CLIP with such a text tower to a folder. Return its name for create_model.

    Args:
        folder: of the CLIP. The text tower and its tokenizer are in a subfolder.
        kind: key of SIZES.
        text: additional fields of text_cfg.
        changes: fields of the text model's configuration.
    """
    name = tiny_clip.folder(folder)
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    tower = write_config(folder / kind, kind, **changes)
    content["model_cfg"]["text_cfg"] = {
        "hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": 12, **(text or {}),
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    return name


def texts(kind: str) -> torch.Tensor:
    """Return token ids [3, 9]: one text without padding, and two with padding."""
    pad = config(kind).pad_token_id
    rows = [[5, 12, 9, 28, 20, 7, 14, 6, 2], [8, 17, 22, 11, 2], [25, 2]]
    return torch.tensor([row + [pad] * (9 - len(row)) for row in rows])


def fingerprint(tower: torch.nn.Module, features: torch.Tensor, tokens: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return a digest of the keys and shapes of a tower's state dict, and a sample of its outputs as one tensor."""
    layout = [(key, list(value.shape)) for key, value in tower.state_dict().items()]
    values = torch.cat([features.flatten(), tokens[:, :, :3].flatten()])
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest(), values


# Tokenizers

CORPUS = "a photo of the dog sitting on a beach near water , two cats sleep . it's café naïve Österreich 日本 語 !"
SPECIAL = ["[ZERO]", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "[EOS]"]
# Kinds of tokenizers, and the options of HFTokenizer to test with them
TOKENIZERS = ("words", "bytes", "pieces", "languages")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lower": {"clean": "lower"},
    "canonicalize": {"clean": "canonicalize"},
    "short": {"context_length": 5},
    "left": {"padding_side": "left"},
    "strip": {"strip_sep_token": True},
    "clips": {"tokenizer_mode": "clips"},
    "clips short": {"tokenizer_mode": "clips", "context_length": 5, "strip_sep_token": True},
    "French": {"src_lang": "fra_Latn"},
}
_ONLY_FOR = {"strip": ("words", "bytes"), "clips": ("words", "bytes"), "French": ("languages",)}


def tokenizer_cases() -> list[tuple[str, str]]:
    """Return all valid pairs (kind of tokenizer, name of the options)."""
    pairs = itertools.product(TOKENIZERS, OPTIONS)
    return [(kind, name) for kind, name in pairs if kind in _ONLY_FOR.get(name.split()[0], TOKENIZERS)]


def write_tokenizer(folder: Path, kind: str) -> str:
    """Write the files of a small tokenizer to a folder. Return its path, for hf_tokenizer_name.

    Args:
        kind: "words" for whole words between [CLS] and [SEP]; "bytes" for byte pairs as in RoBERTa; "pieces" as in T5;
            "languages" as in NLLB.
    """
    make = {"words": _words, "bytes": _bytes, "pieces": _pieces, "languages": _languages}[kind]
    make().save_pretrained(folder)
    return str(folder)


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *CORPUS.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    names = ("pad", "unk", "cls", "sep", "bos", "eos")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": f"[{name.upper()}]" for name in names}
    )


def _bytes() -> Any:
    from transformers import RobertaTokenizer

    from open_clip.tokenizer import bytes_to_unicode

    merges = [("Ġ", "a"), ("o", "g"), ("Ġ", "d"), ("Ġd", "og"), ("c", "a"), ("Ã", "©")]
    symbols = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges)]
    vocab = {symbol: i for i, symbol in enumerate(["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"])}
    return RobertaTokenizer(vocab=vocab, merges=merges)


def _pieces() -> Any:
    from transformers import T5Tokenizer

    words = [f"▁{word}" for word in dict.fromkeys(CORPUS.split())]
    letters = ["▁", *dict.fromkeys("".join(CORPUS.split())), "og", "ing"]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores += [(piece, -2.0 - 0.1 * i) for i, piece in enumerate(words)]
    scores += [(piece, -8.0 - 0.1 * i) for i, piece in enumerate(letters) if piece not in dict(scores)]
    return T5Tokenizer(vocab=scores, extra_ids=2)


def _languages() -> Any:
    from transformers import NllbTokenizer

    letters = dict.fromkeys(["▁", *"".join(CORPUS.split()), "▁d", "og", "▁dog"])
    vocab = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    return NllbTokenizer(vocab=vocab, merges=[("▁", "d"), ("o", "g"), ("▁d", "og")])
