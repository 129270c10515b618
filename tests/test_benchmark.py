"""The benchmark's figures, as a user sees them and as JSON."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, listed, script

from report import benchmark
from report.products import Products, seconds_of_products
from support.command import UserError

FIGURES = ("loop_images_per_second", "memory_images_per_second", "decoding_images_per_second")


@pytest.mark.parametrize("frozen", [[], ["--train-image", 0, "--train-text", 0]])
def test_rates_and_their_ratio(photo_data: Path, tmp_path: Path, capsys, monkeypatch, frozen):
    monkeypatch.chdir(tmp_path)
    words = ["--data", photo_data, "--cache", "cache", "--json", "figures.json", *TINY, *frozen]
    words += ["--batches", 2, "--turns", 3, "--pictures", 10, "--ranked", 40]
    words += ["--markdown", "table.md", "--device", "cpu"]
    monkeypatch.setattr(benchmark, "course_rate", lambda words: 2.0)
    benchmark.main([str(word) for word in words])
    out = capsys.readouterr().out
    figures = json.loads(Path("figures.json").read_text())
    for name in FIGURES:
        assert figures[name] > 0
        assert re.search(rf"^{name} +{figures[name]:.2f}$", out, re.MULTILINE)
    ratio = figures["loop_images_per_second"] / figures["memory_images_per_second"]
    assert figures["loop_over_memory"] == pytest.approx(ratio, rel=0.9)
    assert (figures["batches"], figures["turns"]) == (2, 3)
    assert figures["fp32_over_course"] > 0 and figures["ranks_over_product"] > 0
    assert 0 < figures["products_over_loop"] < 1.5
    table = Path("table.md").read_text("utf-8")
    assert torch.__version__ in table and table.startswith(f"{torch.get_num_threads()} core")
    assert table.count(" | ") >= 2 * 8 and f"| {figures['loop_over_memory']:.2f} | 0.95 |" in table
    assert listed(tmp_path) == ["cache", "figures.json", "table.md"]  # it leaves no run behind


def test_no_more_batches_than_an_epoch_has(photo_data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(benchmark, "course_rate", lambda words: 2.0)
    words = ["--data", photo_data, "--cache", tmp_path / "cache", *TINY, "--batches", 50]
    words += ["--turns", 1, "--pictures", 2, "--ranked", 9, "--json", tmp_path / "figures.json"]
    benchmark.main([str(word) for word in words])
    assert json.loads((tmp_path / "figures.json").read_text())["batches"] == 2  # 30 images, 16 each


def test_of_a_recipe_the_first_run_is_measured(photo_data: Path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "course_rate", lambda words: 2.0)
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("one: --text-tower bag\ntwo: --init one --text-tower lstm\n")
    words = ["--data", photo_data, "--cache", tmp_path / "cache", *TINY, "--recipe", recipe]
    words += ["--batches", 2, "--turns", 1, "--pictures", 2, "--ranked", 9]
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


def test_the_courses_loop_runs_as_the_benchmark_calls_it(photo_data: Path, tmp_path: Path):
    words = ["--data", photo_data, "--cache", tmp_path / "cache", *TINY, "--batches", 2]
    assert benchmark.course_rate([str(word) for word in words]) > 0
    with pytest.raises(UserError, match=r"course_loop\.py: .*missing"):
        benchmark.course_rate(["--data", str(tmp_path / "missing")])


def test_products_of_a_step_are_found_forward_and_backward():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )
    net.append(torch.nn.Linear(2, 2)).append(torch.nn.Linear(2, 2))  # two of one shape
    images, calls = torch.rand(5, 3, 8, 8), []

    def step() -> None:
        calls.append(1)
        net(images).sum().backward()

    with Products() as products:
        step()
    names = Counter()
    for key, (function, _) in products.calls.items():
        names[function.overloadpacket.__name__] += products.counts[key]
    # Of a linear layer two products go back: to its input and to its weights.
    assert names == {"convolution": 1, "convolution_backward": 1, "addmm": 3, "mm": 6}
    assert max(products.counts.values()) > 1
    assert seconds_of_products(step, rounds=1) > 0 and len(calls) == 2
