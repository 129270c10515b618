"""Towers, temperature, pretrained weights, devices and checkpoints."""

import math
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import text_towers
import torch
import torchvision
from cli import UserError
from test_cli import listed
from torch import nn

import models
import towers
from captions import Tokenizer
from flags import build_parser, resolve
from loss import info_nce
from models import (
    CLIP,
    build_model,
    choose_device,
    image_transform,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
    side_by_side,
)

TOKENIZER = Tokenizer([*Tokenizer.SPECIAL, *(f"word{i}" for i in range(30))], 12)
SMALL = {"data": "shapes", "image_size": 32, "text_width": 32, "text_layers": 2, "embed_dim": 16}


def config(**flags: object) -> dict:
    made = resolve({**SMALL, **flags}, build_parser().defaults())
    return {flag: value for flag, value in made.items() if flag not in ("cache", "out")}


def build(**flags: object) -> CLIP:
    made = config(**flags)
    return build_model(made, image_transform(made), TOKENIZER)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def text(*numbers: int, length: int = 0) -> list[int]:
    made = [Tokenizer.BOS, *numbers, Tokenizer.EOS]
    return made + [Tokenizer.PAD] * (length - len(made))


@pytest.fixture(scope="module", params=["transformer", "lstm", "bag"])
def model(request) -> CLIP:
    return build(text_tower=request.param).eval()


# ------------------------------------------------------------------------------- the towers


@pytest.mark.parametrize("inference", [False, True])  # torch has another path for each
def test_padding_never_changes_an_embedding(model, inference):
    texts = [[5], [6, 7, 8], [9, 4], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    with torch.inference_mode(inference):
        alone = torch.cat([model.encode_text(torch.tensor([text(*words)])) for words in texts])
        together = model.encode_text(torch.tensor([text(*words, length=12) for words in texts]))
        shorter = model.encode_text(torch.tensor([text(*words, length=5) for words in texts[:3]]))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(shorter, alone[:3], rtol=0, atol=1e-6)
    assert (alone @ alone.T - torch.eye(4)).abs().max() < 1 - 1e-4  # four different texts


def test_what_stands_behind_the_mask_does_not_matter(model):
    tokens = torch.tensor([text(5, 6, length=9), text(7, length=9)])
    before = model.encode_text(tokens)
    words = model.text_tower.words.weight
    kept = words.detach().clone()
    with torch.no_grad():
        words[Tokenizer.PAD] = 1000.0
    torch.testing.assert_close(model.encode_text(tokens), before, rtol=0, atol=1e-6)
    with torch.no_grad():
        words[6] = words[7]  # while a word that does stand there matters
    after = model.encode_text(tokens)
    with torch.no_grad():
        words.copy_(kept)
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)


def test_padding_gets_no_gradient(model):
    model.zero_grad()
    model.encode_text(torch.tensor([text(5, 6, length=9)]))[0, 0].backward()
    grad = model.text_tower.words.weight.grad
    assert (grad[Tokenizer.PAD] == 0).all() and (grad[5] != 0).any() and grad.isfinite().all()


def test_word_order_matters(model):
    made = model.encode_text(torch.tensor([text(5, 6, 7), text(7, 6, 5)]))
    kept = isinstance(model.text_tower, text_towers.TextBag)  # as its name says
    assert ((made[0] - made[1]).abs().max() < 1e-6) == kept


def test_a_bag_is_a_mean_that_its_weights_tilt():
    tower = build(text_tower="bag", dropout=0.9).eval().text_tower
    tokens, words = torch.tensor([text(5, 6, 6, length=8)]), tower.words.weight
    mean = words[[Tokenizer.BOS, 5, 6, 6, Tokenizer.EOS]].mean(0)
    torch.testing.assert_close(tower(tokens)[0], mean, rtol=0, atol=1e-6)
    with torch.no_grad():
        tower.scores.weight[5] = 30.0
    torch.testing.assert_close(tower(tokens)[0], words[5], rtol=0, atol=1e-5)
    with torch.no_grad():
        tower.scores.weight[5] = 0.0
    kept = [(tower.train()(tokens)[0] - mean).norm() for _ in range(20)]
    assert max(kept) > 1e-3 and all(x.isfinite() for x in kept)


def test_packed_lstm_equals_an_unpacked_one_on_each_text_alone():
    tower = build(text_tower="lstm").eval().text_tower
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    packed = tower(torch.tensor([text(*words, length=10) for words in texts]))
    for row, words in enumerate(texts):
        states, _ = tower.lstm(tower.words(torch.tensor([text(*words)])))
        torch.testing.assert_close(packed[row], states[0].amax(0), rtol=0, atol=1e-6)


