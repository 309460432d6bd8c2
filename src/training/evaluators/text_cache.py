"""Results of a locked text tower, kept between evaluations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from training.sharding.tensors import is_sharded_model

_NOT_TEXT = ("visual.", "logit_scale", "logit_bias")


class TextCache:
    """Keeps a tensor that was computed with the text tower, until the weights of the tower may have changed.

    A tower with a trainable parameter is never cached, nor is a sharded one: all ranks must compute at the same time.
    """

    def __init__(self) -> None:
        self._weights: list[tuple[int, int]] = []
        self._result: Tensor | None = None

    def get(self, model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of an earlier call with the same weights, or that of `compute`."""
        parameters = [p for name, p in model.named_parameters() if not name.startswith(_NOT_TEXT)]
        if is_sharded_model(model) or not parameters or any(p.requires_grad for p in parameters):
            return compute()
        weights = [(p.data_ptr(), p._version) for p in parameters]
        if self._result is None or weights != self._weights:
            self._result, self._weights = compute(), weights
        return self._result
