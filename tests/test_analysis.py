"""Predictions and analysis: figures recomputed by plain loops from embeddings and captions."""

import csv
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import listed, pairs, photo
from PIL import Image
from scipy import stats

import evaluate
import visualize
from dataset import load_dataset
from report import analysis, causes, groups, leak, occlusion, predictions, reasons
from support.command import UserError
from support.finder import places_that_matter, words_that_matter
from support.results import cell_of, read_csv, write_csv

# --------------------------------------------------------------------------- CSV and predictions


@pytest.mark.parametrize("text", ["=1+1", "+1", "-a", "@SUM(A1)", " =1", "\t=1", "\tx", "＝1"])
def test_no_cell_is_a_formula(text):
    assert cell_of(text) == f"'{text}"


def test_a_table_opens_in_a_spreadsheet_and_reads_back(tmp_path):
    odd = ["a, b", 'she said "no"', "两只狗 🐕", "two\nlines", "a dog's", "", "-1 dog"]
    write_csv(tmp_path / "a.csv", ["text", "number"], [(text, -0.5) for text in odd])
    data = (tmp_path / "a.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and data.count(b"\xef\xbb\xbf") == 1
    rows = read_csv(tmp_path / "a.csv")
    assert [row["text"] for row in rows] == [*odd[:-1], "'-1 dog"]
    assert {row["number"] for row in rows} == {"-0.5"}  # a number below 0 stays one
    write_csv(tmp_path / "a.csv", ["x", "y"], [(float("inf"), float("nan")), ("\udcff.jpg", 1)])
    assert read_csv(tmp_path / "a.csv") == [{"x": "", "y": ""}, {"x": "\\udcff.jpg", "y": "1"}]


def ranked(images: np.ndarray, texts: np.ndarray, captions: list[str], owner: list[int]):
    """A ranked split of made-up embeddings; picture i is named i.jpg."""
    dataset = SimpleNamespace(names=[f"{i}.jpg" for i in range(len(images))])
    rows, owner = np.arange(len(images)), np.array(owner)
    pairs = SimpleNamespace(dataset=dataset, rows=rows, captions=captions, caption_image=owner)
    return evaluate.ranked(pairs, images.astype(np.float32), texts.astype(np.float32))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scene(count: int, seed: int, noise: float = 1.0):
    """Pictures with 1 to 4 captions each, in no order."""
    generator = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), generator.integers(1, 5, count))
    generator.shuffle(owner)
    images = generator.normal(size=(count, 5))
    texts = images[owner] + noise * generator.normal(size=(len(owner), 5))
    captions = [f"caption {i} of {picture}" for i, picture in enumerate(owner)]
    return ranked(unit(images), unit(texts), captions, owner.tolist())


def check_predictions(rows: list[dict[str, str]], embedded) -> None:
    """Every cell of the file, counted one query after the other."""
    pairs, images = embedded.pairs, embedded.image_embeddings.astype(float)
    texts, owner = embedded.text_embeddings.astype(float), pairs.caption_image
    names = [pairs.dataset.names[row] for row in pairs.rows]
    assert [row["query"] for row in rows] == ["caption"] * len(texts) + ["image"] * len(images)
    for i, row in enumerate(rows):
        if i < len(texts):
            scores, true, searched = images @ texts[i], np.arange(len(images)) == owner[i], names
            assert (row["caption"], row["image"]) == (pairs.captions[i], names[owner[i]])
        else:
            scores, true = texts @ images[i - len(texts)], owner == i - len(texts)
            searched, own = pairs.captions, np.flatnonzero(true)
            assert row["image"] == names[i - len(texts)]
            assert row["caption"] == pairs.captions[own[scores[own].argmax()]]
        best = scores[true].max()
        assert float(row["score"]) == pytest.approx(best, abs=1e-5)
        assert int(row["rank"]) == 1 + sum(scores[~true] >= best - 1e-12)
        assert float(row["margin"]) == pytest.approx(best - scores[~true].max(), abs=1e-5)
        # Alike captions score alike: the true one comes last of them.
        order = sorted(range(len(scores)), key=lambda j: (-scores[j].round(9), true[j], j))[:5]
        found = [row[f"found_{place}"] for place in range(1, 6)]
        assert found == [searched[j] for j in order] + [""] * (5 - len(order))
        for place, j in enumerate(order, 1):
            assert float(row[f"score_{place}"]) == pytest.approx(scores[j], abs=1e-5)


