"""Names of open_clip.naflex_convert of open_clip's main branch, for programs. Here they are in `convert.naflex`."""

from __future__ import annotations

from .convert.naflex import apply_naflex_vision_config, convert_naflex_state_dict

__all__ = ["apply_naflex_vision_config", "convert_naflex_state_dict"]
