"""What a run is asked to do: defaults that fit the data, recipes, --init, contradictions."""

import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

import train
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import UserError
from support.options import ALL, block_count, config_of, resolve
from support.recipes import RECIPES, as_words, default_recipe, last_runs, read_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.txt"))


def resolved(words: str = "", recipe: str = "") -> Namespace:
    """The options of a run whose flags are typed so, on top of a recipe's line."""
    parser = train.build_parser()
    return resolve(parser, parser.typed(shlex.split(words)), parser.typed(shlex.split(recipe)))


@pytest.fixture
def walk(monkeypatch, tmp_path):
    """walk(*words): train.py without the training; the options of each of its runs, by folder.

    `stop=NAME` ends it inside that run, whose checkpoint is there.
    """

    def walked(*words: str, stop: str = "") -> dict[str, Namespace]:
        found = {}

        def trained(options: Namespace, out: Path, earlier: dict | None, home: Path) -> int:
            found[out.name] = options
            for name in ("best.pt", "last.pt"):
                content = {"config": config_of(options), "epoch": 2, "run": out.name}
                save_checkpoint(out / name, content)
            return 130 if out.name == stop else 0

        monkeypatch.setattr(train, "train", trained)
        assert train.main([*words]) == (130 if stop else 0)
        return found

    return walked


# ------------------------------------------------------------------------- one run's defaults


def test_defaults_fit_the_data():
    shapes, photographs = resolved("--data shapes"), resolved("--data x")
    assert (shapes.image_size, shapes.image_augment, shapes.batch_size) == (64, "none", 256)
    assert (shapes.lr, shapes.epochs) == (1.5e-3, 4)
    assert (photographs.image_size, photographs.image_augment) == (96, "light")
    assert (photographs.batch_size, photographs.lr, photographs.epochs) == (128, 1e-3, 15)
    assert shapes.data == "shapes" and photographs.data == str(Path("x").resolve())
    assert resolved("--data shapes --epochs 9 --image-augment light").epochs == 9
    assert resolved("--data shapes --image-augment light").image_augment == "light"


def test_the_plain_run_is_what_no_flag_gives():
    [(_, words)] = read_recipe("plain")
    plain = resolved()
    assert plain == resolved("", shlex.join(words))
    assert plain.image_weights == plain.text_weights == "none"
    assert plain.train_image == plain.train_text == ALL
    assert (plain.image_tower, plain.text_tower) == ("resnet18", "transformer")
    assert plain.head == plain.text_head == "linear" and plain.loss == "infonce"


def test_defaults_fit_the_towers():
    lite = resolved("--image-tower efficientnet_lite2")
    assert lite.image_weights == "imagenet" and lite.train_image == 0
    assert lite.image_size == 260 and lite.image_augment == "none"  # as it was trained, kept
    assert resolved("--image-tower efficientnet_lite2 --train-image all").image_augment == "light"
    scratch = resolved("--image-tower efficientnet_lite2 --image-weights none")
    assert (scratch.image_size, scratch.train_image, scratch.image_augment) == (96, ALL, "light")
    minilm = resolved("--text-tower minilm")
    assert minilm.text_weights == "pretrained" and minilm.train_text == 0
    assert resolved("--text-tower minilm --text-weights none").train_text == ALL
    assert resolved("--head mlp").text_head == "mlp"
    assert resolved("--head mlp --text-head linear").text_head == "linear"
    a_file = resolved("--image-weights weights.pth")
    assert a_file.image_weights == str(Path("weights.pth").resolve()) and a_file.train_image == 0


def test_blocks_that_learn_are_whole_numbers():
    assert block_count("all") == ALL and block_count("0") == 0 and block_count("8") == 8
    for words in ("--train-image -1", "--train-image 1.5", "--train-text some"):
        with pytest.raises(UserError, match=words.split()[0]):
            resolved(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text-tower lstm --text-weights pretrained", "a lstm has no .* use minilm or bert"),
        ("--loss infonce+hinge", "--loss .*: 'hinge' is none of infonce, "),
        ("--loss 0*infonce", "--loss .*: '0\\*infonce' is none of infonce, "),
        ("--text-augment swap=2", "--text-augment: 'swap=2' is none of synonym=R, "),
        ("--text-augment shuffle=0.1", "--text-augment: 'shuffle=0.1' is none of synonym=R, "),
        ("--poster-text", "--poster-text goes with a frozen text tower"),
        ("--poster-text --text-tower minilm", "--poster-text goes with a frozen image tower"),
        (
            "--poster-text --text-tower minilm --train-image 0 --image-augment light",
            "--poster-text goes with --image-augment none",
        ),
        ("--soft-positives genres --loss triplet", "--soft-positives goes with --loss infonce"),
        ("--captions-alone --text-tower minilm", "--captions-alone trains the text tower"),
        ("--captions-alone --train-text 0", "--captions-alone trains the text tower"),
    ],
)
def test_contradictions_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        resolved(words)


