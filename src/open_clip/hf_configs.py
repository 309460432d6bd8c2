"""Hugging Face text models: how their kinds are spelled in transformers, and the architectures that we need of them.

With the architectures kept here a model is built without asking the hub, as long as it needs no weights from there.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

MINIMAL_TRANSFORMERS = "5.0"

_BERT_NAMES = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "layer_attr": "layer",
    "token_embeddings_attr": "embeddings",
    "final_norm_attr": "",  # each block ends with one
}
_T5_NAMES = {
    "context_length": "",  # positions are relative
    "vocab_size": "vocab_size",
    "width": "d_model",
    "heads": "num_heads",
    "layers": "num_layers",
    "layer_attr": "block",
    "token_embeddings_attr": "embed_tokens",
    "final_norm_attr": "final_layer_norm",
}
_M2M_100_NAMES = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "d_model",
    "heads": "encoder_attention_heads",
    "layers": "encoder_layers",
    "layer_attr": "layers",
    "token_embeddings_attr": "embed_tokens",
    "final_norm_attr": "layer_norm",
}

# model_type -> names of the sizes in its configuration and of parts in its module; the pooler where none is asked for
arch_dict: dict[str, dict[str, Any]] = {
    "roberta": {"config_names": _BERT_NAMES, "pooler": "mean_pooler"},
    "xlm-roberta": {"config_names": _BERT_NAMES, "pooler": "mean_pooler"},
    "mt5": {"config_names": _T5_NAMES, "pooler": "mean_pooler"},
    "t5": {"config_names": _T5_NAMES, "pooler": "mean_pooler"},
    "bert": {"config_names": _BERT_NAMES, "pooler": "cls_pooler"},
    "m2m_100": {"config_names": _M2M_100_NAMES, "pooler": "cls_pooler"},
}

_BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_ROBERTA = {
    "max_position_embeddings": 514,  # 512 tokens: positions are counted from pad_token_id + 1
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_MT5 = {
    "vocab_size": 250112,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_NLLB = {
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

# Name on the hub -> model_type and what its published config.json says. From the papers: BERT arXiv:1810.04805, RoBERTa
# arXiv:1907.11692, XLM-R arXiv:1911.02116, mT5 arXiv:2010.11934, NLLB arXiv:2207.04672.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": (
        "bert",
        _BERT_BASE
        | {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
        | {"layer_norm_eps": 1e-12, "pad_token_id": 0},
    ),
    "roberta-base": ("roberta", _BERT_BASE | _ROBERTA | {"vocab_size": 50265}),
    "xlm-roberta-base": ("xlm-roberta", _BERT_BASE | _ROBERTA | {"vocab_size": 250002}),
    "xlm-roberta-large": ("xlm-roberta", _BERT_BASE | _BERT_LARGE | _ROBERTA | {"vocab_size": 250002}),
    "google/mt5-base": ("mt5", _MT5 | {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
    "google/mt5-xl": ("mt5", _MT5 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": (
        "m2m_100",
        _NLLB | {"encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096},
    ),
    "facebook/nllb-200-distilled-1.3B": (
        "m2m_100",
        _NLLB | {"encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192},
    ),
}
# Where the hub keeps models whose names had no organisation at first.
_ORGANISATIONS = ("FacebookAI/", "google-bert/")


def known_architecture(name: str) -> tuple[str, dict[str, Any]] | None:
    """(model_type, configuration) of a model of the table above, None for any other."""
    for organisation in _ORGANISATIONS:
        name = name.removeprefix(organisation)
    return ARCHITECTURES.get(name)


def import_transformers(wanted_for: str) -> ModuleType:
    """The package transformers, which only Hugging Face's text models and tokenizers need.

    Raises:
        ImportError: it is not installed, or too old.
    """
    mend = f"pip install 'transformers>={MINIMAL_TRANSFORMERS}' sentencepiece"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{wanted_for} needs the package transformers ({error}): {mend}") from error
    if int(transformers.__version__.split(".")[0]) < int(MINIMAL_TRANSFORMERS.split(".")[0]):
        raise ImportError(f"{wanted_for} needs a newer transformers than {transformers.__version__}: {mend}")
    return transformers


def unavailable(what: str, name: str, files: str, error: Exception, others: str = "") -> RuntimeError:
    """The error for files of the hub that are neither there nor to be had.

    Args:
        what: "the text tower's weights"; `files`: by their names; `others`: mends that are the caller's own.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RuntimeError(
        f"{what} of {name!r} cannot be loaded: {reason} Needed are {files}. With a network, they come from the hub "
        f"(HF_ENDPOINT=URL names a mirror, HF_HOME a cache with them); without, name a local folder that has them. "
        f"{others}".rstrip()
    )
