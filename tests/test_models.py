"""The towers of random weights, the temperature, what learns, devices, and checkpoints.

Pretrained towers are in test_towers.py.
"""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORDS, listed, small_model, small_options
from torch import nn

import models
from dataset import Tokenizer
from loss import info_nce
from models import (
    CLIP,
    HEADS,
    IMAGE_TOWERS,
    TEXT_TOWERS,
    Normalize,
    TextTransformer,
    hold_back,
    image_transform,
    model_from_checkpoint,
)
from support.checkpoint import FORMAT, fill_from, load_checkpoint, save_checkpoint
from support.command import UserError
from support.device import choose_device, choose_precision, native_bf16
from support.options import ALL, config_of
from towers.on_cpu import SmallMapConv, WordDropout, exchange
from towers.text import TextBag


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def text(*numbers: int, length: int = 0) -> list[int]:
    tokens = [Tokenizer.BOS, *numbers, Tokenizer.EOS]
    return tokens + [Tokenizer.PAD] * (length - len(tokens))


@pytest.fixture(scope="module", params=["transformer", "lstm", "bag"])
def model(request) -> CLIP:
    return small_model(text_tower=request.param).eval()


# --------------------------------------------------------------------------- the text towers


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


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_short_texts_are_read_apart_from_long_ones(kind):
    tower, shapes = small_model(text_tower=kind).text_tower, []
    tower.words.register_forward_hook(lambda *call: shapes.append(tuple(call[1][0].shape)))
    lengths = (11, 3, 4, 8, 5)
    tower(torch.tensor([text(*[7] * (length - 2), length=12) for length in lengths]))
    assert shapes == [(3, 5), (2, 11)]
    shapes.clear()
    tower(torch.tensor([text(7, 8, length=12)]))
    assert shapes == [(1, 12)]


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


def test_word_order_matters_but_to_a_bag(model):
    first, turned = model.encode_text(torch.tensor([text(5, 6, 7), text(7, 6, 5)]))
    assert ((first - turned).abs().max() < 1e-6) == isinstance(model.text_tower, TextBag)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_lstm_reads_each_text_in_both_directions(layers):
    """As two LSTMs do that meet one text, without padding, and the same text turned about."""
    tower = small_model(text_tower="lstm", text_layers=layers).eval().text_tower
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    features = tower(torch.tensor([text(*words, length=10) for words in texts]))
    for row, words in enumerate(texts):
        x = tower.words(torch.tensor([text(*words)]))
        states = torch.cat([tower.forwards(x)[0][0], tower.backwards(x.flip(1))[0][0].flip(0)], 1)
        torch.testing.assert_close(features[row], states.amax(0), rtol=0, atol=1e-6)


