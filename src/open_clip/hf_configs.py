"""Hugging Face text models: names of their parts and sizes in transformers, and the architectures that models use.

With the architectures stored here, a model that needs no weights from the hub is built without contacting it.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

# The first release in which the attention of all text models below, T5 included, can be replaced.
MINIMAL_TRANSFORMERS = "5.18"

_BERT_NAMES = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "layer_attr": "layer",
    "token_embeddings_attr": "embeddings",
    "final_norm_attr": "",  # each block ends with a norm
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
_MODERNBERT_NAMES = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "window": "sliding_window",  # farthest token in each direction that the tokens of a local layer see
    "layer_attr": "layers",
    "token_embeddings_attr": "embeddings",
    "final_norm_attr": "final_norm",
}

# model_type -> attribute names of sizes (in the configuration) and parts (in the module); the default pooler; whether
# the encoder can have a pooling layer
arch_dict: dict[str, dict[str, Any]] = {
    "roberta": {"config_names": _BERT_NAMES, "pooler": "mean_pooler", "has_pooling_layer": True},
    "xlm-roberta": {"config_names": _BERT_NAMES, "pooler": "mean_pooler", "has_pooling_layer": True},
    "mt5": {"config_names": _T5_NAMES, "pooler": "mean_pooler"},
    "t5": {"config_names": _T5_NAMES, "pooler": "mean_pooler"},
    "bert": {"config_names": _BERT_NAMES, "pooler": "cls_pooler", "has_pooling_layer": True},
    "m2m_100": {"config_names": _M2M_100_NAMES, "pooler": "cls_pooler"},
    "modernbert": {"config_names": _MODERNBERT_NAMES, "pooler": "mean_pooler"},
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
    "max_position_embeddings": 514,  # 512 tokens: positions start at pad_token_id + 1
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

_MODERNBERT_BASE = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "bos_token_id": 50281,
    "eos_token_id": 50282,
    "cls_token_id": 50281,
    "sep_token_id": 50282,
    "pad_token_id": 50283,
}

# Name on the hub -> (model_type, values of its published config.json). Papers: BERT arXiv:1810.04805, RoBERTa
# arXiv:1907.11692, XLM-R arXiv:1911.02116, mT5 arXiv:2010.11934, NLLB arXiv:2207.04672, ModernBERT arXiv:2412.13663.
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
    "answerdotai/ModernBERT-base": ("modernbert", _MODERNBERT_BASE),
    "Alibaba-NLP/gte-modernbert-base": ("modernbert", _MODERNBERT_BASE),
}
# Organisations that the hub later added to names without one.
_ORGANISATIONS = ("FacebookAI/", "google-bert/")


def known_architecture(name: str) -> tuple[str, dict[str, Any]] | None:
    """Return (model_type, configuration) of a model in ARCHITECTURES, or None."""
    for organisation in _ORGANISATIONS:
        name = name.removeprefix(organisation)
    return ARCHITECTURES.get(name)


def import_transformers(wanted_for: str, minimal: str = MINIMAL_TRANSFORMERS) -> ModuleType:
    """Import transformers, which only Hugging Face text models and tokenizers need.

    Args:
        wanted_for: what needs it, for the error message.
        minimal: oldest version that works, such as "5.18".

    Raises:
        ImportError: transformers is not installed, or older than `minimal`.
    """
    command = f"pip install 'transformers>={MINIMAL_TRANSFORMERS}' sentencepiece"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{wanted_for} needs the package transformers ({error}). Install it: {command}.") from error
    if _parse_version(transformers.__version__) < _parse_version(minimal):
        version = transformers.__version__
        raise ImportError(f"{wanted_for} needs a newer transformers than {version}. Install it: {command}.")
    return transformers


def _parse_version(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def unavailable(what: str, name: str, files: str, error: Exception, others: str = "") -> RuntimeError:
    """Create the error for files of the hub that are not in the cache and cannot be downloaded.

    Args:
        what: such as "The text tower's weights".
        name: repository or folder.
        files: names of the needed files.
        error: the cause.
        others: further advice of the caller.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RuntimeError(
        f"{what} of {name!r} cannot be loaded: {reason} Needed are {files}. With a network, they are downloaded from "
        f"the hub (HF_ENDPOINT=URL sets a mirror, HF_HOME the cache). Without one, pass a local folder that has them. "
        f"{others}".rstrip()
    )
