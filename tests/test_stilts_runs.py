"""Runs that go wrong on the way: diverged, killed late, started twice, or given an environment that is not theirs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import torch
import transformers
from safetensors.torch import load_file, save_file

from xfast.errors import InvalidInputError, InvalidOptionError
from xfast.stilts.config import RunConfig
from xfast.stilts.training import train

_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)


def _copy(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder))


def test_the_environment_sets_no_precision(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``accelerate launch`` leaves its own there."""
    plain = stilts.run_config(base, tmp_path / "plain", ["xnli"], np.random.default_rng(0), 16, max_steps=2)
    expected = stilts.weights(train(plain).folder / "encoder")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = stilts.weights(train(stilts.changed(plain, output=str(tmp_path / "launched"))).folder / "encoder")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_an_untied_decoder_is_trained_and_kept(base: Path, tmp_path: Path) -> None:
    made = transformers.AutoTokenizer.from_pretrained(base)
    made.save_pretrained(tmp_path / "untied")
    model = stilts.checkpoint(tmp_path / "untied", len(made), tie_word_embeddings=False)
    text = stilts.write_lines(tmp_path / "text.txt", stilts.sentences(np.random.default_rng(0), 60))
    values = {**stilts.SETTINGS, "max_steps": 3, "mlm_files": [str(text)]}
    trained = train(RunConfig(str(model), ("mlm",), str(tmp_path / "run"), **values))
    before, after = stilts.weights(model), stilts.weights(trained.folder / "tasks/mlm")
    assert before.keys() <= after.keys()
    name = "lm_head.decoder.weight"
    assert not torch.equal(before[name], after[name]) and torch.allclose(before[name], after[name], atol=0.01)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(trained.folder / "tasks/mlm")
    assert torch.equal(loaded.lm_head.decoder.weight, after[name])
    assert torch.equal(after["lm_head.decoder.bias"], after["lm_head.bias"]) and after["lm_head.bias"].any()


def test_a_run_killed_after_it_stopped_early_makes_no_further_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xfast.stilts.dev.Evaluator.__call__", lambda self, model: {"score": 50.0})
    rng = np.random.default_rng(6)
    whole = stilts.run_config(base, tmp_path / "whole", ["xnli"], rng, max_steps=20, eval_steps=1, patience=3)
    expected = train(whole)
    cut = stilts.changed(whole, output=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr("xfast.stilts.training._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    found = train(cut)
    assert found.steps == expected.steps == 4 and found.score == expected.score
    a, b = (stilts.weights(run.folder / "encoder") for run in (expected, found))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_process_does_not_train_in_the_same_folder(base: Path, tmp_path: Path) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(0), 16, max_steps=2)
    refused: list[bool] = []

    class Again(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            for resume in (True, False):
                with pytest.raises(InvalidOptionError, match=r"output: another process is at work in .*run; wait"):
                    train(run, resume=resume)
                refused.append(resume)

    assert train(run, callbacks=[Again()]).steps == 2 and refused[:2] == [True, False]
    assert train(run).steps == 2  # it is given back


def test_checkpoints_that_a_killed_run_left_behind_its_result_go(base: Path, tmp_path: Path) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(0), 16, max_steps=2)
    left = train(run).folder / "checkpoint-2"
    left.mkdir()
    (left / "optimizer.pt").write_bytes(b"12345")
    assert train(run).steps == 2 and not left.exists()
    kept = stilts.changed(run, output=str(tmp_path / "kept"), keep_checkpoints=True)
    assert train(kept) == train(kept) and (tmp_path / "kept/checkpoint-2").is_dir()


@pytest.mark.parametrize("task", ["mewslix", "mlm"])
def test_a_diverged_model_has_no_dev_score(task: str, base: Path, tmp_path: Path) -> None:
    model, rng = _copy(base, tmp_path / "model"), np.random.default_rng(0)
    weights = load_file(model / "model.safetensors")
    weights["roberta.encoder.layer.0.output.dense.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    if task == "mlm":
        text = stilts.write_lines(tmp_path / "text.txt", stilts.sentences(rng, 60))
        values = {**stilts.SETTINGS, "max_steps": 1, "mlm_files": [str(text)]}
        run = RunConfig(str(model), ("mlm",), str(tmp_path / "run"), **values)
    else:
        run = stilts.run_config(model, tmp_path / "run", [task], rng, 16, max_steps=1)
    with pytest.raises(InvalidInputError, match=r"model: NaN or infinity instead of a (vector|loss) for example"):
        train(run)
    assert not (tmp_path / "run/result.json").exists()
