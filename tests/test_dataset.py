"""Tokens and the batches of an epoch. What lies in a folder is tested in test_sources.py."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import names, pairs

import dataset
from captions import Tokenizer
from dataset import Dataset, Feed, Split, limited, load_dataset

ROOT = Path(dataset.__file__).parent
N = 6
SOURCE = ("cloud.tsinghua.edu.cn", "--download", "--data shapes")  # how to get the data


@pytest.fixture
def load(tmp_path):
    def loader(folder: Path, splits: str = "auto") -> Dataset:
        return load_dataset(str(folder), splits, 8, tmp_path / "cache", 0)

    return loader


def table_of(rows) -> dict[str, list[str]]:
    table = defaultdict(list)
    for name, text in rows:
        table[name].append(text)
    return dict(table)


# ------------------------------------------------------------------------------- tokenizer


def test_words():
    split = Tokenizer.words
    assert split("A Dog's tail, WET.") == ["a", "dog", "'s", "tail", ",", "wet", "."]
    assert split("two-tone;café (x)") == ["two", "-", "tone", ";", "café", "(", "x", ")"]
    assert split("  ") == []


def test_vocabulary():
    captions = ["A dog runs", "a DOG sits .", "the dog runs"]
    made = Tokenizer.train(captions, 2, 10)
    assert made.vocabulary == ["<pad>", "<unk>", "<bos>", "<eos>", "a", "dog", "runs"]
    assert (made.PAD, made.UNK, made.BOS, made.EOS) == (0, 1, 2, 3)
    assert set(Tokenizer.train(captions, 1, 10).vocabulary[4:]) == set(
        ["a", "dog", "runs", "sits", ".", "the"]
    )
    assert made.unknown("The dog , runs") == ["the", ","]


def test_vocabulary_is_from_training_captions_alone(photos, load):
    data = load(photos)
    held = {data.names[i] for name in ("dev", "test") for i in data.split(name).images}
    with (photos / "captions.txt").open("a") as file:
        file.writelines(f"{name},zebra zebra\n" for name in held)
        file.writelines(f"{name},panda\n" for name in set(names(40)) - held)
    made = Tokenizer.train(load(photos).split("train").captions, 1, 30)
    assert "panda" in made.vocabulary and "zebra" not in made.vocabulary


def test_encoding_padding_and_cutting():
    made = Tokenizer([*Tokenizer.SPECIAL, "a", "dog", "runs"], 6)
    tokens = made(["A dog runs", "dog", "cat", ""])
    wanted = [[2, 4, 5, 6, 3], [2, 5, 3, 0, 0], [2, 1, 3, 0, 0], [2, 3, 0, 0, 0]]
    assert tokens.tolist() == wanted and tokens.dtype == torch.int64
    assert made.cut == 0
    assert made(["a a a a"]).tolist() == [[2, 4, 4, 4, 4, 3]] and made.cut == 0
    assert made(["a dog a dog runs", "dog " * 50]).tolist() == [
        [2, 4, 5, 4, 5, 3],
        [2, 5, 5, 5, 5, 3],
    ]
    assert made.cut == 2
    assert made(["<pad> <eos>"]).tolist() == [[2, 1, 1, 1, 1, 3]]  # no way to write a special one


# --------------------------------------------------------------------------------- batches

COUNTS = [5, 5, 3, 5, 1, 2, 5, 4, 5, 5, 5]  # captions of each image


def make_feed(batch_size=4, per_image=1, seed=0, counts=COUNTS) -> Feed:
    """Caption j is the token 4 + j, then as many 4s as its image has captions."""
    owner = np.repeat(np.arange(len(counts)), counts)
    owner = np.random.default_rng(3).permutation(owner)  # captions need not stand by image
    rows = 3 * np.arange(len(counts)) + 1
    pixels = np.zeros((3 * len(counts), 2, 2, 3), np.uint8)
    pixels[:] = np.arange(len(pixels), dtype=np.uint8)[:, None, None, None]
    split = Split("train", rows, [f"caption {j}" for j in range(len(owner))], owner)
    tokens = torch.zeros(len(owner), 9, dtype=torch.int64)
    for j, image in enumerate(owner):
        tokens[j, : counts[image] + 3] = torch.tensor([2, 4 + j, *[4] * counts[image], 3])
    flags = {"batch_size": batch_size, "captions_per_image": per_image, "seed": seed}
    return Feed(pixels, split.images, split, tokens.numpy(), flags)


def shown(feed: Feed, epoch: int, ahead: bool = False) -> list[tuple[list[int], list[list[int]]]]:
    """(images, captions of each) of every batch, read from what the model would be given."""
    found = []
    for pixels, tokens, *_ in feed.epoch(epoch, ahead):
        images = ((pixels[:, 0, 0, 0].int() - 1) // 3).tolist()
        found.append((images, (tokens[:, 1] - 4).view(len(images), -1).tolist()))
    return found


@pytest.mark.parametrize("per_image", [1, 2])
@pytest.mark.parametrize(
    ("batch_size", "count", "largest"),
    # 11 images; at a batch size of 2 the odd one joins another pair: alone it teaches nothing
    [(2, 5, 3), (3, 4, 3), (4, 3, 4), (10, 2, 6), (11, 1, 11), (100, 1, 11)],
)
def test_an_epoch_shows_every_image_once(batch_size, count, largest, per_image):
    feed = make_feed(batch_size, per_image)
    for epoch in (1, 2, 9):
        batches = shown(feed, epoch)
        assert len(batches) == feed.batches() == count
        sizes = [len(images) for images, _ in batches]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) == largest
        assert sorted(image for images, _ in batches for image in images) == list(range(11))
        for images, captions in batches:
            for image, chosen in zip(images, captions, strict=True):
                assert len(chosen) == per_image
                assert all(feed.split.caption_image[j] == image for j in chosen)
                assert len(set(chosen)) == min(per_image, COUNTS[image])


def test_batches_hold_pixels_and_tokens_as_promised():
    feed = make_feed(4, 2)
    for pixels, tokens, *_ in feed.epoch(1, False):
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (2, 2, 3)
        assert tokens.dtype == torch.int64 and len(tokens) == 2 * len(pixels)
        assert (tokens != 0).any(0).all()  # no column of padding alone
        assert ((tokens == 3).sum(1) == 1).all()  # and none cut off


def test_as_many_epochs_as_captions_show_each_once():
    feed = make_feed()
    seen = defaultdict(list)
    for epoch in range(1, 6):
        for images, captions in shown(feed, epoch):
            for image, chosen in zip(images, captions, strict=True):
                seen[image].extend(chosen)
    for image, count in enumerate(COUNTS):
        own = np.flatnonzero(feed.split.caption_image == image).tolist()
        assert sorted(seen[image][:count]) == own
        assert set(seen[image]) == set(own)
    orders = {tuple(np.argsort(seen[i])) for i, count in enumerate(COUNTS) if count == 5}
    assert len(orders) > 1  # drawn for each image


def test_two_captions_an_image_take_turns():
    feed, seen = make_feed(per_image=2, counts=[4, 5, 4]), defaultdict(list)
    for epoch in range(1, 6):
        for images, captions in shown(feed, epoch):
            for image, chosen in zip(images, captions, strict=True):
                seen[image].extend(chosen)
    for image, count in enumerate([4, 5, 4]):
        assert len(set(seen[image][:4])) == 4
        assert set(seen[image][:6]) == set(np.flatnonzero(feed.split.caption_image == image))
        assert len(seen[image]) == 10 and (count == 4 or set(Counter(seen[image]).values()) == {2})


def test_plan_is_a_function_of_seed_and_epoch():
    def flat(feed, epoch):
        return [part.tolist() for pair in feed.plan(epoch) for part in pair]

    backwards = make_feed(seed=7)
    later = [flat(backwards, epoch) for epoch in (3, 2, 1)]
    assert [flat(make_feed(seed=7), epoch) for epoch in (1, 2, 3)] == later[::-1]
    assert flat(make_feed(seed=8), 1) != later[2]
    orders = [[i for images, _ in shown(backwards, epoch) for i in images] for epoch in (1, 2, 3)]
    assert len(set(map(tuple, orders))) == 3 and orders[0] != sorted(orders[0])


def test_fetching_ahead_gives_the_same_batches():
    feed = make_feed(3, 2)
    for epoch in (1, 2):
        ahead, plain = list(feed.epoch(epoch, True)), list(feed.epoch(epoch, False))
        assert len(ahead) == len(plain) == 4
        for a, b in zip(ahead, plain, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts)
    next(feed.epoch(1, True))  # may be left half way


def test_an_error_while_fetching_ahead_is_raised():
    feed = make_feed()
    broken = feed._replace(images=feed.images[:5])
    with pytest.raises(IndexError):
        list(broken.epoch(1, True))


def test_limited(capsys):
    split = make_feed().split
    part = limited(split, 4, 0)
    assert len(part.images) == 4 and set(part.images) <= set(split.images)
    position = {row: k for k, row in enumerate(split.images.tolist())}
    for k, row in enumerate(part.images.tolist()):
        own = [part.captions[j] for j in np.flatnonzero(part.caption_image == k)]
        kept = np.flatnonzero(split.caption_image == position[row])
        assert own == [split.captions[j] for j in kept]
    assert len(part.captions) == sum(COUNTS[position[row]] for row in part.images.tolist())
    assert limited(split, 4, 0).images.tolist() == part.images.tolist()
    assert any(limited(split, 4, s).images.tolist() != part.images.tolist() for s in (1, 2, 3))
    assert limited(split, None, 0) is split and capsys.readouterr().err == ""
    assert limited(split, 12, 0) is split and "--limit 12" in capsys.readouterr().err


def test_a_real_folder_feeds(photos, load):
    data = load(photos)
    split = data.split("train")
    tokenizer = Tokenizer.train(split.captions, 1, 40)
    flags = {"batch_size": 8, "captions_per_image": 1, "seed": 0}
    feed = Feed(data.pixels, split.images, split, tokenizer(split.captions).numpy(), flags)
    table, texts = table_of(pairs(40)), 0
    for planned, batch in zip(feed.plan(1), feed.epoch(1, True), strict=True):
        for image, pixels, tokens in zip(planned[0], batch.images, batch.texts, strict=True):
            row = split.images[image]
            assert np.array_equal(pixels, data.pixels[row])
            words = [tokenizer.vocabulary[number] for number in tokens if number > 3]
            own = [Tokenizer.words(text) for text in table[data.names[row]]]
            assert words in own
            texts += 1
    assert texts == 30
