"""Features of frozen blocks: the same numbers as the blocks give, and never stale ones."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, small_model, small_options
from torch import nn

from dataset import CaptionedImages, Pairs
from evaluate import evaluate_split
from models import CLIP, hold_back
from sources.augment import resize
from support.command import UserError
from support.options import ALL
from tricks import frozen
from tricks.frozen import first_that_learns, keep_features, key_of, window

CPU = torch.device("cpu")
BLOCKS = 11  # of a resnet18: pixels, stem, eight with weights of their own, pooling


def options_for(tmp_path: Path, **flags: object) -> Namespace:
    return small_options(precision="fp32", workers=0, cache=tmp_path, **flags)


def photographs(count: int = 40, seed: int = 0) -> CaptionedImages:
    """Noise of 36 pixels, two captions a picture, in no order; the first 30 are for training."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 36, 36, 3)).astype(np.uint8)
    owner = np.random.default_rng(1).permutation(np.arange(2 * count) % count)
    return CaptionedImages(
        path="x",
        layout="x",
        kind="x",
        splits="given",
        names=[f"{row}.jpg" for row in range(count)],
        paths=[],
        pixels=pixels,
        digests=[f"{seed}-{row}" for row in range(count)],
        captions=[" ".join(WORDS[i % 27 : i % 27 + 1 + i % 3]) for i in range(2 * count)],
        caption_image=owner,
        labels=np.where(owner < 30, "train", "dev"),
    )


def model_of(trainable: int = 0, text_trainable: int = ALL, **flags: object) -> CLIP:
    """A small model of which the last blocks learn."""
    model = small_model(**flags)
    hold_back(model.image_tower, trainable)
    hold_back(model.text_tower, text_trainable)
    return model


def pairs_of(model: CLIP, dataset: CaptionedImages | None = None) -> dict[str, Pairs]:
    dataset = dataset or photographs()
    return {name: dataset.pairs(name, model.tokenizer) for name in ("train", "dev")}


def folders(place: Path, kind: str = "") -> set[str]:
    """The features that are cached."""
    return {path.name for path in place.glob(f"{kind}*") if path.name[0] != "."}


def inputs(pairs: Pairs, options: Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """What one epoch shows of a split's images and texts, in the order of the images."""
    batches = list(pairs.batches(1, options, CPU))
    order = torch.cat([ids for *_, ids, _ in batches]).argsort()
    width = max(texts.shape[1] for _, texts, *_ in batches)
    texts = [nn.functional.pad(texts, (0, width - texts.shape[1])) for _, texts, *_ in batches]
    return torch.cat([images for images, *_ in batches])[order], torch.cat(texts)[order]


def run_blocks(model: CLIP, images: torch.Tensor, below: int) -> torch.Tensor:
    with torch.inference_mode():
        for block in model.image_tower[:below]:
            images = block(images)
    return images


# --------------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    ("trainable", "below"), [(0, 11), (1, 9), (3, 7), (8, 2), (9, 0), (ALL, 0)]
)
def test_the_first_block_that_learns(trainable, below):
    tower = model_of(trainable).image_tower
    assert len(tower) == BLOCKS and first_that_learns(tower) == below


@pytest.mark.parametrize("trainable", [0, 1, 5])
def test_features_are_what_the_blocks_give(tmp_path, trainable):
    model, options = model_of(trainable).eval(), options_for(tmp_path)
    below, plain = first_that_learns(model.image_tower), pairs_of(model)
    above, kept = keep_features(model, plain, options)
    images, expected_texts = inputs(plain["train"], options)
    features, texts = inputs(kept["train"], options)
    expected = run_blocks(model, images, below)
    assert features.shape == expected.shape and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(texts, expected_texts)
    found = above.eval().encode_image(features)
    torch.testing.assert_close(found, model.encode_image(images), rtol=0, atol=2e-3)


@pytest.mark.parametrize("trainable", [0, 5])
@pytest.mark.parametrize("views", [{}, {"test_mirror": True}, {"test_crops": True}])
def test_evaluation_from_features_is_that_from_pixels(tmp_path, trainable, views):
    model = model_of(trainable, 0, **views)
    plain = pairs_of(model)
    above, kept = keep_features(model, plain, options_for(tmp_path, **views))
    assert isinstance(above.text_tower, nn.Identity)
    for name in ("train", "dev"):
        if name == "train" and views:  # training shows pictures as they are
            continue
        expected, found = evaluate_split(model, plain[name]), evaluate_split(above, kept[name])
        for kind in ("image_embeddings", "text_embeddings"):
            difference = np.abs(getattr(found, kind) - getattr(expected, kind)).max()
            assert difference < 2e-3, kind
    model.transform["mirror"] = not model.transform["mirror"]
    other = evaluate_split(model, plain["dev"]).image_embeddings
    assert np.abs(other - evaluate_split(above, kept["dev"]).image_embeddings).max() > 1e-3


