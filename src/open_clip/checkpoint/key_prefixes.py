"""Removal of prefixes that wrappers and training programs add to the names in a state dict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..constants import OPENAI_SIZES

logger = logging.getLogger(__name__)

_WRAPPERS = ("module.", "model.")

# Entries of old files that are not weights: the causal mask, and three sizes of OpenAI's models.
_MASK = "attn_mask"
OPENAI_EXTRAS = (*OPENAI_SIZES, _MASK)
# Parameters and buffers that a file may lack.
_MAY_LACK = ("logit_bias", "num_batches_tracked")

NamedValues = Mapping[str, Any]


def strip_prefixes(state_dict: NamedValues) -> dict[str, Any]:
    """Remove the prefixes of wrappers.

    These are `module.` (DDP, AveragedModel) and `model.` (Lightning) before all names, and `_orig_mod.` (torch.compile)
    anywhere.
    """
    state_dict = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    state_dict.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel adds it
    while prefix := next((p for p in _WRAPPERS if state_dict and all(key.startswith(p) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def drop_extras(state_dict: NamedValues, expected: Collection[str]) -> dict[str, Any]:
    """Drop causal masks and sizes that the model does not expect."""
    return {
        key: value
        for key, value in state_dict.items()
        if key in expected or not (key in OPENAI_EXTRAS or key.rpartition(".")[2] == _MASK)
    }


def common_prefixes(names: Collection[str]) -> list[str]:
    """List the prefixes, ending with a dot, that all names share, shortest first: a.b.x, a.b.y -> ["a.", "a.b."]."""
    first = min(names, default="").split(".")
    found: list[str] = []
    for part in first[:-1]:
        prefix = "".join(found[-1:]) + part + "."
        if not all(name.startswith(prefix) for name in names):
            break
        found.append(prefix)
    return found


def strip_to_fit(
    state_dict: NamedValues,
    expected: Collection[str],
    to_layout: Callable[[dict[str, Any]], NamedValues],
    source: str,
) -> dict[str, Any] | None:
    """Select the entries under the one prefix that has all expected names, without the prefix.

    Args:
        state_dict: weights by name.
        expected: the model's names.
        to_layout: converts entries to the model's layout.
        source: name of the file in log lines.

    Returns:
        The entries; None if no prefix fits, or several.
    """
    needed = {name for name in expected if name.rpartition(".")[2] not in _MAY_LACK}
    fitting = {}
    for prefix in _candidate_prefixes(state_dict, needed):
        stripped = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if needed and needed <= to_layout(stripped).keys():
            fitting[prefix] = stripped
    if len(fitting) != 1:
        return None
    ((prefix, stripped),) = fitting.items()
    others = [key for key in state_dict if not key.startswith(prefix)]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        logger.warning("%s: using the names that start with %r and ignoring %s.", source, prefix, shown)
    else:
        logger.info("%s: removed the prefix %r of all names.", source, prefix)
    return stripped


def _candidate_prefixes(state_dict: NamedValues, needed: Collection[str]) -> list[str]:
    """List the prefixes to try: those that all names share, and those of entries that end with a name of the model."""
    longest = max(needed, key=len, default="")
    endings = [f".{longest}", f".{longest.removeprefix('text.')}"]
    anchored = [key[: -len(end) + 1] for key in state_dict for end in endings if len(end) > 1 and key.endswith(end)]
    anchored += [prefix.removesuffix("text.") for prefix in anchored if prefix.endswith(".text.")]
    return list(dict.fromkeys([*common_prefixes(state_dict), *anchored]))
