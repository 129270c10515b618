"""The losses: train.py calls `combined` on a batch of embeddings, evaluate.py `info_nce` on dev.

All take batches in which several captions may belong to one image: those are positives together,
never each other's negatives. A new loss is one function and its entry in LOSSES.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from cli import UserError


def info_nce(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    alike: torch.Tensor | None = None,
    soft_share: float = 0.0,
) -> torch.Tensor:
    """Symmetric InfoNCE of CLIP (Radford et al. 2021, figure 3): a scalar.

    image_embeddings, text_embeddings: (N, D), unit length; row i of both is a pair.
    logit_scale: the factor 1 / temperature. image_ids: (N,), equal where the images are the same
    (None: all differ). With S = logit_scale * images @ texts.T, pair i contributes
        -log( exp S_ii / (exp S_ii + sum over j with id_j != id_i of exp S_ij) ),
    and likewise over the columns: each positive in turn, against what is not its image's. When all
    ids differ this is the assignment's formula. A batch of one has no negatives: its loss is 0.
    label_smoothing: the share of the target that is spread evenly over these candidates.
    alike: (N, N), how alike the images of two pairs are, 0 or more; the share soft_share of the
    target is spread over the others in proportion to it, where there are any. Raises ValueError
    when the shapes do not fit.
    """
    cosines, same = compared(image_embeddings, text_embeddings, image_ids)
    hidden = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logit_scale * cosines
    own, loss = logits.diagonal(), 0.0
    for axis in (1, 0):
        every = logits.masked_fill(hidden, float("-inf")).logsumexp(axis)
        wrong = every - own
        if label_smoothing:
            mean = logits.masked_fill(hidden, 0.0).sum(axis) / (~hidden).sum(axis)
            wrong = wrong.lerp(every - mean, label_smoothing)
        if alike is not None:
            others = alike.masked_fill(same, 0.0)
            total = others.sum(axis)
            mean = (others * logits).sum(axis) / total.clamp(min=1e-12)
            wrong = wrong.lerp(every - mean, soft_share * (total > 0).to(wrong.dtype))
        loss = loss + wrong.mean() / 2
    return loss


def compared(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, image_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines (N, N), which of them are of one image (N, N)). Raises ValueError."""
    if image_embeddings.shape != text_embeddings.shape or image_embeddings.ndim != 2:
        raise ValueError(f"not pairs: {image_embeddings.shape} and {text_embeddings.shape}")
    cosines = image_embeddings @ text_embeddings.T
    if image_ids is None:
        image_ids = torch.arange(len(cosines), device=cosines.device)
    if image_ids.shape != cosines.shape[:1]:
        raise ValueError(f"{len(cosines)} pairs, but image_ids of shape {tuple(image_ids.shape)}")
    return cosines, image_ids[:, None] == image_ids[None, :]


def siglip(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
    logit_bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Sigmoid loss of SigLIP (Zhai et al. 2023, eq. 1): every pair is a yes or no of its own.

    -1/N sum over i, j of log sigmoid( z_ij * (logit_scale * cosine_ij + logit_bias) ), where z_ij
    is 1 for a pair of one image and -1 for any other.
    """
    cosines, same = compared(image_embeddings, text_embeddings, image_ids)
    signs = same.to(cosines.dtype) * 2 - 1
    return -F.logsigmoid(signs * (logit_scale * cosines + logit_bias)).sum() / len(cosines)


def triplet(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    image_ids: torch.Tensor | None = None,
    margin: float = 0.2,
) -> torch.Tensor:
    """Max of hinges of VSE++ (Faghri et al. 2018, eq. 6), the mean over pairs.

    Each pair's cosine must exceed by `margin` that of its image with the hardest text, and of its
    text with the hardest image, that are not of the same image.
    """
    cosines, same = compared(image_embeddings, text_embeddings, image_ids)
    others = cosines.masked_fill(same, -1.0)
    own = cosines.diagonal()
    return sum((margin + others.amax(axis) - own).clamp(min=0).mean() for axis in (1, 0))


# name -> loss(images, texts, model's scale, model's bias, ids, alike, the run's config)
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "infonce": lambda i, t, scale, bias, ids, alike, config: info_nce(
        i, t, scale, ids, config["label_smoothing"], alike, config["soft_share"]
    ),
    "siglip": lambda i, t, scale, bias, ids, alike, config: siglip(i, t, scale, ids, bias),
    "triplet": lambda i, t, scale, bias, ids, alike, config: triplet(i, t, ids),
}


def parse_loss(text: str) -> list[tuple[float, str]]:
    """`infonce+0.2*triplet` -> [(1.0, "infonce"), (0.2, "triplet")]. Raises UserError."""
    made = []
    for part in text.split("+"):
        weight, star, name = part.strip().rpartition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            number = 0.0
        if name not in LOSSES or not 0 < number < 1e6:
            raise UserError(
                f"--loss {text}: {part!r} is none of {', '.join(LOSSES)}, alone or with a weight "
                "above 0, as in infonce+0.2*triplet"
            )
        made.append((number, name))
    return made


def combined(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    image_ids: torch.Tensor,
    alike: torch.Tensor | None,
    config: dict,
) -> torch.Tensor:
    """The weighted sum of losses that config["loss"] asks for."""
    given = (image_embeddings, text_embeddings, logit_scale, logit_bias, image_ids, alike, config)
    return sum(weight * LOSSES[name](*given) for weight, name in parse_loss(config["loss"]))
