"""Phases, schedules, learning rates and the average of the weights."""

import math
from itertools import pairwise

import pytest
import torch
from cli import UserError
from test_models import build, config, pictures, text

from flags import RECIPES, build_parser, resolve
from loss import info_nce
from optimizer import (
    SCHEDULES,
    Average,
    all_epochs,
    learning_rate,
    phase_after,
    phases_of,
    plateau_factor,
    size_in,
    unsettled,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_begin_at_the_peak_and_never_rise(schedule):
    rates = [2 * learning_rate(step, 100, 10, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert all(0 < b <= a for a, b in pairwise(rates[10:]))


def test_schedules_against_closed_forms():
    at = {name: [SCHEDULES[name](x) for x in (0, 0.25, 0.5, 0.9)] for name in SCHEDULES}
    assert at["cosine"] == pytest.approx(
        [1, (2 + math.sqrt(2)) / 4, 0.5, 0.5 - 0.5 * math.cos(0.1 * math.pi)]
    )
    assert at["linear"] == pytest.approx([1, 0.75, 0.5, 0.1])
    assert at["step"] == [1, 1, 0.1, 0.01]
    assert at["constant"] == at["plateau"] == [1] * 4


def test_small_pictures_first():
    given = config(image_size=64, start_size=48, epochs=7)
    assert [size_in(epoch, given) for epoch in range(1, 8)] == [48] * 4 + [64] * 3
    assert size_in(5, {**given, "epochs": 70}) == 64  # a run that goes further stays at its size
    assert unsettled(phases_of(given)[-1], given) == 4
    assert size_in(1, config(image_size=64, start_size=64, epochs=7)) == 64
    one = {"recipe": "best", "image_tower": "efficientnet_lite2", "train_image": "all"}
    late = config(**one, image_size=260, start_size=128, start_epochs=9)
    assert [size_in(epoch, late) for epoch in (9, 10)] == [128, 260]
    assert [unsettled(phase, late) for phase in phases_of(late)] == [9, 9]
    plain = config(recipe="best", epochs=11, head_epochs=8)
    assert [unsettled(phase, plain) for phase in phases_of(plain)] == [0, 8, 11]
    with pytest.raises(UserError, match=r"--start-size 80 goes with .* --start-size 64 leaves"):
        config(image_size=64, start_size=80)


def test_the_recipe_from_scratch():
    defaults = build_parser().defaults()
    made = resolve({"recipe": "scratch", "data": "x"}, defaults)
    assert made["image_weights"] == made["text_weights"] == "none"
    assert (made["train_image"], made["train_text"]) == ("all", "0") and made["pretrain_text"]
    assert (made["start_size"], made["image_size"], made["start_epochs"]) == (64, 96, 20)
    typed = {"recipe": "scratch", "data": "x", "image_tower": "efficientnet_lite0"}
    assert resolve(typed, defaults)["image_weights"] == "none"  # as its name says
    shapes = resolve({"recipe": "scratch", "data": "shapes"}, defaults)
    assert shapes == {**resolve({"data": "shapes"}, defaults), "recipe": "scratch"}
    for more, told in (
        ({"text_weights": "pretrained", "text_tower": "minilm"}, "--pretrain-text 0"),
        ({"poster_text": True}, "--poster-text goes with a frozen text tower"),
    ):
        with pytest.raises(UserError, match=told):
            resolve({"recipe": "scratch", "data": "x", **more}, defaults)


@pytest.mark.parametrize(
    ("scores", "factor"),
    [
        *(([], 1), ([5, 6, 7, 8], 1), ([5, 5], 1), ([5, 4, 3], 0.5), ([5, 4, 3, 2], 0.5)),
        *(([5, 4, 3, 2, 1], 0.25), ([5, 4, 3, 6, 5], 0.5), ([5, 4, 6, 5], 1)),
    ],
)
def test_plateau(scores, factor):
    assert plateau_factor(scores) == factor


def test_average_against_a_loop():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, wanted = Average(model, 0.9), model.weight.detach().clone()
    fixed = model.bias.clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
            model.bias.add_(0)
        average.update()
        kept = min(0.9, (1 + step) / (10 + step))
        wanted = kept * wanted + (1 - kept) * model.weight.detach()
    last = model.weight.detach().clone()
    average.swap()
    torch.testing.assert_close(model.weight.detach(), wanted)
    assert torch.equal(model.bias, fixed)
    average.swap()
    assert torch.equal(model.weight.detach(), last)


def test_phases():
    plain = config(epochs=7, lr=0.1, tower_lr=0.01)
    (only,) = phases_of(plain)
    assert only == (0, 1, 7, "all", "all", (0.1, 0.1, 0.1))  # from random weights all learn at --lr
    best = config(recipe="best", data="photos", head_epochs=4, epochs=6, lr=0.1, tower_lr=0.01)
    first, second, beside = phases_of(best)
    assert first == (0, 1, 4, "0", "0", (0.1, 0.1, 0.1))
    assert second == (0, 5, 6, "8", "0", (0.01, 0.01, 0.01))
    assert beside == (1, 7, 10, "0", "0", (0.1, 0.1, 0.1))
    mixed = config(
        **{"recipe": "best", "data": "photos", "image_tower": "efficientnet_lite2"},
        **{"train_image": "8", "text_tower": "lstm"},
        **{"head_epochs": 0, "lr": 0.1, "tower_lr": 0.01},
    )
    assert phases_of(mixed)[0].rates == (0.01, 0.1, 0.1)
    assert phases_of(mixed)[0].text == "all"


@pytest.mark.parametrize(("heads", "trained"), [(2, "3"), (0, "3"), (4, "0"), (9, "0")])
def test_phases_of_two_image_towers(heads: int, trained: str):
    """Every epoch has a phase, of the tower whose turn it is, with that tower's own blocks."""
    towers = {"image_tower": "efficientnet_lite2+efficientnet_lite0", "train_image": trained}
    both = config(recipe="best", data="photos", head_epochs=heads, epochs=4, **towers)
    assert all_epochs(both) == 8
    for done in range(8):
        phase = phase_after(done, both)
        assert phase.first <= done + 1 <= phase.last and phase.member == done // 4
        assert phase.image == ("0" if done % 4 < heads else trained)
        assert phase.first == 1 + 4 * (done // 4) + (heads if done % 4 >= heads else 0)


def test_what_the_recipes_promise():
    """The README and report/ablations.md describe these runs."""
    assert RECIPES["best"]["image_tower"] == "efficientnet_lite2+efficientnet_lite1"
    assert all_epochs(config(recipe="best", data="photos")) == 9 + 6
    assert all_epochs(config(recipe="best-hour", data="photos")) == 3 * 11
    with pytest.raises(UserError, match=r"8\+0 does not fit .*efficientnet_lite0"):
        config(recipe="best", data="photos", image_tower="efficientnet_lite0")


def test_a_flag_by_hand_wins_over_the_recipe():
    defaults = build_parser().defaults()
    made = resolve({"recipe": "best", "lr": 0.5, "head": "linear"}, defaults)
    assert (made["lr"], made["head"], made["text_tower"]) == (0.5, "linear", "minilm")
    assert made["recipe"] == "best" and made["image_weights"] == "imagenet"
    assert made["image_size"] == 288
    assert made["text_weights"] == "pretrained"
    alone = resolve({"image_tower": "efficientnet_lite2"}, defaults)
    assert alone["image_size"] == 260  # what the tower was trained at
    assert made["train_text"] == "0"
    plain = resolve({}, defaults)
    assert plain == resolve({"recipe": "assignment"}, defaults)
    assert plain["image_weights"] == plain["text_weights"] == "none"
    assert plain["train_image"] == plain["train_text"] == "all"
    for typed, told in (
        ({"recipe": "best", "epochs": 3, "head_epochs": 3}, "--head-epochs leaves no epoch"),
        ({"head_epochs": 3}, "--head-epochs freezes pretrained towers"),
        ({"text_tower": "lstm", "text_weights": "pretrained"}, "use minilm or bert"),
        ({"image_tower": "vit_b_16", "stem": "small"}, "--stem small goes with a resnet"),
        ({"image_tower": "resnet18+vgg"}, "--image-tower: 'vgg' is none of resnet18, "),
        ({"loss": "infonce+hinge"}, "--loss .*: 'hinge' is none of infonce, "),
        ({"text_augment": "swap=2"}, "--text-augment: 'swap=2' is none of synonym=R, "),
    ):
        with pytest.raises(UserError, match=told):
            resolve(typed, defaults)


def test_switches_of_a_recipe_can_be_turned_off():
    parser = build_parser()
    typed = parser.typed(["--recipe", "best", "--no-test-mirror", "--no-fixed-temperature"])
    made = resolve(typed, parser.defaults())
    assert made["test_mirror"] is made["fixed_temperature"] is False
    assert resolve({"recipe": "best"}, parser.defaults())["test_mirror"] is True


@pytest.mark.parametrize("recipe", ["best", "best-hour"])
def test_the_built_in_data_is_never_mirrored(recipe):
    made = resolve({"recipe": recipe, "data": "shapes"}, build_parser().defaults())
    assert made["image_augment"] == "none" and not made["test_mirror"] and not made["map_crop"]
    assert made["head"] == "mlp" and made["views"] == 1


@pytest.mark.parametrize("loss", ["infonce", "siglip", "triplet", "infonce+0.2*triplet"])
def test_logit_bias_learns_with_the_sigmoid_loss_alone(loss):
    model = build(loss=loss)
    assert model.logit_bias.requires_grad == ("siglip" in loss)
    images, texts, scale = model(pictures(4), torch.tensor([text(i) for i in range(4, 8)]))
    info_nce(images, texts, scale).backward()
    assert model.logit_bias.item() == -10


def test_a_tower_beside_that_stays_frozen_has_head_epochs_alone():
    towers = {"image_tower": "efficientnet_lite2+efficientnet_lite0", "train_image": "8+0"}
    both = config(recipe="best", data="photos", head_epochs=2, epochs=5, **towers)
    found = [(p.member, p.first, p.last, p.image) for p in phases_of(both)]
    assert found == [(0, 1, 2, "0"), (0, 3, 5, "8"), (1, 6, 7, "0")]
    assert all_epochs(both) == 7
    plain = config(recipe="best", data="photos", head_epochs=0, epochs=5, **towers)
    assert [(p.first, p.last, p.image) for p in phases_of(plain)] == [(1, 5, "8"), (6, 10, "0")]
    with pytest.raises(UserError, match="8\\+0\\+1 does not fit"):
        config(recipe="best", data="photos", **{**towers, "train_image": "8+0+1"})
