"""--precision auto on a CPU: what is measured and kept, and that the run stays the same."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, listed, run_train, small_model, small_options, start

from models import hold_back
from support import precision
from support.checkpoint import load_checkpoint
from support.precision import describe_precision, faster_precision, measure_steps

QUICK = ("--text-tower", "bag", "--image-augment", "none", "--epochs", 1)


@pytest.fixture
def native(monkeypatch):
    """A CPU with bf16 instructions."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.fixture
def stopwatch(monkeypatch):
    """stopwatch(fp32=2, bf16=1): steps take so many seconds; returns the precisions, in order."""
    steps = []

    def prepare(**seconds: float) -> list[str]:
        now = [0.0]

        def step(model, sides) -> None:
            name = "fp32" if model.autocast is None else "bf16"
            # The first of each is slow: it allocates memory.
            # Another program is at work in the second round of bf16.
            now[0] += seconds[name] + 100 * (name not in steps)
            now[0] += 50 * (steps.count(name) == 1 and name == "bf16")
            steps.append(name)

        monkeypatch.setattr(precision, "clock", lambda: now[0])
        monkeypatch.setattr(precision, "step", step)
        return steps

    return prepare


@pytest.mark.parametrize(
    ("seconds", "expected", "line"),
    [
        ({"fp32": 0.19, "bf16": 0.1}, "bf16", "bf16 (measured 1.9 times as fast as fp32)"),
        ({"fp32": 0.1, "bf16": 0.14}, "fp32", "fp32 (measured 1.4 times as fast as bf16)"),
    ],
)
def test_the_faster_is_taken_and_kept(seconds, expected, line, stopwatch, tmp_path: Path):
    steps, options = stopwatch(**seconds), small_options(cache=tmp_path, precision="auto")
    model = small_model()
    assert faster_precision(model, options) == expected
    assert len(steps) == 6  # the first took long enough; two rounds are counted all the same
    options.precision = expected
    assert describe_precision(options) == line
    (folder,) = listed(tmp_path)
    content = json.loads((tmp_path / folder / "seconds.json").read_text())
    assert content["seconds_per_step"] == pytest.approx(seconds)
    assert content["machine"]["torch"] == torch.__version__ and content["machine"]["processor"]
    assert faster_precision(model, options) == expected and len(steps) == 6  # asked once


@pytest.mark.parametrize(
    "flags", [{"image_size": 48}, {"batch_size": 8}, {"text_tower": "lstm"}, {"train_image": 1}]
)
def test_other_steps_are_another_question(flags, stopwatch, tmp_path: Path):
    steps = stopwatch(fp32=1.0, bf16=2.0)
    for options in (small_options(cache=tmp_path), small_options(cache=tmp_path, **flags)):
        faster_precision(small_model(), options)
    assert len(steps) == 12 and len(listed(tmp_path)) == 2


def test_another_machine_is_another_question(stopwatch, tmp_path: Path, monkeypatch):
    steps, options = stopwatch(fp32=1.0, bf16=2.0), small_options(cache=tmp_path)
    faster_precision(small_model(), options)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "other", raising=False)
    monkeypatch.setattr(precision, "native_bf16", lambda: ["another"])
    faster_precision(small_model(), options)
    assert len(steps) == 12


def test_a_damaged_answer_is_asked_again(stopwatch, tmp_path: Path, capsys):
    steps, options = stopwatch(fp32=1.0, bf16=2.0), small_options(cache=tmp_path)
    faster_precision(small_model(), options)
    (tmp_path / listed(tmp_path)[0] / "seconds.json").write_text("{")
    assert faster_precision(small_model(), options) == "fp32" and len(steps) == 12
    assert "damaged" in capsys.readouterr().err