@pytest.mark.parametrize(
    "words",
    [
        *("--head-epochs 3", "--views 2", "--start-size 32", "--start-epochs 2", "--stem small"),
        *("--pretrain-text 3", "--schedule plateau", "--image-tower resnet18+resnet18"),
    ],
)
def test_flags_of_the_old_house_are_gone(words):
    with pytest.raises(UserError, match=words.split()[0]):
        resolved(words)


def test_a_config_keeps_the_run_and_not_the_machine():
    config = config_of(resolved("--data shapes --out a --cache b --device cpu"))
    assert not {"out", "cache", "device", "resume"} & config.keys()
    assert {"data", "splits", "seed", "precision", "workers", "titles"} <= config.keys()


# -------------------------------------------------------------------------------- recipes


def test_a_flag_by_hand_wins_over_the_recipe():
    line = "--lr 0.1 --head mlp --text-tower minilm --test-mirror --fixed-temperature"
    options = resolved("--lr 0.5 --head linear --no-test-mirror --no-fixed-temperature", line)
    assert (options.lr, options.head, options.text_tower) == (0.5, "linear", "minilm")
    assert options.test_mirror is options.fixed_temperature is False
    assert resolved("", line).test_mirror is True


def test_flags_go_into_words_and_back():
    parser = train.build_parser()
    words = "--train-image all --no-test-mirror --ema 0.97 --captions-alone --limit 5 --lr 0.0005"
    typed = parser.typed([*words.split(), "--data", "a folder"])
    again = as_words(typed)
    assert parser.typed(again) == typed and parser.typed(shlex.split(shlex.join(again))) == typed


def test_a_recipe_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        "# a comment: no run\n\nfirst: --lr 0.1 \\\n    --data 'a b'\n  # another\n"
        "second-one: --init first\nlast_1:\n"
    )
    assert read_recipe(str(path)) == [
        ("first", ["--lr", "0.1", "--data", "a b"]),
        ("second-one", ["--init", "first"]),
        ("last_1", []),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "# nothing\n", "--lr 0.1\n", "a: --lr 1\na: --lr 2\n", "a b: --lr 1\n"),
        *("../up: --lr 1\n", "a: --data 'open\n", b"\xff\xfe"),
    ],
)
def test_odd_recipe_files(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"--recipe .*mine.txt"):
        read_recipe(str(path))