@pytest.mark.parametrize(("count", "seed"), [(30, 0), (300, 1), (3, 2)])
def test_predictions_are_those_of_a_loop(tmp_path, count, seed):
    embedded = scene(count, seed)
    predictions.write_predictions(tmp_path / "p.csv", embedded)
    check_predictions(read_csv(tmp_path / "p.csv"), embedded)
    with (tmp_path / "p.csv").open(encoding="utf-8-sig", newline="") as file:
        assert next(csv.reader(file)) == predictions.COLUMNS
    for column in ("query", "image", "caption", "rank", "score", "margin"):
        assert f"    {column} " in predictions.__doc__


def test_a_tie_stands_before_the_true_one(tmp_path):
    """The rank says that a tie is lost, so the list must say so too."""
    embedded = ranked(np.eye(3)[[0, 0, 1]], np.eye(3)[[0, 0, 1]], ["a", "b", "c"], [0, 1, 2])
    predictions.write_predictions(tmp_path / "p.csv", embedded)
    rows = read_csv(tmp_path / "p.csv")
    assert [row["rank"] for row in rows] == ["2", "2", "1"] * 2
    assert [row["found_1"] for row in rows] == ["1.jpg", "0.jpg", "2.jpg", "b", "a", "c"]
    assert [row["margin"] for row in rows] == ["0", "0", "1"] * 2


def test_a_score_that_is_no_number_has_no_rank(tmp_path):
    images = np.eye(3)
    images[1] = np.nan
    predictions.write_predictions(
        tmp_path / "p.csv", ranked(images, np.eye(3), ["a", "=b", "c"], [0, 1, 2])
    )
    rows = read_csv(tmp_path / "p.csv")
    assert [row["rank"] for row in rows if row["image"] == "1.jpg"] == ["", ""]
    assert [row["score"] for row in rows if row["image"] == "1.jpg"] == ["", ""]
    assert rows[1]["caption"] == "'=b" and rows[0]["found_1"] == "0.jpg"


# --------------------------------------------------------------------------------- groups


def speaking(captions: list[str], owner: list[int], seed: int = 0, noise: float = 1.0):
    """A ranked split of given captions over pictures of noise; 20 captions to train on."""
    generator, count = np.random.default_rng(seed), max(owner) + 1
    images = generator.normal(size=(count, 6))
    texts = images[owner] + noise * generator.normal(size=(len(owner), 6))
    embedded = ranked(unit(images), unit(texts), captions, owner)
    data = embedded.pairs.dataset
    data.picture = lambda row: photo(row)
    data.labels, data.captions = np.array(["train"] * 20), ["a red dog runs on grass"] * 20
    data.caption_image = np.arange(20) + count
    return embedded


@pytest.mark.parametrize(
    ("caption", "people"),
    [
        ("A man and two dogs .", 1),
        ("Two young girls play with a boy .", 3),
        ("children playing", 4),
        ("A man , a woman and a man's hat", 3),
        ("Dogs .", 0),
        ("=1+1", 0),
        ("", 0),
        ("两只狗 🐕", 0),
    ],
)
def test_people_are_counted_by_the_stated_rule(caption, people):
    assert groups.count_people(caption) == people


def test_word_lists_match_whole_words_and_phrases():
    captions = ["A dog in front of cars.", "hotdogs, in the front", "DOG!", "in front  of", "(a|b)"]
    assert groups.speak_of(captions, ["dog", "in front of"]).tolist() == [1, 0, 1, 1, 0]
    found = groups.labels(captions)
    for theme, lists in groups.WORDS["themes"].items():
        for name, words in lists.items():
            assert words == [word.lower() for word in words] and len(set(words)) == len(words)
            expected = [
                any(f" {w} " in f" {' '.join(groups.words_of(c))} " for w in words)
                for c in captions
            ]
            assert found[theme, name].tolist() == expected
        every = [held for (kind, _), held in found.items() if kind == theme]
        assert np.any(every, axis=0).all()  # "none of these" has the rest


