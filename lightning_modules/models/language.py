"""A small language model of characters."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from lightning_modules.models.base import Split, Stages
from lightning_modules.models.nets.transformers import causal_transformer

Batch = tuple[Tensor, Tensor]  # tokens (B, T) int64, and the token after each of them (B, T) int64


class LanguageModel(Stages):
    """A causal transformer that predicts the next character.

    Mean cross-entropy in nats per character is logged as ``train_``, ``val_`` and ``test_loss``. Without an optimizer
    from the command line it trains with NSGD at its defaults.

    Args:
        vocabulary: Number of different characters; on the command line taken from the data.
        context: The most characters that the model sees at once; not below the context of the data.
        dim: Width of the network.
        depth: Number of transformer blocks.
        heads: Attention heads of a block; they divide dim.
        lr: Learning rate of the default optimizer.

    Raises:
        ValueError: If a size is below 1, or dim no multiple of heads; in training, if the data's context exceeds the
            model's.
    """

    def __init__(
        self, vocabulary: int, *, context: int = 64, dim: int = 64, depth: int = 2, heads: int = 4, lr: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = causal_transformer(vocabulary, context=context, dim=dim, depth=depth, heads=heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of the next character, of tokens (B, T)."""
        logits: Tensor = self.net(tokens)
        return logits

    def evaluate(self, batch: Batch, stage: Split) -> Tensor:
        """The mean loss of the batch, logged."""
        tokens, targets = batch
        loss = functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
        self.log_loss(loss, stage, len(tokens))
        return loss
