"""Tokens, pairs, and the batches of an epoch. What lies in a folder is in test_sources.py."""

from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import names, pairs

import dataset
from dataset import (
    PAD,
    CaptionedImages,
    Captions,
    EpochSampler,
    Pairs,
    Pixels,
    Tokenizer,
    ahead,
    load_dataset,
)
from support.command import UserError

CPU = torch.device("cpu")


@pytest.fixture
def load(tmp_path):
    def loader(folder: Path, size: int = 8) -> CaptionedImages:
        return load_dataset(folder, "auto", size, tmp_path / "cache", 0)

    return loader


def captions_by_image(data: CaptionedImages) -> dict[int, list[list[str]]]:
    """The row of each image -> its captions as words, from what the test wrote."""
    table = defaultdict(list)
    for name, text in pairs(40):
        table[data.names.index(name)].append(Tokenizer.words(text))
    return table


# ------------------------------------------------------------------------------- tokenizer


def test_words():
    split = Tokenizer.words
    assert split("A Dog's tail, WET.") == ["a", "dog", "'s", "tail", ",", "wet", "."]
    assert split("two-tone;café (x)") == ["two", "-", "tone", ";", "café", "(", "x", ")"]
    assert split("  ") == []


def test_vocabulary():
    captions = ["A dog runs", "a DOG sits .", "the dog runs"]
    tokenizer = Tokenizer.train(captions, 2, 10)
    assert tokenizer.vocabulary == ["<pad>", "<unk>", "<bos>", "<eos>", "a", "dog", "runs"]
    assert (Tokenizer.PAD, Tokenizer.UNK, Tokenizer.BOS, Tokenizer.EOS) == (PAD, 1, 2, 3)
    every_word = Tokenizer.train(captions, 1, 10).vocabulary[4:]
    assert set(every_word) == {"a", "dog", "runs", "sits", ".", "the"}
    assert tokenizer.unknown("The dog , runs") == ["the", ","]


def test_vocabulary_is_from_training_captions_alone(photos, load):
    data = load(photos)
    held_out = {data.names[row] for name in ("dev", "test") for row in data.pairs(name).rows}
    with (photos / "captions.txt").open("a") as file:
        file.writelines(f"{name},zebra zebra\n" for name in held_out)
        file.writelines(f"{name},panda\n" for name in set(names(40)) - held_out)
    for split in ("train", "dev"):
        vocabulary = load(photos).pairs(split).tokenizer.vocabulary
        assert "panda" in vocabulary and "zebra" not in vocabulary


def test_encoding_padding_and_cutting():
    tokenizer = Tokenizer([*Tokenizer.SPECIAL, "a", "dog", "runs"], 6)
    tokens = tokenizer(["A dog runs", "dog", "cat", ""])
    expected = [[2, 4, 5, 6, 3], [2, 5, 3, 0, 0], [2, 1, 3, 0, 0], [2, 3, 0, 0, 0]]
    assert tokens.tolist() == expected and tokens.dtype == torch.int64
    assert tokenizer.cut == 0
    assert tokenizer(["a a a a"]).tolist() == [[2, 4, 4, 4, 4, 3]] and tokenizer.cut == 0
    long = tokenizer(["a dog a dog runs", "dog " * 50])
    assert long.tolist() == [[2, 4, 5, 4, 5, 3], [2, 5, 5, 5, 5, 3]]
    assert tokenizer.cut == 2
    special = tokenizer(["<pad> <eos>"]).tolist()
    assert special == [[2, 1, 1, 1, 1, 3]]  # no way to write a special one


def test_tokens_count_what_is_cut_once(photos, load):
    data = load(photos)
    short = Tokenizer(data.pairs().tokenizer.vocabulary, 6)
    split = data.pairs("train", short)
    for _ in range(2):
        tokens = split.texts.tokens
    too_long = sum(len(Tokenizer.words(text)) > 4 for text in split.captions)
    assert 0 < too_long == short.cut and tokens.shape == (150, 6)


# ----------------------------------------------------------------------------- one data set


