"""Resizing of position embeddings, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from open_clip import pos_embed


class Clip(nn.Module):
    """The attributes that resizing reads."""

    def __init__(self, grid: tuple[int, int] = (2, 2), context_length: int = 5, custom: bool = False) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.grid_size = grid
        holder = nn.Module() if custom else self
        holder.positional_embedding = nn.Parameter(torch.zeros(context_length, 4))
        if custom:
            self.text = holder


def ramp(rows: int, width: int = 4) -> torch.Tensor:
    """Return a linear ramp, which every interpolation preserves away from the edges."""
    return torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, width).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_class_token_is_kept_and_the_grid_resized(dtype: torch.dtype) -> None:
    table = torch.cat([torch.full((1, 4), 7.0), torch.full((16, 4), 3.0)]).to(dtype)
    state_dict = {"visual.positional_embedding": table}
    pos_embed.resize_pos_embed(state_dict, Clip((3, 5)))
    resized = state_dict["visual.positional_embedding"]
    assert resized.shape == (16, 4)
    assert resized.dtype == dtype
    assert (resized[0] == 7).all()
    torch.testing.assert_close(resized[1:].float(), torch.full((15, 4), 3.0))


def test_rows_and_columns_are_not_swapped() -> None:
    grid = ramp(4)[:, None].expand(4, 4, 4).reshape(16, 4)  # grows downwards
    state_dict = {"visual.positional_embedding": torch.cat([torch.zeros(1, 4), grid])}
    pos_embed.resize_pos_embed(state_dict, Clip((8, 3)))
    resized = state_dict["visual.positional_embedding"][1:].reshape(8, 3, 4)
    torch.testing.assert_close(resized[:, 0], resized[:, 1])
    assert (resized[1:, 0] > resized[:-1, 0]).all()


def test_nothing_changes_if_sizes_agree() -> None:
    table = torch.randn(5, 4)
    state_dict = {"visual.positional_embedding": table}
    pos_embed.resize_pos_embed(state_dict, Clip((2, 2)))
    assert state_dict["visual.positional_embedding"] is table
    empty: dict[str, torch.Tensor] = {}
    pos_embed.resize_pos_embed(empty, Clip())
    pos_embed.resize_text_pos_embed(empty, Clip())
    pos_embed.interpolate_pos_embed(None, empty)
    assert empty == {}


def test_a_grid_that_is_not_square_raises() -> None:
    with pytest.raises(ValueError, match="6 positions, which is not a square grid, and the model has 2x2"):
        pos_embed.resize_pos_embed({"visual.positional_embedding": torch.zeros(7, 4)}, Clip((2, 2)))


@pytest.mark.parametrize("custom", [False, True])
def test_text_embedding_is_resized(custom: bool) -> None:
    key = "text.positional_embedding" if custom else "positional_embedding"
    state_dict = {key: ramp(4)}
    pos_embed.resize_text_pos_embed(state_dict, Clip(context_length=8, custom=custom))
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(state_dict[key], expected[:, None].expand(-1, 4))


def test_text_embedding_of_equal_length_is_unchanged_and_of_another_width_raises() -> None:
    state_dict = {"positional_embedding": ramp(5)}
    before = state_dict["positional_embedding"]
    pos_embed.resize_text_pos_embed(state_dict, Clip())
    assert state_dict["positional_embedding"] is before
    with pytest.raises(ValueError, match="has the width 6, and the model has 4"):
        pos_embed.resize_text_pos_embed({"positional_embedding": ramp(5, 6)}, Clip())


def test_sine_cosine_tables() -> None:
    table = pos_embed.get_1d_sincos_pos_embed_from_grid(4, np.array([0.0, 2.0]))
    np.testing.assert_allclose(table[0], [0, 0, 1, 1])
    np.testing.assert_allclose(table[1], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)])
    grid = pos_embed.get_2d_sincos_pos_embed(8, (2, 3), cls_token=True)
    assert grid.shape == (7, 8)
    assert (grid[0] == 0).all()
    row = pos_embed.get_1d_sincos_pos_embed_from_grid(4, np.ones(1))[0]
    np.testing.assert_allclose(grid[1 + 3 + 2], np.concatenate([table[1], row]))  # row 1, column 2: the column first


@pytest.mark.parametrize(
    ("function", "width"),
    [(pos_embed.get_1d_sincos_pos_embed_from_grid, 3), (pos_embed.get_2d_sincos_pos_embed_from_grid, 6)],
)
def test_invalid_widths_raise(function: object, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width}"):
        function(width, np.zeros((2, 3)))  # type: ignore[operator]
