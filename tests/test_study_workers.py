"""What a worker says beside its times: which code ran, the memory it took, the predictions that it can compare."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from xfast.study import arms, probes, run, worker
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import EARLY, QUANTISATION, EngineName, Settings
from xfast.study.work import Texts

TINY = Settings(sizes=("tiny",), engines=("native:fp32",), tasks=("panx", "xnli"), languages=("sw",), samples=2)
TINY = replace(TINY, responses=0, rounds=1, probes=False)


def measured(settings: Settings, folder: Path, stop: Any = None) -> list[dict[str, Any]]:
    """What the worker of the first group sends, in this process; ``stop`` may raise at a record."""
    group = run.plan(settings, Texts(settings), output=folder).groups[0]
    sent: list[dict[str, Any]] = []

    def send(record: dict[str, Any]) -> None:
        sent.append(record)
        if stop is not None:
            stop(record)

    made = (settings, group.size, group.engine, group.cells, group.fit, frozenset(), group.facts, group.work)
    with contextlib.suppress(StopIteration):
        worker._Group(worker.Job(*made, folder), send).run()
    return sent


def test_calls_of_the_original_code_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [record for record in measured(TINY, tmp_path) if record["kind"] == "note"]
    accelerate = arms.accelerate
    made: list[torch.nn.Module] = []

    def hooked(model: torch.nn.Module, engine: EngineName, **options: Any) -> torch.nn.Module:
        found = accelerate(model, engine, **options)
        made.append(found)
        if len(made) % 3 == 2:  # the intermediate arm: its last layer may not be skipped or fused any more
            layer: Any = arms.without_head(found).encoder.layer[0]
            layer.register_forward_hook(lambda *_: None)
        return found

    monkeypatch.setattr(arms, "accelerate", hooked)
    sent = measured(TINY, tmp_path)
    texts = [record["text"] for record in sent if record["kind"] == "note"]
    assert len(texts) == 2  # the reasons are said once for each head
    for head, text in zip(("tagging", "classification"), texts, strict=True):
        assert text.startswith(f"tiny native:fp32, {head}: calls of {INTERMEDIATE} ran the original code")
        assert BASELINE not in text and CONTROL not in text and "hook" in text
    kinds = [record["kind"] for record in sent]
    assert kinds.index("note") < kinds.index("visit")  # known when the first calls have run


def test_memory_is_told_before_a_block_is_timed_and_after_it(tmp_path: Path) -> None:
    sent = measured(TINY, tmp_path)
    kinds = [record["kind"] for record in sent if record["kind"] in ("engine", "memory", "visit")]
    assert kinds == ["engine", "memory", "visit", "memory"] * 2
    peaks = [record["peak_bytes"] for record in sent if record["kind"] == "memory"]
    assert peaks == sorted(peaks) and peaks[0] > 1e8
    assert [record["head"] for record in sent if record["kind"] == "engine"] == ["tagging", "classification"]

    def killed(record: dict[str, Any]) -> None:
        if record["kind"] == "visit":
            raise StopIteration

    assert [record["kind"] for record in measured(TINY, tmp_path, killed)][-2:] == ["memory", "visit"]


@pytest.mark.parametrize("pooled", [True, False])
def test_a_head_that_is_one_matrix_reads_the_pooler(pooled: bool) -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():  # else every text is of one class, at every layer
        for weight in (model.bert.pooler.dense.weight, model.bert.encoder.layer[1].output.dense.weight):
            weight *= 50
    ids = torch.randint(5, 100, (30, 9))
    mask = torch.ones_like(ids)
    mask[:15, 5:] = 0
    with torch.inference_mode():
        states = model.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        labels = [model.classifier(model.bert.pooler(layer)).argmax(-1) for layer in states]
        assert torch.equal(labels[-1], model(ids, attention_mask=mask).logits.argmax(-1))
    if not pooled:
        model.bert.pooler = None
    batch = {("xnli", "sw"): (ids, mask)}
    found = list(probes.compare(model, EngineName.parse("native:int8"), batch, (QUANTISATION, EARLY)))
    early = [one["value"] for one in found if one.get("probe") == EARLY]
    agreeing = [one for one in found if one.get("what") == "predictions that agree with fp32's"]
    notes = [one["text"] for one in found if one.get("kind") == "note"]
    if pooled:
        assert early[0] < early[1] == 1
        assert early == pytest.approx([float((label == labels[-1]).float().mean()) for label in labels])
        assert len(agreeing) == 1 and round(agreeing[0]["value"] * 30, 4) % 1 == 0 and notes == []
    else:
        assert early == [] and agreeing == []
        assert len(notes) == 1 and "BertForSequenceClassification" in notes[0]
    assert any(one.get("what", "").startswith("cosine") for one in found)