def test_where_nothing_can_be_kept_it_is_measured(stopwatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    steps, options = stopwatch(fp32=2.0, bf16=1.0), small_options(cache=tmp_path / "file")
    options.precision = faster_precision(small_model(), options)
    assert (options.precision, len(steps)) == ("bf16", 6)
    assert describe_precision(options) == "bf16"


def test_what_was_not_measured_is_not_said(tmp_path: Path):
    for name in ("fp32", "bf16", "fp16"):
        assert describe_precision(small_options(cache=tmp_path, precision=name)) == name


@pytest.mark.parametrize("text_tower", ["transformer", "lstm", "bag"])
@pytest.mark.parametrize(
    "flags", [{}, {"train_image": 0, "train_text": 0}, {"captions_alone": True}]
)
def test_real_steps_leave_all_as_it_was(text_tower: str, flags):
    """Weights, statistics, gradients, and the random numbers that come next."""
    options = small_options(text_tower=text_tower, batch_size=8, **flags)
    model = small_model(text_tower=text_tower, batch_size=8, **flags)
    hold_back(model.image_tower, options.train_image)
    hold_back(model.text_tower, options.train_text)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    seconds = measure_steps(model, options)
    assert seconds.keys() == {"fp32", "bf16"} and min(seconds.values()) > 0
    assert torch.equal(torch.get_rng_state(), state) and model.autocast is None
    assert all(weight.grad is None for weight in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_time_is_that_of_one_thread_alone(monkeypatch):
    """Another program's work, here a sleep, is not counted; the threads are as many as before."""
    threads, seen = torch.get_num_threads(), []

    def step(model, sides) -> None:
        seen.append(torch.get_num_threads())
        time.sleep(0.2 if model.autocast is None else 0)

    monkeypatch.setattr(precision, "step", step)
    torch.set_num_threads(2)
    try:
        seconds = measure_steps(small_model(), small_options(batch_size=4))
        assert torch.get_num_threads() == 2 and set(seen) == {1}
    finally:
        torch.set_num_threads(threads)
    assert max(seconds.values()) < 0.1


def test_the_towers_are_measured_in_both_precisions(monkeypatch):
    kinds, real = [], precision.step

    def step(model, sides) -> None:
        with model.lower_precision():
            kinds.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        real(model, sides)

    monkeypatch.setattr(precision, "step", step)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    measure_steps(small_model(), small_options(batch_size=4))
    assert kinds == [torch.float32, torch.bfloat16] * 3


def test_a_run_has_the_bits_of_the_precision_that_was_measured(
    photo_data: Path, tmp_path: Path, native, monkeypatch, capsys
):
    """A run of --precision auto ends as the same run with the answer typed."""
    monkeypatch.setattr(precision, "read_seconds", lambda folder: {"fp32": 1.0, "bf16": 3.0})
    auto = start(photo_data, tmp_path / "auto", tmp_path / "cache", *QUICK, "--precision", "auto")
    assert run_train(*auto) == 0
    assert "fp32 (measured 3.0 times as fast as bf16) on cpu" in capsys.readouterr().out
    typed = start(photo_data, tmp_path / "typed", tmp_path / "other", *QUICK, "--precision", "fp32")
    assert run_train(*typed) == 0
    assert_same_run(tmp_path / "auto" / "last.pt", tmp_path / "typed" / "last.pt")


def test_a_run_that_goes_on_keeps_its_precision(
    photo_data: Path, tmp_path: Path, native, monkeypatch, capsys
):
    answers = iter([{"fp32": 2.0, "bf16": 1.0}])
    monkeypatch.setattr(precision, "measure_steps", lambda *_: next(answers))
    words = start(photo_data, tmp_path / "run", tmp_path / "cache", *QUICK, "--precision", "auto")
    assert run_train(*words) == 0
    again = ("--resume", tmp_path / "run", "--cache", tmp_path / "new", "--epochs", 2)
    assert run_train(*again, "--precision", "auto") == 0
    assert "bits" not in capsys.readouterr().err
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (content["config"]["precision"], content["epoch"]) == ("bf16", 2)


def test_a_processor_has_a_name():
    machine = SimpleNamespace(**precision.machine_of())
    assert machine.processor and machine.threads == torch.get_num_threads()
