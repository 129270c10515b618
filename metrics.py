"""Recall@K and ranks from embeddings, in plain NumPy and torch, with no model in sight.

evaluate.py calls these on a split's embeddings; the tests check them against a loop. They cannot
flatter: a tie is lost, a score that is not finite is a miss.
"""

import numpy as np
import torch

KS = (1, 5, 10)
# Scores are float64 products of float32 vectors, so equal vectors differ by less than this.
TIE = 1e-12


def retrieval_ranks(
    image_embeddings: np.ndarray, text_embeddings: np.ndarray, caption_image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 in both directions: i2t (images,) and t2i (captions,), as floats.

    image_embeddings (N, D), text_embeddings (M, D), caption_image (M,): the image of each caption.
    i2t: the rank among all M captions of the image's best own one (the other own ones are not
    counted against it). t2i: the rank of the caption's image among all N. A tie counts as lost. A
    query whose own score is not finite gets infinity; another's counts as better. The scores are
    made in blocks, never all at once. Raises ValueError when an image has no caption.
    """
    images, texts = finite_or_nan(image_embeddings), finite_or_nan(text_embeddings)
    own_image = torch.as_tensor(np.asarray(caption_image), dtype=torch.int64)
    count, pool = len(images), len(texts)
    if (torch.bincount(own_image, minlength=count) == 0).any():
        raise ValueError("an image has no caption")
    own = torch.empty(pool, dtype=torch.float64)
    for start in range(0, pool, 8192):
        part = slice(start, start + 8192)
        own[part] = (images[own_image[part]].double() * texts[part].double()).sum(1)
    low = torch.full((count,), float("-inf"), dtype=torch.float64)
    best = low.scatter_reduce(0, own_image, own.nan_to_num(nan=float("-inf")), "amax")
    best[best == float("-inf")] = float("nan")
    as_good, ahead = ~(own < best[own_image] - TIE), torch.zeros(count, dtype=torch.int64)
    ahead -= torch.zeros_like(ahead).scatter_add_(0, own_image, as_good.long())
    behind = torch.zeros(pool, dtype=torch.int64)  # counts the own image too: a rank from 1
    for top in range(0, count, 1024):
        rows = slice(top, top + 1024)
        queries, wanted = images[rows].double(), best[rows, None] - TIE
        for left in range(0, pool, 8192):
            columns = slice(left, left + 8192)
            scores = queries @ texts[columns].double().T
            ahead[rows] += (~(scores < wanted)).sum(1)
            behind[columns] += (~(scores < own[columns] - TIE)).sum(0)
    i2t = torch.where(best.isnan(), float("inf"), (ahead + 1).double())
    t2i = torch.where(own.isnan(), float("inf"), behind.double())
    return i2t.numpy(), t2i.numpy()


def finite_or_nan(embeddings: np.ndarray) -> torch.Tensor:
    """An embedding with one number that is not finite becomes NaN all over: it never matches."""
    tensor = torch.as_tensor(embeddings)
    finite = torch.cat([part.isfinite().all(1) for part in tensor.split(8192)])
    return tensor if finite.all() else tensor.masked_fill(~finite[:, None], float("nan"))


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """The share of queries, in percent, whose rank is at most k."""
    return float((np.asarray(ranks) <= k).mean() * 100)


def retrieval_metrics(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
    """R@1/5/10 in percent, median and mean rank in both directions, their sum and mean.

    A miss for want of a finite score counts as the last rank of its pool in medr and meanr.
    """
    metrics: dict[str, float] = {}
    for way, ranks, pool in (("i2t", i2t, len(t2i)), ("t2i", t2i, len(i2t))):
        metrics |= {f"{way}_r{k}": recall_at_k(ranks, k) for k in KS}
        ended = np.minimum(ranks, pool)
        metrics[f"{way}_medr"] = float(np.median(ended))
        metrics[f"{way}_meanr"] = float(ended.mean())
    metrics["rsum"] = sum(metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in KS)
    metrics["mean_recall"] = metrics["rsum"] / 6
    return metrics


def bootstrap_intervals(
    i2t: np.ndarray, t2i: np.ndarray, caption_image: np.ndarray, resamples: int = 1000
) -> dict[str, list[float]]:
    """95% percentile intervals of the recalls, images (with their captions) drawn anew.

    Only the queries are resampled; the pool that they search stays whole. Seeded.
    """
    generator, count = np.random.default_rng(0), len(i2t)
    captions = np.bincount(caption_image, minlength=count)
    found = [np.bincount(caption_image, t2i <= k, minlength=count) for k in KS]
    hits = np.stack([i2t <= k for k in KS] + found, axis=1).astype(np.float64)
    sizes = np.stack([np.ones(count)] * 3 + [captions] * 3, axis=1)
    draws = np.empty((resamples, 6))
    for row in range(resamples):
        weight = np.bincount(generator.integers(count, size=count), minlength=count)
        draws[row] = weight @ hits / (weight @ sizes) * 100
    columns = {f"{way}_r{k}": None for way in ("i2t", "t2i") for k in KS}
    values = dict(zip(columns, draws.T, strict=True))
    values |= {"rsum": draws.sum(1), "mean_recall": draws.mean(1)}
    return {key: np.percentile(drawn, [2.5, 97.5]).tolist() for key, drawn in values.items()}


def first_captions(caption_image: np.ndarray) -> np.ndarray:
    """For each image the position of its first caption."""
    return np.unique(caption_image, return_index=True)[1]


# ------------------------------------------------------------- the table of a training run

COLUMNS = {  # of the table on the screen: key -> (title, format)
    "epoch": ("epoch", "{:5d}"),
    "train_loss": ("loss", "{:7.3f}"),
    "dev_loss": ("dev loss", "{:8.3f}"),
    "top1_i2t": ("top1 i2t", "{:8.1f}"),
    "top1_t2i": ("t2i", "{:5.1f}"),
    "i2t_r1": ("i2t R@1", "{:7.1f}"),
    "i2t_r5": ("R@5", "{:5.1f}"),
    "i2t_r10": ("R@10", "{:5.1f}"),
    "i2t_medr": ("medr", "{:5.0f}"),
    "t2i_r1": ("t2i R@1", "{:7.1f}"),
    "t2i_r5": ("R@5", "{:5.1f}"),
    "t2i_r10": ("R@10", "{:5.1f}"),
    "t2i_medr": ("medr", "{:5.0f}"),
    "mean_recall": ("mean", "{:5.1f}"),
    "logit_scale": ("scale", "{:5.1f}"),
    "images_per_second": ("img/s", "{:6.0f}"),
    "seconds": ("s", "{:5.0f}"),
    "minutes": ("min", "{:6.1f}"),  # since the run began, its preparation included
}


def table_head() -> str:
    widths = {key: len(form.format(0)) for key, (_, form) in COLUMNS.items()}
    return " ".join(title.rjust(widths[key]) for key, (title, _) in COLUMNS.items())


def table_line(record: dict[str, float]) -> str:
    return " ".join(
        form.format(record[key]).rjust(len(title)) for key, (title, form) in COLUMNS.items()
    )