def test_a_layer_of_both_lstms_is_torchs_bidirectional_one():
    """The same weights by the same draws, so that runs of one layer are what they were."""
    tower = small_model(text_tower="lstm", text_layers=1).text_tower
    both = nn.LSTM(tower.width // 2, tower.width // 2, batch_first=True, bidirectional=True)
    for name, weight in both.named_parameters():
        side = tower.backwards if name.endswith("_reverse") else tower.forwards
        weight.data = side.get_parameter(name.removesuffix("_reverse")).data
    x = torch.randn(2, 7, tower.width // 2)
    separate = torch.cat([tower.forwards(x)[0], tower.backwards(x.flip(1))[0].flip(1)], 2)
    torch.testing.assert_close(both(x)[0], separate)


def test_transformer_feature_is_the_mean_over_the_real_tokens():
    tower = small_model().eval().text_tower
    tokens = torch.tensor([text(5, 6, 7)])
    states = tower.encoder(tower.words(tokens) + tower.positions[:5])
    padded = tower(torch.tensor([text(5, 6, 7, length=11)]))
    torch.testing.assert_close(padded[0], states[0].mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [8, 100, 193, 200, 300])
def test_any_width_of_the_transformer(width):
    tower = TextTransformer(20, 6, width, 1, 0.0).eval()
    assert tower(torch.tensor([text(5, length=6)])).shape == (1, width)


def test_heads_of_the_usual_widths_have_64_numbers():
    for width, heads in ((64, 1), (256, 4), (512, 8)):
        tower = TextTransformer(20, 6, width, 1, 0.0)
        assert tower.encoder.layers[0].self_attn.num_heads == heads


# -------------------------------------------------------------- image towers, projections


def test_embeddings_have_unit_length(model):
    tokens = torch.tensor([text(5)] * 3)
    for embeddings in (model.encode_image(pictures(3)), model.encode_text(tokens)):
        assert embeddings.shape == (3, 16) and embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    images, texts, scale = model(pictures(3), tokens)
    assert torch.equal(images, model.encode_image(pictures(3)))
    assert torch.equal(texts, model.encode_text(tokens)) and scale.shape == ()


def test_pixels_are_normalised_by_the_first_block(model):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = torchvision.transforms.Normalize(mean, std)(pictures(2))
    torch.testing.assert_close(model.image_tower[0](pictures(2)), expected)
    assert isinstance(model.image_tower[0], Normalize) and not model.image_tower[0].state_dict()


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_a_resnet_is_torchvisions_without_its_classifier(name, width):
    options = small_options(image_tower=name)
    torch.manual_seed(3)
    tower = IMAGE_TOWERS[name].build(options).eval().double()
    torch.manual_seed(3)
    net = torchvision.models.get_model(name, weights=None).eval().double()
    net.fc = nn.Identity()
    images = pictures(2).double()
    expected = net(Normalize().double()(images))
    assert tower.width == width == expected.shape[1]
    torch.testing.assert_close(tower(images), expected)
    sides, x = [], torch.rand(1, 3, 64, 64, dtype=torch.float64)
    for block in tower:
        x = block(x)
        sides.append(x.shape[-1])
    assert sides[1] == 16 and sides[-2:] == [2, width]  # a quarter, ..., a 32nd, the mean


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_product_on_a_small_map_is_the_convolution(side, stride, monkeypatch):
    """Values and all gradients, in float64; from four places a side on it is the convolution."""
    torch.manual_seed(side)
    conv = nn.Conv2d(6, 5, 3, stride, 1, bias=False).double()
    ours = exchange(nn.Sequential(conv))[0]
    assert type(ours) is SmallMapConv and ours.weight is conv.weight
    x = torch.randn(3, 6, side, side - side // 5, dtype=torch.float64, requires_grad=True)
    expected, weights = conv(x), [x, conv.weight]
    along = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, weights, along)
    if max(expected.shape[2:]) <= 3:  # then no convolution is called
        monkeypatch.setattr(nn.Conv2d, "forward", None)
    found = ours(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weights, along), gradients)


def test_the_exchanged_resnet_has_the_names_that_it_had():
    net = torchvision.models.resnet18()
    names = list(net.state_dict())
    assert list(exchange(net).state_dict()) == names
    kept = [name for name, part in net.named_modules() if type(part) is nn.Conv2d]
    assert kept == ["conv1", *(f"layer{n}.0.downsample.0" for n in (2, 3, 4))]


def test_a_convolution_of_another_kind_is_not_exchanged():
    kinds = [
        nn.Conv2d(4, 4, 3, padding=1),  # a bias
        nn.Conv2d(4, 4, 3, bias=False),  # no padding
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 5, padding=2, bias=False),
    ]
    assert [type(layer) for layer in exchange(nn.Sequential(*kinds))] == [nn.Conv2d] * 5


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_a_cpu_is_dropout(p, dtype):
    """Rate, scale, gradient, independence of neighbours; and it follows torch's generator."""
    layer = exchange(nn.Sequential(nn.Dropout(p)))[0].train()
    assert type(layer) is WordDropout
    x = torch.full((101, 103, 7), 2.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    found = layer(x)
    torch.manual_seed(4)
    assert torch.equal(found, layer(x)) and (not p or not torch.equal(found, layer(x)))
    kept = (found != 0).flatten().double()
    error = math.sqrt(p * (1 - p) / len(kept))  # of the share: a standard deviation
    assert abs(kept.mean() - (1 - p)) <= 5 * error
    scale = torch.tensor(2 / (1 - p)).to(dtype)
    torch.testing.assert_close(found.detach(), scale * kept.view(x.shape).to(dtype))
    (gradient,) = torch.autograd.grad(found.float().sum(), x)
    torch.testing.assert_close(2 * gradient, found.detach())
    for apart in (1, 2, 3, 4, 7):  # four numbers come of one draw
        both = (kept[apart:] * kept[:-apart]).mean()
        assert abs(both - (1 - p) ** 2) <= 10 * error
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("head", HEADS)
def test_projections(head):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    project = HEADS[head](24, 16, 0.5)
    features = torch.randn(10, 24, generator=generator) * 3 + 1
    assert project.train()(features).shape == (10, 16)
    assert not torch.equal(project(features), project(features))  # dropout
    project.eval()
    assert torch.equal(project(features), project(features))
    torch.testing.assert_close(project(features)[3:4], project(features[3:4]))


def test_the_assignments_projection_is_one_matrix():
    model = small_model()
    assert {name for name, _ in model.image_projection.named_parameters()} == {"weight"}
    features = torch.randn(4, 512)
    expected = features @ model.image_projection.weight.T
    torch.testing.assert_close(model.image_projection.eval()(features), expected)


# ------------------------------------------------------------------------------ temperature


def test_scale_is_the_inverse_of_the_temperature():
    model = small_model()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))  # as in the paper
    assert model.scale().item() == pytest.approx(1 / 0.07)
    assert small_model(temperature=0.5).scale().item() == pytest.approx(2)


