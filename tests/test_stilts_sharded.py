"""FSDP: two processes that share the weights compute what one does, continue after SIGKILL, leave whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import torch
import transformers

from xfast.errors import InvalidOptionError
from xfast.stilts.config import RunConfig
from xfast.stilts.dev import Evaluator
from xfast.stilts.model import build, load_task_model
from xfast.stilts.tasks import get
from xfast.stilts.training import train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on the CPU; with a GPU these runs would use it")

_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)

PROGRAM = """
import json, os, signal, sys, torch, transformers
torch.set_num_threads(1)
from pathlib import Path
from xfast.stilts import dev, training
from xfast.stilts.config import from_dict, load

run, rank = from_dict(load(Path(sys.argv[1]))), int(os.environ["RANK"])

class Watch(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        Path(sys.argv[1]).with_name(f"held{rank}.json").write_text(json.dumps(held))
        if rank == 1 and state.global_step == int(os.environ.get("KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)

if scores := json.loads(os.environ.get("SCORES", "null")):
    done = len(list(Path(run.output).glob("checkpoint-*/complete.json")))
    following, evaluate = iter(scores[rank][done:]), dev.Evaluator.__call__
    dev.Evaluator.__call__ = lambda self, model: {**evaluate(self, model), "score": next(following)}
training.train(run, callbacks=[Watch()])
"""
"""Notes how many parameters each process holds.

``KILL_AT``: the step after which the second process dies, by SIGKILL. ``SCORES``: by process, dev scores instead of the
true ones, one for each evaluation.
"""

SETTINGS = {"batching": "random", "batch_size": 8, "device_batch_size": 4}


def sharded(run: RunConfig, **changes: Any) -> RunConfig:
    trainer = {"fsdp": True, "logging_steps": 1}
    return stilts.changed(run, trainer=trainer, **changes)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "result.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def same_models(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """Every model that both runs left, bit for bit or within an absolute tolerance."""
    found = sorted(path.relative_to(first) for path in first.glob("**/model.safetensors"))
    assert found and found == sorted(path.relative_to(second) for path in second.glob("**/model.safetensors"))
    for path in found:
        a, b = stilts.weights((first / path).parent), stilts.weights((second / path).parent)
        assert a.keys() == b.keys()
        worst = {name: float((a[name] - b[name]).abs().max()) for name in a}
        assert not {name: value for name, value in worst.items() if value > tolerance}, path


def interrupted(run: RunConfig, folder: Path, step: int, **environment: str) -> None:
    """Train in two processes of which one is killed after a step, and once more to the end."""
    killed = stilts.torchrun(run, folder, PROGRAM, KILL_AT=str(step), **environment)
    assert killed.returncode and not (Path(run.output) / "result.json").exists(), killed.stderr[-3000:]
    assert list(Path(run.output).glob("checkpoint-*/complete.json"))
    finished = stilts.torchrun(run, folder, PROGRAM, **environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "returned a view tensor" not in finished.stderr


def test_two_sharded_processes_train_as_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights to rounding, killed in between or not, with bf16 and gradient checkpointing.

    Without clipping two processes sum as one does; AdamW's last bit depends on where a shard ends, in a vector or its
    tail. Some steps use one head, the pooler or the tied word embeddings, some another. The best checkpoint is not the
    last; the second process's other scores do not count.
    """
    text = stilts.write_lines(tmp_path / "sw.txt", stilts.sentences(np.random.default_rng(5), 40))
    tasks = ["xnli", "udpos", "hellaswag", "mewslix"]
    one = stilts.run_config(
        *(base, tmp_path / "one", tasks, np.random.default_rng(4), 16), **SETTINGS, max_grad_norm=0.0, max_steps=9,
        eval_steps=3, precision="bf16", mlm_files=(str(text),), mlm_share=0.3,
        trainer={"logging_steps": 1},
    )  # fmt: skip
    two = sharded(one, output=str(tmp_path / "two"), gradient_checkpointing=True)
    scores = [10.0, 30.0, 20.0, 30.0]  # the last is of the best model
    interrupted(two, tmp_path, 5, SCORES=json.dumps([scores, [9.0, 8.0, 7.0, 6.0]]))
    following, evaluate = iter(scores), Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self, model: {**evaluate(self, model), "score": next(following)})
    expected = train(one)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert expected.score == result["score"] == 30.0
    assert expected.metrics == pytest.approx(result["metrics"], rel=1e-4)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    same_models(tmp_path / "one", tmp_path / "two", 2e-4)
    for task in (*tasks, "mlm"):
        model = load_task_model(str(tmp_path / "two" / "tasks" / task), get(task))
        assert model.config.architectures == [type(model).__name__]
    heads = {name: (get(name), get(name).labels) for name in (*tasks, "mlm")}
    whole = sum(p.numel() for p in build(str(base), heads, 0).parameters())
    held = [json.loads((tmp_path / f"held{rank}.json").read_text()) for rank in (0, 1)]
    assert whole <= sum(held) < 1.05 * whole and max(held) < 0.55 * whole
    assert not list((tmp_path / "two").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_killed_sharded_run_continues_with_its_dropout(base: Path, tmp_path: Path) -> None:
    """Each process has its own random state; gradients are accumulated and clipped."""
    dropout = tmp_path / "dropout"
    made = transformers.AutoTokenizer.from_pretrained(base)
    made.save_pretrained(dropout)
    stilts.checkpoint(dropout, len(made), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    run = stilts.run_config(
        *(dropout, tmp_path / "whole", ["xnli", "udpos"], np.random.default_rng(7), 16), max_steps=6, eval_steps=2,
        device_batch_size=4,
    )  # fmt: skip
    whole = sharded(run)
    done = stilts.torchrun(whole, tmp_path, PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    cut = stilts.changed(whole, output=str(tmp_path / "cut"))
    interrupted(cut, tmp_path, 3)
    same_models(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "changes", "match"),
    [
        ({"fsdp": True}, {}, r"fsdp: shards over several processes, this is one; start it with torchrun"),
        ({"fsdp": ["hybrid_shard"]}, {}, r"fsdp: \['hybrid_shard'\]; accepted: true, or auto_wrap, full_shard"),
        ({"fsdp": "full_shard offload"}, {}, r"accepted: true, or auto_wrap"),
        ({"deepspeed": "zero.json"}, {}, r"trainer: deepspeed: .*use `fsdp: true`"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, r"version: 1; accepted: 2 .FSDP1's checkpoints"),
        ({"fsdp": True, "fsdp_config": {"fsdp_activation_checkpointing": True}}, {}, r"use the run's gradient_check"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True, "nonsense": 1}}, {}, r"cpu_offload, nonsense follows"),
        ({"fsdp": True, "fsdp_config": {"min_num_params": 10}}, {}, r"min_num_params follows"),
        ({"fsdp": True, "optim": "adafactor"}, {}, r"optim: .*; accepted with fsdp: adamw_torch"),
        ({"fsdp": True}, {"batching": "packed"}, r"batching: packed needs whole weights"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(
    trainer: dict[str, Any], changes: dict[str, Any], match: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    processes = 1 if not changes and len(trainer) == 1 else 2
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", processes)
    run = stilts.run_config(base, tmp_path / "run", ["udpos"], np.random.default_rng(8), 16, **changes)
    with pytest.raises(InvalidOptionError, match=match):
        train(stilts.changed(run, trainer=trainer))
    assert not (tmp_path / "run").exists()
