"""The benchmark's figures, as a user sees them and as JSON."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, listed, script

from report import benchmark

FIGURES = ("loop_images_per_second", "memory_images_per_second", "decoding_images_per_second")


@pytest.mark.parametrize("frozen", [[], ["--train-image", 0, "--train-text", 0]])
def test_rates_and_their_ratio(photo_data: Path, tmp_path: Path, capsys, monkeypatch, frozen):
    monkeypatch.chdir(tmp_path)
    words = ["--data", photo_data, "--cache", "cache", "--json", "figures.json", *TINY, *frozen]
    words += ["--batches", 2, "--turns", 3, "--pictures", 10]
    benchmark.main([str(word) for word in words])
    out = capsys.readouterr().out
    figures = json.loads(Path("figures.json").read_text())
    for name in FIGURES:
        assert figures[name] > 0
        assert re.search(rf"^{name} +{figures[name]:.2f}$", out, re.MULTILINE)
    ratio = figures["loop_images_per_second"] / figures["memory_images_per_second"]
    assert figures["loop_over_memory"] == pytest.approx(ratio, rel=0.9)
    assert (figures["batches"], figures["turns"]) == (2, 3)
    assert listed(tmp_path) == ["cache", "figures.json"]  # it leaves no run behind


def test_no_more_batches_than_an_epoch_has(photo_data: Path, tmp_path: Path):
    words = ["--data", photo_data, "--cache", tmp_path / "cache", *TINY, "--batches", 50]
    words += ["--turns", 1, "--pictures", 2, "--json", tmp_path / "figures.json"]
    benchmark.main([str(word) for word in words])
    assert json.loads((tmp_path / "figures.json").read_text())["batches"] == 2  # 30 images, 16 each


def test_of_a_recipe_the_first_run_is_measured(photo_data: Path, tmp_path: Path, capsys):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("one: --text-tower bag\ntwo: --init one --text-tower lstm\n")
    words = ["--data", photo_data, "--cache", tmp_path / "cache", *TINY, "--recipe", recipe]
    words += ["--batches", 2, "--turns", 1, "--pictures", 2]
    benchmark.main([str(word) for word in words])
    assert "model: resnet18 at 32 px and bag" in capsys.readouterr().out


def test_built_in_data_has_nothing_to_decode():
    dataset = SimpleNamespace(paths=[], pixels=SimpleNamespace(shape=(9, 64, 64, 3)))
    trained = SimpleNamespace(pairs={"train": SimpleNamespace(dataset=dataset)})
    options = SimpleNamespace(pictures=5, workers=0)
    assert benchmark.decoding_rate(trained, options) is None


def test_it_runs_from_anywhere_and_fails_in_one_line(tmp_path: Path):
    done = script("report/benchmark.py", "--data", tmp_path / "missing", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("benchmark.py: error: ")
