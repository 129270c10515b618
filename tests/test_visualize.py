"""The figures: the pictures shown are those found, and odd data cannot spoil a drawing."""

import csv
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, caption, names, photo
from PIL import Image

import evaluate
import train
import visualize
from evaluate import retrieval_metrics, retrieval_ranks
from sources.pictures import decode
from sources.texts import clean_text
from support import cases, figures, grid, similarity, thumbnails
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import UserError
from support.origin import run_name
from support.ranking import top_k
from support.topics import Topics, topics

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
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, cache) -> Path:
    """The best.pt of a run on photographs of two proportions, every third caption an odd one."""
    data = tmp_path_factory.mktemp("odd") / "data"
    (data / "images").mkdir(parents=True)
    with (data / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i, name in enumerate(names(COUNT)):
            photo(i, (48, 30) if i % 2 else (30, 48)).save(data / "images" / name)
            writer.writerows([name, caption(i, k)] for k in range(2))
            writer.writerow([name, ODD[i % 3]])
    out = tmp_path_factory.mktemp("runs") / "odd"
    words = ["--data", data, "--out", out, "--cache", cache, "--epochs", 2, *TINY]
    assert train.main([str(word) for word in words]) == 0
    content = load_checkpoint(out / "best.pt")
    save_checkpoint(out / "best.pt", {**content, "split_by_caption": True})
    return out / "best.pt"


@pytest.fixture
def draw(model_file, tmp_path, cache):
    """Runs visualize.main and returns the names of the files in --out."""

    def run(*words: object) -> set[str]:
        fixed = [model_file, "--device", "cpu", "--cache", cache, "--workers", 0]
        visualize.main([str(word) for word in [*fixed, "--out", tmp_path / "out", *words]])
        files = list((tmp_path / "out").iterdir())
        for file in files:
            with Image.open(file) as image:
                assert image.format == "PNG" and min(image.size) > 200
        return {file.name for file in files}

    return run


def pairs_of(images: int, each: int) -> SimpleNamespace:
    """What the figures ask of dataset.Pairs."""
    image_of = np.repeat(np.arange(images), each)
    captions = [f"caption {i}" for i in range(len(image_of))]
    return SimpleNamespace(rows=np.arange(images), captions=captions, caption_image=image_of)


def embedded(images: int = 30, each: int = 2, seed: int = 0) -> evaluate.Embedded:
    generator = np.random.default_rng(seed)

    def unit(count: int) -> np.ndarray:
        vectors = generator.normal(size=(count, 8)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    pairs = pairs_of(images, each)
    image_embeddings, text_embeddings = unit(images), unit(images * each)
    i2t, t2i = retrieval_ranks(image_embeddings, text_embeddings, pairs.caption_image)
    metrics = retrieval_metrics(i2t, t2i)
    return evaluate.Embedded(pairs, image_embeddings, text_embeddings, i2t, t2i, metrics)


# ------------------------------------------------------------------------------ whole runs


def test_every_figure_of_a_split_with_odd_captions(draw, capsys, monkeypatch):
    footers, titles = [], {}
    original = visualize.canvas

    def noted(path, width, height, title, footer):
        footers.append(footer)
        titles[path.name] = title
        return original(path, width, height, title, footer)

    for module in (visualize, figures, grid, similarity):
        monkeypatch.setattr(module, "canvas", noted)
    assert draw("--split", "train", "--queries", 3, "--top-k", 20) == ALL
    wrote = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]
    assert {Path(line[6:]).name for line in wrote} == ALL
    assert all(
        "SPLIT BY CAPTION" in footer and "odd/best.pt, epoch" in footer for footer in footers
    )
    assert all("train split" in footer for footer in footers[1:])
    assert titles.keys() == ALL and titles.pop("curves.png").startswith("odd: ")
    assert all(title.startswith("odd, train split: ") for title in titles.values())


def test_figures_stand_beside_the_checkpoint(model_file, tmp_path, cache, monkeypatch):
    """Unless --out says otherwise; a search never paints over the grids of a split."""
    (tmp_path / "run").mkdir()
    checkpoint = shutil.copyfile(model_file, tmp_path / "run" / "best.pt")
    monkeypatch.chdir(tmp_path)
    fixed = [str(checkpoint), "--device", "cpu", "--cache", str(cache), "--workers", "0"]
    visualize.main(fixed)
    made = {path.name: path.read_bytes() for path in (tmp_path / "run" / "figures").iterdir()}
    assert made.keys() == ALL
    visualize.main([*fixed, "--query", "a red dog"])
    photo(1).save(tmp_path / "run" / "a.png")
    visualize.main([*fixed, "--query", "a red dog", "--images", "run"])
    after = {path.name: path.read_bytes() for path in (tmp_path / "run" / "figures").iterdir()}
    assert after.keys() == ALL | {"grid_query.png", "grid_search.png"}
    assert all(after[name] == content for name, content in made.items())
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_curves_are_those_of_the_whole_run(model_file, tmp_path):
    """best.pt ends with its best epoch; last.pt, of the same run only, knows the rest."""
    content = load_checkpoint(model_file)
    config, history = content["config"], [{"epoch": i + 1, **RECORD} for i in range(3)]
    trained = evaluate.Trained(tmp_path / "best.pt", [{**content, "history": history[:2]}], [])
    assert visualize.whole_history(trained) == history[:2]
    save_checkpoint(tmp_path / "last.pt", {**content, "history": history})
    assert visualize.whole_history(trained) == history
    other = {**content, "config": {**config, "seed": config["seed"] + 1}, "history": history}
    save_checkpoint(tmp_path / "last.pt", other)
    assert visualize.whole_history(trained) == history[:2]
    (tmp_path / "recipe.txt").touch()  # its runs have folders of their own
    save_checkpoint(tmp_path / "one" / "last.pt", other)
    save_checkpoint(tmp_path / "two" / "last.pt", {**content, "history": history})
    assert visualize.whole_history(trained) == history


def test_several_checkpoints_stand_side_by_side(model_file, tmp_path, cache, monkeypatch):
    """A model beside itself finds what it finds alone; the figures stand beside the first."""
    drawn = []
    monkeypatch.setattr(visualize, "draw_grid", lambda *words: drawn.append(words))
    (tmp_path / "twin").mkdir()
    twin = shutil.copyfile(model_file, tmp_path / "twin" / "best.pt")
    for paths in ([twin], [twin, model_file]):
        words = [*paths, "--query", "a red dog", "--cache", cache, "--workers", 0]
        visualize.main([str(word) for word in words])
    (path, _, footer, _, ((_, *cells),)), (both_path, title, both, _, ((_, *both_cells),)) = drawn
    assert title.startswith("twin and odd, test split: ")
    assert path == both_path == tmp_path / "twin" / "figures" / "grid_query.png"
    assert [cell.note for cell in cells] == [cell.note for cell in both_cells]
    assert "checkpoint twin/best.pt, epoch" in footer
    assert "checkpoint twin/best.pt and odd/best.pt, epoch" in both


def test_a_pool_smaller_than_top_k_is_said(draw, capsys):
    draw("--split", "dev", "--top-k", 20, "--query", "a red dog")
    assert "--top-k 20: there are" in capsys.readouterr().err


def test_trained_on_images_are_counted(draw, capsys):
    draw("--split", "train", "--query", "a red dog")
    draw("--split", "dev", "--query", "a red dog")
    draw("--split", "test", "--query", "a red dog")
    assert capsys.readouterr().err.count("were trained on") == 1


def test_queries_of_the_user(draw, capsys):
    assert draw("--query", "a red dog", "--query", "a zebra in $\\alpha_{ red \U0001f415") == {
        "grid_query.png"
    }
    err = capsys.readouterr().err
    assert "zebra, in never stood" in err and "a red dog" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--query", "  "], "holds no word"),
        (["--query", ""], "holds no word"),
        (["--query", "?!"], "holds no word"),
        (["--query", "zebra quagga"], "zebra, quagga never stood in the training captions"),
        (["--images", "."], "--images needs a text"),
        (["--query", "dog", "--zero-shot", "."], "leave --query out"),
        (["--query", "dog", "--images", "/no/such/folder"], "not a folder"),
        (["--templates", "x"], "--templates goes with"),
        (["--occlusion", "--html"], "--occlusion goes with the figures of a split"),
        (["--top-k", "0"], "not a whole number in [1, 20]"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, words, message):
    with pytest.raises(UserError) as error:
        draw(*words)
    assert message in str(error.value)


def test_flags_without_effect_are_said(draw, capsys):
    draw("--query", "a red dog", "--queries", 3, "--seed", 4, "--top-k", 2)
    assert "warning: no effect on this run: --queries, --seed (" in capsys.readouterr().err


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


def test_pictures_of_a_folder_keep_their_names(model_file, tmp_path):
    """Names, pictures and embeddings are in one order, without the unreadable ones."""
    for number in range(5):
        photo(7 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    trained = visualize.load_trained([model_file], "cpu")
    options = SimpleNamespace(images=tmp_path, workers=0, checkpoint=[model_file])
    pool = visualize.embed_folder(trained, options)
    assert sorted(pool.names) == ["0.png", "2.png", "3.png", "4.png"]
    for i, name in enumerate(pool.names):
        assert pool.picture(i) == Image.open(tmp_path / name).convert("RGB")
        pixels = decode(tmp_path / name, trained.members[0].transform["stored_size"])
        alone = trained.embed_pixels(lambda _size, pixels=pixels: pixels[None])[0]
        np.testing.assert_allclose(pool.embeddings[i], alone, atol=1e-5)


@pytest.mark.parametrize(("trained_so", "data_so"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_split_by_caption_is_marked(model_file, trained_so, data_so):
    """Whether the run was trained on such a split, or these figures are of one."""
    content = {**load_checkpoint(model_file), "split_by_caption": bool(trained_so)}
    trained = evaluate.Trained(model_file, [content], [])
    footer = visualize.origin(
        trained, SimpleNamespace(checkpoint=[]), SimpleNamespace(by_caption=bool(data_so))
    )
    assert footer.endswith("; SPLIT BY CAPTION: flatters") == bool(trained_so or data_so)
    assert footer.startswith("checkpoint odd/best.pt, epoch")


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
        figures.canvas(tmp_path / "x.png", 4, 3, "title", "footer"),
    ):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_curves(tmp_path, monkeypatch, epochs):
    """Each line is the column of its label."""
    drawn, savefig = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure,
        "savefig",
        lambda *args, **rest: drawn.append(args[0]) or savefig(*args, **rest),
    )
    keys = ["train_loss", "dev_loss", "mean_recall"]
    keys += [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    history = [
        {"epoch": i + 1, **{key: 10.0 * place + i % 3 for place, key in enumerate(keys)}}
        for i in range(epochs)
    ]
    figures.draw_curves(tmp_path / "curves.png", history, "", "", images=0, batch=1)
    assert Image.open(tmp_path / "curves.png").size[0] > 800
    lines = [line for axes in drawn[0].axes for line in axes.get_lines()]
    curves = [line for line in lines if line.get_label() != "best epoch"]
    labels = ["train", "dev", "mean of six", *["R@1", "R@5", "R@10"] * 2]
    assert [line.get_label() for line in curves] == labels
    for line, key in zip(curves, keys, strict=True):
        assert line.get_xdata().tolist() == list(range(1, epochs + 1))
        assert list(line.get_ydata()) == [record[key] for record in history]
    assert {min(epochs, 3)} == {x for line in lines[2:3] for x in line.get_xdata()}


def test_curves_mark_chance_and_keep_legends_off_the_lines(tmp_path, monkeypatch):
    kept = drawn_by(monkeypatch)
    history = [{"epoch": i + 1, **RECORD} for i in range(3)]
    figures.draw_curves(tmp_path / "curves.png", history, "", "run", images=200, batch=64)
    chances = []
    for axes in kept[0].axes:
        (chance,) = [line for line in axes.get_lines() if line.get_label().startswith("chance")]
        chances.append(chance.get_ydata()[0])
        assert axes.get_ylim()[1] > chances[-1]
        box, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert box.y0 >= inside.y1 - 1  # above the axes, where no line runs
        assert box.x0 > inside.x0 - 30 and box.x1 < inside.x1 + 30
    # 200 images are measured in 4 batches of 50; R@K of chance is K in 200.
    assert chances == pytest.approx([np.log(50), (0.5 + 2.5 + 5) / 3, 5, 5])
    assert kept[0].axes[2].get_ylim() == kept[0].axes[3].get_ylim()


def test_top_k_is_a_prefix_with_ties_by_position_and_nan_last():
    scores = np.array([0.1, np.nan, 0.5, 0.5, np.inf, 0.5 + 1e-14, -0.9])
    order = top_k(scores, 7).tolist()
    assert order == [2, 3, 5, 0, 6, 1, 4]
    assert all(top_k(scores, k).tolist() == order[:k] for k in range(8))
    ties = np.random.default_rng(0).integers(0, 5, 100) / 5
    assert top_k(ties, 15)[:5].tolist() == top_k(ties, 5).tolist()


def test_the_true_one_is_marked_inside_top_k_and_follows_outside():
    split = embedded()
    for i, true in enumerate(split.pairs.caption_image):
        hits = visualize.find(
            split.text_embeddings[i], split.image_embeddings, 5, [true], split.t2i[i]
        )
        (place,) = [hit for hit in hits if hit.true]
        assert (place.rank, place.position) == (split.t2i[i], true)
        assert len(hits) == 5 + (split.t2i[i] > 5)
        assert len({hit.position for hit in hits}) == len(hits)  # each picture once
    assert len(visualize.find(split.text_embeddings[0], split.image_embeddings, 5)) == 5


def test_the_best_own_caption_follows_when_none_is_found():
    split, inside, outside = embedded(), 0, 0
    for i in range(30):
        true = [2 * i, 2 * i + 1]
        hits = visualize.find(
            split.image_embeddings[i], split.text_embeddings, 5, true, split.i2t[i]
        )
        first = next(hit for hit in hits if hit.true)
        assert first.rank == split.i2t[i]
        scores = split.text_embeddings[true].astype(float) @ split.image_embeddings[i]
        assert first.position == true[int(scores.argmax())]
        inside, outside = inside + (len(hits) == 5), outside + (len(hits) == 6)
    assert inside and outside


def pool_of(split: evaluate.Embedded) -> visualize.Pictures:
    picture = lambda i: f"picture {i}"  # noqa: E731
    return visualize.Pictures(split.image_embeddings, picture, [], "the footer", "run, test split")


def test_cells_name_ranks_and_frame_the_true_image():
    pool = pool_of(embedded(3, 1))
    first = visualize.cell_of(visualize.Hit(1, 0, 0.5, False), pool)
    second = visualize.cell_of(visualize.Hit(1234.0, 2, -0.25, True), pool)
    assert first == ("picture 0", "1: 0.500", None)
    assert second == ("picture 2", "1,234: -0.250 ✓", visualize.GREEN)
    named = visualize.cell_of(visualize.Hit(1, 2, 0.5, False), pool._replace(names=["a", "b", "c"]))
    assert named.note.split("\n")[1] == "c"


def test_text_rows_show_the_true_picture_beside_those_found():
    split = embedded(images=5, each=2)
    pool, found = pool_of(split), 0
    for i, true in enumerate(split.pairs.caption_image):
        (query, (said, hue)), own, *cells = visualize.text_row(split, pool, i, 2)
        assert query[0] == f"caption {i}" and f"rank {split.t2i[i]:.0f} of 5" in said
        assert own.picture == f"picture {true}" and own.frame == visualize.GREEN
        order = np.argsort(-(split.image_embeddings @ split.text_embeddings[i]))[:2]
        assert [cell.picture for cell in cells] == [f"picture {j}" for j in order]
        right = split.t2i[i] <= 2
        assert [cell.frame is not None for cell in cells] == [j == true for j in order]
        assert hue == (visualize.GREEN if right else visualize.RED) and ("✓" in said) == right
        found += right
    assert 0 < found < 10


def test_image_rows_tell_own_captions_from_others():
    split = embedded(images=5, each=2)
    for i in range(5):
        cell, (verdict, *lines), true = visualize.image_row(split, pool_of(split), i, 5)
        assert cell.picture == f"picture {i}" and f"rank {split.i2t[i]:.0f} of 10" in verdict[0]
        own = {f"caption {2 * i}", f"caption {2 * i + 1}"}
        assert len(lines) == 5
        for text, colour in lines:
            assert ("✓" in text) == (colour == visualize.GREEN) == (text[-9:] in own)
            assert ("✗" in text) != ("✓" in text)
        scores = split.text_embeddings[2 * i : 2 * i + 2] @ split.image_embeddings[i]
        order = np.argsort(-scores)
        assert [text for text, _ in true] == [f"{scores[j]:.3f} caption {2 * i + j}" for j in order]


def test_mixed_cases_are_one_of_each_part_by_rank():
    ranks = np.random.default_rng(0).permutation(60) + 1.0
    queries = np.arange(10, 60)
    chosen = cases.mixed_cases(queries, ranks, 5, seed=1)
    parts = np.sort(ranks[queries]).reshape(5, 10)
    for query, part in zip(chosen, parts, strict=True):
        assert query >= 10 and ranks[query] in part
    assert chosen == cases.mixed_cases(queries, ranks, 5, seed=1)
    assert chosen != cases.mixed_cases(queries, ranks, 5, seed=2)
    ties = [cases.mixed_cases(np.arange(6), np.ones(6), 3, seed) for seed in range(20)]
    assert {i for few in ties for i in few} == set(range(6))  # by lot where ranks are equal


def test_grids_hold_whole_captions_under_the_heads_of_their_columns(tmp_path, monkeypatch):
    texts, original = [], figures.Figure.text

    def noted(self, x, y, text, **style):
        texts.append((x, text))
        return original(self, x, y, text, **style)

    monkeypatch.setattr(figures.Figure, "text", noted)
    caption = " ".join(f"word{i}" for i in range(90))
    row = [[(caption, "black")], grid.Cell(photo(0), "a note", figures.GREEN), None]
    columns = [grid.Column(2.0, "the head"), grid.Column(), grid.Column(1.0, "other")]
    grid.draw_grid(tmp_path / "a.png", "title", "footer", columns, [row])
    left = min(x for x, text in texts if text == "the head")
    shown = " ".join(text for x, text in texts if x == left and text.startswith("word"))
    assert shown == caption
    heads = [x for x, text in texts if text in ("the head", "other")]
    assert heads[0] < heads[1]


def test_extreme_cases_against_a_loop():
    split = embedded(images=12, each=3, seed=1)
    best, worst = visualize.extreme_cases(split, 4)
    image_of, margins = split.pairs.caption_image, {}
    for i, true in enumerate(image_of):
        scores = split.image_embeddings.astype(float) @ split.text_embeddings[i]
        if split.t2i[i] == 1:
            margin = scores[true] - np.delete(scores, true).max()
            margins[true] = max(margins.get(true, (0, 0)), (margin, i))
    assert best == [i for _, i in sorted(margins.values(), reverse=True)][:4]
    ranks = [max(split.t2i[image_of == image]) for image in range(12)]
    assert [split.t2i[i] for i in worst] == sorted(ranks, reverse=True)[:4]
    assert len({int(image_of[i]) for i in worst}) == 4


def test_extreme_cases_without_a_hit_or_with_one_image():
    split = embedded(images=1, each=2)
    assert visualize.extreme_cases(split, 4) == [[0], [0]]
    missed = split._replace(
        image_embeddings=np.full((1, 8), np.nan),
        text_embeddings=np.full((2, 8), np.nan),
        i2t=np.full(1, np.inf),
        t2i=np.full(2, np.inf),
    )
    assert visualize.extreme_cases(missed, 4) == [[], [0]]


def photos_of(split: evaluate.Embedded) -> visualize.Pictures:
    return pool_of(split)._replace(picture=photo)


def topics_of(split: evaluate.Embedded) -> Topics:
    """Three topics in turn; the last picture has none."""
    topic = np.arange(len(split.pairs.rows)) % 3
    topic[-1] = -1
    return Topics(topic, ["dog, snow", "boat, water", "man, red"])


def test_modality_gap_against_numpy(tmp_path, monkeypatch):
    titles = []
    original = visualize.canvas
    monkeypatch.setattr(
        visualize, "canvas", lambda *words: titles.append(words[3]) or original(*words)
    )
    split = embedded(10)
    visualize.draw_tsne(tmp_path / "tsne.png", split, photos_of(split), topics_of(split), 0)
    means = [e.astype(np.float64).mean(0) for e in (split.image_embeddings, split.text_embeddings)]
    gap = np.sqrt(((means[0] - means[1]) ** 2).sum())
    assert f"Modality gap {gap:.3f} " in titles[0]


def test_topics_part_texts_by_their_words():
    texts = ["the red dog in snow, dogs"] * 5 + ["a blue boat on water"] * 5 + ["in the red ..."]
    topic, labels = topics(texts, 0, most=2)
    assert set(topic[:5]) != set(topic[5:10]) and len(set(topic[:5])) == len(set(topic[5:10])) == 1
    assert topic[10] == -1
    assert not {"red", "blue", "the"} & set(" ".join(labels).replace(",", "").split())
    assert "dog" in labels[topic[0]] or "snow" in labels[topic[0]]
    empty, none = topics(["the", "$ !"], 0)
    assert empty.tolist() == [-1, -1] and none == []


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_pairs_and_a_collapsed_model(tmp_path, count):
    split = embedded(count, 1)
    pool, groups = photos_of(split), topics_of(split)
    visualize.draw_tsne(tmp_path / "tsne.png", split, pool, groups, 0)
    visualize.draw_similarity(tmp_path / "similarity.png", split, groups, 0, "", "")
    visualize.draw_extremes(tmp_path / "extremes.png", split, pool)
    same = np.ones((count, 8), np.float32) / np.sqrt(8).astype(np.float32)
    collapsed = split._replace(image_embeddings=same, text_embeddings=same)
    visualize.draw_tsne(tmp_path / "same.png", collapsed, pool, groups, 0)
    assert len(list(tmp_path.iterdir())) == 4


def drawn_by(monkeypatch) -> list:
    """The figures that are saved from now on."""
    kept, savefig = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure,
        "savefig",
        lambda *args, **rest: kept.append(args[0]) or savefig(*args, **rest),
    )
    return kept


def test_tsne_has_a_look_for_each_of_ten_topics_and_few_lines(tmp_path, monkeypatch):
    kept, split = drawn_by(monkeypatch), embedded(60, 1)
    groups = Topics(np.arange(60) % 10, [f"topic {i}, x" for i in range(10)])
    visualize.draw_tsne(tmp_path / "a.png", split, photos_of(split), groups, 0)
    (axes,) = kept[0].axes
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == [f"topic {i}, x (6)" for i in range(10)]
    lines, *points = axes.collections
    assert len(lines.get_segments()) == visualize.LINKS < 60
    images = [part for part in points[::2] if len(part.get_offsets())]  # then their captions
    colours = {tuple(part.get_edgecolor()[0]) for part in images}
    shapes = {part.get_paths()[0].vertices.tobytes() for part in images}
    assert len(images) == len(colours) == len(shapes) == 10
    boxes = [artist for artist in axes.artists if hasattr(artist, "offsetbox")]
    assert 3 <= len(boxes) <= thumbnails.MOST


def test_thumbnails_are_central_and_apart():
    points = np.concatenate([np.random.default_rng(i).normal(10 * i, 1, (40, 2)) for i in (0, 1)])
    topic = np.repeat([0, 1], 40)
    chosen = thumbnails.spread(points, topic)
    assert {0, 1} == {int(topic[i]) for i in chosen[:2]} and len(set(chosen)) == len(chosen)
    for i in chosen[:2]:
        centre = np.median(points[topic == topic[i]], axis=0)
        assert np.linalg.norm(points[i] - centre) < 1
    span = np.ptp(points, axis=0)
    for k, i in enumerate(chosen):
        assert all(np.abs((points[i] - points[j]) / span).max() > 0.1 for j in chosen[:k])
    assert thumbnails.spread(np.zeros((5, 2)), np.zeros(5, int)) == [0]  # all in one place


def test_similarity_is_sorted_by_topic_with_pairs_on_the_diagonal(tmp_path, monkeypatch):
    kept, split = drawn_by(monkeypatch), embedded(40, 2)
    groups = topics_of(split)
    similarity.draw_similarity(tmp_path / "a.png", split, groups, 3, "run, test", "")
    square, histogram = kept[0].axes[:2]
    images, captions = cases.sample_pairs(split.pairs, 48, 3)
    names = [label.get_text() for label in square.get_xticklabels()]
    assert names == [*groups.names, "no words"]
    assert [label.get_text() for label in square.get_yticklabels()] == names
    order = sorted(range(40), key=lambda i: (groups.of_image[images[i]] % 9, i))  # -1 % 9 is last
    wanted = split.image_embeddings[images[order]] @ split.text_embeddings[captions[order]].T
    np.testing.assert_allclose(square.images[0].get_array(), wanted, atol=1e-6)
    dots = square.collections[0].get_offsets()
    assert dots.tolist() == [[i, i] for i in range(40)]
    labels = histogram.get_legend_handles_labels()[1]
    rest = wanted[~np.eye(40, dtype=bool)]
    assert labels[0] == f"not a pair: mean {rest.mean():.3f}"
    assert labels[1] == f"a pair: mean {wanted.diagonal().mean():.3f}"
    for patch in histogram.patches:  # both kinds sum to 100%
        x, y = patch.get_xy().T
        assert 2 * np.abs(np.diff(y)).sum() > 0 and x.min() <= wanted.min()


def test_the_share_of_pairs_above_the_rest_against_a_loop():
    matched, unmatched = np.array([0.5, 0.1, 0.3]), np.array([0.3, 0.0, 0.2, 0.6])
    wanted = np.mean([(m > u) + 0.5 * (m == u) for m in matched for u in unmatched])
    assert similarity.share_above(matched, unmatched) == pytest.approx(100 * wanted)


def luminance(colour: str) -> float:
    """CIE L*, 0 to 100."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    y = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_runs_are_named_after_their_folder_and_that_of_their_recipe(tmp_path):
    (tmp_path / "best-0" / "heads").mkdir(parents=True)
    assert run_name(tmp_path / "best-0" / "heads") == "heads"
    (tmp_path / "best-0" / "recipe.txt").touch()
    assert run_name(tmp_path / "best-0" / "heads") == "best-0/heads"
    assert run_name(tmp_path / "best-0") == "best-0"


def test_what_is_drawn_together_is_told_apart_without_colours():
    """The first three curves by their grey; all others by line, marker and hatch."""
    greys = [luminance(colour) for colour in figures.PALETTE[:3]]
    assert min(abs(a - b) for a, b in zip(greys, [*greys[1:], greys[0]], strict=True)) > 10
    assert abs(luminance(figures.PALETTE[0]) - luminance(figures.PALETTE[5])) > 20  # of ablations
    assert len({*map(str, figures.LINES)}) == len(figures.LINES) == len(figures.PALETTE)
    assert len({*figures.MARKERS}) == len(figures.MARKERS) == len(figures.TEN)
    assert len({*figures.TEN}) == 10 and len({*figures.HATCHES}) == len(figures.HATCHES)
    cycle = figures.STYLE["axes.prop_cycle"].by_key()
    assert cycle == {"color": figures.PALETTE, "linestyle": figures.LINES}


def test_pairs_are_drawn_by_the_seed_and_belong_together():
    pairs = pairs_of(50, 5)
    images, captions = visualize.sample_pairs(pairs, 20, 3)
    assert (pairs.caption_image[captions] == images).all() and len(set(images)) == 20
    again = visualize.sample_pairs(pairs, 20, 3)
    assert (again[0] == images).all() and (again[1] == captions).all()
    assert (visualize.sample_pairs(pairs, 20, 4)[0] != images).any()


def test_text_that_the_font_lacks_or_that_is_too_long():
    assert figures.wrapped("a\x00b\n\t c \udcff 犬 ✓", 5, 9) == ["ab c  □ ✓"]
    lines = figures.wrapped("word " * 100, 2, 9, lines=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert figures.wrapped("", 2, 9) == [""]
    (cut,) = figures.wrapped("x" * 500, 1, 9, lines=1)
    assert cut.startswith("xxx") and cut.endswith(" …")


# ------------------------------------------------------------------------------ --html


def test_the_page_holds_every_query_and_asks_for_nothing(model_file, tmp_path, cache):
    fixed = ["--device", "cpu", "--cache", cache, "--workers", 0, "--out", tmp_path]
    words = [model_file, "--html", "--split", "train", "--top-k", 3, *fixed]
    visualize.main([str(word) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.html"]
    text = (tmp_path / "predictions.html").read_text("utf-8")
    assert "http:" not in text and "https:" not in text and "{{" not in text
    (found,) = re.findall(r'<script id="data"[^>]*>(.*)</script>', text)
    assert "<" not in found
    content = json.loads(found)
    trained = visualize.load_trained([model_file], "cpu")
    options = SimpleNamespace(data=None, splits=None, split="train", cache=cache, workers=0)
    dataset, pairs = evaluate.load_data_for(trained, options)
    split = evaluate.evaluate_trained(trained, dataset, "train", options)
    assert content["captions"] == pairs.captions
    assert {*map(clean_text, ODD)} <= {*content["captions"]}
    scores = split.text_embeddings.astype(float) @ split.image_embeddings.T.astype(float)
    for way, table, ranks in (("texts", scores, split.t2i), ("images", scores.T, split.i2t)):
        part = content[way]
        assert part["rank"] == ranks.tolist()
        for row, order, shown in zip(table, part["found"], part["scores"], strict=True):
            assert order == top_k(row, 3).tolist() and np.allclose(row[order], shown, atol=1e-4)
    assert content["texts"]["true"] == content["owner"] == pairs.caption_image.tolist()
    for i, own in enumerate(content["images"]["true"]):
        assert content["owner"][own] == i
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in content["pictures"])


def test_the_page_shows_a_split_alone(model_file):
    with pytest.raises(UserError, match="--html shows a split"):
        visualize.main([str(model_file), "--html", "--query", "a dog"])