def test_picture_measures_are_those_of_loops():
    """Hasler and Suesstrunk's formula and the gradient, a pixel at a time."""
    picture = photo(3, (9, 7))
    pixels = np.asarray(picture).astype(float)
    light, rg, yb = [], [], []
    for red, green, blue in pixels.reshape(-1, 3):
        light.append(0.299 * red + 0.587 * green + 0.114 * blue)
        rg.append(red - green)
        yb.append(0.5 * (red + green) - blue)
    mean = sum(light) / len(light)
    spread = math.sqrt(statistics.pvariance(rg) + statistics.pvariance(yb))
    centre = math.sqrt(statistics.fmean(rg) ** 2 + statistics.fmean(yb) ** 2)
    found = groups.picture_measures(picture)
    assert found["brightness"] == pytest.approx(mean)
    assert found["contrast"] == pytest.approx(statistics.pstdev(light))
    assert found["colourfulness"] == pytest.approx(spread + 0.3 * centre)
    grid, total = np.array(light).reshape(7, 9), 0.0
    for y in range(7):
        for x in range(9):
            up, down, left, right = max(y - 1, 0), min(y + 1, 6), max(x - 1, 0), min(x + 1, 8)
            dy = (grid[down, x] - grid[up, x]) / (down - up)
            total += math.hypot(dy, (grid[y, right] - grid[y, left]) / (right - left))
    assert found["edges"] == pytest.approx(total / 63)
    grey = groups.picture_measures(Image.new("L", (1, 1), 7))
    assert grey == {"brightness": pytest.approx(7), "contrast": 0, "colourfulness": 0, "edges": 0}


def test_near_training_captions_are_those_of_other_pictures():
    embedded = speaking(["A red dog runs on grass .", "the sea", "", "of the"], [0, 1, 2, 3])
    assert groups.near_training(embedded.pairs).tolist() == [20, 0, 0, 0]
    embedded.pairs.dataset.caption_image[:5] = 0  # of the query's own picture
    assert groups.near_training(embedded.pairs).tolist() == [15, 0, 0, 0]
    embedded.pairs.dataset.labels[:] = "dev"
    assert groups.near_training(embedded.pairs).tolist() == [0] * 4


def test_parts_hold_their_values():
    values = np.array([5, 1, 1, 1, 2, 3, 4, 8, np.nan])
    found = groups.parts("x", values)
    assert [part.name for part in found] == [
        "1 of 4 (lowest)",
        "2 of 4",
        "3 of 4",
        "4 of 4 (highest)",
    ]
    assert sum(part.member for part in found).tolist() == [1] * 8 + [0]
    for part in found:
        low, high = map(float, part.span.split(" to "))
        assert part.member.tolist() == [low <= value <= high for value in values]
    assert groups.parts("x", np.ones(9)) == []


WORDS = ["dog", "man", "red", "snow", "runs", "two", "water", "ball"]


@pytest.fixture(scope="module")
def talk():
    """80 pictures with 1 to 5 captions, the captions in no order."""
    generator = np.random.default_rng(4)
    owner = np.repeat(np.arange(80), generator.integers(1, 6, 80))
    generator.shuffle(owner)
    captions = [" ".join(generator.permutation(WORDS)[:3]) for _ in owner]
    return speaking(captions, owner.tolist(), 4)


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_groups_are_those_of_a_loop(talk, way):
    owner, captions = talk.pairs.caption_image, talk.pairs.captions
    answered = predictions.answers(talk, way)
    members = groups.groups_of(way, groups.features(talk), owner)
    rows = analysis.measure_groups(answered, members)
    ranks = talk.t2i if way == "t2i" else talk.i2t
    for word, kind, name in (("red", "colour", "red"), ("dog", "what it speaks of", "dogs")):
        row = next(r for r in rows if (r[1], r[2]) == (kind, name))
        row = dict(zip(analysis.GROUP_COLUMNS, row, strict=True))
        if way == "t2i":
            chosen = [i for i, caption in enumerate(captions) if word in caption.split()]
        else:
            said = [
                [word in captions[j].split() for j in np.flatnonzero(owner == i)] for i in range(80)
            ]
            chosen = [i for i, each in enumerate(said) if 2 * sum(each) >= len(each)]
        assert row["queries"] == len(chosen)
        assert row["images"] == len({answered.image[i] for i in chosen})
        every = {}
        for k in (1, 5, 10):
            share = 100 * sum(ranks[i] <= k for i in chosen) / len(chosen)
            assert row[f"r{k}"] == pytest.approx(share)
            every[k] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
        assert row["against_all"] == pytest.approx(row["r10"] - every[10])
        assert row["medr"] == statistics.median(ranks[i] for i in chosen)
        generator, drawn = np.random.default_rng(7), []
        for _ in range(1000):  # the same interval by another lot
            images = generator.integers(80, size=80)
            mine = [i for image in images for i in chosen if answered.image[i] == image]
            drawn.append(100 * sum(ranks[i] <= 10 for i in mine) / len(mine))
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert abs(row["r10_low"] - low) < 3 and abs(row["r10_high"] - high) < 3