def test_a_fixed_temperature_has_no_gradient():
    model = small_model(fixed_temperature=True)
    images, texts, scale = model(pictures(4), torch.tensor([text(i) for i in range(4, 8)]))
    info_nce(images, texts, scale).backward()
    assert model.logit_scale.grad is None and not model.logit_scale.requires_grad
    assert model.text_projection.weight.grad.abs().sum() > 0
    learned = small_model()
    info_nce(images.detach(), texts.detach(), learned.scale()).backward()
    assert learned.logit_scale.grad.abs() > 0


# ---------------------------------------------------------------------------- frozen, seeded


def test_a_frozen_tower_stays_in_eval_mode():
    model = small_model()
    hold_back(model.image_tower, 0)
    model.train()
    norms = [m for m in model.image_tower.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model.encode_image(pictures(8))
    assert all(torch.equal(n.running_mean, b) for n, b in zip(norms, before, strict=True))
    assert not any(module.training for module in (model.image_tower, *norms))
    assert model.training and model.text_tower.training
    hold_back(model.image_tower, ALL)
    model.train()
    model.encode_image(pictures(8))
    assert not any(torch.equal(n.running_mean, b) for n, b in zip(norms, before, strict=True))
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9, 10, ALL])
def test_the_last_blocks_of_a_resnet_learn(count):
    """resnet18: a stem and eight blocks have weights; pixels and pooling have none."""
    tower = small_model().image_tower
    hold_back(tower, count)
    learns = [{w.requires_grad for w in block.parameters()} for block in tower]
    learns = [states for states in learns if states]
    assert learns == [{False}] * max(0, 9 - count) + [{True}] * min(9, count)


@pytest.mark.parametrize(("tower", "blocks"), [("transformer", 3), ("lstm", 2), ("bag", 1)])
def test_the_last_blocks_of_a_text_tower_learn(tower, blocks):
    tower = small_model(text_tower=tower).text_tower
    assert len(tower.blocks()) == blocks
    in_blocks = [id(weight) for block in tower.blocks() for weight in block.parameters()]
    assert len(set(in_blocks)) == len(in_blocks)
    beside = [weight for weight in tower.parameters() if id(weight) not in set(in_blocks)]
    for count in range(blocks + 1):
        hold_back(tower, count)
        for place, block in enumerate(tower.blocks()):
            expected = place >= blocks - count
            assert {weight.requires_grad for weight in block.parameters()} == {expected}
        assert all(weight.requires_grad == (count == blocks) for weight in beside)


