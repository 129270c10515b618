"""Why a model fails: words that move the rank, hubs, near misses, the gap between the two clouds.

report/analysis.py writes these figures; each function takes a ranked split or its `Answers`.
"""

from __future__ import annotations

from collections import Counter
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from report.groups import content, words_of
from report.predictions import Answers, Line

if TYPE_CHECKING:
    from dataset import Pairs
    from evaluate import Embedded

FEW = 30  # pictures: a group or a word with fewer is too small to tell
RESAMPLES = 1000
ACCEPTED = 2 / 3  # share of a caption's telling words that a picture's captions must hold

# ------------------------------------------------------------------------- words and ranks

WORD_COLUMNS = ["direction", "word", "images", "times", "times_low", "times_high"]
WORD_COLUMNS += ["finding", "holds_for_all"]
MOST_WORDS = 150  # the most frequent, and no more than one for twenty queries


def least_squares(
    design: np.ndarray, target: np.ndarray, cluster: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (P,) of plain least squares and their standard errors (P,).

    design (Q, P), target (Q,), cluster (Q,): queries of one cluster may be wrong together, so the
    errors are those of the sandwich formula over clusters (Liang and Zeger 1986).
    """
    queries, unknowns = design.shape
    inverse = np.linalg.pinv(design.T @ design)
    found = inverse @ (design.T @ target)
    scores = design * (target - design @ found)[:, None]
    sums = np.zeros((cluster.max() + 1, unknowns))
    np.add.at(sums, cluster, scores)
    groups = len(np.unique(cluster))
    factor = groups / max(1, groups - 1) * (queries - 1) / max(1, queries - unknowns)
    spread = inverse @ (sums.T @ sums) @ inverse * factor
    return found, np.sqrt(np.diag(spread).clip(0))


def word_effects(answered: Answers, pairs: Pairs) -> list[Line]:
    """By how much each frequent word multiplies the rank, others held fast: rows of words.csv.

    Least squares of log rank on a caption's length and on which words stand in it; intervals of
    95%. For a picture: the share of its captions that hold a word, so `times` compares all with
    none. `holds_for_all`: the finding stands when all words are asked at once (Bonferroni).
    """
    owner, count = np.asarray(pairs.caption_image), len(pairs.rows)
    words = [words_of(caption) for caption in pairs.captions]
    stands = Counter(w for w, _ in {(w, i) for i, ws in zip(owner, words, strict=True) for w in ws})
    frequent = [w for w, n in stands.items() if w.isalpha() and FEW <= n <= count - FEW]
    frequent = sorted(frequent, key=lambda word: (-stands[word], word))
    frequent = frequent[: min(MOST_WORDS, len(answered.ranks) // 20)]
    if not frequent:
        return []
    place = {word: column for column, word in enumerate(frequent)}
    holds = np.zeros((len(words), len(frequent) + 1))
    for row, found in enumerate(words):
        holds[row, [place[word] for word in found if word in place]] = 1
        holds[row, -1] = len(found)
    if answered.way == "i2t":
        sums = np.zeros((count, holds.shape[1]))
        np.add.at(sums, owner, holds)
        holds = sums / np.bincount(owner)[:, None]
    design = np.column_stack([holds, np.ones(len(holds))])
    ranks = np.minimum(answered.ranks, len(answered.pool_image))
    effects, errors = least_squares(design, np.log(ranks), answered.image)
    strict = NormalDist().inv_cdf(1 - 0.025 / len(frequent))
    rows: list[Line] = []
    for word, effect, error in zip(frequent, effects, errors, strict=False):
        low, high = effect - 1.96 * error, effect + 1.96 * error
        finding = "found sooner" if high < 0 else "found later" if low > 0 else "no difference seen"
        sure = "yes" if abs(effect) > strict * error else "no"
        rows.append(
            [answered.way, word, stands[word], *np.exp([effect, low, high]).tolist(), finding, sure]
        )
    return sorted(rows, key=lambda row: row[3])


# ---------------------------------------------------------------------------------- hubs

HUB_COLUMNS = ["direction", "item", "times", "percent"]


def hub_share(times: np.ndarray) -> float:
    """The share, in percent, of all places that the 1% most returned (one at least) hold."""
    top = max(1, round(len(times) / 100))
    return float(100 * np.sort(times)[::-1][:top].sum() / max(1, times.sum()))


def hubs(answered: Answers) -> tuple[np.ndarray, dict[str, float]]:
    """How often each thing stands among the first ten, and what that says of hubs.

    By chance: every place drawn by lot (seeded); the most returned hold more than 1% of those too.
    """
    pool = len(answered.pool_image)
    times = np.bincount(answered.found.ravel(), minlength=pool)
    drawn = np.random.default_rng(0).multinomial(times.sum(), np.full(pool, 1 / pool))
    return times, {
        "hub share": hub_share(times),
        "hub share by chance": hub_share(drawn),
        "never returned": float(100 * (times == 0).mean()),
    }


# --------------------------------------------------------------------------- near misses

MISS_COLUMNS = ["direction", "image", "caption", "rank", "found", "found_caption"]
MISS_COLUMNS += ["overlap", "accepted"]


class Overlap:
    """Which share of a caption's telling words stands in the captions of a picture."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.owner = pairs, np.asarray(pairs.caption_image)
        self.words = [frozenset(content(caption)) for caption in pairs.captions]
        self.of_image: list[Counter[str]] = [Counter() for _ in pairs.rows]
        self.captions: list[list[int]] = [[] for _ in pairs.rows]
        for i, (image, words) in enumerate(zip(self.owner, self.words, strict=True)):
            self.of_image[image].update(words)
            self.captions[image].append(i)

    def share(self, caption: int, image: int) -> float:
        """0 to 1; the caption itself does not speak for its own picture."""
        words, own = self.words[caption], int(self.owner[caption] == image)
        return sum(self.of_image[image][word] > own for word in words) / max(1, len(words))

    def nearest(self, caption: int, image: int) -> int:
        """The caption of a picture that has most words with this one in common."""
        shared = [len(self.words[caption] & self.words[i]) for i in self.captions[image]]
        return self.captions[image][int(np.argmax(shared))]


def near_misses(answered: Answers, overlap: Overlap, names: list[str]) -> list[Line]:
    """Every query whose first answer is wrong: rows of near_misses.csv.

    Accepted: two thirds of the telling words of the caption (the query, or the one found) stand in
    the captions of the picture (the one found, or the query).
    """
    rows: list[Line] = []
    captions = overlap.pairs.captions
    for i in np.flatnonzero(answered.ranks > 1):
        image, first = int(answered.image[i]), int(answered.found[i, 0])
        other = int(answered.pool_image[first])
        if other == image:  # its own score is no number
            continue
        if answered.way == "t2i":
            share, query, found = overlap.share(i, other), i, overlap.nearest(i, other)
        else:
            share, query, found = overlap.share(first, image), int(answered.own[i]), first
        line: Line = [answered.way, names[image], captions[query], float(answered.ranks[i])]
        accepted = "yes" if share >= ACCEPTED else "no"
        rows.append([*line, names[other], captions[found], share, accepted])
    return rows


class Rates(NamedTuple):
    """Shares in percent, each with its 95% interval over pictures: [value, low, high]."""

    accepted: list[float]  # of the misses, by the rule
    own: list[float]  # what the rule says of captions and the rest of their own picture's
    other: list[float]  # what it says of captions and a picture drawn by lot
    estimate: list[float]  # of the misses that a person would accept


def miss_rates(misses: list[Line], overlap: Overlap, names: list[str]) -> Rates:
    """How many misses the rule accepts, and what follows once its own errors are counted out.

    The rule takes some wrong pictures (`other`) and refuses some right ones (1 - `own`). If a
    share x of the misses is right in a person's eyes it accepts x own + (1 - x) other of them.
    """
    count, random = len(names), np.random.default_rng(0)
    position = {name: i for i, name in enumerate(names)}
    sums = np.zeros((count, 6))  # of each picture: accepted and asked, for misses, own, other
    for row in misses:
        sums[position[row[1]], :2] += row[7] == "yes", 1
    for i, image in enumerate(overlap.owner):
        if len(overlap.captions[image]) > 1:
            sums[image, 2:4] += overlap.share(i, image) >= ACCEPTED, 1
        if count > 1:
            lot = (image + 1 + random.integers(count - 1)) % count
            sums[image, 4:] += overlap.share(i, lot) >= ACCEPTED, 1
    weights = np.vstack([np.ones(count), draw_weights(count)])
    asked = weights @ sums
    with np.errstate(invalid="ignore", divide="ignore"):
        accepted, own, other = (100 * asked[:, i] / asked[:, i + 1] for i in (0, 2, 4))
        estimate = (100 * (accepted - other) / (own - other)).clip(0, 100)
    estimate[~(own > other)] = np.nan
    return Rates._make(map(with_interval, (accepted, own, other, estimate)))


def draw_weights(count: int) -> np.ndarray:
    """How often each of `count` pictures stands in each resample: (RESAMPLES, count), seeded."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def with_interval(drawn: np.ndarray) -> list[float]:
    """[value, low, high] of a figure whose first entry is the figure and the rest resamples."""
    rest = drawn[1:][np.isfinite(drawn[1:])]
    known = len(rest) and np.isfinite(drawn[0])
    ends = np.percentile(rest, [2.5, 97.5]).tolist() if known else [np.nan, np.nan]
    return [float(drawn[0]), *ends]


# --------------------------------------------------------------------------- the two clouds


def clouds(embedded: Embedded) -> dict[str, float]:
    """How far the clouds of pictures and captions are apart (Liang et al. 2022); mean cosines."""
    images = np.nan_to_num(embedded.image_embeddings.astype(np.float64))
    texts = np.nan_to_num(embedded.text_embeddings.astype(np.float64))
    matched = (images[embedded.pairs.caption_image] * texts).sum(1)
    every = images.sum(0) @ texts.sum(0)
    found = {"modality gap": float(np.linalg.norm(images.mean(0) - texts.mean(0)))}
    found["cosine of pairs"] = float(matched.mean())
    others = len(images) * len(texts) - len(texts)
    found["cosine of others"] = float((every - matched.sum()) / max(1, others))
    for name, cloud in (("pictures", images), ("captions", texts)):
        among = cloud.sum(0) @ cloud.sum(0) - (cloud**2).sum()
        found[f"cosine among {name}"] = float(among / max(1, len(cloud) ** 2 - len(cloud)))
    return found
