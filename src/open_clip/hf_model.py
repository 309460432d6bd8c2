"""Text towers from Hugging Face's transformers: an encoder, a pooler that makes one vector per text, and a projection.

The encoder gets padding as a bool mask of the shape that fused kernels take. Without that shape, transformers reads the
mask's values to decide whether a mask is needed, so the host waits for the device in each forward pass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import aliases
from .hf_configs import arch_dict
from .hf_encoder import check_model_type, load_encoder, new_encoder, read_config, use_exact_gelu
from .hf_poolers import POOLERS, ClsPooler
from .transformer.layers import GELU
from .utils import (
    LayerGroups,
    NotScriptable,
    check_token_ids,
    expect,
    feature_take_indices,
    layer_groups,
    set_trainable,
)

logger = logging.getLogger(__name__)

__getattr__ = aliases.of(__name__)  # names that open_clip 3.3 has here

DEFAULT_CONTEXT_LENGTH = 77  # for models without a limit, and for their texts


def _around(parent: nn.Module, child: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules of `parent` before and after `child`."""
    parts = list(parent.children())
    position = next(number for number, part in enumerate(parts) if part is child)
    return parts[:position], parts[position + 1 :]


class HFTextEncoder(NotScriptable, nn.Module):
    """A text tower whose encoder is a model of transformers.

    Args:
        model_name_or_path: a folder with a config.json, or a name on the hub. hf_configs has the configurations of the
            models in open_clip's architectures, so these need no download.
        output_dim: width of the features.
        config: a transformers configuration to use instead of that of `model_name_or_path`; the weights are random.
        pooler_type: name of a registered pooler; None for the default of the model.
        proj_type: see `_projection`; None for no projection, if the encoder's width is `output_dim`.
        pretrained: load the published weights from the folder or the hub.
        output_tokens: return (features, tokens).
        config_overrides: values that replace those of the configuration of `model_name_or_path`.
        num_tokens: number of tokens of a text, to which tokenizers pad. The encoder itself only has a maximum.

    Raises:
        ImportError: transformers is not installed, or too old.
        RuntimeError: the configuration or the weights cannot be loaded.
        ValueError: the model type, the pooler or the projection is not known.
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
        config_overrides: Mapping[str, Any] | None = None,
        num_tokens: int = DEFAULT_CONTEXT_LENGTH,
    ) -> None:
        super().__init__()
        self.output_tokens = output_tokens
        self.output_dim = output_dim
        # Without this, the parameters of an unused pooling layer would get no gradients.
        add_pooling_layer = pooler_type == "cls_pooler"
        if config is None and pretrained:
            self.transformer = load_encoder(model_name_or_path, add_pooling_layer, config_overrides or {})
            self.config = self.transformer.config
        else:
            if config is None:
                config = read_config(model_name_or_path, offline=True, overrides=config_overrides or {})
            self.config = config
            check_model_type(self.config, model_name_or_path)
            self.transformer = new_encoder(self.config, add_pooling_layer)
        use_exact_gelu(self.transformer)
        self.vocab_size = self._config_value("vocab_size")
        self.context_length = self._config_value("context_length") or DEFAULT_CONTEXT_LENGTH
        self.num_tokens = min(num_tokens, self.max_tokens or self.context_length)
        pooler_type = pooler_type or arch_dict[self.config.model_type]["pooler"]
        expect("pooler_type", pooler_type, POOLERS)
        self.pooler = POOLERS[pooler_type]()
        self.proj = _projection(proj_type, self._config_value("width"), output_dim)
        self.register_load_state_dict_post_hook(_restore_buffers)

    @property
    def config_names(self) -> dict[str, str]:
        """Map from names used here to those of the configuration and the modules of this model type."""
        return arch_dict[self.config.model_type]["config_names"]

    def _config_value(self, name: str) -> int:
        return getattr(self.config, self.config_names[name]) if self.config_names[name] else 0

    @property
    def max_tokens(self) -> int | None:
        """The maximum number of tokens of a text. None if the encoder computes positions for any number."""
        table = getattr(getattr(self.transformer, "embeddings", None), "position_embeddings", None)
        if table is None:
            return None
        first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's positions follow that of padding
        return table.num_embeddings - first

    @property
    def _stack(self) -> Any:
        """The module that contains the blocks."""
        return getattr(self.transformer, "encoder", self.transformer)

    @property
    def _blocks(self) -> nn.ModuleList:
        return getattr(self._stack, self.config_names["layer_attr"])

    @property
    def grad_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.transformer.modules())

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        # Older releases of transformers call it gradient_checkpointing, newer ones activation_checkpointing.
        verb = "enable" if enable else "disable"
        change = getattr(self.transformer, f"activation_checkpointing_{verb}", None)
        change = change or getattr(self.transformer, f"gradient_checkpointing_{verb}")
        change(*([{"use_reentrant": False}] if enable else []))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the encoder except for its last blocks and the layers after them. The projection is never frozen.

        Args:
            unlocked_layers: number of last blocks to train. One more than there are trains the embeddings, too.
            freeze_layer_norm: False trains all layer norms.
        """
        groups = [members for _, members in self.layer_groups()][:-1]
        if unlocked_layers >= len(groups):
            logger.warning("The text tower has %d groups: unlocking %d locks nothing.", len(groups), unlocked_layers)
        set_trainable(groups[:-unlocked_layers] if unlocked_layers else self.transformer, False)
        if not freeze_layer_norm:
            norms = [module for module in self.transformer.modules() if "norm" in type(module).__name__.lower()]
            set_trainable(norms, True)

    def layer_groups(self, pooler_in_head: bool = True) -> LayerGroups:
        """Return the tower's parameters in groups from the input to the output, see `utils.layer_groups`.

        The pooler is the encoder's pooling layer. What the encoder has after its blocks belongs to the last block.
        """
        pooler = getattr(self.transformer, "pooler", None)
        before, after = _around(self._stack, self._blocks)
        if self._stack is not self.transformer:
            outer = _around(self.transformer, self._stack)
            before, after = [*outer[0], *before], [*after, *(part for part in outer[1] if part is not pooler)]
        poolers = [] if pooler is None else [pooler]
        return layer_groups(before, self._blocks, after, poolers, [self.pooler, self.proj], pooler_in_head)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to norms and biases: none."""
        return set()

    def no_weight_decay_patterns(self) -> set[str]:
        """Return patterns of more names without weight decay, for --decay-rule 4: tables of positions and types."""
        return {"*position_embeddings.weight", "*token_type_embeddings.weight", "*relative_attention_bias.weight"}

    def text_lengths(self, text: torch.Tensor) -> torch.Tensor | None:
        """Return the lengths of the texts without trailing padding, which changes no embedding.

        Args:
            text: int64 [batch, tokens].

        Returns:
            int64 [batch], at least 1; None if the tower returns its tokens, padding included.
        """
        if self.output_tokens:
            return None
        positions = torch.arange(1, text.shape[1] + 1, device=text.device)
        return ((text != self.config.pad_token_id) * positions).amax(dim=1).clamp(min=1)

    def trim_padding(self, text: torch.Tensor) -> torch.Tensor:
        """Drop trailing padding columns of token ids [batch, tokens].

        The number of columns is rounded up to a multiple of 16, so that devices which compile kernels per shape see few
        shapes. `text` should be on the CPU: its values are read.
        """
        lengths = self.text_lengths(text)
        return text if lengths is None else text[:, : -(-int(lengths.max()) // 16) * 16]

    def _encode(self, text: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return the encoder's output, and a bool mask [batch, tokens] that is False for padding."""
        check_token_ids(text)
        is_token = text != self.config.pad_token_id
        return self.transformer(input_ids=text, attention_mask=self._attention_mask(is_token)), is_token

    def _attention_mask(self, is_token: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the bool mask [batch, 1, tokens, tokens], or that of each type of layer for models with local layers.

        A padding token of a local layer sees all tokens: a row of attention without any would not be finite.
        """
        num_tokens = is_token.shape[1]
        # Expanded, because not every fused kernel broadcasts the mask over the query tokens.
        mask = is_token[:, None, None, :].expand(-1, -1, num_tokens, -1)
        if "window" not in self.config_names:
            return mask
        window = self._config_value("window")
        local = mask
        if num_tokens > window + 1:
            place = torch.arange(num_tokens, device=is_token.device)
            is_near = (place[:, None] - place).abs() <= window
            local = mask & (is_near | ~is_token[:, None, :, None])
        return {"full_attention": mask, "sliding_attention": local}

    def _apply(self, fn: Any, recurse: bool = True) -> HFTextEncoder:
        """Move or cast the tower, but keep the frequencies of rotary positions in float32."""
        frequencies = {name: b for name, b in self.transformer.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, buffer in frequencies.items():
            owner, _, last = name.rpartition(".")
            moved = self.transformer.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.transformer.get_submodule(owner), last, buffer.to(moved.device))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids.

        Args:
            x: token ids, [batch, tokens].

        Returns:
            Features [batch, output_dim]. With `output_tokens`, (features, tokens): [batch, tokens, width] of the
            encoder's last layer, without the first token if the pooler is ClsPooler.
        """
        output, is_token = self._encode(x)
        features = self.proj(self.pooler(output, is_token))
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
        """Compute the outputs of the blocks.

        Args:
            text: token ids, [batch, tokens].
            indices: None for all blocks, n for the last n, or a list of indices.
            stop_early: no effect: the encoder always runs all blocks.
            normalize_intermediates: apply the final layer norm, if the encoder has one after its blocks.
            intermediates_only: do not compute the text features.
            output_fmt: "NLC".
            output_extra_tokens: no effect: a special first token is always included.

        Returns:
            A dictionary.
            "text_intermediates": list of [batch, tokens, width], in the order of the blocks;
            "text_features": [batch, output_dim], unless `intermediates_only`.
        """
        expect("output_fmt of texts", output_fmt, ("NLC",))
        take, _ = feature_take_indices(len(self._blocks), indices, as_set=True)
        intermediates: list[torch.Tensor] = []

        def append_output(block: nn.Module, args: Any, result: Any) -> None:
            intermediates.append(result[0] if isinstance(result, tuple) else result)

        hooks = [self._blocks[index].register_forward_hook(append_output) for index in take]
        try:
            output, is_token = self._encode(text)
        finally:
            for hook in hooks:
                hook.remove()
        final_norm = self.config_names["final_norm_attr"]
        if normalize_intermediates and final_norm:
            intermediates = [getattr(self._stack, final_norm)(tokens) for tokens in intermediates]
        features: dict[str, Any] = {"text_intermediates": intermediates}
        if not intermediates_only:
            features["text_features"] = self.proj(self.pooler(output, is_token))
        return features


def _projection(proj_type: str | None, width: int, output_dim: int) -> nn.Module:
    """Create the projection of the pooled text, [batch, width] -> [batch, output_dim].

    Args:
        proj_type: "linear"; "mlp", two layers with GELU between; both without bias. "clap_mlp", two layers with bias
            and ReLU between, as in CLAP (arXiv:2211.06687). None, if `width` is `output_dim`.
    """
    expect("proj_type", proj_type, (None, "linear", "mlp", "clap_mlp"))
    if proj_type == "linear":
        return nn.Linear(width, output_dim, bias=False)
    if proj_type == "mlp":
        hidden = (width + output_dim) // 2
        return nn.Sequential(nn.Linear(width, hidden, bias=False), GELU(), nn.Linear(hidden, output_dim, bias=False))
    if proj_type == "clap_mlp":
        return nn.Sequential(nn.Linear(width, output_dim), nn.ReLU(), nn.Linear(output_dim, output_dim))
    if width != output_dim:
        raise ValueError(
            f"The encoder's width is {width} and output_dim is {output_dim}. Use proj_type 'linear' or 'mlp'."
        )
    return nn.Identity()


def _restore_buffers(tower: HFTextEncoder, incompatible_keys: Any) -> None:
    """Fill the encoder's non-persistent buffers after weights were loaded into a tower built on the meta device.

    The buffers depend on the configuration only, so they are copied from an encoder with the same configuration but
    with as few blocks and tokens as possible.
    """
    names = [name for name, buffer in tower.transformer.named_buffers() if buffer.is_meta]
    weight = next(tower.transformer.parameters())
    if not names or weight.is_meta:
        return
    config = copy.deepcopy(tower.config)
    # ModernBERT divides by the number of layers to initialize its weights.
    setattr(config, tower.config_names["layers"], 1 if config.model_type == "modernbert" else 0)
    if config.model_type != "m2m_100":  # whose table of positions depends on it
        config.pad_token_id = 0
    setattr(config, tower.config_names["vocab_size"], (config.pad_token_id or 0) + 1)
    with weight.device:
        buffers = dict(new_encoder(config, add_pooling_layer=False).named_buffers())
    for name in names:
        owner, _, last = name.rpartition(".")
        dtype = tower.transformer.get_buffer(name).dtype
        tower.transformer.get_submodule(owner).register_buffer(last, buffers[name].to(dtype), persistent=False)
