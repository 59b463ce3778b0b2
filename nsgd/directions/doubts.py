"""What gives doubt in gradients of samples, said once each, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsgd.curvature.hessian import NO_SHARE
from nsgd.directions.on_host import OnHost

# The mean of the samples' losses may differ from the batch's by this share of the larger, and by so many standard
# errors: dropout, BatchNorm's statistics of a group, and samples that are a part of the batch, make less.
_SHARE, _ERRORS = 0.5, 3.0
_LEAST = 8  # groups, of which a standard error can be told

_OTHER_LOSS = (
    "the samples' losses have another mean than the loss of the batch, so the directions are those of another loss; "
    'usual causes are class weights, reduction="sum", losses that compare samples (contrastive, triplet), and samples '
    "that do not lie along the first dimension (pass batch_dim). Pass larger groups (group_size), or a loss whose mean "
    "over samples is the batch's, or take products (solver='lanczos')"
)
_EMPTY = (
    "the gradients of the samples are all zero or alike, so there are no directions; a loss that compares samples is "
    "constant on one alone. Pass larger groups (group_size), or take products (solver='lanczos')"
)
_UNKNOWN = (
    "the loss of one sample or more is NaN or has no value, so the directions come from the others; said once, and the "
    "refresh counts as done"
)


class Doubts:
    """Truth values under way to the host, with what is said where they are true; each at most once."""

    def __init__(self) -> None:
        self._checked: set[str] = set()
        self._pending: dict[str, tuple[OnHost, str]] = {}

    def note_losses(self, losses: Tensor, good: Tensor, expected: Tensor | None) -> None:
        """Look at the samples' losses (m,), on the device.

        Args:
            losses: NaN where one has no label.
            good: Whether all go.
            expected: Loss of the batch that the samples are of, where it is known, a tensor of one number.
        """
        known = ~losses.isnan()
        self._note("unknown", ~known.all() & good, _UNKNOWN)
        if expected is None or "mean" in self._checked or len(losses) < _LEAST:
            return
        self._checked.add("mean")
        expected = expected.reshape(()).to(losses)
        count = known.sum().clamp(min=1)
        mean = torch.where(known, losses, 0.0).sum() / count
        error = (torch.where(known, losses - mean, 0.0).square().sum() / count / count).sqrt()
        apart, least = (mean - expected).abs(), torch.maximum(mean.abs(), expected.abs())
        self._note("mean", good & (apart > _SHARE * least) & (apart > _ERRORS * error), _OTHER_LOSS)

    def note_weights(self, weights: Tensor, good: Tensor) -> None:
        """Look at the weights of the directions (k,)."""
        self._note("empty", good & ~(weights > 0).any(), _EMPTY)

    def note_shares(
        self, blocks: Sequence[Tensor], params: Sequence[Tensor], names: Sequence[str], good: Tensor
    ) -> None:
        """Look, once, for weights that train without a share in the gradients or directions (m, *shape) of each."""
        if "shares" in self._checked:
            return
        self._checked.add("shares")
        shares = [block.any().to(good.device) for block in blocks]
        some = good & torch.stack(shares).any()  # else there is no estimate at all
        for share, p, name in zip(shares, params, names, strict=True):
            if not p.requires_grad or p.ndim < 2:  # a bias before normalisation has no gradient, and need not
                continue
            self._note(
                f"share of {name}",
                some & ~share,
                NO_SHARE.format(name),
            )

    def say(self, warn_once: Callable[[str, str], None]) -> None:
        """Say what has turned out true; waits for what is under way."""
        pending, self._pending = self._pending, {}
        for key, (outcome, message) in pending.items():
            if outcome.is_true():
                warn_once(key, message)

    def _note(self, key: str, doubtful: Tensor, message: str) -> None:
        self._pending[key] = OnHost(doubtful), message