def test_tiny_groups_are_said(talk):
    answered = predictions.answers(talk, "t2i")
    few = answered.image < 29
    group = [
        groups.Group("x", "few", "", few),
        groups.Group("x", "enough", "", answered.image < 60),
    ]
    rows = analysis.measure_groups(
        answered, [*group, groups.Group("x", "one", "", answered.image == 3)]
    )
    assert [row[-1] == "too few" for row in rows] == [False, True, False, True]
    assert rows[0][-1] == "" and rows[1][5] == 29
    table = analysis.group_table(rows)
    lines = [line for line in table.splitlines() if line.startswith(("  few", "  one"))]
    assert len(lines) == 2 and all(line.endswith("?") for line in lines)


def test_a_group_that_is_found_less_is_worse():
    owner = np.arange(100)
    images = unit(np.random.default_rng(0).normal(size=(100, 40)))
    texts = np.where((owner < 50)[:, None], images, -images)
    answered = predictions.answers(ranked(images, texts, ["x"] * 100, owner.tolist()), "t2i")
    halves = [groups.Group("x", "good", "", owner < 50), groups.Group("x", "bad", "", owner >= 50)]
    rows = analysis.measure_groups(answered, halves)
    assert [row[-1] for row in rows] == ["", "better", "worse"]
    assert [row[10] for row in rows] == [50, 100, 0]


# --------------------------------------------------------------------------------- causes


def test_least_squares_finds_what_was_put_in():
    """Coefficients by numpy's lstsq; clustered errors by their formula, a cluster at a time."""
    generator = np.random.default_rng(0)
    design = np.column_stack([generator.integers(0, 2, (300, 3)), np.ones(300)]).astype(float)
    cluster = generator.integers(0, 60, 300)
    shared = generator.normal(size=60)[cluster]
    target = design @ [1.0, -2.0, 0.0, 3.0] + shared + generator.normal(size=300)
    found, errors = causes.least_squares(design, target, cluster)
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(found, expected)
    clusters = len(set(cluster.tolist()))
    inverse, meat = np.linalg.inv(design.T @ design), np.zeros((4, 4))
    for one in range(60):
        rows = cluster == one
        score = design[rows].T @ (target[rows] - design[rows] @ expected)
        meat += np.outer(score, score)
    spread = inverse @ meat @ inverse * clusters / (clusters - 1) * 299 / 296
    np.testing.assert_allclose(errors, np.sqrt(np.diag(spread)))
    assert abs(found - [1, -2, 0, 3]).max() < 3 * errors.max()


def test_a_word_that_helps_is_found():
    generator = np.random.default_rng(1)
    owner = np.repeat(np.arange(300), 3)
    captions = []
    for words, others in generator.integers((1, 0), (5, 5), (900, 2)):  # no length tells the words
        captions.append(" ".join([*generator.permutation(WORDS)[:words], *["q2"] * others]))
    good = np.array(["red" in caption.split() for caption in captions])
    images = unit(generator.normal(size=(300, 8)))
    noise = np.where(good, 0.4, 1.5)[:, None] * generator.normal(size=(900, 8)) / 2
    embedded = ranked(images, unit(images[owner] + noise), captions, owner.tolist())
    rows = causes.word_effects(predictions.answers(embedded, "t2i"), embedded.pairs)
    assert {row[1] for row in rows} == set(WORDS) and rows[0][1] == "red"
    _, _, stands, times, low, high, finding, sure = rows[0]
    assert stands == len({i for i, red in zip(owner, good, strict=True) if red})
    assert low < times < high < 0.7 and (finding, sure) == ("found sooner", "yes")
    assert [row[-1] for row in rows[1:]].count("yes") <= 1


