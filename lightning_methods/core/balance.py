"""A warning where an added term has no effect, or is larger than the loss it is added to."""

from __future__ import annotations

from torch import Tensor

from lightning_methods.core._lightning import rank_zero_warn
from lightning_methods.errors import NoEffect, TermOutweighsLoss


class Balance:
    """Compares a term with the loss it is added to over the first steps, and warns once where the term is larger.

    Later the comparison would mislead: a loss that is almost 0 is outweighed by any term.
    """

    steps = 20

    def __init__(self) -> None:
        self.seen = 0
        self.term: Tensor | float = 0.0
        self.loss: Tensor | float = 0.0

    def see(self, term: Tensor, loss: Tensor, who: str) -> None:
        """Take in a step, in which `who` adds the term to the loss."""
        if self.seen >= self.steps:
            return
        if self.seen == 0 and not term.requires_grad:
            rank_zero_warn(
                f"{who}: none of the weighted layers is trained (their outputs need no gradient), so that the term has "
                f"no effect. Tap a layer that is trained, or set weight=0 to only measure.",
                category=NoEffect,
            )
        self.seen += 1
        self.term = self.term + term.detach().abs()
        self.loss = self.loss + loss.detach().abs()
        # one synchronisation with the device in all
        if self.seen == self.steps and self.term > self.loss:
            rank_zero_warn(
                f"{who}: over the first {self.steps} steps the added term is {float(self.term) / self.steps:.3g} on "
                f"average and the loss {float(self.loss) / self.steps:.3g}: the training follows the term. If that is "
                f"not meant, make the weight about {max(float(self.loss / self.term), 1e-4) / 10:.1g} times as large.",
                category=TermOutweighsLoss,
            )
