"""Heads for posters: one starts where the text tower's features are, one reads the words.

models.py names `IdentityHead` among its projections, and with --poster-text puts `PosterHead` in
the image projection's place; what that is handed comes from words.py's `add_words`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models import LinearHead
from posters.words import READINGS


class IdentityHead(LinearHead):
    """Centred features through a matrix that starts as the identity, on the first `embed_dim`.

    For a text tower whose features are good embeddings already, such as MiniLM's first 384.
    """

    def __init__(self, width: int, embed_dim: int, dropout: float):
        super().__init__(width, embed_dim, dropout)
        nn.init.eye_(self.weight)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:  # the mean of all that was seen in training
            self.seen += len(features)
            self.mean += (features.detach() - self.mean).sum(0) / self.seen
        return super().forward(features - self.mean)


class PosterHead(nn.Module):
    """An image projection that mixes in the embeddings of readings, each weighed by its text.

    Each reading (words.READINGS) goes through the texts' projection as any text does; only how
    much each counts is learned, from its place among the readings and from its features: few
    numbers, that cannot learn a poster by heart.
    """

    def __init__(self, picture: nn.Module, text_projection: nn.Module, text_width: int):
        super().__init__()
        self.picture = picture
        self.width = next(picture.parameters()).shape[1]  # of the image tower's features
        self.texts = (text_projection,)  # a tuple: its weights are the model's, not also the head's
        self.weigh = nn.Linear(text_width, 1, bias=False)
        nn.init.zeros_(self.weigh.weight)
        self.place = nn.Parameter(torch.zeros(len(READINGS)))
        self.share = nn.Parameter(torch.tensor(1.0))  # of the words; a logit

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, width), or (B, width + readings * text width), 0 where none -> (B, D)."""
        picture = self.picture(features[:, : self.width])
        if features.shape[1] == self.width:
            return picture
        readings = features[:, self.width :].unflatten(1, (len(READINGS), -1))
        there = readings.any(2)
        scores = (self.weigh(readings)[..., 0] + self.place).masked_fill(~there, -1e9)
        texts = picture.new_zeros(*there.shape, picture.shape[1])
        (project,) = self.texts
        was_training = project.training
        project.eval()  # neither dropout nor statistics of texts that are no captions
        texts[there] = F.normalize(project(readings[there]), dim=-1)
        project.train(was_training)
        words = F.normalize((scores.softmax(1)[..., None] * texts).sum(1), dim=-1)
        return F.normalize(picture, dim=-1).lerp(words, self.share.sigmoid())
