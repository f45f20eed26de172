"""Training: every type learns, interrupted runs continue exactly, packed equals padded, errors name what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import torch
import transformers

import xfast.training
from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts import checkpoints
from xfast.stilts.checkpoints import CheckpointError
from xfast.stilts.config import RunConfig
from xfast.stilts.model import build, load_task_model
from xfast.stilts.tasks import get
from xfast.stilts.training import train

_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)


@pytest.mark.parametrize("task", list(stilts.DATA))
def test_a_model_learns_64_examples(task: str, base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    run = stilts.run_config(base, tmp_path / "run", [task], rng, epochs=25 if task == "hellaswag" else 40)
    trained = train(run)
    metrics = {name.removeprefix(f"{task}_"): value for name, value in trained.metrics.items()}
    score = metrics.get("f1") if task == "xquad" else metrics.get("token_accuracy", trained.score)
    assert score is not None and score >= 95, metrics
    assert trained.steps >= 100


def test_several_tasks_share_an_encoder(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    text = stilts.write_lines(tmp_path / "sw.txt", stilts.sentences(rng, 60))
    other = stilts.write_lines(tmp_path / "yo.txt", stilts.sentences(rng, 20))
    run = stilts.run_config(
        base,
        tmp_path / "run",
        list(stilts.DATA),
        rng,
        32,
        epochs=24,
        mlm_files=(str(text), str(other)),
        device_batch_size=8,
    )
    trained = train(run)
    assert trained.metrics["udpos_token_accuracy"] >= 75 and trained.metrics["xnli_accuracy"] >= 80, trained.metrics
    assert {"mlm:sw_perplexity", "mlm:yo_perplexity"} <= trained.metrics.keys()
    encoder = stilts.weights(trained.folder / "encoder")
    for task in ("xnli", "xquad", "udpos", "hellaswag", "mewslix", "mlm"):
        model = load_task_model(str(trained.folder / "tasks" / task), get(task))
        own = {k.removeprefix("roberta."): v for k, v in model.state_dict().items() if "pooler" not in k}
        assert torch.equal(own["encoder.layer.0.output.dense.weight"], encoder["encoder.layer.0.output.dense.weight"])
    before = stilts.weights(base)["roberta.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(before, encoder["encoder.layer.0.output.dense.weight"])


def test_masked_language_modelling_lowers_perplexity(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    text = stilts.write_lines(tmp_path / "text.txt", [" ".join(stilts.WORDS[i % 5 : i % 5 + 8]) for i in range(200)])
    values = {**stilts.SETTINGS, "epochs": 20, "mlm_files": [str(text)], "eval_steps": 60}
    trained = train(RunConfig(str(base), ("mlm",), str(tmp_path / "run"), **values))
    log = json.loads((trained.folder / "result.json").read_text())["log"]
    first = next(entry["eval_mlm:text_perplexity"] for entry in log if "eval_mlm:text_perplexity" in entry)
    assert trained.metrics["mlm:text_perplexity"] < min(first, 30)
    continued = transformers.AutoModelForMaskedLM.from_pretrained(trained.folder / "tasks" / "mlm")
    assert not torch.equal(continued.lm_head.dense.weight, stilts.weights(base)["lm_head.dense.weight"])
    assert continued.lm_head.decoder.weight is continued.roberta.embeddings.word_embeddings.weight


# --- continuing ----------------------------------------------------------------------------------------


def test_a_killed_run_continues_to_the_same_weights(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """SIGKILL somewhere after the first checkpoint; dropout, order and masking go on as if nothing had happened."""
    dropout = tmp_path / "dropout"
    made = transformers.AutoTokenizer.from_pretrained(base)
    made.save_pretrained(dropout)
    stilts.checkpoint(dropout, len(made), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    text = stilts.write_lines(tmp_path / "sw.txt", stilts.sentences(rng, 60))
    changes = {"epochs": 6, "eval_steps": 10, "mlm_files": (str(text),), "device_batch_size": 8}
    whole = stilts.run_config(dropout, tmp_path / "whole", ["xnli", "udpos"], rng, **changes)
    cut = stilts.changed(whole, output=str(tmp_path / "cut"))
    expected = train(whole)
    cut.save(tmp_path / "cut.yaml")
    command = [sys.executable, "-c", stilts.RUN, str(tmp_path / "cut.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("checkpoint-*/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    continued = train(cut)
    assert continued.steps == expected.steps and continued.score == expected.score
    a, b = stilts.weights(expected.folder / "encoder"), stilts.weights(continued.folder / "encoder")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_is_not_repeated_and_another_is_refused(base: Path, tmp_path: Path, rng: Any) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], rng, max_steps=2)
    first = train(run)
    stamp = (first.folder / "result.json").stat().st_mtime_ns
    assert train(run) == first and (first.folder / "result.json").stat().st_mtime_ns == stamp
    assert not list(first.folder.glob("checkpoint-*"))
    with pytest.raises(InvalidOptionError, match=r"another learning_rate"):
        train(stilts.changed(run, learning_rate=1e-4))


def test_a_truncated_checkpoint_is_passed_over(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], rng, max_steps=4)
    broken = tmp_path / "run" / "checkpoint-2"
    broken.mkdir(parents=True)
    (broken / "model.safetensors").write_bytes(b"cut")
    assert train(run).steps == 4


LIMITED = """
import resource, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from xfast.stilts.config import from_dict, load
from xfast.stilts.checkpoints import CheckpointError
from xfast.stilts.training import train
run = from_dict(load(Path(sys.argv[1])))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    train(run)
except CheckpointError as error:
    print("CheckpointError:", error)
