"""The cache of frozen features: the same numbers as the blocks give, and never a stale one."""

import numpy as np
import pytest
import torch
from cli import UserError
from images import resize
from test_models import TOKENIZER, build, config

import features
from dataset import Dataset, Feed, Split
from embedding import embed_images
from features import image_features, opened, text_features, window

CONFIG = config(image_augment="light", precision="fp32", views=4)


def pictures_of(count: int = 40, seed: int = 0) -> Dataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 36, 36, 3)).astype(np.uint8)
    digests = [f"{seed}-{row}" for row in range(count)]
    names = [f"{row}.jpg" for row in range(count)]
    return Dataset("x", "made", "given", names, [], pixels, digests, [], np.array([]), np.array([]))


def kept(model, tmp_path, dataset=None, starts=(10,), views=2, **changes):
    dataset = dataset or pictures_of()
    rows = np.arange(len(dataset.names))
    wanted = dict.fromkeys(starts, views)
    made = image_features(model, dataset, rows, wanted, {**CONFIG, **changes}, tmp_path, "train")
    return [made[start] for start in starts]


def test_each_start_has_its_own_count_of_views(tmp_path):
    model, dataset = build().eval(), pictures_of()
    given = model, dataset, np.arange(40)
    made = image_features(*given, {0: 2, 3: 2, 10: 1}, CONFIG, tmp_path, "train")
    assert {start: x.shape[1] for start, x in made.items()} == {3: 2, 10: 1}
    alone = image_features(*given, {10: 2}, CONFIG, tmp_path / "alone", "train")[10]
    assert np.array_equal(made[10][:, 0], alone[:, 0])
    lower = image_features(*given, {3: 2}, CONFIG, tmp_path / "alone", "train")[3]
    assert np.array_equal(made[3], lower)


@pytest.mark.parametrize("start", [3, 9, 10])
def test_features_are_what_the_blocks_give(tmp_path, start):
    model, dataset = build().eval(), pictures_of()
    (made,) = kept(model, tmp_path, dataset, (start,))
    assert made.dtype == np.float16 and made.shape[:2] == (40, 2)
    for row in (0, 31, 32, 39):
        images = resize(torch.from_numpy(dataset.pixels[row : row + 1]), CONFIG["image_size"])
        for view, shown in enumerate((images, images.flip(3))):
            x = model.normalised(shown)
            with torch.inference_mode():
                for block in model.image_blocks[:start]:
                    x = block(x)
            stored = opened(torch.from_numpy(np.array(made[row : row + 1, view])))
            torch.testing.assert_close(stored, x, rtol=2e-3, atol=2e-3)


def test_embeddings_from_features_are_those_from_pixels(tmp_path):
    model, dataset = build().eval(), pictures_of()
    model.transform["mirror"] = True
    rows = np.arange(40)
    wanted = embed_images(model, dataset.pixels, rows)
    for start in (5, 10):
        (made,) = kept(model, tmp_path, dataset, (start,))
        assert np.abs(embed_images(model, made, rows, start) - wanted).max() < 2e-3
    model.transform["mirror"] = False
    assert np.abs(embed_images(model, dataset.pixels, rows) - wanted).max() > 1e-3


def test_two_starts_in_one_pass(tmp_path):
    model = build().eval()
    early, late = kept(model, tmp_path, starts=(4, 10))
    assert np.array_equal(early, kept(model, tmp_path, starts=(4,))[0])
    assert np.array_equal(late, kept(model, tmp_path, starts=(10,))[0])
    assert len(folders(tmp_path)) == 2  # what is there is not made again
    for start, wanted in ((4, early), (10, late)):
        assert np.array_equal(wanted, kept(model, tmp_path / "alone", starts=(start,))[0])


def test_further_views_are_crops_of_their_own(tmp_path):
    made = np.asarray(kept(build().eval(), tmp_path, views=4)[0], np.float32)
    for a in range(4):
        for b in range(a):
            assert np.abs(made[:, a] - made[:, b]).max() > 1e-2
    assert np.array_equal(made, kept(build().eval(), tmp_path / "again", views=4)[0])


def folders(place) -> set[str]:
    return {path.name for path in place.iterdir() if path.name[0] != "."}


