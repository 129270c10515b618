"""The figures: what is drawn, from pure functions, and that odd data cannot spoil them."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, caption, names, photo
from PIL import Image

import captions
import charts
import dataset
import evaluate
import visualize
from cli import UserError
from flags import build_parser, resolve
from metrics import retrieval_metrics, retrieval_ranks
from models import build_model, image_transform, save_checkpoint

COUNT = 24
ODD = ("costs $5 or $\\alpha_{", "a dog \U0001f415 \x07\x1b[31m 犬", "x" * 300)
RECORD = {
    **{key: 2.0 for key in ("train_loss", "dev_loss", "mean_recall", "lr", "logit_scale")},
    **{f"{way}_r{k}": 10.0 * k for way in ("i2t", "t2i") for k in (1, 5, 10)},
}
ALL = {
    *("curves.png", "similarity.png", "tsne.png"),
    *("grid_text_to_image.png", "grid_image_to_text.png", "grid_best_worst.png"),
}


@pytest.fixture(autouse=True)
def no_warnings():
    """matplotlib warns of glyphs that it cannot draw and of layouts that failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "Converting mask without|TypedStorage")  # torch 2.0
        yield


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory) -> Path:
    """COUNT photographs of several proportions, three captions of which are odd."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "images").mkdir()
    with (folder / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i, name in enumerate(names(COUNT)):
            photo(i, (48, 30) if i % 2 else (30, 48)).save(folder / "images" / name)
            writer.writerows([name, caption(i, k)] for k in range(2))
            writer.writerow([name, ODD[i % 3]])
    return folder


@pytest.fixture(scope="module")
def model_file(odd_data, tmp_path_factory) -> Path:
    """A checkpoint of random weights."""
    parser = build_parser()
    config = resolve(parser.typed(["--data", str(odd_data), *TINY]), parser.defaults())
    transform, cache = image_transform(config), tmp_path_factory.mktemp("cache")
    data = dataset.load_dataset(str(odd_data), "random", transform["stored_size"], cache, 0)
    tokenizer = captions.Tokenizer.train(data.captions, 2, 40)
    config = {k: v for k, v in config.items() if k not in ("resume", "cache", "out", "device")}
    content = {
        "epoch": 1,
        "config": {**config, "splits": "random"},
        "transform": transform,
        "vocabulary": tokenizer.vocabulary,
        "model": build_model(config, transform, tokenizer).state_dict(),
        "history": [{"epoch": 1, **RECORD}],
        "split_by_caption": True,
        "train_images": {"names": [data.names[0]], "digests": []},
    }
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, content)
    return path


@pytest.fixture
def draw(model_file, tmp_path):
    """Runs visualize.main and returns the names of the files in --out."""

    def run(*words: object) -> set[str]:
        fixed = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", "--workers", 0]
        visualize.main([str(word) for word in [model_file, "--device", "cpu", *fixed, *words]])
        files = list((tmp_path / "out").iterdir())
        for file in files:
            with Image.open(file) as image:
                assert image.format == "PNG" and min(image.size) > 200
        return {file.name for file in files}

    return run


def split_of(images: int, each: int) -> dataset.Split:
    owner = np.repeat(np.arange(images), each)
    captions = [f"caption {i}" for i in range(len(owner))]
    return dataset.Split("test", np.arange(images), captions, owner)


def embedded(images: int = 30, each: int = 2, seed: int = 0) -> evaluate.Embedded:
    generator = np.random.default_rng(seed)

    def unit(count: int) -> np.ndarray:
        made = generator.normal(size=(count, 8)).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    split = split_of(images, each)
    made = unit(images), unit(images * each)
    ranks = retrieval_ranks(*made, split.caption_image)
    return evaluate.Embedded(split, *made, *ranks, retrieval_metrics(*ranks))


# ------------------------------------------------------------------------------ whole runs


def test_every_figure_of_a_split_with_odd_captions(draw, capsys, monkeypatch):
    footers = []
    original = visualize.canvas

    def noted(path, width, height, title, footer):
        footers.append(footer)
        return original(path, width, height, title, footer)

    for module in (visualize, charts):
        monkeypatch.setattr(module, "canvas", noted)
    assert draw("--split", "train", "--queries", 3, "--top-k", 20) == ALL
    out = capsys.readouterr()
    wrote = [line for line in out.out.splitlines() if line.startswith("wrote ")]
    assert {Path(line[6:]).name for line in wrote} == ALL
    assert all("SPLIT BY CAPTION" in footer and "epoch 1" in footer for footer in footers)
    assert all("train split" in footer for footer in footers[1:])


def test_a_pool_smaller_than_top_k_is_said(draw, capsys):
    assert draw("--split", "dev", "--top-k", 20) == ALL
    assert "--top-k 20: there are" in capsys.readouterr().err


def test_trained_on_images_are_counted(draw, capsys):
    draw("--split", "train", "--query", "a red dog")
    draw("--split", "dev", "--query", "a red dog")
    draw("--split", "test", "--query", "a red dog")
    assert capsys.readouterr().err.count("were trained on") == 1


def test_queries_of_the_user(draw, capsys):
    texts = ("a red dog", "a zebra in $\\alpha_{ red \U0001f415")
    drawn = draw("--query", texts[0], "--query", texts[1])
    assert drawn == {"grid_text_to_image.png"}
    err = capsys.readouterr().err
    assert "zebra, in never stood" in err and "a red dog" not in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--query", "  "], "holds no word"),
        (["--query", ""], "holds no word"),
        (["--query", "?!"], "holds no word"),
        (["--query", "zebra quagga"], "zebra, quagga never stood in the training captions"),
        (["--images", "."], "--images needs a text"),
        (["--query", "dog", "--zero-shot", "."], "leave --query out"),
        (["--query", "dog", "--images", "/no/such/folder"], "not a folder"),
        (["--templates", "x"], "--templates goes with"),
        (["--top-k", "0"], "not a whole number in [1, 20]"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, words, told):
    with pytest.raises(UserError) as error:
        draw(*words)
    assert told in str(error.value)


def test_a_folder_of_the_users_own_pictures(draw, tmp_path, capsys):
    folder = tmp_path / "mine $x_{"
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no picture"):
        draw("--images", folder, "--query", "a dog")
    photo(1).save(folder / "sub" / "犬 $a_{ \x07.PNG")
    photo(2).convert("LA").save(folder / "grey.png")
    Image.fromarray(np.full((9, 300), 40_000, np.uint16)).save(folder / "wide.tiff")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    assert draw("--images", folder, "--query", "a dog") == {"grid_search.png"}
    out = capsys.readouterr()
    assert "1 of 4 pictures cannot be read" in out.err
    assert "--top-k 5: there are 3" in out.err  # so the one in the subfolder was found


def test_zero_shot_confusion(draw, tmp_path):
    for i, name in enumerate(["dog", "a_ball $x_{", "car"]):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(i + 1):
            photo(6 * i + k).save(tmp_path / "classes" / name / f"{k}.png")
    assert draw("--zero-shot", tmp_path / "classes") == {"confusion.png"}


def test_a_file_in_place_of_the_folder_stays_whole(draw, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        draw("--query", "a dog")
    assert (tmp_path / "out").read_text() == "mine"


def test_nothing_half_written_when_drawing_fails(tmp_path):
    with (
        pytest.raises(RuntimeError),
        charts.canvas(tmp_path / "x.png", 4, 3, "title", "footer"),
    ):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_curves(tmp_path, epochs):
    history = [{"epoch": i + 1, **RECORD} for i in range(epochs)]
    charts.draw_curves(history, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 800


def test_top_k_is_a_prefix_with_ties_by_position_and_nan_last():
    scores = np.array([0.1, np.nan, 0.5, 0.5, np.inf, 0.5 + 1e-14, -0.9])
    order = visualize.top_k(scores, 7).tolist()
    assert order == [2, 3, 5, 0, 6, 1, 4]
    assert all(visualize.top_k(scores, k).tolist() == order[:k] for k in range(8))
    ties = np.random.default_rng(0).integers(0, 5, 100) / 5
    assert visualize.top_k(ties, 15)[:5].tolist() == visualize.top_k(ties, 5).tolist()


def test_the_true_one_is_marked_inside_top_k_and_follows_outside():
    made = embedded()
    for i, own in enumerate(made.split.caption_image):
        found = visualize.find(
            made.text_embeddings[i], made.image_embeddings, 5, [own], made.t2i[i]
        )
        (place,) = [hit for hit in found if hit[3]]
        assert place[:2] == (made.t2i[i], own)
        assert len(found) == 5 + (made.t2i[i] > 5)
        assert len({hit[1] for hit in found}) == len(found)  # each picture once
    assert len(visualize.find(made.text_embeddings[0], made.image_embeddings, 5)) == 5


def test_the_best_own_caption_follows_when_none_is_found():
    made, inside, outside = embedded(), 0, 0
    for i in range(30):
        own = [2 * i, 2 * i + 1]
        found = visualize.find(made.image_embeddings[i], made.text_embeddings, 5, own, made.i2t[i])
        first = next(hit for hit in found if hit[3])
        assert first[0] == made.i2t[i]
        scores = made.text_embeddings[own].astype(float) @ made.image_embeddings[i]
        assert first[1] == own[int(scores.argmax())]
        inside, outside = inside + (len(found) == 5), outside + (len(found) == 6)
    assert inside and outside


def test_cells_name_ranks_and_frame_the_true_image():
    hits = [(1, 4, 0.5, False), (1234.0, 7, -0.25, True)]
    cells = visualize.cells_of(hits, lambda i: i, [])
    assert cells[0] == (4, "1: 0.500", None)
    assert cells[1] == (7, "1,234: -0.250 true image", visualize.GREEN)


def test_extreme_cases_against_a_loop():
    made = embedded(images=12, each=3, seed=1)
    best, worst = visualize.extreme_cases(made, 4)
    owner, margins = made.split.caption_image, {}
    for i, own in enumerate(owner):
        scores = made.image_embeddings.astype(float) @ made.text_embeddings[i]
        if made.t2i[i] == 1:
            margin = scores[own] - np.delete(scores, own).max()
            margins[own] = max(margins.get(own, (0, 0)), (margin, i))
    wanted = [i for _, i in sorted(margins.values(), reverse=True)][:4]
    assert best == wanted
    ranks = [max(made.t2i[owner == image]) for image in range(12)]
    assert [made.t2i[i] for i in worst] == sorted(ranks, reverse=True)[:4]
    assert len({int(owner[i]) for i in worst}) == 4


def test_extreme_cases_without_a_hit_or_with_one_image():
    made = embedded(images=1, each=2)
    assert visualize.extreme_cases(made, 4) == [[0], [0]]
    none = evaluate.Embedded(made.split, *[np.full((n, 8), np.nan) for n in (1, 2)],
                             np.full(1, np.inf), np.full(2, np.inf), {})  # fmt: skip
    assert visualize.extreme_cases(none, 4) == [[], [0]]


def test_modality_gap_against_numpy():
    made = embedded()
    means = [e.astype(np.float64).mean(0) for e in (made.image_embeddings, made.text_embeddings)]
    wanted = np.sqrt(((means[0] - means[1]) ** 2).sum())
    assert charts.modality_gap(made.image_embeddings, made.text_embeddings) == pytest.approx(wanted)
    assert charts.modality_gap(made.image_embeddings, made.image_embeddings) == 0


def test_topics_part_texts_by_their_words():
    texts = ["the red dog in snow, dogs"] * 5 + ["a blue boat on water"] * 5 + ["in the red ..."]
    topic, labels = charts.topics(texts, 0, most=2)
    assert set(topic[:5]) != set(topic[5:10]) and len(set(topic[:5])) == len(set(topic[5:10])) == 1
    assert topic[10] == -1
    assert not {"red", "blue", "the"} & set(" ".join(labels).replace(",", "").split())
    assert "dog" in labels[topic[0]] or "snow" in labels[topic[0]]
    empty, none = charts.topics(["the", "$ !"], 0)
    assert empty.tolist() == [-1, -1] and none == []


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_pairs_and_a_collapsed_model(tmp_path, count):
    made = embedded(count, 1)
    charts.draw_tsne(tmp_path / "tsne.png", made, 0, "")
    charts.draw_similarity(tmp_path / "similarity.png", made, 0, "")
    same = np.ones((count, 8), np.float32) / np.sqrt(8).astype(np.float32)
    made = evaluate.Embedded(made.split, same, same, made.i2t, made.t2i, {})
    charts.draw_tsne(tmp_path / "same.png", made, 0, "")
    assert len(list(tmp_path.iterdir())) == 3


def test_pairs_are_drawn_by_the_seed_and_belong_together():
    split = split_of(50, 5)
    images, captions = charts.sample_pairs(split, 20, 3)
    assert (split.caption_image[captions] == images).all() and len(set(images)) == 20
    again = charts.sample_pairs(split, 20, 3)
    assert (again[0] == images).all() and (again[1] == captions).all()
    assert (charts.sample_pairs(split, 20, 4)[0] != images).any()


def test_text_that_the_font_lacks_or_that_is_too_long():
    assert charts.wrapped("a\x00b\n\t c \udcff 犬 ✓", 5, 9) == ["ab c  □ ✓"]
    lines = charts.wrapped("word " * 100, 2, 9, lines=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert charts.wrapped("", 2, 9) == [""]
    (cut,) = charts.wrapped("x" * 500, 1, 9, lines=1)
    assert cut.startswith("xxx") and cut.endswith(" …")


def test_ablations(tmp_path, capsys):
    table = tmp_path / "ablations.csv"
    table.write_text(
        "row,group,command,mean_recall,minutes\n"
        "assignment,path,python train.py,7.6,15\n"
        "$head$ & <b>,path,x,48.7,5.5\nsiglip,losses,x,47,5\n"
    )
    visualize.main(["--ablations", str(table), "--out", str(tmp_path / "out")])
    assert "ablations.png" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "ablations.png") as image:
        assert min(image.size) > 400
    for text in (
        "",
        "row,group,minutes,mean_recall\n",
        "row,minutes\na,1\n",
        "row,group,minutes,mean_recall\na,b,x,1\n",
    ):
        table.write_text(text)
        with pytest.raises(UserError, match="it needs the columns"):
            visualize.main(["--ablations", str(table)])
