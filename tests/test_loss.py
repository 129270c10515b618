"""The loss against a plain loop in float64, closed forms and torch's own cross-entropy."""

import math

import numpy as np
import pytest
import torch
from cli import UserError
from torch.nn import functional as F

from loss import combined, info_nce, parse_loss, siglip, triplet


def unit(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return F.normalize(made, dim=1)


def loop(images: np.ndarray, texts: np.ndarray, scale: float, ids: list[int]) -> float:
    count, total = len(ids), 0.0
    for i in range(count):
        for queries, pool in ((images, texts), (texts, images)):
            terms = [math.exp(scale * float(queries[i] @ pool[j])) for j in range(count)]
            others = sum(term for term, other in zip(terms, ids, strict=True) if other != ids[i])
            total -= math.log(terms[i] / (terms[i] + others)) / (2 * count)
    return total


IDS = {
    "all differ": list(range(9)),
    "duplicates": [0, 0, 1, 2, 2, 2, 3, 4, 4],
    "unsorted": [7, -1, 7, 30, -1, 2, 7, 5, 10**12],
    "one image": [3] * 9,
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_against_a_loop(ids, scale):
    images, texts = unit(9), unit(9, seed=1)
    wanted = loop(images.numpy(), texts.numpy(), scale, ids)
    assert info_nce(images, texts, scale, torch.tensor(ids)).item() == pytest.approx(wanted, 1e-9)
    single = info_nce(images.float(), texts.float(), torch.tensor(scale), torch.tensor(ids))
    assert single.dtype == torch.float32 and single.shape == ()
    assert single.item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("ids", [None, torch.tensor([5, 3, 8, 1, 0, 9])])
def test_without_duplicates_it_is_cross_entropy(ids):
    images, texts, place = unit(6), unit(6, seed=1), torch.arange(6)
    logits = 20 * images @ texts.T
    wanted = (F.cross_entropy(logits, place) + F.cross_entropy(logits.T, place)) / 2
    torch.testing.assert_close(info_nce(images, texts, 20.0, ids), wanted)


@pytest.mark.parametrize(("count", "scale"), [(2, 1.0), (5, 3.0), (64, 1 / 0.07)])
def test_closed_form_of_orthogonal_embeddings(count, scale):
    same = torch.eye(count, dtype=torch.float64)
    wanted = math.log(1 + (count - 1) * math.exp(-scale))
    assert info_nce(same, same, scale).item() == pytest.approx(wanted, 1e-9)


def test_closed_form_of_indifferent_embeddings():
    same = unit(1).expand(12, -1)
    assert info_nce(same, same, 50.0).item() == pytest.approx(math.log(12))
    halves = torch.arange(12) // 6  # half of the batch is of the query's image
    assert info_nce(same, same, 50.0, halves).item() == pytest.approx(math.log(7))


def test_gradcheck():
    ids = torch.tensor([0, 1, 1, 2, 0])
    inputs = (unit(5, 4), unit(5, 4, seed=1), torch.tensor(3.0, dtype=torch.float64))
    for wanted in inputs:
        wanted.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: info_nce(*given, ids), inputs)
    assert torch.autograd.gradcheck(lambda *given: info_nce(*given), inputs)


def test_a_batch_of_one_has_no_loss():
    image, text = unit(1).float().requires_grad_(), unit(1, seed=1).float().requires_grad_()
    scale = torch.tensor(14.3, requires_grad=True)
    loss = info_nce(image, text, scale)
    loss.backward()
    assert loss.item() == 0
    for leaf in (image, text, scale):
        assert (leaf.grad == 0).all()


def test_captions_of_one_image_are_never_negatives():
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    same = ids[:, None] == ids
    for seed in range(20):
        # With the unit matrix for images, the texts' transpose is the matrix of cosines itself.
        cosines = torch.empty(7, 7, dtype=torch.float64).uniform_(
            -1, 1, generator=torch.Generator().manual_seed(seed)
        )
        cosines.requires_grad_()
        info_nce(torch.eye(7, dtype=torch.float64), cosines.T, 10.0, ids).backward()
        assert (cosines.grad[same] <= 0).all() and (cosines.grad[~same] >= 0).all()
        assert cosines.grad.abs().max() > 1e-4


def test_symmetric_and_indifferent_to_order():
    images, texts = unit(9), unit(9, seed=1)
    ids = torch.tensor(IDS["duplicates"])
    loss = info_nce(images, texts, 14.3, ids)
    torch.testing.assert_close(info_nce(texts, images, 14.3, ids), loss)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(images[order], texts[order], 14.3, ids[order]), loss)
    torch.testing.assert_close(info_nce(images, texts, 14.3, ids * -3 + 5), loss)


@pytest.mark.parametrize("ids", [None, torch.tensor(IDS["duplicates"])])
@pytest.mark.parametrize("scale", [1e4, 1e20, 1e30])
def test_a_huge_scale_stays_finite(scale, ids):
    images, texts = unit(9).float().requires_grad_(), unit(9, seed=1).float().requires_grad_()
    loss = info_nce(images, texts, torch.tensor(scale), ids)
    loss.backward()
    assert math.isfinite(loss.item())
    assert images.grad.isfinite().all() and texts.grad.isfinite().all()