def test_the_share_of_the_most_returned():
    assert causes.hub_share(np.array([6, 1, 1, 0])) == 75
    assert causes.hub_share(np.arange(200)) == pytest.approx(
        100 * (199 + 198) / np.arange(200).sum()
    )


def test_hubs_of_a_split(talk):
    answered = predictions.answers(talk, "t2i")
    times, shares = causes.hubs(answered)
    counted = [sum(i in found for found in answered.found.tolist()) for i in range(80)]
    assert times.tolist() == counted and sum(counted) == 10 * len(talk.t2i)
    assert shares["hub share"] == pytest.approx(100 * max(counted) / sum(counted))
    assert shares["never returned"] == pytest.approx(100 * counted.count(0) / 80)
    assert 1 < shares["hub share by chance"] < 4


def test_near_misses_are_those_of_a_loop(talk):
    owner, captions = talk.pairs.caption_image, talk.pairs.captions
    names, overlap = talk.pairs.dataset.names, causes.Overlap(talk.pairs)
    rows = causes.near_misses(predictions.answers(talk, "t2i"), overlap, names)
    scores = talk.text_embeddings.astype(float) @ talk.image_embeddings.T.astype(float)
    expected, accepted, missed = [], 0, 0
    for i, caption in enumerate(captions):
        first = int(scores[i].argmax())
        if first != owner[i]:
            said = {w for j in np.flatnonzero(owner == first) for w in groups.content(captions[j])}
            words = set(groups.content(caption))
            share = len(words & said) / len(words)
            expected.append((names[owner[i]], caption, names[first], share))
            missed, accepted = missed + 1, accepted + (share >= 2 / 3)
    assert [(row[1], row[2], row[4], row[6]) for row in rows] == expected
    assert all(row[7] == ("yes" if row[6] >= 2 / 3 else "no") for row in rows)
    rates = causes.miss_rates(rows, overlap, names)
    assert rates.accepted[0] == pytest.approx(100 * accepted / missed)
    asked, good = 0, 0
    for i, caption in enumerate(captions):
        rest = [j for j in np.flatnonzero(owner == owner[i]) if j != i]
        if rest:
            said = {w for j in rest for w in groups.content(captions[j])}
            words = set(groups.content(caption))
            asked, good = asked + 1, good + (len(words & said) / len(words) >= 2 / 3)
    assert rates.own[0] == pytest.approx(100 * good / asked)
    for value, low, high in (rates.accepted, rates.own, rates.other):
        assert low <= value <= high


def test_the_clouds_are_those_of_a_loop(talk):
    images, texts = talk.image_embeddings.astype(float), talk.text_embeddings.astype(float)
    owner, found = talk.pairs.caption_image, causes.clouds(talk)
    pairs = [images[owner[j]] @ texts[j] for j in range(len(texts))]
    others = [images[i] @ t for j, t in enumerate(texts) for i in range(80) if i != owner[j]]
    among = [images[i] @ images[j] for i in range(80) for j in range(80) if i != j]
    assert found["cosine of pairs"] == pytest.approx(np.mean(pairs))
    assert found["cosine of others"] == pytest.approx(np.mean(others))
    assert found["cosine among pictures"] == pytest.approx(np.mean(among), abs=1e-6)
    assert found["modality gap"] == pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)))


def test_correlation_is_that_of_scipy():
    one, other = np.array([1, 2, 2, 5, 9.0]), np.array([3, 1, 1, np.inf, 2])
    expected = stats.spearmanr(one, np.minimum(other, 99)).statistic
    assert analysis.correlation(one, other) == pytest.approx(expected)
    assert math.isnan(analysis.correlation(one, np.ones(5)))


# ------------------------------------------------------------------------------ as a user


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache):
    def call(*words: object) -> None:
        fixed = ["--cache", cache, "--workers", 0, "--device", "cpu"]
        evaluate.main([str(word) for word in [*words, *fixed]])

    return call


def embedded_of(file: Path):
    """The ranked split that evaluate.py --save-embeddings wrote."""
    with np.load(file, allow_pickle=False) as saved:
        embedded = ranked(
            saved["image_embeddings"],
            saved["text_embeddings"],
            saved["captions"].tolist(),
            saved["caption_image"].tolist(),
        )
        embedded.pairs.dataset.names = saved["image_names"].tolist()
    return embedded


