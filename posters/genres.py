"""Genres of films: how alike two films are, a loss that knows it, and which genres match best.

train.py builds `GenreInfoNCE` for --soft-positives genres; figures.py draws `genre_recalls`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from loss import compared, info_nce
from support.command import UserError

if TYPE_CHECKING:
    from dataset import Pairs


def genre_table(genres: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The names of all genres, and which film (row) is of which: float32 (films, names)."""
    parts = [set(filter(None, joined.split("|"))) for joined in genres]
    names = sorted(set().union(*parts))
    cells = [[name in part for name in names] for part in parts]
    return names, np.array(cells, np.float32).reshape(len(parts), len(names))


def genre_likeness(table: torch.Tensor) -> torch.Tensor:
    """Jaccard index of every two rows of a genre table (N, names): (N, N); 0 where one has none."""
    common, sizes = table @ table.T, table.sum(1)
    return common / (sizes[:, None] + sizes[None, :] - common).clamp(min=1)


def genre_recalls(
    ranks: dict[str, np.ndarray], genres: Sequence[str], fewest: int = 10
) -> dict[str, dict[str, float]]:
    """{genre: films and R@10 in both directions} of genres with `fewest` films or more."""
    names, table = genre_table(genres)
    recalls = {}
    for name, column in zip(names, table.T > 0, strict=True):
        if column.sum() >= fewest:
            found = {dim: 100 * float((each[column] <= 10).mean()) for dim, each in ranks.items()}
            recalls[name] = {"films": int(column.sum()), **found}
    return recalls


class GenreInfoNCE(nn.Module):
    """InfoNCE (loss.py) that moves `share` of each pair's target to films of like genres.

    It is spread over the other films of the batch in proportion to the Jaccard index of the genres,
    where any are alike. `table` is the genre table of the whole dataset.
    """

    def __init__(self, table: torch.Tensor, share: float, label_smoothing: float = 0.0):
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.share, self.label_smoothing = share, label_smoothing

    def forward(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        ids: torch.Tensor,
        text_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """images, texts (N, D), unit length; ids (N,): rows of the dataset. A scalar."""
        loss = info_nce(images, texts, scale, ids, self.label_smoothing, text_ids)
        cosines, same = compared(images, texts, ids, text_ids)
        alike = genre_likeness(self.table[ids]).masked_fill(same, 0.0)
        logits, total = scale * cosines, alike.sum(1)
        for axis in (1, 0):  # both are sums over the target times the logits: what moves is added
            theirs = (alike * logits).sum(axis) / total.clamp(min=1e-12)
            loss = loss + self.share * ((logits.diagonal() - theirs) * (total > 0)).mean() / 2
        return loss


def build(options: Namespace, pairs: Pairs) -> GenreInfoNCE:
    """The loss of a run on these pairs. Raises UserError when their data tells no genres."""
    names, table = genre_table([film.genres for film in pairs.dataset.records])
    if not names:
        raise UserError(f"--soft-positives genres: {pairs.dataset.path} has no genres")
    return GenreInfoNCE(torch.from_numpy(table), options.soft_share, options.label_smoothing)