def test_pairs_of_a_torch_dataset(photos, load):
    data = load(photos)
    split, texts = data.pairs("dev"), captions_by_image(data)
    shown = list(split)  # ends by itself, as sequences do
    assert len(shown) == len(split) == 25 and len(split.rows) == 5
    for image, tokens, row in shown:
        assert image.shape == (3, 8, 8) and image.dtype == torch.float32
        pixels = torch.from_numpy(np.array(data.pixels[row])).permute(2, 0, 1) / 255
        torch.testing.assert_close(image, pixels)
        words = [split.tokenizer.vocabulary[number] for number in tokens if number > 3]
        known = [[w for w in t if w in split.tokenizer.number] for t in texts[row]]
        assert words in known
    assert len({len(tokens) for _, tokens, _ in shown}) == 1  # padded, so that they can be stacked
    with pytest.raises(IndexError):
        split[25]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_shows_every_caption_with_its_image(photo_data, load, workers):
    data = load(photo_data)
    split, texts, seen = data.pairs("train"), captions_by_image(data), Counter()
    assert not split.tokenizer.unknown(" ".join(split.captions))
    loader = torch.utils.data.DataLoader(split, batch_size=32, shuffle=True, num_workers=workers)
    batches = list(loader)
    assert [len(ids) for *_, ids in batches] == [32, 32, 32, 32, 22]
    for images, tokens, ids in batches:
        expected = torch.from_numpy(data.pixels[ids.numpy()]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(images, expected)
        for row, numbers in zip(ids.tolist(), tokens, strict=True):
            words = [split.tokenizer.vocabulary[number] for number in numbers if number > 3]
            assert words in texts[row]
            seen[row, " ".join(words)] += 1
    assert len(seen) == 150 and set(seen.values()) == {1}
    assert [row for row, _ in seen] != sorted(row for row, _ in seen)


def test_an_epochs_batches_can_be_a_loaders(photo_data, load):
    split = load(photo_data).pairs("train")
    sampler = split.sampler(options(8, 2))
    loader = torch.utils.data.DataLoader(split, batch_sampler=sampler)
    ids = [ids for *_, ids in loader]
    assert len(ids) == len(loader) == len(sampler) == 4
    assert sorted(torch.cat(ids).tolist()) == sorted(split.rows.tolist() * 2)


def test_pictures_of_another_size(photo_data, load, tmp_path):
    data = load(photo_data)
    larger = data.at_size(12, tmp_path / "cache", 0)
    assert larger.pixels.shape == (40, 12, 12, 3) and larger.fingerprint == data.fingerprint
    assert np.array_equal(larger.pixels, load(photo_data, 12).pixels)
    assert data.at_size(8, tmp_path / "cache", 0) is data


def test_captions_in_batches_of_like_length():
    captions = ["a", "a b c d e", "c b", "", "b c d", *["a b"] * 300]
    tokenizer = Tokenizer([*Tokenizer.SPECIAL, *"abcde"], 9)
    batches = list(Captions(captions, tokenizer).batches())
    assert sorted(i for chosen, _ in batches for i in chosen) == list(range(305))
    assert len(batches) > 1 and max(len(chosen) for chosen, _ in batches) <= 256
    for chosen, tokens in batches:
        assert torch.equal(tokens, tokenizer([captions[i] for i in chosen]))


# --------------------------------------------------------------------------------- batches

COUNTS = [5, 5, 3, 5, 1, 2, 5, 4, 5, 5, 5]  # captions of each image


def options(batch_size: int = 4, each: int = 1, seed: int = 0, **flags: object) -> Namespace:
    fixed = {"workers": 0, "image_size": 2, "image_augment": "none", **flags}
    return Namespace(batch_size=batch_size, captions_per_image=each, seed=seed, **fixed)


def small_pairs(counts: list[int] = COUNTS) -> Pairs:
    """Caption j is the word cj, then as many others as its image has captions.

    Captions do not stand by image. Every third picture is of the split; its pixels are its row.
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    owner = np.random.default_rng(3).permutation(owner)
    pixels = np.zeros((3 * len(counts), 2, 2, 3), np.uint8)
    pixels[:] = np.arange(len(pixels), dtype=np.uint8)[:, None, None, None]
    captions = [f"c{j} {'w ' * counts[image]}" for j, image in enumerate(owner)]
    vocabulary = [*Tokenizer.SPECIAL, *(f"c{j}" for j in range(len(owner))), "w"]
    data, rows = SimpleNamespace(pixels=pixels), 3 * np.arange(len(counts)) + 1
    return Pairs(data, "train", rows, captions, owner, Tokenizer(vocabulary, 20))


def shown(split: Pairs, epoch: int, flags: Namespace) -> list[tuple[list[int], list[list[int]]]]:
    """(images, captions of each) of every batch, read from what the model would be given."""
    found = []
    for pixels, tokens, ids, _ in split.batches(epoch, flags, CPU):
        rows = (pixels[:, 0, 0, 0] * 255).round().int()
        assert ids.tolist() == rows.repeat_interleave(len(ids) // len(rows)).tolist()
        images = ((rows - 1) // 3).tolist()
        found.append((images, (tokens[:, 1] - 4).view(len(images), -1).tolist()))
    return found


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize(
    ("batch_size", "count", "largest"),
    # 11 images; at a batch size of 2 the odd one joins another pair: alone it teaches nothing
    [(2, 5, 3), (3, 4, 3), (4, 3, 4), (10, 2, 6), (11, 1, 11), (100, 1, 11)],
)
def test_an_epoch_shows_every_image_once(batch_size, count, largest, each):
    split, flags = small_pairs(), options(batch_size, each)
    for epoch in (1, 2, 9):
        batches = shown(split, epoch, flags)
        assert len(batches) == len(split.sampler(flags)) == count
        sizes = [len(images) for images, _ in batches]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) == largest
        assert sorted(image for images, _ in batches for image in images) == list(range(11))
        for images, captions in batches:
            for image, chosen in zip(images, captions, strict=True):
                assert len(chosen) == each
                assert all(split.caption_image[j] == image for j in chosen)
                assert len(set(chosen)) == min(each, COUNTS[image])


def test_batches_hold_images_and_tokens_as_promised():
    for images, tokens, ids, _ in small_pairs().batches(1, options(4, 2, image_size=3), CPU):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 3, 3)
        assert images.min() >= 0 and images.max() <= 1
        assert tokens.dtype == torch.int64 and len(tokens) == len(ids) == 2 * len(images)
        assert (tokens != PAD).any(0).all()  # no column of padding alone
        assert ((tokens == Tokenizer.EOS).sum(1) == 1).all()  # and none cut off


def captions_seen(split: Pairs, flags: Namespace, epochs: int = 5) -> dict[int, list[int]]:
    """Image -> its captions in the order in which epochs show them."""
    seen = defaultdict(list)
    for epoch in range(1, epochs + 1):
        for images, captions in shown(split, epoch, flags):
            for image, chosen in zip(images, captions, strict=True):
                seen[image].extend(chosen)
    return seen


def test_as_many_epochs_as_captions_show_each_once():
    split = small_pairs()
    seen = captions_seen(split, options())
    for image, count in enumerate(COUNTS):
        captions = np.flatnonzero(split.caption_image == image).tolist()
        assert sorted(seen[image][:count]) == captions
        assert set(seen[image]) == set(captions)
    orders = {tuple(np.argsort(seen[i])) for i, count in enumerate(COUNTS) if count == 5}
    assert len(orders) > 1  # drawn for each image


def test_two_captions_an_image_take_turns():
    split = small_pairs([4, 5, 4])
    seen = captions_seen(split, options(each=2))
    for image, count in enumerate([4, 5, 4]):
        assert len(set(seen[image][:4])) == 4
        assert set(seen[image][:6]) == set(np.flatnonzero(split.caption_image == image))
        assert len(seen[image]) == 10 and (count == 4 or set(Counter(seen[image]).values()) == {2})


def test_batches_are_a_function_of_seed_and_epoch():
    owner = small_pairs().caption_image

    def captions_of(seed: int, *epochs: int) -> list[list[list[int]]]:
        sampler, found = EpochSampler(owner, 4, 1, seed), []
        for epoch in epochs:
            sampler.epoch = epoch
            found.append([batch.tolist() for batch in sampler])
        return found

    assert captions_of(7, 3, 2, 1)[::-1] == captions_of(7, 1, 2, 3)
    assert captions_of(8, 1) != captions_of(7, 1)
    split, flags = small_pairs(), options(seed=7)
    orders = [[i for images, _ in shown(split, e, flags) for i in images] for e in (1, 2, 3)]
    assert len(set(map(tuple, orders))) == 3 and orders[0] != sorted(orders[0])


def test_augmentation_is_drawn_anew_in_every_epoch(photo_data, load):
    split = load(photo_data).pairs("train")

    def images(epoch: int, seed: int = 0) -> torch.Tensor:
        """In the order of their rows."""
        flags = options(8, image_size=8, image_augment="strong", seed=seed)
        batches = list(split.batches(epoch, flags, CPU))
        order = torch.cat([ids for *_, ids, _ in batches]).argsort()
        return torch.cat([images for images, *_ in batches])[order]

    first = images(1)
    assert torch.equal(first, images(1)) and not torch.equal(first, images(1, seed=1))
    assert ((first - images(2)).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("each", [1, 2])
def test_fetching_ahead_gives_the_same_batches(each):
    split = small_pairs()
    for epoch in (1, 2):
        fetched = [list(split.batches(epoch, options(3, each, workers=w), CPU)) for w in (0, 1)]
        assert len(fetched[0]) == 4
        for now, earlier in zip(*fetched, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(now, earlier, strict=True))
    next(iter(split.batches(1, options(3, workers=1), CPU)))  # may be left half way


def test_ahead_keeps_the_order_and_goes_one_step_ahead():
    asked = []
    found = ahead(lambda x: asked.append(x) or 10 * x, iter(range(5)))
    assert next(found) == 0 and 2 not in asked
    assert list(found) == [10, 20, 30, 40] and asked == list(range(5))
    assert list(ahead(str, [])) == []


def test_an_error_while_fetching_ahead_is_raised():
    split = small_pairs()
    images = Pixels(split.dataset.pixels[:5], split.rows, split.caption_image)
    with pytest.raises(IndexError):
        list(replace(split, images=images).batches(1, options(workers=1), CPU))


def test_limited():
    split = small_pairs()
    part = split.limited(4, 0)
    assert len(part.rows) == 4 and set(part.rows) <= set(split.rows)
    position = {row: image for image, row in enumerate(split.rows.tolist())}
    for image, row in enumerate(part.rows.tolist()):
        kept = [part.captions[j] for j in np.flatnonzero(part.caption_image == image)]
        before = np.flatnonzero(split.caption_image == position[row])
        assert kept == [split.captions[j] for j in before]
    assert len(part) == sum(COUNTS[position[row]] for row in part.rows.tolist())
    assert sum(len(images) for images, _ in shown(part, 1, options(2))) == 4
    assert split.limited(4, 0).rows.tolist() == part.rows.tolist()
    assert any(split.limited(4, s).rows.tolist() != part.rows.tolist() for s in (1, 2, 3))
    assert split.limited(None, 0) is split.limited(12, 0) is split


def test_a_real_folder_in_batches(photo_data, load):
    data = load(photo_data)
    split, texts = data.pairs("train"), captions_by_image(data)
    flags = options(8, image_size=8, workers=1)
    batches = list(split.batches(1, flags, CPU))
    assert sorted(torch.cat([ids for *_, ids, _ in batches]).tolist()) == split.rows.tolist()
    for images, tokens, ids, _ in batches:
        for image, numbers, row in zip(images, tokens, ids.tolist(), strict=True):
            pixels = torch.from_numpy(np.array(data.pixels[row])).permute(2, 0, 1) / 255
            torch.testing.assert_close(image, pixels)
            words = [split.tokenizer.vocabulary[number] for number in numbers if number > 3]
            assert words in texts[row]


def test_url_needs_download():
    with pytest.raises(UserError, match="--url goes with --download"):
        dataset.main(["--url", "https://example.org/x.zip"])