def test_transformer_feature_is_the_mean_over_the_real_tokens():
    tower = build().eval().text_tower
    tokens = torch.tensor([text(5, 6, 7)])
    states = tower.blocks(tower.words(tokens) + tower.positions[:5])
    padded = tower(torch.tensor([text(5, 6, 7, length=11)]))
    torch.testing.assert_close(padded[0], states[0].mean(0), rtol=0, atol=1e-6)


def test_embeddings_have_unit_length(model):
    for made in (model.encode_image(pictures(3)), model.encode_text(torch.tensor([text(5)] * 3))):
        assert made.shape == (3, 16) and made.dtype == torch.float32
        torch.testing.assert_close(made.norm(dim=1), torch.ones(3))


def test_pixels_are_normalised_inside_the_model(model):
    images, seen = pictures(2), []
    first = model.image_blocks[0]
    hook = first.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    model.encode_image(images)
    hook.remove()
    wanted = torchvision.transforms.Normalize(**models.IMAGENET)(images)
    torch.testing.assert_close(seen[0], wanted)


@pytest.mark.parametrize("width", [8, 100, 193, 200, 300])
def test_any_width_of_the_transformer(width):
    tower = text_towers.TextTransformer(20, 6, width, 1, 0.0).eval()
    assert tower(torch.tensor([text(5, length=6)])).shape == (1, width)


def test_heads_of_the_usual_widths_have_64_numbers():
    for width, heads in ((64, 1), (256, 4), (512, 8)):
        tower = text_towers.TextTransformer(20, 6, width, 1, 0.0)
        assert tower.blocks.layers[0].self_attn.num_heads == heads


@pytest.mark.parametrize(
    ("stem", "sides"), [("imagenet", [16, 8, 4, 2]), ("small", [32, 16, 8, 4])]
)
def test_stems(stem, sides):
    tower, width, _ = towers.resnet("resnet18", config(stem=stem))
    tower.eval()
    stages, images = [], torch.rand(1, 3, 64, 64)
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        stage.register_forward_hook(lambda _module, _given, made: stages.append(made.shape[-1]))
    assert tower(images).shape == (1, width) == (1, 512)
    assert stages == sides


def test_resnet50_is_wider():
    assert towers.resnet("resnet50", config()).width == 2048


# ------------------------------------------------------------------------------ temperature


def test_scale_starts_at_the_papers_value():
    model = build()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.scale().item() == pytest.approx(1 / 0.07)
    assert build(temperature=0.5).scale().item() == pytest.approx(2)


def test_scale_is_at_most_100_and_can_fall_again():
    model = build()
    for value in (math.log(100), 5.0, 50.0, 1e30):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        assert model.scale().item() == pytest.approx(100, rel=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(9.0).clamp_(max=math.log(CLIP.MAX_SCALE))  # as train.py does
    # Each image's own text is its worst match, so that a smaller scale makes the loss smaller.
    same = torch.eye(4)
    info_nce(same, same.roll(1, 0), model.scale()).backward()
    assert model.logit_scale.grad.item() == pytest.approx(100, rel=1e-3)


def test_a_fixed_temperature_has_no_gradient():
    model = build(fixed_temperature=True)
    images, texts, scale = model(pictures(4), torch.tensor([text(i) for i in range(4, 8)]))
    info_nce(images, texts, scale).backward()
    assert model.logit_scale.grad is None and not model.logit_scale.requires_grad
    assert model.text_projection.weight.grad.abs().sum() > 0
    learned = build()
    info_nce(images.detach(), texts.detach(), learned.scale()).backward()
    assert learned.logit_scale.grad.abs() > 0


# ---------------------------------------------------------------------------- frozen, seeded


def test_a_frozen_tower_stays_in_eval_mode():
    model = build()
    model.image_tower.requires_grad_(False)
    model.train()
    norm = model.image_tower.bn1
    before = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    model.encode_image(pictures(8))
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.num_batches_tracked, before[1])
    assert not model.image_tower.training and not norm.training
    assert model.training and model.text_tower.training
    model.image_tower.requires_grad_(True)
    model.train()
    model.encode_image(pictures(8))
    assert norm.training and not torch.equal(norm.running_mean, before[0])
    assert not any(module.training for module in model.eval().modules())


