"""The loss against a plain loop in float64, closed forms and torch's own cross-entropy."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from loss import SigLIP, build_loss, check_finite, info_nce, parse_loss, triplet
from support.command import UserError


def unit(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


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
    expected = loop(images.numpy(), texts.numpy(), scale, ids)
    assert info_nce(images, texts, scale, torch.tensor(ids)).item() == pytest.approx(expected, 1e-9)
    single = info_nce(images.float(), texts.float(), torch.tensor(scale), torch.tensor(ids))
    assert single.dtype == torch.float32 and single.shape == ()
    assert single.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("ids", [None, torch.tensor([5, 3, 8, 1, 0, 9])])
def test_without_duplicates_it_is_cross_entropy(ids):
    images, texts, place = unit(6), unit(6, seed=1), torch.arange(6)
    logits = 20 * images @ texts.T
    expected = (F.cross_entropy(logits, place) + F.cross_entropy(logits.T, place)) / 2
    torch.testing.assert_close(info_nce(images, texts, 20.0, ids), expected)


@pytest.mark.parametrize(("count", "scale"), [(2, 1.0), (5, 3.0), (64, 1 / 0.07)])
def test_closed_form_of_orthogonal_embeddings(count, scale):
    same = torch.eye(count, dtype=torch.float64)
    expected = math.log(1 + (count - 1) * math.exp(-scale))
    assert info_nce(same, same, scale).item() == pytest.approx(expected, 1e-9)


def test_closed_form_of_indifferent_embeddings():
    same = unit(1).expand(12, -1)
    assert info_nce(same, same, 50.0).item() == pytest.approx(math.log(12))
    halves = torch.arange(12) // 6  # half of the batch is of the query's image
    assert info_nce(same, same, 50.0, halves).item() == pytest.approx(math.log(7))


def test_gradcheck():
    ids = torch.tensor([0, 1, 1, 2, 0])
    inputs = (unit(5, 4), unit(5, 4, seed=1), torch.tensor(3.0, dtype=torch.float64))
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *batch: info_nce(*batch, ids), inputs)
    assert torch.autograd.gradcheck(info_nce, inputs)


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
    expected = sum(F.cross_entropy(x, place, label_smoothing=0.2) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(info_nce(images, texts, 9.0, None, 0.2), expected)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_siglip_against_a_loop(ids):
    images, texts = unit(9), unit(9, seed=1)
    total = 0.0
    for i in range(9):
        for j in range(9):
            sign = 1 if ids[i] == ids[j] else -1
            logit = sign * (8 * float(images[i] @ texts[j]) - 3)
            total += math.log1p(math.exp(-logit)) / 9
    siglip = SigLIP()
    with torch.no_grad():
        siglip.bias.fill_(-3.0)
    assert siglip(images, texts, 8.0, torch.tensor(ids)).item() == pytest.approx(total, 1e-9)


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
    assert triplet(images, texts, 9.0, torch.tensor(ids)).item() == pytest.approx(total, 1e-9)


def test_hinges_never_punish_a_positive():
    """Two captions of one image, the same embedding: neither is the other's hard negative."""
    same = torch.eye(3)[[0, 0, 1, 2]]
    assert triplet(same, same, 1.0, torch.tensor([5, 5, 6, 7])).item() == 0
    assert triplet(same, same).item() > 0


def built(loss: str, label_smoothing: float = 0.0) -> torch.nn.Module:
    return build_loss(Namespace(loss=loss, label_smoothing=label_smoothing), None)


def test_sums_of_losses():
    images, texts, ids, scale = unit(8), unit(8, seed=1), torch.arange(8) // 2, torch.tensor(7.0)
    expected = info_nce(images, texts, scale, ids, 0.1)
    expected = expected + 0.2 * triplet(images, texts, scale, ids)
    expected = expected + 3 * SigLIP()(images, texts, scale, ids)
    loss = built("infonce + 0.2*triplet+3*siglip", 0.1)
    torch.testing.assert_close(loss(images, texts, scale, ids), expected)
    torch.testing.assert_close(
        built("infonce")(images, texts, scale, ids), info_nce(images, texts, scale, ids)
    )


def test_weights_of_a_loss_learn_and_are_kept():
    loss = built("triplet+2*siglip")
    assert [weight.item() for weight in loss.parameters()] == [-10]
    loss(unit(5), unit(5, seed=1), torch.tensor(2.0), torch.arange(5)).backward()
    assert next(loss.parameters()).grad.item() < 0  # most pairs are none: yes is said too seldom
    with torch.no_grad():
        next(loss.parameters()).fill_(-3.0)
    again = built("triplet+2*siglip")
    again.load_state_dict(loss.state_dict())
    assert next(again.parameters()).item() == -3
    assert not list(built("infonce").parameters())


@pytest.mark.parametrize(
    "text", ["", "hinge", "2*", "0*triplet", "x*siglip", "infonce+", "-1*siglip", "nan*triplet"]
)
def test_losses_that_are_none(text):
    with pytest.raises(UserError, match="infonce, siglip, triplet"):
        parse_loss(text)


@pytest.mark.parametrize("loss", [SigLIP(), triplet], ids=["siglip", "triplet"])
def test_gradients_of_the_others(loss):
    images, texts = unit(5).requires_grad_(), unit(5, seed=1).requires_grad_()
    ids = torch.tensor([0, 0, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda i, t: loss(i, t, 5.0, ids), (images, texts))


@pytest.mark.parametrize("loss", [SigLIP(), triplet], ids=["siglip", "triplet"])
def test_shapes_that_do_not_fit_the_others(loss):
    for texts, ids in ((torch.ones(5, 8), None), (torch.ones(4, 8), torch.arange(3))):
        with pytest.raises(ValueError):
            loss(torch.ones(4, 8), texts, 1.0, ids)


# ------------------------------------------------------------------------------- when to stop


def test_what_is_not_finite_is_refused():
    images, texts = unit(9), unit(9, seed=1)
    check_finite(3.0, images, texts, "epoch 1, batch 1")
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"epoch 2, batch 7: the loss is (nan|inf); .*--lr"):
            check_finite(value, images, texts, "epoch 2, batch 7")
    broken = images.clone()
    broken[3, 2] = math.nan
    with pytest.raises(UserError, match="an image embedding is not finite"):
        check_finite(3.0, broken, texts, "x")
    with pytest.raises(UserError, match="a text embedding is not finite"):
        check_finite(3.0, images, broken, "x")


def test_collapse_is_refused_and_a_narrow_cone_is_not():
    images, point = unit(9).float(), unit(1).float().expand(9, -1)
    for name, batch in (("image", (point, images)), ("text", (images, point))):
        with pytest.raises(UserError, match=f"all {name} embeddings are the same point"):
            check_finite(3.0, batch[0], batch[1], "x")
    check_finite(3.0, F.normalize(point + 1e-3 * images, dim=1), images, "x")
    check_finite(3.0, point[:7], images, "x")  # so few may be of one caption
