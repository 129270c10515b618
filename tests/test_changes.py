"""The table of single changes: its runs, which are not done twice, and what it says of them."""

import csv
import math
import shlex
from pathlib import Path

import pytest
from conftest import TINY, write_kaggle

from report import changes, single, tables
from support.checkpoint import load_checkpoint
from support.command import UserError
from support.recipes import read_recipe
from support.results import read_csv
from train import build_parser


@pytest.fixture
def runs(tmp_path: Path, monkeypatch) -> Path:
    """A runs.csv without rows, that report/changes.py writes to."""
    heads = read_csv(changes.RUNS)[0]
    path = tmp_path / "runs.csv"
    path.write_text(",".join(heads) + "\n")
    monkeypatch.setattr(changes, "RUNS", path)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_line_is_the_base_and_one_change():
    lines = dict(read_recipe("report/changes.txt"))
    parser = build_parser()
    base = parser.typed(lines.pop("base"))
    for name, words in lines.items():
        typed = parser.typed(words)
        assert len(typed) == 1, name
        assert any(typed[flag] != base.get(flag) for flag in typed), name


def test_the_rows_are_what_the_list_says():
    """A row's command is the one that its line gives today; the base's rows come first."""
    lines = dict(read_recipe("report/changes.txt"))
    rows = tables.single_changes()
    assert rows[0]["run"] == "change: base"
    for row in rows:
        name = row["run"].removeprefix("change: ")
        words = lines["base"] + (lines[name] if name != "base" else [])
        assert row["command"] == shlex.join(["python", "train.py", *words]), name


def test_the_rows_follow_the_list(runs, monkeypatch):
    """Whatever the order of the runs."""
    names = ["sigmoid", "Transformer", "base", "no-augmentation"]
    for name in names:
        changes.append({"run": f"change: {name}", "group": "changes", "seed": "0"})
    monkeypatch.setattr(tables, "read", lambda _: rows_of(runs))
    found = [row["run"].removeprefix("change: ") for row in tables.single_changes()]
    assert found == ["base", "Transformer", "no-augmentation", "sigmoid"]
    changes.append({"run": "change: luck", "group": "changes", "seed": "0"})
    with pytest.raises(UserError, match="change: luck"):
        tables.single_changes()


def test_what_was_run_is_not_run_again(runs, monkeypatch, capsys):
    done = []

    def run_once(words: list[str], seed: int, options: list[str]) -> dict[str, float]:
        done.append((words[-1], seed))
        ways = {f"{way}_r{k}": 1.0 for way in ("i2t", "t2i") for k in (1, 5, 10)}
        return {**ways, "mean_recall": 5.126, "minutes": 9.96}

    monkeypatch.setattr(changes, "run_once", run_once)
    changes.main(["--only", "sigmoid", "--seeds", "2"])
    assert done == [("siglip", 0), ("siglip", 1)]
    changes.main(["--only", "sigmoid", "hinge", "--seeds", "2"])
    assert done[2:] == [("triplet", 0), ("triplet", 1)]
    assert capsys.readouterr().out.count("2 new rows") == 2
    rows = rows_of(runs)
    assert [row["run"] for row in rows] == ["change: sigmoid"] * 2 + ["change: hinge"] * 2
    first = rows[0]
    assert (first["mean_recall"], first["minutes"], first["seed"]) == ("5.13", "10.0", "0")
    assert first["command"].endswith("--epochs 12 --loss siglip") and first["split"] == "dev"


def test_a_run_is_measured_by_its_best_epoch(tmp_path: Path, monkeypatch):
    data = write_kaggle(tmp_path / "data")
    options = ["--data", str(data), "--cache", str(tmp_path / "cache")]
    with pytest.raises(UserError, match="is not Flickr8k"):
        changes.run_once([*TINY, "--epochs", "1"], 0, options)
    histories = []

    def load(path: Path) -> dict:
        content = load_checkpoint(path)
        histories.append(content["history"])
        sizes = [len(content["train_images"]["names"])]
        sizes.append(len(content["split_images"]["dev"]["names"]))
        monkeypatch.setattr(changes, "FLICKR8K", tuple(sizes))
        return content

    monkeypatch.setattr(changes, "load_checkpoint", load)
    record = changes.run_once([*TINY, "--epochs", "2"], 0, options)
    (history,) = histories
    best = max(past["mean_recall"] for past in history)
    assert record["mean_recall"] == best and record["minutes"] == history[-1]["minutes"]


def test_a_run_that_fails_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="ended with 2"):
        changes.run_once(["--data", str(tmp_path / "nothing")], 0, [])


def made_up(**values: list[float]) -> list[dict[str, str]]:
    return [
        {
            **{"run": f"change: {name}", "change": "--x", "seed": str(seed)},
            **{"mean_recall": str(value), "i2t_r1": "1.0", "t2i_r1": "3.0"},
        }
        for name, means in values.items()
        for seed, value in enumerate(means)
    ]


def test_level_and_apart():
    rows = made_up(base=[5.0, 5.2, 5.4], sigmoid=[5.2, 5.4, 5.3], hinge=[4.0, 4.2, 4.1])
    grouped = single.by_change(rows)
    # (0.04 + 0.01 + 0.01) / 3, twice that times the square root of 2 / 3
    assert single.spread(grouped) == pytest.approx(math.sqrt(0.02))
    lines = {line[0]: line for line in single.table(rows)}
    assert lines["base"][5:] == ["5.0 to 5.4", "the start"]
    assert lines["sigmoid"][-1] == "level: +0.1"
    assert lines["hinge"][2:] == ["1.0", "3.0", "4.1", "4.0 to 4.2", "worse: -1.1"]


def test_one_seed_tells_nothing():
    lines = single.table(made_up(base=[5.0], sigmoid=[9.0]))
    assert lines[-1][-1] == "level: +4.0"


def test_a_difference_of_nothing_has_no_minus():
    lines = single.table(made_up(base=[5.0], sigmoid=[4.98]))
    assert lines[-1][-1] == "level: +0.0"


def test_nothing_measured_draws_nothing(tmp_path: Path):
    single.draw_if_measured(tmp_path / "none.png", made_up(sigmoid=[1.0]))
    assert not list(tmp_path.iterdir())
    single.draw_if_measured(tmp_path / "one.png", made_up(base=[5.0], sigmoid=[6.0]))
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
