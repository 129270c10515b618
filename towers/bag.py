"""The simplest text tower: a bag of words, --text-tower bag. models.py builds it."""

import torch
from torch import nn

from dataset import PAD


class TextBag(nn.Module):
    """A mean of word embeddings, in which each word has a learned weight; their order is lost.

    Dropout leaves out whole words, never the first token.
    """

    def __init__(self, vocabulary_size: int, width: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width)
        self.scores = nn.Embedding(vocabulary_size, 1)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.zeros_(self.scores.weight)
        self.width, self.dropout = width, dropout

    def blocks(self) -> list[nn.Module]:
        return [self]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, width)."""
        counted = tokens != PAD
        if self.training:
            counted &= torch.rand(tokens.shape, device=tokens.device) >= self.dropout
            counted[:, 0] = True
        weights = self.scores(tokens)[..., 0].masked_fill(~counted, float("-inf")).softmax(1)
        return (weights[..., None] * self.words(tokens)).sum(1)