@pytest.mark.parametrize(
    ("images", "texts", "ids"),
    [
        ((4, 8), (5, 8), None),
        ((4, 8), (4, 7), None),
        ((4,), (4,), None),
        ((1, 4, 8), (1, 4, 8), None),
        ((4, 8), (4, 8), (3,)),
        ((4, 8), (4, 8), (1,)),
        ((4, 8), (4, 8), ()),
        ((4, 8), (4, 8), (4, 1)),
    ],
)
def test_shapes_that_do_not_fit(images, texts, ids):
    with pytest.raises(ValueError):
        info_nce(
            torch.ones(images),
            torch.ones(texts),
            1.0,
            None if ids is None else torch.zeros(ids, dtype=torch.int64),
        )


# -------------------------------------------------------- smoothing, sigmoid, triplet, sums


def test_label_smoothing_is_cross_entropys_own():
    images, texts, place = unit(7), unit(7, seed=1), torch.arange(7)
    logits = 9 * images @ texts.T
    wanted = sum(F.cross_entropy(x, place, label_smoothing=0.2) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(info_nce(images, texts, 9.0, None, 0.2), wanted)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_siglip_against_a_loop(ids):
    images, texts = unit(9), unit(9, seed=1)
    total = 0.0
    for i in range(9):
        for j in range(9):
            sign = 1 if ids[i] == ids[j] else -1
            logit = sign * (8 * float(images[i] @ texts[j]) - 3)
            total += math.log1p(math.exp(-logit)) / 9
    made = siglip(images, texts, 8.0, torch.tensor(ids), torch.tensor(-3.0))
    assert made.item() == pytest.approx(total, 1e-9)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_triplet_against_a_loop(ids):
    images, texts = unit(9), unit(9, seed=1)
    cosines = (images @ texts.T).numpy()
    total = 0.0
    for i in range(9):
        others = [j for j in range(9) if ids[j] != ids[i]]
        for scores in (cosines[i], cosines[:, i]):
            hardest = max((scores[j] for j in others), default=-1.0)
            total += max(0.0, 0.2 + hardest - cosines[i, i]) / 9
    assert triplet(images, texts, torch.tensor(ids)).item() == pytest.approx(total, 1e-9)


def test_hinges_never_punish_a_positive():
    """Two captions of one image, the same embedding: neither is the other's hard negative."""
    same = torch.eye(3)[[0, 0, 1, 2]]
    assert triplet(same, same, torch.tensor([5, 5, 6, 7])).item() == 0
    assert triplet(same, same).item() > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_soft_positives_against_a_loop(share):
    """Cross-entropy with a target that is (1 - share) on the pair, share on what is alike."""
    images, texts, count = unit(7), unit(7, seed=1), 7
    alike = torch.rand(7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alike = (alike + alike.T) / 2
    alike[3] = alike[:, 3] = 0.0  # like no other: all of its target is its own
    logits, total = 9.0 * (images @ texts.T), 0.0
    for table in (logits, logits.T):
        for i in range(count):
            others = [0.0 if i == j else alike[i, j].item() for j in range(count)]
            soft = share if sum(others) else 0.0
            target = [soft * other / (sum(others) or 1) for other in others]
            target[i] = 1 - soft
            norm = math.log(sum(math.exp(x) for x in table[i].tolist()))
            total += sum(t * (norm - x) for t, x in zip(target, table[i].tolist(), strict=True))
    made = info_nce(images, texts, 9.0, None, 0.0, alike, share)
    assert made.item() == pytest.approx(total / (2 * count), 1e-9)


def test_sums_of_losses():
    images, texts, ids = unit(8), unit(8, seed=1), torch.arange(8)
    scale, bias = torch.tensor(7.0), torch.tensor(-2.0)
    config = {"loss": "infonce + 0.2*triplet+3*siglip", "label_smoothing": 0.1, "soft_share": 0.2}
    wanted = info_nce(images, texts, scale, ids, 0.1) + 0.2 * triplet(images, texts, ids)
    wanted = wanted + 3 * siglip(images, texts, scale, ids, bias)
    torch.testing.assert_close(combined(images, texts, scale, bias, ids, None, config), wanted)


@pytest.mark.parametrize(
    "text", ["", "hinge", "2*", "0*triplet", "x*siglip", "infonce+", "-1*siglip"]
)
def test_losses_that_are_none(text):
    with pytest.raises(UserError, match="infonce, siglip, triplet"):
        parse_loss(text)


@pytest.mark.parametrize("name", ["siglip", "triplet"])
def test_gradients_of_the_others(name):
    images, texts = unit(5).requires_grad_(), unit(5, seed=1).requires_grad_()
    ids = torch.tensor([0, 0, 1, 2, 3])
    loss = {
        "siglip": lambda i, t: siglip(i, t, 5.0, ids, -1.0),
        "triplet": lambda i, t: triplet(i, t, ids),
    }
    assert torch.autograd.gradcheck(loss[name], (images, texts))
