"""The benchmark's figures, and that the README names every flag that it explains."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY

import benchmark
import flags


def test_benchmark_prints_rates_and_their_ratio(photo_data: Path, tmp_path: Path, capsys):
    words = ["--data", photo_data, "--cache", tmp_path / "cache", "--json", tmp_path / "b.json"]
    words += [*TINY, "--batches", 2, "--turns", 3, "--pictures", 10]
    benchmark.main([str(word) for word in words])
    told = capsys.readouterr().out
    figures = json.loads((tmp_path / "b.json").read_text())
    for name in ("loop", "memory", "decoding"):
        assert figures[f"{name}_images_per_second"] > 0
        assert f"{figures[f'{name}_images_per_second']:.2f}" in told
    ratio = figures["loop_images_per_second"] / figures["memory_images_per_second"]
    assert figures["loop_over_memory"] == pytest.approx(ratio, rel=0.9)
    assert not list(tmp_path.glob("*.pt"))  # it leaves no run behind


def test_of_several_towers_the_first_is_measured(photo_data: Path, tmp_path: Path, capsys):
    words = ["--data", photo_data, "--cache", tmp_path / "cache", *TINY, "--batches", 2]
    words += ["--turns", 1, "--pictures", 2, "--image-tower", "resnet18+resnet50"]
    words += ["--train-text", 0, "--pretrain-text", 1]
    benchmark.main([str(word) for word in words])
    told = capsys.readouterr()
    assert "of resnet18+resnet50 the first is measured, resnet18" in told.err
    assert "model: resnet18 at" in told.out


def test_readme_names_every_flag_of_train():
    readme = (ROOT / "README.md").read_text("utf-8")
    for flag in flags.build_parser().defaults():
        assert re.search(rf"--{flag.replace('_', '-')}\b", readme), flag


def test_readme_names_every_script():
    readme = (ROOT / "README.md").read_text("utf-8")
    for path in ROOT.glob("*.py"):
        assert path.name in readme, path.name


def test_scripts_stay_short():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 500, path.name