def test_an_unknown_recipe_lists_the_known(tmp_path):
    with pytest.raises(UserError, match=f"--recipe nope: .*{', '.join(NAMES)}"):
        train.main(["--recipe", "nope", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["shapes", "photographs"])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves(walk, tmp_path, name, data):
    runs = walk("--recipe", name, "--data", data, "--out", str(tmp_path / "run"))
    names, parser = [run for run, _ in read_recipe(name)], train.build_parser()
    ends = last_runs(read_recipe(name), parser)
    assert list(runs) == ["run" if [run] == ends else run for run in names]
    for options in runs.values():
        assert options.recipe == name
        contradicts = options.image_augment != "none", options.test_mirror, options.map_crop
        assert not any(contradicts) or data != "shapes"  # a scene's captions tell left from right


def test_what_the_recipes_promise(walk, tmp_path):
    """The README and the report describe these runs."""
    best = walk("--recipe", "best", "--data", "x", "--out", str(tmp_path / "best"))
    heads, tuned, beside = best.values()
    assert (heads.train_image, tuned.train_image, beside.train_image) == (0, 8, 0)
    assert sum(options.epochs for options in best.values()) == 15
    for options in best.values():
        assert (options.image_weights, options.text_tower) == ("imagenet", "minilm")
        assert (options.image_size, options.test_mirror, options.head) == (288, True, "mlp")
        assert options.train_text == 0 and options.fixed_temperature
    assert tuned.image_tower == heads.image_tower == "efficientnet_lite2"
    assert tuned.init == str(tmp_path / "best" / "lite2-heads")
    assert beside.image_tower == "efficientnet_lite1" and beside.init is None
    hour = walk("--recipe", "best-hour", "--data", "x", "--out", str(tmp_path / "hour"))
    assert sum(options.epochs for options in hour.values()) == 3 * 11
    runs = {}
    for name in ("assignment", "scratch"):
        out = str(tmp_path / name)
        runs[name] = [*walk("--recipe", name, "--data", "x", "--out", out).values()]
    chains = [runs["scratch"][first : first + 3] for first in (0, 3, 6)]
    lines = dict(zip(("", "lstm-", "again-", "bag-"), [runs["assignment"], *chains], strict=True))
    for line, (captions, small, large) in lines.items():
        for options in (captions, small, large):
            assert options.image_weights == options.text_weights == "none"
            assert options.image_tower == "resnet18"
            assert options.text_tower == ("bag" if line == "bag-" else "lstm")
        assert captions.captions_alone and not small.captions_alone and not large.captions_alone
        assert (captions.train_text, small.train_text, large.train_text) == (ALL, 0, ALL)
        assert (small.image_size, large.image_size, large.text_lr) == (64, 96, 1e-4)
        inits = [
            str(tmp_path / ("scratch" if line else "assignment") / f"{line}{stage}")
            for stage in ("captions", "small")
        ]
        assert [small.init, large.init] == inits and captions.init is None
    same = [{**vars(run), "out": "", "init": "", "recipe": ""} for run in runs["assignment"]]
    for line, seed in (("lstm-", 0), ("again-", 1)):
        unlike = {"out": "", "init": "", "recipe": "", "seed": 0}
        assert [run.seed for run in lines[line]] == [seed] * 3
        assert [{**vars(run), **unlike} for run in lines[line]] == same  # the README says so


def default_of(*words: object) -> str:
    return default_recipe(train.build_parser().typed([str(word) for word in words]))


def test_the_default_recipe_fits_data_and_towers(photo_data, tmp_path, capsys):
    assert default_of("--data", photo_data) == "assignment"
    with pytest.raises(UserError, match="nowhere does not exist"):
        default_of("--data", tmp_path / "nowhere")
    assert default_of("--data", photo_data, "--text-tower", "transformer") == "assignment"
    assert default_of("--data", "shapes") == "plain"
    for words in (
        ("--init", "run"),
        ("--captions-alone",),
        ("--image-tower", "efficientnet_lite2"),
        ("--text-tower", "minilm"),
        ("--image-weights", "weights.pth"),
        ("--train-text", 0),
    ):
        assert default_of("--data", photo_data, *words) == "plain", words
    assert capsys.readouterr().out == ""
    one_each = tmp_path / "one"
    shutil.copytree(photo_data / "images", one_each / "images")
    rows = [f"{path.name},a picture\n" for path in (one_each / "images").iterdir()]
    (one_each / "captions.txt").write_text("image,caption\n" + "".join(rows))
    assert default_of("--data", one_each) == "plain"
    assert "most images have one caption" in capsys.readouterr().out


TWO = "a: --lr 0.1 --head mlp --test-mirror --map-crop 0.1\nb: --init a --lr 0.2 --train-image 0\n"


@pytest.mark.parametrize("data", ["shapes", "photographs"])
def test_a_flag_by_hand_wins_in_every_run(walk, tmp_path, data):
    (tmp_path / "two.txt").write_text(TWO)
    words = ("--recipe", str(tmp_path / "two.txt"), "--data", data, "--seed", "3", "--test-mirror")
    runs = walk(*words, "--lr", "0.5", "--head", "linear", "--out", str(tmp_path / "run"))
    for options in runs.values():
        assert (options.lr, options.head, options.seed) == (0.5, "linear", 3)
        assert options.test_mirror and options.data.endswith(data)
    assert runs["a"].map_crop == (0 if data == "shapes" else 0.1)
    assert runs["run"].train_image == 0 and runs["a"].train_image == ALL


@pytest.mark.parametrize("data", ["shapes", "photographs"])
def test_a_recipe_that_goes_on_has_the_options_of_one_never_stopped(walk, tmp_path, data):
    (tmp_path / "two.txt").write_text(TWO)
    out = tmp_path / "run"
    words = ("--recipe", str(tmp_path / "two.txt"), "--data", data, "--lr", "0.5", "--test-mirror")
    whole = walk(*words, "--out", str(out))
    out.rename(tmp_path / "other")
    stopped = walk(*words, "--out", str(out), stop="a")
    assert list(stopped) == ["a"]
    again = walk("--resume", str(out))
    assert list(again) == ["a", "run"]  # the last run has the recipe's folder
    for name in again:
        assert config_of(again[name]) == config_of(whole[name])


@pytest.mark.parametrize(("typed", "seeds"), [([], (0, 2)), (["--seed", 3], (3, 5))])
def test_a_seed_in_a_recipe_is_added_to_the_one_that_is_typed(walk, tmp_path, typed, seeds):
    """Once: a recipe that goes on keeps its seeds."""
    (tmp_path / "two.txt").write_text("a:\nb: --seed 2\n")
    out, words = tmp_path / "run", ("--recipe", str(tmp_path / "two.txt"), "--data", "shapes")
    stopped = walk(*words, *map(str, typed), "--out", str(out), stop="a")
    assert stopped["a"].seed == seeds[0]
    again = walk("--resume", str(out))
    assert (again["a"].seed, again["b"].seed) == seeds


def test_seeds_that_are_added_go_around(walk, tmp_path):
    (tmp_path / "two.txt").write_text("a:\nb: --seed 2\n")
    words = ("--recipe", str(tmp_path / "two.txt"), "--data", "shapes", "--seed", str(2**32 - 1))
    assert walk(*words, "--out", str(tmp_path / "run"))["b"].seed == 1


def test_a_recipe_goes_further_with_its_last_runs(walk, tmp_path):
    (tmp_path / "four.txt").write_text("a:\nb: --init a\nc: --init a --epochs 3\nd: --epochs 4\n")
    out = tmp_path / "run"
    walk("--recipe", str(tmp_path / "four.txt"), "--data", "x", "--out", str(out))
    again = walk("--resume", str(out), "--epochs", "20")
    epochs = {name: options.epochs for name, options in again.items()}
    assert epochs == {"a": 15, "b": 20, "c": 20, "d": 20}
    with pytest.raises(UserError, match="the runs of a recipe keep their --lr"):
        train.main(["--resume", str(out), "--lr", "0.1"])


# ---------------------------------------------------------------------------------- --init


@pytest.fixture
def earlier(walk, tmp_path):
    """The folder of a run with a model of its own."""
    out = tmp_path / "earlier"
    model = "--text-tower lstm --text-width 64 --head mlp --embed-dim 48 --image-size 64"
    rest = "--lr 0.01 --loss triplet --epochs 3 --seed 5 --data x --recipe plain"
    walk(*model.split(), *rest.split(), "--out", str(out))
    return out


def test_init_inherits_the_model_and_nothing_else(earlier):
    for place in (earlier, earlier / "best.pt"):
        options = resolved(f"--init {place} --data x")
        assert (options.text_tower, options.text_width, options.embed_dim) == ("lstm", 64, 48)
        assert options.head == options.text_head == "mlp" and options.image_size == 64
        assert (options.lr, options.loss, options.epochs, options.seed) == (1e-3, "infonce", 15, 0)
    typed = resolved(f"--init {earlier} --data x --head linear --text-width 32", "--embed-dim 24")
    assert (typed.head, typed.text_width, typed.embed_dim) == ("linear", 32, 24)
    assert typed.text_tower == "lstm"


def test_init_of_a_run_from_before_a_flag_was_there(earlier):
    config = load_checkpoint(earlier / "best.pt")["config"]
    del config["test_mirror"], config["epochs_before"]
    save_checkpoint(earlier / "best.pt", {"config": config, "epoch": 2})
    assert resolved(f"--init {earlier} --data x").test_mirror is False


def test_init_knows_how_many_epochs_its_weights_have_seen(walk, tmp_path):
    (tmp_path / "three.txt").write_text("a:\nb: --init a\nc: --init b\nd:\n")
    words = ("--recipe", str(tmp_path / "three.txt"), "--data", "x", "--out", str(tmp_path / "run"))
    before = {name: options.epochs_before for name, options in walk(*words).items()}
    assert before == {"a": 0, "b": 2, "c": 4, "d": 0}  # `walk` says that the best epoch is 2


def test_init_of_what_is_no_run(walk, tmp_path):
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        resolved(f"--init {tmp_path / 'nowhere'}")
    (tmp_path / "two.txt").write_text("a:\nb:\n")
    walk("--recipe", str(tmp_path / "two.txt"), "--data", "x", "--out", str(tmp_path / "run"))
    with pytest.raises(UserError, match="holds several models; name the run of one"):
        resolved(f"--init {tmp_path / 'run'}")
    with pytest.raises(UserError, match="holds several models; give the recipe's folder"):
        train.main(["--resume", str(tmp_path / "run" / "best.pt")])
    assert resolved(f"--init {tmp_path / 'run' / 'a'}").text_tower == "transformer"