def test_a_wholly_frozen_model():
    model = small_model().requires_grad_(False)
    for mode in (True, False):
        model.train(mode)
        weighty = [m for m in model.modules() if m is not model and list(m.parameters())]
        assert not any(module.training for module in weighty)


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = small_model(seed=4).state_dict()
    assert torch.equal(torch.rand(3), expected)  # torch's own generator was not disturbed
    torch.manual_seed(2)
    second, other = small_model(seed=4).state_dict(), small_model(seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    random = [key for key, value in first.items() if value.ndim >= 2]
    assert len(random) > 20
    assert not any(torch.equal(first[key], other[key]) for key in random)


def test_a_model_above_other_towers_shares_the_weights():
    model = small_model(head="mlp").eval()
    model.autocast = torch.bfloat16
    above = model.above(model.image_tower[5:], nn.Identity()).eval()
    features, texts = model.image_tower[:5](pictures(2)), torch.tensor([text(5), text(6)])
    torch.testing.assert_close(above.encode_image(features), model.encode_image(pictures(2)))
    expected = model.encode_text(texts)
    torch.testing.assert_close(above.encode_text(model.text_tower(texts)), expected)
    assert above.transform == model.transform and above.autocast == model.autocast
    with torch.no_grad():
        above.image_projection.linear.weight.zero_()
    assert (model.image_projection.linear.weight == 0).all()


# ---------------------------------------------------------------------- device and precision


def test_choose_device(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # and is unset again
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cudnn.allow_tf32 = True


def test_choose_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        choose_precision("fp16", cpu)
    assert choose_precision("bf16", cpu) == "bf16" and choose_precision("fp16", cuda) == "fp16"
    for native, expected in ((True, "auto"), (False, "fp32")):  # auto: it is measured
        for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, test, lambda native=native: native, raising=False)
        assert choose_precision("auto", cpu) == expected
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda x=capability: x)
        assert choose_precision("auto", cuda) == expected
    assert choose_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(
    ("tower", "instructions"), [("transformer", []), ("lstm", ["avx512_bf16"]), ("lstm", ["amx"])]
)
def test_autocast_lowers_the_precision_in_training_only(tower, instructions, monkeypatch):
    if instructions == ["amx"] and "amx" not in native_bf16():
        pytest.skip("this CPU has no AMX")
    monkeypatch.setattr(models, "native_bf16", lambda: instructions)
    model = small_model(text_tower=tower, dropout=0.0)
    images, tokens = pictures(6), torch.tensor([text(i, i + 1, length=6) for i in range(4, 10)])

    def embed() -> list[torch.Tensor]:
        return [embeddings.detach() for embeddings in model(images, tokens)[:2]]

    model.train()
    exact = embed()
    model.autocast = torch.bfloat16
    for kind, lower, expected in zip(("resnet18", tower), embed(), exact, strict=True):
        # An LSTM on a CPU without AMX stays in float32.
        stays = kind == "lstm" and instructions != ["amx"]
        assert lower.dtype == torch.float32 and torch.equal(lower, expected) == stays
        torch.testing.assert_close(lower.norm(dim=1), torch.ones(6))
        assert (lower * expected).sum(1).min() > 0.995
    model.eval()
    in_evaluation = embed()
    model.autocast = None
    assert all(torch.equal(a, b) for a, b in zip(in_evaluation, embed(), strict=True))


# ------------------------------------------------------------------------------- checkpoints


def content(**flags: object) -> dict:
    """What a checkpoint of train.py holds of a model."""
    options, model = small_options(**flags), small_model(**flags)
    return {
        "config": config_of(options),
        "transform": model.transform,
        "vocabulary": model.tokenizer.vocabulary,
        "model": model.state_dict(),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "best.pt"
    save_checkpoint(path, content())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


def test_checkpoint_round_trip(checkpoint):
    loaded = load_checkpoint(checkpoint)
    assert loaded["config"] == config_of(small_options())
    assert loaded["versions"]["torch"] == torch.__version__
    assert torch.load(checkpoint, weights_only=True).keys() == loaded.keys()
    model = model_from_checkpoint(loaded, checkpoint)
    assert model.tokenizer.vocabulary == [*Tokenizer.SPECIAL, *WORDS]
    assert model.tokenizer.max_tokens == 40 and model.transform == loaded["transform"]
    original, tokens = small_model().eval(), torch.tensor([text(5, 6)])
    assert torch.equal(model.eval().encode_text(tokens), original.encode_text(tokens))
    assert torch.equal(model.encode_image(pictures(2)), original.encode_image(pictures(2)))


def test_a_checkpoint_from_before_crops(checkpoint):
    loaded = load_checkpoint(checkpoint)
    del loaded["config"]["test_crops"], loaded["transform"]["crops"]
    assert model_from_checkpoint(loaded, checkpoint).transform == small_model().transform


@pytest.mark.parametrize("tower", [name for name, t in TEXT_TOWERS.items() if not t.pretrained])
def test_every_text_tower_comes_back(tower, tmp_path):
    flags = {"text_tower": tower, "head": "mlp", "text_head": "identity", "max_tokens": 12}
    save_checkpoint(tmp_path / "a.pt", content(**flags))
    model = model_from_checkpoint(load_checkpoint(tmp_path / "a.pt"), tmp_path / "a.pt")
    tokens = torch.tensor([text(5, 6), text(7, 8)])
    expected = small_model(**flags).eval().encode_text(tokens)
    assert torch.equal(model.eval().encode_text(tokens), expected)


def test_how_a_picture_becomes_the_input():
    """shapes have 64 pixels; photographs are decoded an eighth larger where they are cropped."""
    photographs = {"data": "there", "image_size": 96, "test_mirror": True}
    for flags, expected in (
        ({"image_size": 32}, (32, 64, False, False)),
        ({**photographs, "image_augment": "light"}, (96, 108, True, False)),
        ({**photographs, "image_augment": "none"}, (96, 96, True, False)),
        ({**photographs, "image_augment": "mirror"}, (96, 96, True, False)),
        ({**photographs, "image_augment": "none", "test_crops": True}, (96, 108, True, True)),
    ):
        transform = image_transform(small_options(**flags))
        names = ("image_size", "stored_size", "mirror", "crops")
        assert transform == dict(zip(names, expected, strict=True))


def test_image_weights_are_not_looked_for_again(checkpoint):
    loaded = load_checkpoint(checkpoint)
    loaded["config"]["image_weights"] = "/no/longer/here.pth"
    # Pretrained batch norm is frozen, and counts no batches.
    model = {key: x for key, x in loaded["model"].items() if "num_batches" not in key}
    model_from_checkpoint({**loaded, "model": model}, checkpoint)


def test_weights_that_fit_are_those_of_another_run(checkpoint, capsys):
    """--init: towers come over, projections of another width do not."""
    other = load_checkpoint(checkpoint)
    model = small_model(embed_dim=8, seed=9)
    fresh = {key: x.clone() for key, x in model.state_dict().items()}
    fill_from(model, other, "NAME")
    for key, value in model.state_dict().items():
        expected = fresh[key] if "projection" in key else other["model"][key]
        assert torch.equal(value, expected), key
    out = capsys.readouterr().out
    assert "NAME" in out and "fresh ones in image_projection, text_projection" in out
    with pytest.raises(UserError, match="none of its weights fits"):
        fill_from(nn.Linear(3, 5), other, "NAME")


def test_copy_holds_the_same_bytes(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1}, copy=tmp_path / "best.pt")
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "best.pt").read_bytes()
    save_checkpoint(tmp_path / "last.pt", {"epoch": 2})
    epochs = [load_checkpoint(tmp_path / f"{name}.pt")["epoch"] for name in ("last", "best")]
    assert epochs == [2, 1]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file"), UserError),
        (OSError(28, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, error, raised):
    path, copy = tmp_path / "last.pt", tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1}, copy=copy)

    def half(_content: object, place: Path) -> None:
        Path(place).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(raised):
        save_checkpoint(path, {"epoch": 2}, copy=copy)
    assert listed(tmp_path) == ["best.pt", "last.pt"]
    assert load_checkpoint(path)["epoch"] == load_checkpoint(copy)["epoch"] == 1


