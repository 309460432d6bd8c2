"""Names that a module has in open_clip 3.3 and that this package defines elsewhere.

Programs import such names: `from open_clip.model import LayerNorm`, `open_clip.factory._MODEL_CONFIGS`. A module
provides them with `__getattr__ = aliases.of(__name__)`. They are resolved on first use, so that they cost nothing at
import and do not affect the import order.

Names of open_clip's main branch (4.x) that this package has not raise an AttributeError that says what to use instead.

Modules that open_clip 3.3 imports (`np`, `F`, `nn`, the standard library) are not listed. `tests/compat/test_names.py`
compares the names of each module with those of 3.3.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_LAYERS = dict.fromkeys(("LayerNorm", "LayerNormFp32", "QuickGELU"), "open_clip.transformer.layers")
_TOKENIZERS = dict.fromkeys(("HFTokenizer", "SigLipTokenizer"), "open_clip.tokenizer.hf")
_CHECKPOINT = {"checkpoint": "torch.utils.checkpoint"}


def _legacy(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "open_clip.legacy")


# Module -> name -> source: "module", or "module:name" if the name differs there.
NAMES: dict[str, dict[str, str]] = {
    "open_clip": {"ModernTextTransformer": "open_clip.modern_text", "get_model_from_task": "open_clip.task"},
    "open_clip.coca_model": {
        **_LAYERS,
        **_legacy("_has_transformers", "_token_to_tensor"),
        **dict.fromkeys(
            (
                *("EosTokenCriteria", "LogitsProcessorList", "MaxLengthCriteria", "MinLengthLogitsProcessor"),
                *("RepetitionPenaltyLogitsProcessor", "StopStringCriteria", "StoppingCriteriaList"),
                *("TopKLogitsWarper", "TopPLogitsWarper"),
            ),
            "transformers",
        ),
    },
    "open_clip.convert": {
        "CLIP": "open_clip.model",
        "CustomTextCLIP": "open_clip.model",
        "TextTransformer": "open_clip.transformer.text",
        "Transformer": "open_clip.transformer.stack",
    },
    "open_clip.factory": {
        **_legacy("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS", "_find_checkpoint_in_dir", "_get_hf_config"),
        **_legacy("_set_model_device_and_precision"),
        **dict.fromkeys(("HF_HUB_PREFIX", "LOCAL_DIR_PREFIX", "_natural_key"), "open_clip.config"),
        "_rescan_model_configs": "open_clip.config:rescan_model_configs",
        "DEFAULT_CONTEXT_LENGTH": "open_clip.tokenizer",
        "SigLipTokenizer": "open_clip.tokenizer.hf",
        "convert_state_dict": "open_clip.convert",
        "convert_to_custom_text_state_dict": "open_clip.model",
        "convert_weights_to_lp": "open_clip.precision",
        **dict.fromkeys(
            (
                *("download_pretrained", "download_pretrained_from_hf", "get_pretrained_cfg", "is_pretrained_cfg"),
                "list_pretrained_tags_by_model",
            ),
            "open_clip.pretrained",
        ),
        "merge_preprocess_kwargs": "open_clip.transform",
        **dict.fromkeys(("resize_pos_embed", "resize_text_pos_embed"), "open_clip.pos_embed"),
    },
    "open_clip.hf_model": {
        **_legacy("_camel2snake"),
        **dict.fromkeys(
            ("ClsLastHiddenStatePooler", "MaxPooler", "MeanPooler", "register_pooler"), "open_clip.hf_poolers"
        ),
        "_POOLERS": "open_clip.hf_poolers:POOLERS",
        **dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "PretrainedConfig", "TensorType"), "transformers"),
        **dict.fromkeys(
            ("BaseModelOutput", "BaseModelOutputWithPooling", "BaseModelOutputWithPoolingAndCrossAttentions"),
            "transformers.modeling_outputs",
        ),
    },
    "open_clip.loss": _legacy("has_distributed", "hvd"),
    "open_clip.model": {
        **_LAYERS,
        **_CHECKPOINT,
        "Attention": "open_clip.transformer.attention",
        "HFTextEncoder": "open_clip.hf_model",
        "ModifiedResNet": "open_clip.modified_resnet",
        "TimmModel": "open_clip.timm_model",
        "VisionTransformer": "open_clip.transformer.vision",
        "build_model_from_openai_state_dict": "open_clip.openai",
        "lock_text_tower": "open_clip.transformer.text",
        "text_global_pool": "open_clip.transformer.text_encoder",
    },
    "open_clip.openai": {"convert_weights_to_lp": "open_clip.precision"},
    "open_clip.pretrained": {
        **_legacy("_has_hf_hub", "_has_safetensors", "_get_safe_alternatives"),
        **_legacy("_pcfg", "_slpcfg", "_apcfg", "_mccfg", "_mc2cfg", "_pecfg"),
        **_legacy("_PRETRAINED", "_PRETRAINED_quickgelu", "quick_gelu_tags"),
        **_legacy("_RN50", "_RN101", "_RN50x4", "_RN50x16", "_RN50x64"),
        **_legacy("_VITB32", "_VITB32_256", "_VITB16", "_VITB16_PLUS_240", "_VITL14", "_VITL14_336"),
        **_legacy("_VITH14", "_VITH14_378", "_VITg14", "_VITbigG14", "_coca_VITB32", "_coca_VITL14"),
        **_legacy("_robertaViTB32", "_xlmRobertaBaseViTB32", "_xlmRobertaLargeFrozenViTH14"),
        **_legacy("_convnext_base", "_convnext_base_w", "_convnext_base_w_320"),
        **_legacy("_convnext_large_d", "_convnext_large_d_320", "_convnext_xxlarge"),
        **dict.fromkeys(
            (
                *("IMAGENET_MEAN", "IMAGENET_STD", "INCEPTION_MEAN", "INCEPTION_STD"),
                *("OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD", "HF_SAFE_WEIGHTS_NAME", "HF_WEIGHTS_NAME"),
            ),
            "open_clip.constants",
        ),
        "_clean_tag": "open_clip.pretrained.registry",
        "hf_hub_download": "huggingface_hub",
        "tqdm": "tqdm",
    },
    "open_clip.push_to_hf_hub": {
        **_TOKENIZERS,
        **_legacy("_has_hf_hub", "_has_safetensors"),
        "get_model_config": "open_clip.config",
        **dict.fromkeys(("create_repo", "get_hf_file_metadata", "hf_hub_download", "hf_hub_url"), "huggingface_hub"),
    },
    "open_clip.timm_model": {
        "freeze_batch_norm_2d": "open_clip.utils",
        **dict.fromkeys(("Mlp", "RotAttentionPool2d"), "timm.layers"),
        "AbsAttentionPool2d": "timm.layers:AttentionPool2d",
    },
    "open_clip.tokenizer": {
        **_legacy("_nltk_init"),
        "_tokenizer": "open_clip.tokenizer.simple",
        **dict.fromkeys(("_clean_canonicalize", "_clean_lower", "_clean_whitespace"), "open_clip.tokenizer.cleaning"),
    },
    "open_clip.transform": {
        **_legacy("_convert_to_rgb", "_setup_size"),
        **dict.fromkeys(
            (
                *("CenterCrop", "ColorJitter", "Compose", "Grayscale", "InterpolationMode", "Normalize"),
                *("RandomResizedCrop", "Resize", "ToTensor"),
            ),
            "torchvision.transforms",
        ),
        **dict.fromkeys(("OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD"), "open_clip.constants"),
        "MaybeToTensor": "open_clip.transform.preprocess",
        "_PREPROCESS_KEYS": "open_clip.transform.pipeline",
        "to_2tuple": "open_clip.utils",
    },
    "open_clip.transformer": {
        **_legacy("_expand_token"),
        **_CHECKPOINT,
        **dict.fromkeys(("feature_take_indices", "to_2tuple"), "open_clip.utils"),
        "get_2d_sincos_pos_embed": "open_clip.pos_embed",
        **dict.fromkeys(
            (
                *("ModernTextAttention", "ModernTextBlock", "ModernTextPool", "ModernTextTransformer", "ReLUSquared"),
                *("RotaryEmbedding1D", "SwiGLU"),
            ),
            "open_clip.modern_text",
        ),
    },
    "open_clip.utils": {
        **_legacy("_out_indices_as_tuple"),
        "FrozenBatchNorm2d": "torchvision.ops.misc",
        "_assert": "torch",
    },
}


_TASK = "Task objects are not supported yet. Use training.train.train_one_epoch, or create_loss in your own loop."
_AUDIO = "Audio models are not supported yet. Use open_clip's main branch for CLAP."
_GENERATIVE = "GenLIP and GenLAP models are not supported yet. CoCa models generate captions."
_FUSED_LOSS = "Use CoCaLoss, or torch.nn.functional.linear and cross_entropy."


def _refused(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


_TASK_CLASSES = (
    *("TrainingTask", "ImageTextTask", "CLIPTask", "SigLIPTask", "CoCaTask", "DistillCLIPTask"),
    *("GenLipTask", "GenLapTask"),
)

# Module -> public name of open_clip's main branch that is not here -> what to use instead.
REFUSED: dict[str, dict[str, str]] = {
    "open_clip": {
        **_refused(_TASK, *_TASK_CLASSES, "create_task"),
        **_refused(_AUDIO, "CLAP", "AUDIO_AVAILABLE", "AudioAugmentationCfg", "AudioTower", "CLIPAudioCfg"),
        **_refused(_AUDIO, "audio_transform_v2", "require_audio"),
        **_refused(_GENERATIVE, "NaFlexGenLip", "NaFlexGenLap", "GenLipLoss"),
    },
    "open_clip.factory": {"create_task": _TASK},
    "open_clip.loss": {"GenLipLoss": _GENERATIVE, "fused_linear_cross_entropy": _FUSED_LOSS},
    "open_clip.task": _refused(_TASK, *_TASK_CLASSES, "CLAPTask"),
}

# Models of the main branch that are not here: name -> kind of model, and what to use instead.
_AUDIO_MODEL = ("an audio model", "Use the main branch for CLAP.")
_GENERATIVE_MODEL = ("a generative model", "CoCa models generate captions, for example coca_ViT-B-32.")
_REFUSED_MODELS: dict[str, tuple[str, str]] = {
    **dict.fromkeys((f"CLAP-HTSAT-{size}" for size in ("tiny", "base", "large")), _AUDIO_MODEL),
    **dict.fromkeys((f"CLAP-HTSAT-{size}-Roberta-base" for size in ("tiny", "base")), _AUDIO_MODEL),
    "CLAP-HTSAT-tiny-Roberta-base-fused": _AUDIO_MODEL,
    **dict.fromkeys((f"CLAP-Whisper-{size}-Roberta-base" for size in ("tiny", "base", "small")), _AUDIO_MODEL),
    **dict.fromkeys((f"naflexclap_{size}" for size in ("little", "mediumd", "test")), _AUDIO_MODEL),
    **dict.fromkeys((f"naflexclap_{size}_roberta" for size in ("little", "mediumd")), _AUDIO_MODEL),
    **dict.fromkeys((f"naflexclap_{size}_pf4_pt20_moderntextp" for size in ("mediumd", "base")), _AUDIO_MODEL),
    **dict.fromkeys((f"naflexclap_base_pf8_{kind}" for kind in ("pt16_moderntext", "pt16_moderntextp")), _AUDIO_MODEL),
    "naflexclap_base_pf8_pt20_moderntextp": _AUDIO_MODEL,
    **dict.fromkeys((f"naflexgenlip_{size}" for size in ("b16", "so150m2", "so16", "test")), _GENERATIVE_MODEL),
    **dict.fromkeys(
        (f"naflexgenlap_{size}" for size in ("betwixt", "so150m2", "test_1d", "test_2d")), _GENERATIVE_MODEL
    ),
}


def check_model_of_main(name: str) -> None:
    """Raise NotImplementedError if `name` is a model of open_clip's main branch that is not supported yet."""
    if name in _REFUSED_MODELS:
        kind, instead = _REFUSED_MODELS[name]
        raise NotImplementedError(f"{name} is {kind} of open_clip's main branch, not supported yet. {instead}")


# Arguments of the main branch's create_model and create_model_and_transforms.
_REFUSED_ARGUMENTS = {"audio_aug_cfg": _AUDIO, "pretrained_audio_path": _AUDIO}


def drop_arguments_of_main(kwargs: dict[str, Any]) -> None:
    """Remove arguments of open_clip's main branch that are not supported yet, unless they ask for something.

    Raises:
        ValueError: one of them is not None, False or empty.
    """
    for name, reason in _REFUSED_ARGUMENTS.items():
        if kwargs.pop(name, None):
            raise ValueError(f"{name}: {reason}")


def of(module_name: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that resolves the names listed for it in NAMES."""
    names, refused = NAMES.get(module_name, {}), REFUSED.get(module_name, {})

    def get(name: str) -> Any:
        source = names.get(name)
        if source is None:
            reason = f": {refused[name]}" if name in refused else ""
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}{reason}")
        module, _, renamed = source.partition(":")
        return getattr(importlib.import_module(module), renamed or name)

    return get