"""


def test_a_checkpoint_that_lost_a_file_is_not_continued(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"12345")
        content = {"step": step, "files": checkpoints._sizes(folder)}
        (folder / checkpoints.COMPLETE).write_text(json.dumps(content))
    assert checkpoints.last_complete(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()  # the run died while it removed it
    assert checkpoints.last_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    assert checkpoints.last_complete(tmp_path) is None


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_says_so(base: Path, tmp_path: Path, rng: Any) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], rng, max_steps=4, eval_steps=2)
    run.save(tmp_path / "run.yaml")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run.yaml")],
        cwd=tmp_path,  # -c puts the current folder on the path: not the checkout
        capture_output=True,
        text=True,
        check=False,
    )
    assert "CheckpointError:" in done.stdout, done.stderr[-2000:]
    assert str(tmp_path / "run") in done.stdout and "no complete checkpoint" in done.stdout
    assert issubclass(CheckpointError, RuntimeError)


# --- what it computes ------------------------------------------------------------------------------------


def test_accumulation_changes_no_gradient(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """16 examples at once or 4 x 4: the same optimizer steps, to rounding."""
    runs = [
        stilts.run_config(base, tmp_path / f"run{size}", ["xnli"], np.random.default_rng(1), max_steps=6,
                          device_batch_size=size, batching="random")
        for size in (16, 4)
    ]  # fmt: skip
    a, b = (stilts.weights(train(run).folder / "encoder") for run in runs)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-4), name


def test_packed_training_follows_padded_training(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding, on the varlen kernels (in Triton's interpreter where there is no GPU): the same losses."""
    pytest.importorskip("triton", reason="packed training needs triton")
    small = {
        "max_steps": 3,
        "batch_size": 2,
        "device_batch_size": 2,
        "trainer": {"logging_steps": 1},
        "dev_examples": 0,
    }
    losses = []
    calls: list[int] = []
    packed_run = xfast.training.run
    monkeypatch.setattr(xfast.training, "run", lambda *given: (calls.append(1), packed_run(*given))[1])
    for batching in ("length", "packed"):
        run = stilts.run_config(
            base, tmp_path / batching, ["udpos"], np.random.default_rng(2), 16, batching=batching, **small
        )
        log = json.loads((train(run).folder / "result.json").read_text())["log"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert len(losses[0]) == 3 and len(calls) == 3
    assert np.allclose(losses[0], losses[1], rtol=2e-4), losses


def test_two_processes_train_as_one(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """torchrun with two CPU processes and half the examples in each: the same weights, to rounding."""
    settings = {"max_steps": 4, "batch_size": 8, "batching": "random"}
    one = stilts.run_config(
        base, tmp_path / "one", ["xnli", "udpos"], np.random.default_rng(3), device_batch_size=8, **settings
    )
    two = stilts.changed(one, output=str(tmp_path / "two"), device_batch_size=4)
    done = stilts.torchrun(two, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = stilts.weights(train(one).folder / "encoder"), stilts.weights(tmp_path / "two" / "encoder")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-4), name


def test_new_heads_depend_on_the_seed_alone(base: Path) -> None:
    tasks = {"xnli": (get("xnli"), get("xnli").labels), "hellaswag": (get("hellaswag"), ())}
    first, same, other = (build(str(base), tasks, seed).heads.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class _Checkpointing(transformers.TrainerCallback):
    """Notes whether the encoder recomputes its activations."""

    def __init__(self) -> None:
        self.on: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.on.append(any(getattr(part, "gradient_checkpointing", False) for part in model.encoder.modules()))


def test_gradient_checkpointing_changes_no_weight(base: Path, tmp_path: Path) -> None:
    runs = [
        stilts.run_config(
            base, tmp_path / str(on), ["xnli"], np.random.default_rng(4), max_steps=3, gradient_checkpointing=on
        )
        for on in (False, True)
    ]
    seen = _Checkpointing()
    a, b = (stilts.weights(train(run, callbacks=[seen]).folder / "encoder") for run in runs)
    assert seen.on == [False] * 3 + [True] * 3
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


class _Stop(transformers.TrainerCallback):
    """Ends the process's part of a run after a step, as a kill does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_early_stopping_goes_on_counting(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that never gets better: stopped after 1 + patience evaluations, interrupted in between or not."""
    monkeypatch.setattr("xfast.stilts.dev.Evaluator.__call__", lambda self, model: {"score": 50.0})
    make = np.random.default_rng
    whole = stilts.run_config(base, tmp_path / "whole", ["xnli"], make(6), max_steps=20, eval_steps=1, patience=3)
    assert train(whole).steps == 4
    cut = stilts.changed(whole, output=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, callbacks=[_Stop(2)])
    assert train(cut).steps == 4


def test_the_best_checkpoint_is_what_is_saved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([10.0, 30.0, 20.0, 30.0])
    kept: list[torch.Tensor] = []

    def judged(self: Any, model: Any) -> dict[str, float]:
        kept.append(model.encoder.encoder.layer[0].output.dense.weight.detach().clone())
        return {"score": next(scores)}

    monkeypatch.setattr("xfast.stilts.dev.Evaluator.__call__", judged)
    trained = train(
        stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(7), max_steps=6, eval_steps=2)
    )
    assert trained.score == 30 and len(kept) == 4  # the last evaluation is of the best model
    saved = stilts.weights(trained.folder / "encoder")["encoder.layer.0.output.dense.weight"]
    assert torch.equal(saved, kept[1]) and not torch.equal(saved, kept[2])


def test_the_best_checkpoint_of_a_moved_run_is_found_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last checkpoint, and continued under another path: the state names the old one."""
    scores = iter([30.0, 20.0, 30.0])
    kept: list[torch.Tensor] = []

    def judged(self: Any, model: Any) -> dict[str, float]:
        kept.append(model.encoder.encoder.layer[0].output.dense.weight.detach().clone())
        return {"score": next(scores)}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xfast.stilts.dev.Evaluator.__call__", judged)
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(7), max_steps=4, eval_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("xfast.stilts.training._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    (tmp_path / "run").rename(tmp_path / "moved")
    trained = train(stilts.changed(run, output=str(tmp_path / "moved")))
    saved = stilts.weights(trained.folder / "encoder")["encoder.layer.0.output.dense.weight"]
    assert torch.equal(saved, kept[0]) and not torch.equal(saved, kept[1])


def test_starting_anew_forgets_everything(base: Path, tmp_path: Path) -> None:
    make = np.random.default_rng
    first = stilts.run_config(base, tmp_path / "run", ["xnli"], make(8), max_steps=2)
    train(first)
    other = stilts.changed(first, max_steps=4, eval_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(other, resume=False, callbacks=[_Stop(3)])
    assert not (tmp_path / "run/result.json").exists()
    assert train(other).steps == 4


def test_a_refused_run_can_be_corrected(base: Path, tmp_path: Path) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(9), max_steps=2)
    with pytest.raises(InvalidOptionError, match="max_length"):
        train(stilts.changed(run, max_length=600))
    assert train(run).steps == 2


def test_half_precision_checkpoints_train_in_fp32(base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    transformers.AutoModelForMaskedLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(half)
    trained = train(stilts.run_config(half, tmp_path / "run", ["xnli"], np.random.default_rng(10), max_steps=2))
    assert {t.dtype for t in stilts.weights(trained.folder / "encoder").values()} == {torch.float32}


def test_tensorboard_logs(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(11), max_steps=2, tensorboard=True)
    assert list((train(run).folder / "logs").glob("events.out.tfevents.*"))


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"max_length": 600}, InvalidOptionError, r"max_length: 600.*512"),
        ({"batch_size": 20}, InvalidOptionError, r"batch_size: 20 is no multiple"),
        ({"trainer": {"nonsense": 1}}, InvalidOptionError, r"TrainingArguments has no nonsense"),
        ({"trainer": {"learning_rate": 1}}, InvalidOptionError, r"learning_rate follows from the run's own options"),
        ({"batching": "packed", "gradient_checkpointing": True}, InvalidOptionError, r"packed keeps all activations"),
        ({"model": "/nowhere/at/all"}, DataFileError, r"/nowhere/at/all"),
        ({"tokenizer": "/nowhere/at/all"}, DataFileError, r"tokenizer: /nowhere/at/all"),
        ({"mlm_files": ("/nowhere.txt",)}, DataFileError, r"/nowhere.txt"),
    ],
)
def test_bad_input_is_refused(
    changes: dict[str, Any], error: type, match: str, base: Path, tmp_path: Path, rng: Any
) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], rng)
    with pytest.raises(error, match=match):
        train(stilts.changed(run, **changes))


def test_a_checkpoint_of_another_size_is_refused(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """The configuration says one size, the weights have another."""
    other = stilts.checkpoint(tmp_path / "other", 64, hidden_size=32)
    made = transformers.AutoTokenizer.from_pretrained(base)
    made.save_pretrained(other)
    with pytest.raises(InvalidOptionError, match=r"vocabulary of 64"):
        train(stilts.run_config(other, tmp_path / "run", ["xnli"], rng))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "hidden_size": 64, "vocab_size": 5000}))
    with pytest.raises(DataFileError, match=r"model: "):
        train(stilts.run_config(other, tmp_path / "run2", ["xnli"], rng))