def test_predictions_of_a_run(run, tiny_run, tmp_path, capsys):
    files = ("--predictions", tmp_path / "p.csv", "--save-embeddings", tmp_path / "e.npz")
    run(tiny_run / "best.pt", "--split", "train", *files)
    assert f"wrote {tmp_path / 'p.csv'}" in capsys.readouterr().out
    check_predictions(read_csv(tmp_path / "p.csv"), embedded_of(tmp_path / "e.npz"))


FILES = ["about.json", "epochs.csv", "groups.csv", "hubs.csv", "near_misses.csv"]
FILES += ["summary.csv", "words.csv"]


def test_analysis_of_a_run_and_its_figures(run, tiny_run, tmp_path, capsys, monkeypatch):
    """One checkpoint, and two side by side; both are drawn on one scale."""
    best, last = tiny_run / "best.pt", tiny_run / "last.pt"
    run(best, "--split", "train", "--analysis", tmp_path / "one", "--json", tmp_path / "m.json")
    printed = capsys.readouterr()
    run(best, last, "--split", "train", "--analysis", tmp_path / "two")
    assert listed(tmp_path / "one") == listed(tmp_path / "two") == FILES
    rows = read_csv(tmp_path / "one" / "groups.csv")
    assert list(rows[0]) == analysis.GROUP_COLUMNS
    metrics = json.loads((tmp_path / "m.json").read_text("utf-8"))
    for way, queries in (("t2i", 150), ("i2t", 30)):
        whole, *others = [row for row in rows if row["direction"] == way]
        assert (whole["kind"], int(whole["queries"])) == ("all", queries)
        for k in (1, 5, 10):
            assert float(whole[f"r{k}"]) == pytest.approx(metrics[f"{way}_r{k}"], abs=1e-3)
        kinds = {row["kind"] for row in others}
        assert {"colour", "brightness", "edges", "typical", analysis.LEAD} <= kinds
    epochs = read_csv(tmp_path / "one" / "epochs.csv")
    with (tiny_run / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))[: len(epochs)]
    assert [row["epoch"] for row in epochs] == [row["epoch"] for row in history]
    for row, record in zip(epochs, history, strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(record["train_loss"]), abs=1e-3)
    assert "too few to tell" in printed.out and "no recall of training images" in printed.err
    summary = read_csv(tmp_path / "two" / "summary.csv")
    assert {row["measure"] for row in summary} == set(analysis.MEANING)
    assert all(row["meaning"] for row in summary)

    monkeypatch.chdir(tmp_path)  # no checkpoint is needed
    folders = ("--analysis", tmp_path / "one", "--analysis", tmp_path / "two")
    visualize.main([str(word) for word in (*folders, "--out", tmp_path / "figures")])
    assert "no effect" not in capsys.readouterr().err
    drawn = listed(tmp_path / "figures")
    assert drawn == [f"analysis_{name}.png" for name in ("captions", "causes", "pictures", "words")]
    with pytest.raises(UserError, match="is no analysis"):
        visualize.main(["--analysis", str(tmp_path / "figures")])


# ---------------------------------------------------------------------------------- the leak


def test_the_leak_is_by_line_and_marked(photo_data, cache, tmp_path, capsys):
    leak.main(["--data", str(photo_data), "--out", str(tmp_path / "leak")])
    assert "test pictures are trained on too" in capsys.readouterr().out
    links = list((tmp_path / "leak" / "images").iterdir())
    assert len(links) == 40 and all(link.is_symlink() for link in links)
    data = load_dataset(tmp_path / "leak", "given", 32, cache, 0)
    assert data.by_caption and "by caption" in capsys.readouterr().err
    lines = [(data.names[i], c) for i, c in zip(data.caption_image, data.captions, strict=True)]
    assert sorted(lines) == sorted(pairs(40))  # every line once
    counts = {name: int((data.labels == name).sum()) for name in ("train", "dev", "test")}
    assert counts == {"train": 160, "dev": 20, "test": 20}
    trained = {line[0] for line, label in zip(lines, data.labels, strict=True) if label == "train"}
    tested = {line[0] for line, label in zip(lines, data.labels, strict=True) if label == "test"}
    assert tested <= trained
    refused = load_dataset(tmp_path / "leak", "auto", 32, cache, 0)
    assert not refused.by_caption


