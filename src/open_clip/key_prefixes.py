"""Prefixes that wrappers and training programs put before all names of a state dict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

logger = logging.getLogger(__name__)

_WRAPPERS = ("module.", "model.")

# What old files hold besides the weights: the causal mask, and OpenAI's three numbers of the architecture.
_MASK = "attn_mask"
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size", _MASK)
# What a model may have and a file lack.
_MAY_LACK = ("logit_bias", "num_batches_tracked")

NamedValues = Mapping[str, Any]


def strip_prefixes(state_dict: NamedValues) -> dict[str, Any]:
    """Names without what wrappers put there: DDP and averaged models `module.`, Lightning `model.` before all of
    them, torch.compile `_orig_mod.` anywhere."""
    state_dict = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    state_dict.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    while prefix := next((p for p in _WRAPPERS if state_dict and all(key.startswith(p) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def without_leftovers(state_dict: NamedValues, expected: Collection[str]) -> dict[str, Any]:
    """Without masks and numbers of the architecture that the model does not expect."""
    return {
        key: value
        for key, value in state_dict.items()
        if key in expected or not (key in OPENAI_EXTRAS or key.rpartition(".")[2] == _MASK)
    }


def common_prefixes(names: Collection[str]) -> list[str]:
    """The prefixes that end with a dot and that all names have, shortest first: a.b.x, a.b.y -> ["a.", "a.b."]."""
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
    """The entries below the one prefix under which all expected names are; None where no prefix or several fit.

    Args:
        expected: the model's names.
        to_layout: renames entries to the model's layout.
        source: name of the file in the log, which says what is left out.
    """
    needed = {name for name in expected if name.rpartition(".")[2] not in _MAY_LACK}
    fitting = {}
    for prefix in fitting_candidates(state_dict, needed):
        stripped = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if needed and needed <= to_layout(stripped).keys():
            fitting[prefix] = stripped
    if len(fitting) != 1:
        return None
    ((prefix, stripped),) = fitting.items()
    others = [key for key in state_dict if not key.startswith(prefix)]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        logger.warning("%s: the names of this model begin with %r; left out: %s.", source, prefix, shown)
    else:
        logger.info("%s: removed %r, with which all names begin.", source, prefix)
    return stripped


def fitting_candidates(state_dict: NamedValues, needed: Collection[str]) -> list[str]:
    """Prefixes that are worth a try: those that all names have, and those before one long name of the model."""
    longest = max(needed, key=len, default="")
    endings = [f".{longest}", f".{longest.removeprefix('text.')}"]
    anchored = [key[: -len(end) + 1] for key in state_dict for end in endings if len(end) > 1 and key.endswith(end)]
    anchored += [prefix.removesuffix("text.") for prefix in anchored if prefix.endswith(".text.")]
    return list(dict.fromkeys([*common_prefixes(state_dict), *anchored]))