def test_a_model_above_its_features_learns_the_same_weights(tmp_path):
    """A step on features moves the weights of the model that is kept, as a step on pixels does."""
    moved = []
    for keep in (False, True):
        model, options = model_of(2, 0, dropout=0.0), options_for(tmp_path)
        learner, pairs = model, pairs_of(model)
        if keep:
            learner, pairs = keep_features(model, pairs, options)
        learner.eval()  # no running statistics, which differ by rounding
        images, texts, *_ = next(pairs["train"].batches(1, options, CPU))
        loss = (learner.encode_image(images) - learner.encode_text(texts)).square().sum()
        loss.backward()
        moved.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    assert moved[0].keys() == moved[1].keys() and len(moved[0]) > 10
    assert not any(name.startswith("text_tower") for name in moved[0])
    for name, gradient in moved[0].items():
        if gradient.norm() > 1e-3:
            cosine = torch.cosine_similarity(gradient.ravel(), moved[1][name].ravel(), 0)
            assert cosine > 0.99, name


def test_text_features_are_the_towers(tmp_path):
    model, options = model_of(ALL, 0), options_for(tmp_path)
    plain = pairs_of(model)
    above, kept = keep_features(model, plain, options)
    assert not folders(tmp_path)  # a random tower is nobody's but this run's
    assert list(above.image_tower) == list(model.image_tower)
    images, features = inputs(kept["train"], options)
    plain_images, tokens = inputs(plain["train"], options)
    assert torch.equal(images, plain_images)
    expected = model.eval().text_tower(tokens).detach()
    torch.testing.assert_close(features.float(), expected, rtol=2e-3, atol=2e-3)


def test_nothing_is_kept_of_what_changes(tmp_path):
    """A tower that learns whole, augmented pictures, rewritten captions."""
    learns = model_of(ALL, 2)
    plain = pairs_of(learns)
    assert keep_features(learns, plain, options_for(tmp_path)) == (learns, plain)
    still = model_of(0, 0)
    flags = {"image_augment": "light", "text_augment": "delete=0.1"}
    assert keep_features(still, plain, options_for(tmp_path, **flags)) == (still, plain)
    _, kept = keep_features(still, plain, options_for(tmp_path, image_augment="mirror"))
    assert kept["train"].images is plain["train"].images
    assert kept["train"].texts is not plain["train"].texts
    _, kept = keep_features(still, plain, options_for(tmp_path, text_augment="delete=0.1"))
    assert kept["train"].images is not plain["train"].images
    assert kept["train"].texts is plain["train"].texts


# ----------------------------------------------------------------------------------- cache


def test_a_second_time_nothing_is_computed(tmp_path, monkeypatch):
    model, options = model_of(), options_for(tmp_path)
    first = inputs(keep_features(model, pairs_of(model), options)[1]["train"], options)[0]
    monkeypatch.setattr(frozen, "write_header", lambda *_: pytest.fail("computed again"))
    again = inputs(keep_features(model, pairs_of(model), options)[1]["train"], options)[0]
    assert torch.equal(first, again) and len(folders(tmp_path)) == 2  # of train and of dev


def test_a_stale_cache_is_never_used(tmp_path):
    """Other weights, statistics, size, pictures, views, precision: each gets its features."""
    dataset = photographs(4)
    changed = replace(dataset, pixels=dataset.pixels.copy(), digests=["0-0", "new", "0-2", "0-3"])
    changed.pixels[1] = 0
    larger = np.pad(dataset.pixels, ((0, 0), (0, 4), (0, 4), (0, 0)))

    def count(model: CLIP | None = None, data: CaptionedImages = dataset, **flags: object) -> int:
        model = model or model_of(**flags)
        options = options_for(tmp_path, **flags)
        keep_features(model, {"dev": data.pairs("train", model.tokenizer)}, options)
        return len(folders(tmp_path))

    weights, statistics, above = model_of(), model_of(), model_of()
    with torch.no_grad():
        weights.image_tower[3].conv1.weight[0, 0, 0, 0] += 1e-3
        above.image_projection.weight += 1  # a weight above the features is none of theirs
    statistics.image_tower[1][1].running_mean += 0.1
    assert count() == 1
    assert count(above) == 1
    assert count(weights) == 2
    assert count(statistics) == 3
    assert count(image_size=48) == 4
    assert count(data=changed) == 5
    assert count(data=replace(dataset, pixels=larger)) == 6
    assert count(test_mirror=True) == 7
    assert count(test_crops=True) == 8
    assert count(model_of(1)) == 9
    bf16 = small_options(precision="bf16", workers=0, cache=tmp_path)
    model = model_of()
    keep_features(model, {"dev": dataset.pairs("train", model.tokenizer)}, bf16)
    assert len(folders(tmp_path)) == 10 and count() == 10