def test_the_pool_and_the_lot_of_the_leak(photo_data, tmp_path):
    words = ["--data", str(photo_data), "--pool", "5"]
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        leak.main([*words, "--out", str(tmp_path / out), "--seed", seed])
    texts = [(tmp_path / out / "test_captions.txt").read_text("utf-8") for out in "abc"]
    assert texts[0] == texts[1] != texts[2]
    for text in texts:
        rows = list(csv.DictReader(text.splitlines()))
        assert len({row["image"] for row in rows}) == 5
        assert {(row["image"], row["caption"]) for row in rows} <= set(pairs(40))
    with pytest.raises(UserError, match="is there already"):
        leak.main([*words, "--out", str(tmp_path / "a")])
    with pytest.raises(UserError, match="does not exist"):
        leak.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "d")])


# -------------------------------------------------------------------------------- occlusion


def test_occlusion_finds_the_word_and_the_place(monkeypatch, tmp_path):
    """A model that knows one word and the brightness of one corner."""

    class Known:
        def embed_texts(self, texts):
            return np.array([[1.0 if "dog" in text.split() else 0.2, 0.5] for text in texts])

        def embed_pixels(self, pixels_at):
            corner = pixels_at(28)[:, :4, :4].mean((1, 2, 3)) / 255
            return np.stack([corner, 0 * corner], 1)

    falls = words_that_matter(Known(), "a dog runs", np.array([1.0, 0.0]))
    assert [(word, round(fall, 6)) for word, fall in falls] == [("a", 0), ("dog", 0.8), ("runs", 0)]
    pixels = np.zeros((70, 70, 3), np.uint8)
    pixels[:10, :10] = 255
    places = places_that_matter(Known(), Image.fromarray(pixels), np.array([1.0, 0.0]))
    assert places.shape == (7, 7) and places.argmax() == 0 and places[3:, 3:].max() == 0

    drawn = []
    monkeypatch.setattr(occlusion, "draw_words", lambda axes, falls, rank: drawn.append(falls))
    embedded = ranked(np.eye(2), np.eye(2)[[0, 0]], ["a dog", "dog"], [0, 1])
    embedded.pairs.captions[1] = "dog"
    picture = lambda place: Image.fromarray(pixels)  # noqa: E731
    occlusion.draw_occlusion(
        tmp_path / "a.png", Known(), embedded, picture, [0, 1], "run, test", "foot"
    )
    assert [[word for word, _ in falls] for falls in drawn] == [["a", "dog"], ["dog"]]
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_occlusion_of_a_run(tiny_run, cache, tmp_path):
    words = ("--split", "dev", "--queries", 2, "--occlusion", "--out", tmp_path)
    fixed = ("--cache", cache, "--workers", 0, "--device", "cpu")
    visualize.main([str(word) for word in (tiny_run / "best.pt", *words, *fixed)])
    assert "grid_occlusion.png" in listed(tmp_path)


# --------------------------------------------------------------------------------- reasons


def test_reasons_tell_margins_and_shared_words():
    """Captions 0 and 2 find their pictures' rivals, 1 its own."""
    images = np.eye(3)
    texts = np.array([[0.6, 0.8, 0.0], [0.0, 0.8, 0.6], [0.8, 0.6, 0.0]])
    embedded = ranked(images, texts, ["a", "b", "c"], [0, 1, 2])
    embedded.pairs.captions[:] = ["two dogs run on snow", "the dog runs on snow", "a red boat"]
    found = [visualize.found_by(embedded, i, 2) for i in range(3)]
    first, second, third = reasons.reasons(embedded, [0, 1, 2], found)
    assert first.startswith("behind the first by 0.200; the first's captions have 4 of its 5")
    assert first.endswith(": dogs, run, on, snow; a near miss")
    assert (
        second == "ahead of the next by 0.200; the next's captions have none of its 4 telling words"
    )
    assert third.startswith("behind the first by 0.800; the first's captions have none of its 2")
    alone = ranked(np.eye(1), np.eye(1), ["a"], [0])
    assert reasons.reasons(alone, [0], [visualize.found_by(alone, 0, 2)]) == ["the only picture"]
