"""The loss: train.py calls `info_nce` on a batch of embeddings, evaluate.py on dev.

Symmetric InfoNCE as in CLIP (Radford et al. 2021, figure 3), for batches in which several captions
may belong to one image: those are positives together, never each other's negatives.
"""

import torch


def info_nce(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the mean of the image-to-text and the text-to-image cross-entropy, a scalar.

    image_embeddings, text_embeddings: (N, D), unit length; row i of both is a pair.
    logit_scale: the factor 1 / temperature. image_ids: (N,), equal where the images are the same
    (None: all differ). With S = logit_scale * images @ texts.T, image i contributes
        -log( sum over j with id_j = id_i of exp S_ij / sum over all N texts of exp S_ij ),
    which is the assignment's formula when all ids differ; texts likewise over the columns. A
    batch of one has no negatives: its loss is 0. Raises ValueError when the shapes do not fit.
    """
    if image_embeddings.shape != text_embeddings.shape or image_embeddings.ndim != 2:
        raise ValueError(f"not pairs: {image_embeddings.shape} and {text_embeddings.shape}")
    logits = logit_scale * image_embeddings @ text_embeddings.T
    if image_ids is None:
        image_ids = torch.arange(len(logits), device=logits.device)
    if image_ids.shape != logits.shape[:1]:
        raise ValueError(f"{len(logits)} pairs, but image_ids of shape {tuple(image_ids.shape)}")
    others = image_ids[:, None] != image_ids[None, :]
    own = logits.masked_fill(others, float("-inf"))
    image_to_text = logits.logsumexp(1) - own.logsumexp(1)
    text_to_image = logits.logsumexp(0) - own.logsumexp(0)
    return (image_to_text.mean() + text_to_image.mean()) / 2
