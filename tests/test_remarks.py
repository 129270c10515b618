"""What a run says of itself: a table in 80 columns, chance, flags without effect."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_train, small_options, start

from evaluate import metrics_table
from support import remarks
from support.idle import say_idle
from support.options import ALL

KEYS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum", "mean_recall")


def record(**changes: float) -> dict[str, float]:
    zero = dict.fromkeys((*remarks.COLUMNS, "t2i_r10"), 0.0)
    return {**zero, "epoch": 1, **changes}


def test_the_table_of_a_run_holds_in_80_columns():
    perfect = dict.fromkeys(remarks.COLUMNS, 100.0) | {"epoch": 10_000, "train_loss": 10.5}
    perfect |= {"dev_loss": 99.999, "minutes": 999.5, "i2t_medr": 500.5, "t2i_medr": 1.5}
    line = remarks.table_line(perfect)
    assert len(line) == len(remarks.table_head()) < 80
    assert len(line.split()) == len(remarks.COLUMNS) == len(remarks.table_head().split())


def test_medians_of_a_half_are_shown():
    for value in ("1.5", "2.5", "500.5"):
        line = remarks.table_line(record(i2t_medr=float(value), t2i_medr=1.0))
        assert value in line.split() and "1.0" in line.split()


@pytest.mark.parametrize("value", [100.0, 51.23, 0.0])
def test_the_columns_of_the_metrics_are_apart(value: float):
    metrics = dict.fromkeys(KEYS, value) | {f"top1_{way}": value for way in ("i2t", "t2i")}
    metrics |= {"i2t_medr": 1.5, "t2i_medr": 2.5, "i2t_meanr": 1234.5, "t2i_meanr": 1.0}
    table = metrics_table(metrics, {key: [value, value] for key in KEYS}).splitlines()
    for line, medr, meanr in zip(table[1:3], ("1.5", "2.5"), ("1234.5", "1.0"), strict=True):
        cells = line.split("  ")
        assert sum("[" in cell for cell in cells) == 3 and line.split()[-2:] == [medr, meanr]
        assert line.count("]  ") == 3 and len(line) <= 86
    assert [x.index("[") for x in table[1:3]] == [table[1].index("[")] * 2


# -------------------------------------------------------------------------------------- chance


def run_of(dev: int, train: int = 4000, **figures: float) -> SimpleNamespace:
    """A run after an epoch, as far as `at_chance` looks at it: five captions an image."""
    pairs = {
        "dev": type("Dev", (), {"rows": np.arange(dev), "__len__": lambda self: 5 * dev})(),
        "train": SimpleNamespace(
            rows=np.arange(train),
            sampler=lambda options: range(math.ceil(train / options.batch_size)),
        ),
    }
    return SimpleNamespace(pairs=pairs, history=[record(**figures)])


def test_recall_at_chance_is_said():
    options = small_options(batch_size=100)
    guessed = remarks.at_chance(run_of(1000, t2i_r10=1.1, train_loss=1.0), options)
    assert guessed.startswith(
        "recall on dev is at chance: t2i R@10 1.1%, where guessing gives 1.0%"
    )
    assert remarks.at_chance(run_of(1000, t2i_r10=2.0, train_loss=1.0), options) == ""
    assert remarks.at_chance(run_of(49, t2i_r10=0.0, train_loss=1.0), options) == ""  # cannot tell


@pytest.mark.parametrize(("each", "candidates"), [(1, 100), (5, 496)])
def test_a_loss_that_stands_at_guessing_is_said(each: int, candidates: int):
    options = small_options(batch_size=100, captions_per_image=each)
    guess = math.log(candidates)
    line = remarks.at_chance(run_of(10, train_loss=guess), options)
    assert f"the loss stands at {guess:.3f}: guessing gives ln(batch) = {guess:.3f}" in line
    assert remarks.at_chance(run_of(10, train_loss=guess - 0.05), options) == ""
    assert remarks.at_chance(run_of(10, train=300, train_loss=guess), options) == ""  # three steps
    options.loss = "siglip"  # which has another sum
    assert remarks.at_chance(run_of(10, train_loss=guess), options) == ""


def test_a_best_epoch_that_is_the_first_for_want_of_a_better():
    first = [{"epoch": n, "mean_recall": x} for n, x in enumerate((5.0, 5.0, 4.0), 1)]
    assert remarks.best_of(first) == (
        "epoch 1, the first: none after it was better, mean recall on dev 5.0%"
    )
    assert remarks.best_of(first[:1]) == "epoch 1, mean recall on dev 5.0%"
    assert remarks.best_of([*first, {"epoch": 4, "mean_recall": 6.0}]).startswith("epoch 4, mean")


def test_few_dev_images_are_said(photo_data, tmp_path, capsys):
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", "--train-image", 0)
    assert run_train(*words, "--image-augment", "none", "--epochs", 1) == 0
    assert "with fewer than 50 images recalls tell little" in capsys.readouterr().out


# ------------------------------------------------------------------------ flags without effect


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ({"text_tower": "bag", "text_layers": 3}, ["--text-layers"]),
        ({"data": "shapes", "splits": "official"}, ["--splits"]),
        (
            {"text_tower": "minilm", "text_width": 512, "min_count": 7, "dropout": 0.9},
            ["--text-width", "--min-count", "--dropout"],
        ),
        ({"map_crop": 0.5}, ["--map-crop"]),  # nothing is frozen
        ({"map_crop": 0.5, "train_image": 0, "image_augment": "none"}, ["--map-crop"]),
        ({"map_crop": 0.5, "train_image": 2, "image_augment": "none"}, []),
        ({"map_crop": 0.5, "train_image": 2, "image_augment": "light"}, ["--map-crop"]),
        ({"soft_share": 0.9}, ["--soft-share"]),
        ({"tower_lr": 1e-3}, ["--tower-lr"]),
        ({"image_weights": "imagenet", "train_image": 2, "tower_lr": 1e-3}, []),
        ({"loss": "triplet", "temperature": 0.1}, ["--temperature"]),
        ({"loss": "siglip", "label_smoothing": 0.1}, ["--label-smoothing"]),
        ({"loss": "infonce+0.2*triplet", "label_smoothing": 0.1, "temperature": 0.1}, []),
        ({"patience": 9, "epochs": 3}, ["--patience"]),
        ({"warmup": 9, "epochs": 3, "schedule": "step"}, ["--schedule"]),
        ({"captions_alone": True, "image_augment": "strong"}, ["--image-augment"]),
        ({"train_text": 0, "dropout": 0.5}, ["--dropout"]),
        ({"train_image": ALL, "lr": 1e-3, "epochs": 3, "seed": 2, "embed_dim": 8}, []),
    ],
    ids=str,
)
def test_flags_without_effect_are_said(flags: dict, idle: list[str], capsys):
    options = small_options(**{"data": "photographs", **flags})
    for recipe, typed in ((flags, {}), ({}, flags)):
        say_idle(options, recipe, typed)
        lines = capsys.readouterr().err.splitlines()
        found = [word for line in lines for word in line.partition(" (")[0].split()]
        assert [word.strip(",") for word in found if word.startswith("--")] == idle
        assert all(line.startswith("warning: no effect on this run: ") for line in lines)


def test_what_shapes_leave_out_of_a_recipe_is_said(capsys):
    recipe = {"image_augment": "strong", "test_mirror": True, "epochs": 3}
    say_idle(small_options(data="shapes"), recipe, {"data": "shapes"})
    assert "left out of the recipe: --image-augment, --test-mirror" in capsys.readouterr().err
    say_idle(small_options(data="shapes"), recipe, {"data": "shapes", **recipe})
    assert capsys.readouterr().err == ""