def test_a_failing_copy_leaves_both_old_files(tmp_path, monkeypatch):
    path, copy = tmp_path / "last.pt", tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1}, copy=copy)

    def full(*_files: object) -> None:
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
    message = refusal(tmp_path / "cut.pt")
    assert "or a damaged one" in message or "cannot read the checkpoint" in message


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "other.pt"
    path.write_text("hello\nworld\n")
    assert "not a checkpoint" in refusal(path)
    for thing in (Evil(), nn.Linear(2, 2)):
        for save in (torch.save, lambda thing, place: place.write_bytes(pickle.dumps(thing))):
            save(thing, path)
            assert "not a checkpoint" in refusal(path)
    assert not Evil.ran
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))
    assert "not a checkpoint" in refusal(path)
    for thing in ({"model": {}}, {"format": torch.ones(2)}, [1, 2], torch.ones(2)):
        torch.save(thing, path)
        assert "another program" in refusal(path)


def test_another_version_of_checkpoints(tmp_path):
    path = tmp_path / "newer.pt"
    for fields, message in (({"version": 99}, "version 99"), ({}, "version None")):
        torch.save({"format": FORMAT, **fields}, path)
        assert message in refusal(path)


def test_a_folder_or_a_missing_file(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "missing.pt")


def test_a_damaged_legacy_file(tmp_path):
    """torch answers with an AssertionError or struct.error, which are no RuntimeErrors."""
    path = tmp_path / "legacy.pt"
    torch.save({"x": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for end in range(0, len(data), 5):
        path.write_bytes(data[:end])
        refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"config": {"image_tower": "resnet34"}},
        {"config": {"embed_dim": 8}},
        {"vocabulary": ["a"]},
        {"model": {}},
        {"transform": None},
    ],
)
def test_a_checkpoint_of_another_model(checkpoint, change):
    loaded = load_checkpoint(checkpoint)
    if change.get("config"):
        change = {"config": {**loaded["config"], **change["config"]}}
    if change == {"transform": None}:
        del loaded["transform"]
        change = {}
    with pytest.raises(UserError, match="holds another model") as error:
        model_from_checkpoint({**loaded, **change}, checkpoint)
    assert "\n" not in str(error.value)
