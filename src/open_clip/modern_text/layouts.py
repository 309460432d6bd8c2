"""Where the tokens of a batch of texts are: padded to one length, or packed one after another.

The two classes have one interface, so the tower has one computation for both.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import device as devices
from .. import packing
from ..packing import Segments
from ..text_groups import PackedText
from ..utils import exact_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionContext:
    """What the attention of every block shares.

    Not a tuple: FSDP casts floating point tensors in tuples that a block gets to half precision.

    Attributes:
        cos, sin: of rotary positions, float32 [tokens, head_dim].
        is_causal: each token attends to tokens up to its position.
        allowed: bool [batch, 1, tokens, tokens] of padded texts, True where a token may attend. None: everywhere.
        segments: of packed texts.
    """

    cos: Tensor
    sin: Tensor
    is_causal: bool = False
    allowed: Tensor | None = None
    segments: Segments | None = None

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention of [batch, tokens, heads, head_dim], or packed [tokens, heads, head_dim]. Merge heads."""
        if self.segments is None:
            return _padded_attention(query, key, value, self.allowed, self.is_causal)
        return packing.attention(query, key, value, self.segments, is_causal=self.is_causal).flatten(-2)


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Compute attention of [batch, tokens, heads, head_dim], to [batch, tokens, heads * head_dim]."""
    heads = query.shape[-2]
    query, key, value = query.flatten(-2), key.flatten(-2), value.flatten(-2)
    return devices.attention(query, key, value, attn_mask=allowed, is_causal=is_causal, num_heads=heads)


def valid_lengths(ids: Tensor, pad_id: int) -> Tensor:
    """Return the number of tokens before the trailing padding, int64 [batch]. It is 1 for padding alone."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return ((ids != pad_id) * places).amax(dim=1).clamp(min=1)


def eos_places(ids: Tensor, lengths: Tensor, eos_id: int) -> Tensor:
    """Return the place of the first end of text, else of the last valid token, int64 [batch]."""
    is_eos = ids == eos_id
    place = is_eos.int().argmax(dim=1)
    return torch.where(is_eos.any(dim=1), place, lengths - 1)


class PaddedLayout:
    """Texts padded to one length, with `num_registers` tokens before each.

    Args:
        ids: int64 [batch, tokens].
        pad_id: id of padding. Only padding at the end of a text is hidden.
    """

    def __init__(self, ids: Tensor, num_registers: int, pad_id: int) -> None:
        self.ids = ids
        self.num_registers = num_registers
        self.lengths = valid_lengths(ids, pad_id)

    @property
    def is_text(self) -> Tensor:
        """Bool [batch, tokens], False for padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def positions(self) -> Tensor:
        """The positions of registers and text, int64 [tokens]."""
        return torch.arange(self.num_registers + self.ids.shape[1], device=self.ids.device)

    def context(self, cos: Tensor, sin: Tensor, is_causal: bool) -> AttentionContext:
        """Return what attention needs. Under a causal mask no token sees the padding after it."""
        if is_causal:
            return AttentionContext(cos, sin, is_causal=True)
        shown = torch.nn.functional.pad(self.is_text, (self.num_registers, 0), value=True)
        # Expanded, because not every fused kernel broadcasts the mask over the query tokens.
        return AttentionContext(cos, sin, allowed=shown[:, None, None, :].expand(-1, -1, shown.shape[1], -1))

    def add_registers(self, x: Tensor, registers: Tensor) -> Tensor:
        """Put registers [1, registers, width] before each text [batch, tokens, width]."""
        return torch.cat([registers.expand(x.shape[0], -1, -1), x], dim=1)

    def split_registers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the registers and the text of [batch, registers + tokens, width]."""
        return x[:, : self.num_registers], x[:, self.num_registers :]

    def eos_places(self, eos_id: int) -> Tensor:
        return eos_places(self.ids, self.lengths, eos_id)

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        """Select one token per text: [batch, tokens, width] -> [batch, width]. `places` is int64 [batch]."""
        return x[torch.arange(x.shape[0], device=x.device), places]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over each text, [batch, width], with sums in float32."""
        dtype = exact_dtype(x.dtype)
        total = (x.to(dtype) * self.is_text[:, :, None]).sum(dim=1)
        return (total / self.lengths[:, None]).to(x.dtype)

    def pooling_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let one query attend to each text.

        Args:
            query: [1, heads, head_dim].
            key, value: [batch, tokens, heads, head_dim].

        Returns:
            [batch, heads * head_dim].
        """
        query = query.expand(key.shape[0], 1, -1, -1)
        return _padded_attention(query, key, value, self.is_text[:, None, None, :])[:, 0]

    def as_padded(self, x: Tensor) -> Tensor:
        """Return the tokens of all texts as [batch, tokens, width]."""
        return x