def test_a_second_time_nothing_is_computed(tmp_path, monkeypatch):
    first = kept(build().eval(), tmp_path)
    monkeypatch.setattr(features, "write_header", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(first[0], kept(build().eval(), tmp_path)[0])
    assert len(folders(tmp_path)) == 1


def test_a_stale_cache_is_never_used(tmp_path):
    """Other weights, statistics, size, pictures, views, precision: each gets its own features."""
    model = build().eval()
    kept(model, tmp_path)
    other = pictures_of()
    other.digests[7], other.pixels[7] = "changed", 0
    weights, statistics = build().eval(), build().eval()
    with torch.no_grad():
        weights.image_tower.layer1[0].conv1.weight[0, 0, 0, 0] += 1e-3
    statistics.image_tower.bn1.running_mean += 0.1
    changes = (
        *(
            (weights, {}),
            (statistics, {}),
            (model, {"image_size": 48}),
            (model, {"dataset": other}),
        ),
        *((model, {"views": 1}), (model, {"precision": "bf16"}), (model, {"starts": (8,)})),
        *((model, {"views": 3}), (model, {"views": 3, "image_augment": "strong"})),
    )
    for count, (changed, flags) in enumerate(changes, 2):
        kept(changed, tmp_path, **flags)
        assert len(folders(tmp_path)) == count, flags
    above = build().eval()
    with torch.no_grad():
        above.image_projection.weight += 1  # a weight above the features is none of theirs
    kept(above, tmp_path)
    assert len(folders(tmp_path)) == len(changes) + 1


def test_text_features_are_the_towers_and_never_stale(tmp_path):
    model = build().eval()
    tokens = TOKENIZER([f"word{i} word{i + 1}" * (i % 3 + 1) for i in range(20)])
    own, given = CONFIG, {**CONFIG, "text_weights": "pretrained"}
    made = text_features(model, tokens, own, tmp_path, "train")
    assert not tmp_path.exists() or not folders(tmp_path)  # a tower that nobody meets again
    assert np.array_equal(made, text_features(model, tokens, given, tmp_path, "train"))
    with torch.inference_mode():
        wanted = model.text_tower(tokens)
    torch.testing.assert_close(
        torch.from_numpy(np.array(made)).float(), wanted, rtol=2e-3, atol=2e-3
    )
    assert np.array_equal(made, text_features(model, tokens, given, tmp_path, "train"))
    changed = tokens.clone()
    changed[3, 1] = 9
    text_features(model, changed, given, tmp_path, "train")
    with torch.no_grad():
        model.text_tower.words.weight[5] += 0.01
    text_features(model, tokens, given, tmp_path, "train")
    # The same weights pooled in another way, as minilm and bert do with one folder.
    text_features(model, tokens, {**given, "text_tower": "bert"}, tmp_path, "train")
    assert len(folders(tmp_path)) == 4


def test_features_too_large_for_16_bits(tmp_path):
    model = build().eval()
    with torch.no_grad():
        model.image_tower.layer4[1].bn2.weight.fill_(1e6)
    with pytest.raises(UserError, match="--views 0"):
        kept(model, tmp_path)
    assert not folders(tmp_path)


def test_frozen_blocks_run_in_eval_mode_and_the_mode_comes_back(tmp_path):
    model = build().train()
    before = model.image_tower.bn1.running_mean.clone()
    kept(model, tmp_path)
    assert torch.equal(model.image_tower.bn1.running_mean, before)
    assert model.training and model.image_tower.bn1.training and not model.always_lower


def test_a_feed_of_features_shows_every_view_in_turn():
    views = np.arange(8 * 3).reshape(8, 3, 1).astype(np.float16)
    split = Split("train", np.arange(8), [f"t{i}" for i in range(40)], np.repeat(np.arange(8), 5))
    texts = np.arange(40, dtype=np.float16)[:, None]
    flags = {"batch_size": 4, "captions_per_image": 2, "seed": 0}
    feed = Feed(views, np.arange(8), split, texts, flags)
    seen = set()
    for epoch in range(1, 30):
        for (images, captions), batch in zip(
            feed.plan(epoch), feed.epoch(epoch, False), strict=True
        ):
            assert (batch.images[:, 0] // 3).tolist() == images.tolist()
            assert batch.texts[:, 0].tolist() == captions.tolist()
            seen |= set(batch.images[:, 0].int().tolist())
    assert seen == set(range(24))
    again = [batch.images for batch in feed.epoch(3, True)]
    assert all(torch.equal(a, b.images) for a, b in zip(again, feed.epoch(3, False), strict=True))


def test_windows_of_maps():
    maps = torch.arange(2 * 3 * 17 * 17.0).view(2, 3, 17, 17)
    random, sides, places = torch.Generator().manual_seed(0), [], set()
    for _ in range(60):
        made = window(maps, 0.12, random)
        sides.append(made.shape[-1])
        top, left = divmod(int(made[0, 0, 0, 0]), 17)
        assert torch.equal(made, maps[:, :, top : top + sides[-1], left : left + sides[-1]])
        places.add((top, left, sides[-1]))
    assert set(sides) == {15, 17} and 15 < sides.count(15) < 45 and len(places) >= 8
    assert window(maps, 0.0, random) is maps
    assert window(maps[:, 0, 0], 0.5, random).shape == (2, 17)  # pooled features have no window


def test_keys_tell_shapes_and_types_apart():
    values = np.zeros(4, np.float32)
    keys = {
        *(features.key_of(values), features.key_of(values.reshape(2, 2))),
        *(features.key_of(values.astype(np.float16)), features.key_of(values, 1)),
        *(features.key_of({"a": 1}), features.key_of({"a": 2})),
    }
    assert len(keys) == 6
    assert features.key_of({"a": 1, "b": 2}) == features.key_of({"b": 2, "a": 1})