def test_a_wholly_frozen_model():
    model = build().requires_grad_(False)
    for mode in (True, False):
        model.train(mode)
        assert not any(
            m.training for m in model.modules() if m is not model and list(m.parameters())
        )


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first = build(seed=4).state_dict()
    assert torch.equal(torch.rand(3), wanted)  # torch's own generator was not disturbed
    torch.manual_seed(2)
    second, other = build(seed=4).state_dict(), build(seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("text_tower.words.weight", "image_tower.conv1.weight", "image_projection.weight"):
        assert not torch.equal(first[key], other[key])


# ----------------------------------------------------------------------------- image weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def test_image_weights_from_a_file(weights):
    state = torch.load(weights, weights_only=True)
    tower = build(image_weights=str(weights)).image_tower
    for key in ("conv1.weight", "layer4.1.conv2.weight", "bn1.running_var"):
        assert torch.equal(tower.state_dict()[key], state[key])


def test_image_weights_that_do_not_fit(weights, tmp_path):
    with pytest.raises(UserError, match="not those of a resnet50"):
        build(image_weights=str(weights), image_tower="resnet50")
    with pytest.raises(UserError, match="--image-weights none"):
        build(image_weights=str(weights), stem="small")
    (tmp_path / "text").write_text("not weights at all")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(weights.read_bytes()[:100_000])
    for name in ("text", "empty", "cut", "missing", "."):
        with pytest.raises(UserError, match="cannot be read"):
            build(image_weights=str(tmp_path / name))
    for name, content in {
        "wrapped": {"state_dict": {"conv1.weight": torch.ones(2)}},
        "list": [1, 2],
        "numbers": {1: 2},
        "tensor": torch.ones(3),
    }.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="are not those of a resnet18"):
            build(image_weights=str(tmp_path / name))


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError(OSError(-2, "Name or service not known")), TimeoutError("timed out")],
)
def test_imagenet_weights_without_a_network(error, monkeypatch, tmp_path):
    def refuse(*_given, **_options):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(UserError, match="--image-weights PATH") as told:
        build(image_weights="imagenet")
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------------- device and precision


def test_choose_device(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)


@pytest.mark.parametrize("tower", ["transformer", "lstm"])
def test_autocast_lowers_the_precision_in_training_only(tower):
    model = build(text_tower=tower, dropout=0.0)
    images, tokens = pictures(6), torch.tensor([text(i, i + 1, length=6) for i in range(4, 10)])

    def embed() -> list[torch.Tensor]:
        return [made.detach() for made in model(images, tokens)[:2]]

    model.train()
    exact = embed()
    model.autocast = torch.bfloat16
    for kind, lower, wanted in zip(("resnet18", tower), embed(), exact, strict=True):
        # An LSTM on a CPU stays in float32.
        assert lower.dtype == torch.float32 and torch.equal(lower, wanted) == (kind == "lstm")
        torch.testing.assert_close(lower.norm(dim=1), torch.ones(6))
        assert (lower * wanted).sum(1).min() > 0.995
    model.eval()
    lower = embed()
    model.autocast = None
    for made, wanted in zip(lower, embed(), strict=True):
        assert torch.equal(made, wanted)


# ------------------------------------------------------------------------------- checkpoints