class PackedLayout:
    """Texts packed one after another, with `num_registers` tokens before each. Methods are those of PaddedLayout.

    Tensors of tokens are [all tokens, width].
    """

    def __init__(self, text: PackedText, num_registers: int) -> None:
        self.ids = text.ids
        self.num_registers = num_registers
        self._text = text.segments  # without registers
        self.segments = text.segments
        if num_registers:
            self.segments, self._slots, self._order = _insert(text.segments, num_registers)

    @property
    def positions(self) -> Tensor:
        return self.segments.position

    def context(self, cos: Tensor, sin: Tensor, is_causal: bool) -> AttentionContext:
        return AttentionContext(cos, sin, is_causal=is_causal, segments=self.segments)

    def add_registers(self, x: Tensor, registers: Tensor) -> Tensor:
        repeated = registers.expand(len(self._text), -1, -1).flatten(0, 1)
        return torch.cat([x, repeated]).index_select(0, self._order)

    def split_registers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the registers, [batch, registers, width], and the text, [all tokens without registers, width]."""
        starts = self.segments.offsets[:-1, None] + torch.arange(self.num_registers, device=x.device)
        return x[starts], x.index_select(0, self._slots) if self.num_registers else x

    def eos_places(self, eos_id: int) -> Tensor:
        ids = packing.unpack(self.ids, self._text, value=eos_id - 1)  # padded with another id
        return eos_places(ids, self._text.offsets.diff().long(), eos_id)

    def take(self, x: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, self._text.offsets[:-1] + places)

    def mean(self, x: Tensor) -> Tensor:
        return packing.mean(x, self._text)

    def pooling_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.expand(len(self._text), -1, -1)
        return packing.attention(query, key, value, self._text.single(), self._text).flatten(-2)

    @property
    def lengths(self) -> Tensor:
        """Int64 [batch]."""
        return self._text.offsets.diff().long()

    def as_padded(self, x: Tensor) -> Tensor:
        return packing.unpack(x, self._text)


Layout = PaddedLayout | PackedLayout


def _insert(segments: Segments, count: int) -> tuple[Segments, Tensor, Tensor]:
    """Insert `count` tokens before each sequence. The host computes nothing that has to be copied to the device.

    Returns:
        The longer segments;
        the slots of the old tokens in the new order, int64 [T];
        for each new slot the index into the old tokens followed by all inserted ones, int64 [T + B * count].
    """
    device, batch, total = segments.device, len(segments), segments.total
    numbers = torch.arange(batch, device=device)
    offsets = segments.offsets + count * torch.arange(batch + 1, device=device, dtype=torch.int32)
    slots = torch.arange(total, device=device) + count * (segments.sequence + 1)
    inserted = (offsets[:-1, None].long() + torch.arange(count, device=device)).flatten()
    both = torch.cat([slots, inserted])
    order = torch.empty_like(both).index_copy(0, both, torch.arange(len(both), device=device))
    sequence = torch.cat([segments.sequence, numbers.repeat_interleave(count)]).index_select(0, order)
    position = torch.arange(len(both), device=device) - offsets[:-1].long().index_select(0, sequence)
    host_offsets = segments.host_offsets + count * torch.arange(batch + 1)
    lengths = tuple(length + count for length in segments.lengths)
    indices = torch.cat([sequence, position, segments.by_length])
    return Segments(lengths, host_offsets, indices, offsets), slots, order
