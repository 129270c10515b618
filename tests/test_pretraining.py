"""Captions alone: which are paired, what learns, and that a run that goes on does so once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli import UserError
from test_models import build, config
from test_train import assert_same_run, run_train, start

import train
from models import load_checkpoint
from pretraining import caption_pairs, pretrain_text


def test_pairs_are_two_captions_of_one_image():
    owner = np.array([3, 0, 1, 1, 3, 4, 3, 4, 0])  # image 2 has none in this split, all others two
    owner = np.append(owner, 5)  # and image 5 has one
    seen = set()
    for seed in range(40):
        pairs = caption_pairs(owner, np.random.default_rng(seed))
        assert sorted(owner[pairs[:, 0]]) == [0, 1, 3, 4]
        assert (owner[pairs[:, 0]] == owner[pairs[:, 1]]).all() and (np.diff(pairs) != 0).all()
        assert np.array_equal(pairs, caption_pairs(owner, np.random.default_rng(seed)))
        seen |= {tuple(pair) for pair in pairs.tolist() if owner[pair[0]] == 3}
    assert seen == {(a, b) for a in (0, 4, 6) for b in (0, 4, 6) if a != b}


@pytest.mark.parametrize("tower", ["bag", "transformer", "lstm"])
def test_captions_of_an_image_come_together(tower, capsys):
    """Captions of image i hold words 4 + i or 10 + i: nothing but the pairs tells that they fit."""
    given = config(text_tower=tower, batch_size=6, lr=1e-2, pretrain_text=40, weight_decay=0.0)
    model = build(**given)
    tokens = torch.tensor([[2, word + i, 3] for i in range(6) for word in (4, 10)])
    owner = np.repeat(np.arange(6), 2)
    before = [weight.clone() for weight in model.image_tower.parameters()]
    pretrain_text(model, tokens, owner, given)
    made = model.eval().encode_text(tokens)
    cosines = made[0::2] @ made[1::2].T
    assert (cosines.argmax(1) == torch.arange(6)).all()
    assert all(map(torch.equal, before, model.image_tower.parameters()))
    assert capsys.readouterr().out.startswith("captions alone: 40 epochs in ")


def test_one_caption_an_image_is_no_start():
    given = config(text_tower="bag", batch_size=6, pretrain_text=1)
    with pytest.raises(UserError, match="two captions or more"):
        pretrain_text(build(**given), torch.full((5, 3), 4), np.arange(5), given)


def test_a_run_that_goes_on_does_not_start_its_texts_again(
    photo_data: Path, tmp_path: Path, monkeypatch, capsys
):
    cache, more = tmp_path / "cache", ("--text-tower", "bag", "--pretrain-text", 2, "--epochs", 3)
    assert run_train(*start(photo_data, tmp_path / "whole", cache, *more)) == 0
    whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert "captions alone: 2 epochs" in capsys.readouterr().out
    real = train.Run.epoch

    def interrupted(run, epoch):
        if epoch == 2:
            raise UserError("stopped")
        real(run, epoch)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(train.Run, "epoch", interrupted)
        run_train(*start(photo_data, tmp_path / "run", cache, *more))
    capsys.readouterr()
    assert run_train("--resume", tmp_path / "run", "--cache", cache) == 0
    assert "captions alone" not in capsys.readouterr().out
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")
    assert whole["config"]["pretrain_text"] == 2