def content() -> dict:
    made = config()
    return {
        "config": made,
        "transform": image_transform(made),
        "vocabulary": TOKENIZER.vocabulary,
        "model": build().state_dict(),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "best.pt"
    save_checkpoint(path, content())
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as told:
        load_checkpoint(path)
    message = str(told.value)
    assert "\n" not in message and path.name in message
    return message


def test_checkpoint_round_trip(checkpoint):
    loaded = load_checkpoint(checkpoint)
    assert loaded["config"] == config() and loaded["versions"]["torch"] == torch.__version__
    assert torch.load(checkpoint, weights_only=True).keys() == loaded.keys()
    model = model_from_checkpoint(loaded, checkpoint)
    assert model.tokenizer.vocabulary == TOKENIZER.vocabulary
    assert model.tokenizer.max_tokens == 40 and model.transform == loaded["transform"]
    original, tokens = build().eval(), torch.tensor([text(5, 6)])
    assert torch.equal(model.eval().encode_text(tokens), original.encode_text(tokens))
    assert torch.equal(model.encode_image(pictures(2)), original.encode_image(pictures(2)))


def test_side_by_side_is_the_mean_of_the_cosines(tmp_path):
    flags = {"image_tower": "resnet18+resnet50", "text_tower": "bag", "train_text": "0"}
    model, tokens = build(**flags).eval(), torch.tensor([text(5, 6), text(7, 8)])
    views, alone = [pictures(3), pictures(3).flip(3)], []
    for member in model.members:
        mean = sum(member.encode_image(view) for view in views)
        alone.append(mean / mean.norm(dim=1, keepdim=True) @ member.encode_text(tokens).T)
    for trained in (1, 2):
        model.trained.fill_(trained)
        images, texts = model.encode_views(views), model.encode_text(tokens)
        assert images.shape == (3, model.embed_dim) and texts.shape == (2, 16 * trained)
        np.testing.assert_allclose(images.norm(dim=1).detach(), 1, atol=1e-6)
        wanted = sum(alone[:trained]) / trained
        np.testing.assert_allclose((images @ texts.T).detach(), wanted.detach(), atol=1e-6)
    made = config(**flags)
    told = {"config": made, "transform": image_transform(made), "vocabulary": TOKENIZER.vocabulary}
    save_checkpoint(tmp_path / "two.pt", {**told, "model": model.state_dict()})
    again = model_from_checkpoint(load_checkpoint(tmp_path / "two.pt"), tmp_path / "two.pt")
    assert torch.equal(again.eval().encode_views(views), images)
    assert torch.equal(again.encode_text(tokens), texts)


def test_three_towers_count_alike():
    parts = [torch.nn.functional.normalize(torch.randn(4, 6), dim=1) for _ in range(3)]
    twice = side_by_side([side_by_side(parts[:2]), parts[2]])  # as train.py adds one by one
    torch.testing.assert_close(twice, side_by_side(parts))
    torch.testing.assert_close(twice @ twice.T, sum(part @ part.T for part in parts) / 3)


def test_image_weights_are_not_looked_for_again(checkpoint):
    loaded = load_checkpoint(checkpoint)
    loaded["config"]["image_weights"] = "/no/longer/here.pth"
    model_from_checkpoint(loaded, checkpoint)


def test_copy_holds_the_same_bytes(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1}, copy=tmp_path / "best.pt")
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "best.pt").read_bytes()
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 1
    save_checkpoint(tmp_path / "last.pt", {"epoch": 2})
    assert [load_checkpoint(tmp_path / f"{name}.pt")["epoch"] for name in ("last", "best")] == [
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file"), UserError),
        (OSError(28, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, error, wanted):
    path, copy = tmp_path / "last.pt", tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1}, copy=copy)

    def half(_content: object, place: Path) -> None:
        Path(place).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(wanted):
        save_checkpoint(path, {"epoch": 2}, copy=copy)
    assert listed(tmp_path) == ["best.pt", "last.pt"]
    assert load_checkpoint(path)["epoch"] == load_checkpoint(copy)["epoch"] == 1


def test_a_failing_copy_leaves_both_old_files(tmp_path, monkeypatch):
    path, copy = tmp_path / "last.pt", tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1}, copy=copy)

    def full(*_given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match=r"cannot write .*best\.pt: No space left"):
        save_checkpoint(path, {"epoch": 2}, copy=copy)
    assert listed(tmp_path) == ["best.pt", "last.pt"]
    assert load_checkpoint(path)["epoch"] == load_checkpoint(copy)["epoch"] == 1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 0.99999])
def test_a_truncated_checkpoint(checkpoint, tmp_path, share):
    data = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(share * len(data))])
    told = refused(tmp_path / "cut.pt")
    assert "or a damaged one" in told or "cannot read the checkpoint" in told


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "other.pt"
    path.write_text("hello\nworld\n")
    assert "not a checkpoint" in refused(path)
    for content in (Evil(), nn.Linear(2, 2)):
        for save in (torch.save, lambda made, place: place.write_bytes(pickle.dumps(made))):
            save(content, path)
            assert "not a checkpoint" in refused(path)
    assert not Evil.ran
    np.savez(path.open("wb"), a=np.ones(3))
    assert "not a checkpoint" in refused(path)
    for content in ({"model": {}}, {"format": torch.ones(2)}, [1, 2], torch.ones(2)):
        torch.save(content, path)
        assert "another program" in refused(path)


def test_another_version_of_checkpoints(tmp_path):
    path = tmp_path / "newer.pt"
    for made, told in (({"version": 99}, "version 99"), ({}, "version None")):
        torch.save({"format": models.FORMAT, **made}, path)
        assert told in refused(path)


def test_a_folder_or_a_missing_file(tmp_path):
    assert "is a folder" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "missing.pt")


def test_a_damaged_legacy_file(tmp_path):
    """torch answers with an AssertionError or struct.error, which are no RuntimeErrors."""
    path = tmp_path / "legacy.pt"
    torch.save({"x": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for end in range(0, len(data), 5):
        path.write_bytes(data[:end])
        refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"config": {**config(), "image_tower": "resnet34"}},
        {"config": {**config(), "embed_dim": 8}},
        {"vocabulary": ["a"]},
        {"model": {}},
        {"transform": {}},
    ],
)
def test_a_checkpoint_of_another_model(checkpoint, change):
    with pytest.raises(UserError, match="holds another model") as told:
        model_from_checkpoint({**load_checkpoint(checkpoint), **change}, checkpoint)
    assert "\n" not in str(told.value)
