"""Text towers from Hugging Face's transformers: an encoder, a pooler that makes one vector a text, and a projection.

The encoder computes attention through `device.attention`, and is told what padding is by a bool mask of the shape that
fused kernels take; transformers would look at the mask's values to find out whether it needs one, for which the host
would wait for the device in each forward pass.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from typing import Any

import torch
from torch import nn

from . import aliases
from . import device as devices
from .hf_configs import arch_dict, import_transformers, known_architecture, unavailable
from .layers import GELU
from .utils import NotScriptable, check_token_ids, expect, feature_take_indices, set_trainable

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

DEFAULT_CONTEXT_LENGTH = 77  # of models that take any number of tokens

# ------------------------------------------------------------------------------------------------------------- poolers

_POOLERS: dict[str, type[nn.Module]] = {}


def register_pooler(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: makes a pooler known by its name in snake case ("MeanPooler" is "mean_pooler").

    A pooler is called with the encoder's output (its `last_hidden_state` is [batch, tokens, width]) and a mask [batch,
    tokens], true where there is a token and not padding, and returns [batch, width].
    """
    _POOLERS[re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()] = cls
    return cls


@register_pooler
class MeanPooler(nn.Module):
    """The mean of the tokens."""

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[..., None].to(x.last_hidden_state.dtype)
        return (x.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@register_pooler
class MaxPooler(nn.Module):
    """The largest value of the tokens in each channel."""

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        padding = attention_mask[..., None] == 0
        return x.last_hidden_state.masked_fill(padding, torch.finfo(x.last_hidden_state.dtype).min).amax(dim=1)


@register_pooler
class ClsPooler(nn.Module):
    """The first token, after the encoder's own pooler if it has one.

    Args:
        use_pooler_output: False for the first token as it is.
    """

    def __init__(self, use_pooler_output: bool = True) -> None:
        super().__init__()
        self.cls_token_position = 0
        self.use_pooler_output = use_pooler_output

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        pooled = getattr(x, "pooler_output", None) if self.use_pooler_output else None
        return x.last_hidden_state[:, self.cls_token_position] if pooled is None else pooled


@register_pooler
class ClsLastHiddenStatePooler(nn.Module):
    """The first token as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token_position = 0

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        return x.last_hidden_state[:, self.cls_token_position]


# ------------------------------------------------------------------------------------------------------------ encoders

ATTENTION = "open_clip"  # the name under which transformers finds `_attention`


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface to attention: [batch, heads, tokens, dim] -> [batch, tokens, heads, dim].

    `position_bias`, [1 or batch, heads, tokens, tokens], is T5's, which no bool mask can hold.
    """
    if position_bias is not None:
        position_bias = position_bias.to(query.dtype)  # under autocast embeddings are float32, and queries are not
        if attention_mask is None:
            attention_mask = position_bias
        else:
            attention_mask = position_bias.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    output = devices.attention(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _transformers() -> Any:
    """The package, told of our attention."""
    transformers = import_transformers("A text tower of Hugging Face")
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register(ATTENTION, _attention)
    transformers.AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for who calls the encoder with a mask [B, L]
    return transformers


def _read_config(name_or_path: str, offline: bool) -> Any:
    """transformers' configuration of a model; with `offline`, from our own table where it has it.

    Raises:
        RuntimeError: it cannot be had.
    """
    transformers = _transformers()
    known = known_architecture(name_or_path)
    if offline and known is not None and not os.path.isdir(name_or_path):
        model_type, values = known
        return transformers.AutoConfig.for_model(model_type, **values)
    try:
        return transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unavailable(name_or_path, error) from error


def _check_kind(config: Any, name_or_path: str) -> None:
    if config.model_type not in arch_dict:
        raise ValueError(
            f"{name_or_path!r} is of the kind {config.model_type!r}, which is no text tower here: "
            f"{', '.join(arch_dict)} are."
        )


def _unavailable(name_or_path: str, error: Exception) -> RuntimeError:
    return unavailable(
        "The text tower",
        name_or_path,
        "config.json, and for its weights model.safetensors (or pytorch_model.bin)",
        error,
        others="Random weights: pretrained_text=False (hf_model_pretrained in a text_cfg).",
    )


def _use_exact_gelu(encoder: nn.Module) -> None:
    """Put our GELU in place of transformers', which on some devices is the tanh form."""
    for module in encoder.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "GELUActivation":
                setattr(module, name, GELU())


def _new_encoder(config: Any, add_pooling_layer: bool) -> Any:
    """The encoder of that configuration with random weights; of an encoder-decoder nothing else is made."""
    transformers = _transformers()
    config = copy.deepcopy(config)
    if config.model_type == "m2m_100":  # has no class of its own for a model that is all encoder
        from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

        config._attn_implementation = ATTENTION
        return M2M100Encoder(config)
    options = {"attn_implementation": ATTENTION, "dtype": torch.float32}
    if config.is_encoder_decoder:
        return transformers.AutoModelForTextEncoding.from_config(config, **options).encoder
    return transformers.AutoModel.from_config(config, add_pooling_layer=add_pooling_layer, **options)


def _load_encoder(name_or_path: str, add_pooling_layer: bool) -> Any:
    """The encoder with its published weights, from a local folder, the hub's cache, or the hub."""
    transformers = _transformers()
    config = _read_config(name_or_path, offline=False)
    _check_kind(config, name_or_path)
    options: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": torch.float32, "trust_remote_code": False}
    auto_model = transformers.AutoModel
    if config.model_type in ("t5", "mt5"):
        auto_model = transformers.AutoModelForTextEncoding  # leaves the decoder's weights where they are
    elif not config.is_encoder_decoder:
        options["add_pooling_layer"] = add_pooling_layer
    try:
        model = auto_model.from_pretrained(name_or_path, weights_only=True, **options)
    except OSError as error:
        raise _unavailable(name_or_path, error) from error
    return (model.get_encoder() if config.is_encoder_decoder else model).train()


# --------------------------------------------------------------------------------------------------------------- tower


class HFTextEncoder(NotScriptable, nn.Module):
    """A text tower that is an encoder of transformers.

    Args:
        model_name_or_path: a folder with a config.json, or a name on the hub. The configurations of the models that
            open_clip's architectures use are known here.
        output_dim: of the features.
        config: transformers' configuration, in place of that of `model_name_or_path`; the weights are random then.
        pooler_type: a registered pooler's name; None for what is usual for the model.
        proj_type: "linear" or "mlp" (two layers with GELU between), both without bias; None where the encoder's width
            is `output_dim`.
        pretrained: start from published weights, which the folder or the hub must have.
        output_tokens: return (features, tokens).

    Raises:
        ImportError: transformers is not installed, or too old.
        RuntimeError: files cannot be had.
        ValueError: a kind of model, a pooler or a projection that does not exist.
    """

    def __init__(
        self,
        model_name_or_path: str,
        output_dim: int,
        config: Any = None,
        pooler_type: str | None = None,
        proj_type: str | None = None,
        pretrained: bool = True,
        output_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.output_tokens = output_tokens
        self.output_dim = output_dim
        # A pooler that no feature comes from would be parameters without gradients.
        add_pooling_layer = pooler_type == "cls_pooler"
        if config is None and pretrained:
            self.transformer = _load_encoder(model_name_or_path, add_pooling_layer)
            self.config = self.transformer.config
        else:
            self.config = _read_config(model_name_or_path, offline=True) if config is None else config
            _check_kind(self.config, model_name_or_path)
            self.transformer = _new_encoder(self.config, add_pooling_layer)
        _use_exact_gelu(self.transformer)
        self.vocab_size = self._size("vocab_size")
        self.context_length = self._size("context_length") or DEFAULT_CONTEXT_LENGTH
        pooler_type = pooler_type or arch_dict[self.config.model_type]["pooler"]
        expect("pooler_type", pooler_type, _POOLERS)
        self.pooler = _POOLERS[pooler_type]()
        self.proj = _projection(proj_type, self._size("width"), output_dim)
        self.register_load_state_dict_post_hook(_restore_tables)

    @property
    def _names(self) -> dict[str, str]:
        return arch_dict[self.config.model_type]["config_names"]

    def _size(self, name: str) -> int:
        return getattr(self.config, self._names[name]) if self._names[name] else 0

    @property
    def _stack(self) -> Any:
        """What holds the blocks."""
        return getattr(self.transformer, "encoder", self.transformer)

    @property
    def _blocks(self) -> nn.ModuleList:
        return getattr(self._stack, self._names["layer_attr"])

    @property
    def grad_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.transformer.modules())

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        # named gradient_ in older releases of transformers, activation_ in newer ones
        verb = "enable" if enable else "disable"
        change = getattr(self.transformer, f"activation_checkpointing_{verb}", None)
        change = change or getattr(self.transformer, f"gradient_checkpointing_{verb}")
        change(*([{"use_reentrant": False}] if enable else []))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the encoder but for its last blocks and what follows them; the projection is trained always.

        Args:
            unlocked_layers: blocks from the back; one more than there are, and the embeddings are trained, too.
            freeze_layer_norm: False lets all layer norms be trained.
        """
        groups = [getattr(self.transformer, self._names["token_embeddings_attr"]), *self._blocks]
        if unlocked_layers >= len(groups):
            logger.warning("The text tower has %d groups: unlocking %d locks nothing.", len(groups), unlocked_layers)
        set_trainable(groups[:-unlocked_layers] if unlocked_layers else self.transformer, False)
        if not freeze_layer_norm:
            norms = [module for module in self.transformer.modules() if "norm" in type(module).__name__.lower()]
            set_trainable(norms, True)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside norms and biases: none."""
        return set()

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """How many of its first tokens each text's embedding depends on: int64 [batch, tokens] -> int64 [batch].

        Nothing sees the padding after them. None where the tower returns its tokens.
        """
        if self.output_tokens:
            return None
        positions = torch.arange(1, text.shape[1] + 1, device=text.device)
        return ((text != self.config.pad_token_id) * positions).amax(dim=1).clamp(min=1)

    def trim_padding(self, text: torch.Tensor) -> torch.Tensor:
        """Ids [batch, tokens] without the columns at the end that are padding in each text.

        A multiple of 16 columns is left, so that devices which compile by shape meet few. Waits for `text`, so give it
        on the CPU.
        """
        lengths = self.text_lengths(text)
        return text if lengths is None else text[:, : -(-int(lengths.max()) // 16) * 16]

    def _encode(self, text: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The encoder's output, and the mask [batch, tokens]: true where there is no padding."""
        check_token_ids(text)
        seen = text != self.config.pad_token_id
        mask = seen[:, None, None, :].expand(-1, -1, text.shape[1], -1)  # not every fused kernel takes one row for all
        return self.transformer(input_ids=text, attention_mask=mask), seen

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Ids [batch, tokens] -> features [batch, output_dim]; or (features, tokens [batch, tokens, width]).

        Tokens are those of the encoder's last layer, without the first where ClsPooler makes the features of it.
        """
        output, seen = self._encode(x)
        features = self.proj(self.pooler(output, seen))
        if not self.output_tokens:
            return features
        tokens = output.last_hidden_state
        return features, tokens[:, 1:] if isinstance(self.pooler, ClsPooler) else tokens

    def forward_intermediates(
        self,
        text: torch.Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NLC",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Features of the blocks between.

        Args:
            indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: changes nothing: the encoder is run as a whole.
            normalize_intermediates: apply the final layer norm, where the encoder has one behind its blocks.
            intermediates_only: leave out the features of the whole.
            output_fmt: "NLC".
            output_extra_tokens: changes nothing: a first token that is special is among the others.

        Returns:
            "text_intermediates": list of [batch, tokens, width], in the order of the blocks;
            "text_features": [batch, output_dim], unless left out.
        """
        expect("output_fmt of texts", output_fmt, ("NLC",))
        take, _ = feature_take_indices(len(self._blocks), indices, as_set=True)
        intermediates: list[torch.Tensor] = []

        def keep(block: nn.Module, args: Any, result: Any) -> None:
            intermediates.append(result[0] if isinstance(result, tuple) else result)

        hooks = [self._blocks[index].register_forward_hook(keep) for index in take]
        try:
            output, seen = self._encode(text)
        finally:
            for hook in hooks:
                hook.remove()
        final_norm = self._names["final_norm_attr"]
        if normalize_intermediates and final_norm:
            intermediates = [getattr(self._stack, final_norm)(tokens) for tokens in intermediates]
        found: dict[str, Any] = {"text_intermediates": intermediates}
        if not intermediates_only:
            found["text_features"] = self.proj(self.pooler(output, seen))
        return found


def _projection(proj_type: str | None, width: int, output_dim: int) -> nn.Module:
    expect("proj_type", proj_type, (None, "linear", "mlp"))
    if proj_type == "linear":
        return nn.Linear(width, output_dim, bias=False)
    if proj_type == "mlp":
        between = (width + output_dim) // 2
        return nn.Sequential(
            nn.Linear(width, between, bias=False), GELU(), nn.Linear(between, output_dim, bias=False)
        )
    if width != output_dim:
        raise ValueError(f"the encoder's width is {width} and not {output_dim}: use proj_type 'linear' or 'mlp'")
    return nn.Identity()


def _restore_tables(tower: HFTextEncoder, incompatible_keys: Any) -> None:
    """After weights came to a tower built on the meta device: the encoder's tables, which no state dict holds.

    They follow from the configuration, and are taken from an encoder of it that has no blocks and no words.
    """
    names = [name for name, buffer in tower.transformer.named_buffers() if buffer.is_meta]
    weight = next(tower.transformer.parameters())
    if not names or weight.is_meta:
        return
    config = copy.deepcopy(tower.config)
    setattr(config, tower._names["layers"], 0)
    setattr(config, tower._names["vocab_size"], (config.pad_token_id or 0) + 1)
    with weight.device:
        tables = dict(_new_encoder(config, add_pooling_layer=False).named_buffers())
    for name in names:
        owner, _, last = name.rpartition(".")
        dtype = tower.transformer.get_buffer(name).dtype
        tower.transformer.get_submodule(owner).register_buffer(last, tables[name].to(dtype), persistent=False)