def test_text_features_are_never_stale(tmp_path):
    """Those of pretrained weights are cached, by the weights, every token, and the pooling."""
    model = model_of(ALL, 0)
    options = options_for(tmp_path, image_augment="light")
    tokens = model.tokenizer([f"{WORDS[i]} {WORDS[i + 1]}" for i in range(20)])

    def features(tokens: torch.Tensor, **flags: object) -> np.ndarray:
        flags = {**vars(options), "text_weights": "pretrained", **flags}
        return np.array(frozen.text_features(model, tokens, Namespace(**flags), "train"))

    first = features(tokens)
    assert np.array_equal(first, features(tokens)) and len(folders(tmp_path, "texts")) == 1
    assert np.array_equal(first, features(tokens, text_weights="none"))
    changed = tokens.clone()
    changed[3, 1] = 9
    assert [*np.flatnonzero((features(changed) != first).any(1))] == [3]
    # The same weights pooled in another way, as minilm and bert do with one folder.
    features(tokens, text_tower="bert")
    with torch.no_grad():
        model.text_tower.words.weight[5] *= 2
    assert not np.array_equal(features(tokens), first)
    assert len(folders(tmp_path, "texts")) == 4


def test_keys_tell_shapes_and_types_apart():
    values = np.zeros(4, np.float32)
    keys = {
        key_of(values),
        key_of(values.reshape(2, 2)),
        key_of(values.astype(np.float16)),
        key_of(values, 1),
        key_of({"a": 1}),
        key_of({"a": 2}),
    }
    assert len(keys) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of(torch.from_numpy(values)) == key_of(values)


def test_features_too_large_for_16_bits(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.image_tower[9].bn2.weight.fill_(1e6)
    with pytest.raises(UserError, match="--image-augment light"):
        keep_features(model, pairs_of(model), options_for(tmp_path))
    assert not folders(tmp_path)


def test_frozen_blocks_run_in_eval_mode_and_the_mode_comes_back(tmp_path):
    model = model_of(1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    keep_features(model, pairs_of(model), options_for(tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model.text_tower.training and model.image_tower[9].training
    assert not model.image_tower[3].training


# --------------------------------------------------------------------------------- batches


def test_batches_of_features_belong_to_their_ids(tmp_path):
    model = model_of(0, 0)
    options = options_for(tmp_path, captions_per_image=2, batch_size=8)
    dataset, plain = photographs(), pairs_of(model)
    _, kept = keep_features(model, plain, options)
    for epoch, workers in ((1, 0), (2, 1)):
        options.workers = workers
        batches = [p["train"].batches(epoch, options, CPU) for p in (plain, kept)]
        for (_, tokens, ids, _), (images, texts, same_ids, _) in zip(*batches, strict=True):
            assert torch.equal(ids, same_ids) and len(ids) == 2 * len(images)
            pixels = torch.from_numpy(dataset.pixels[ids[::2].numpy()])
            expected = run_blocks(model.eval(), resize(pixels, 32), BLOCKS)
            torch.testing.assert_close(images, expected, rtol=2e-3, atol=2e-3)
            expected = model.text_tower(tokens).detach()
            torch.testing.assert_close(texts.float(), expected, rtol=2e-3, atol=2e-3)


def test_windows_of_maps():
    maps = torch.arange(2 * 3 * 17 * 17.0).view(2, 3, 17, 17)
    random, sides, places = torch.Generator().manual_seed(0), [], set()
    for _ in range(60):
        part = window(maps, 0.12, random)
        sides.append(part.shape[-1])
        top, left = divmod(int(part[0, 0, 0, 0]), 17)
        assert torch.equal(part, maps[:, :, top : top + sides[-1], left : left + sides[-1]])
        places.add((top, left, sides[-1]))
    assert set(sides) == {15, 17} and 15 < sides.count(15) < 45 and len(places) >= 8
    assert window(maps, 0.0, random) is maps
    pooled = maps[:, 0, 0]
    assert window(pooled, 0.5, random) is pooled  # pooled features have no window


def test_windows_are_cut_in_training_alone(tmp_path):
    model = model_of(4)
    options = options_for(tmp_path, map_crop=0.5, image_size=64, batch_size=4)
    dataset = replace(photographs(), pixels=np.zeros((40, 64, 64, 3), np.uint8))
    _, kept = keep_features(model, pairs_of(model, dataset), options)
    shapes = [{x.shape[2:] for x, *_ in kept[n].batches(1, options, CPU)} for n in ("train", "dev")]
    assert len(shapes[0]) == 2
    (view,) = kept["dev"].images.views(slice(0, 3), model.transform, CPU)
    assert view.shape[2:] == max(shapes[0])
