"""Packed artifacts as arms: which fit, seeded ones made and made again, given ones, and what of either cannot be."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study_processes as processes
import torch
import transformers
from rich.console import Console
from study_processes import quiet

import xfast
from xfast import artifact
from xfast.benchmarks.models import SeededTensors, random_model
from xfast.convert import convert
from xfast.errors import ArtifactError, InvalidOptionError
from xfast.study import arms, artifacts, document, fit, report, run, store, summary, worker
from xfast.study.artifacts import Seeded
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE
from xfast.study.factors import CHECKPOINT, EngineName, Settings
from xfast.study.timing import Runner
from xfast.study.work import Texts

TINY = Settings(
    sizes=("tiny",),
    engines=("native:int8",),
    tasks=("panx",),
    languages=("sw",),
    samples=4,
    responses=0,
    rounds=1,
    probes=False,
    threads=1,
)
GB = 10**9
ALL_FIT, TWO_FIT = fit._SPARE_BYTES + 100_000_000, fit._SPARE_BYTES + 50_000_000
"""Memory for all arms of tiny as artifacts and for none as models; for the baseline's artifact alone."""

_forked = pytest.fixture(scope="module", autouse=True)(processes.forked)


def limited(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: memory)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / store.NAME).read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


# --- seeded weights without a model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seeded_tensors_are_those_of_the_model_in_memory(dtype: torch.dtype) -> None:
    model, drawn = random_model("tiny", 3, dtype), SeededTensors("tiny", 3, dtype)
    parameters = dict(model.named_parameters())
    assert drawn.names() == parameters.keys()
    assert drawn.bytes == sum(one.numel() * one.element_size() for one in parameters.values())
    for name, want in parameters.items():
        assert drawn.entry(name).shape == tuple(want.shape)
        assert torch.equal(drawn.read(name), want)
    table = parameters["embeddings.word_embeddings.weight"]  # several chunks, which end in the middle of rows' pieces
    for first, rows in ((0, 5), (32760, 20), (40000, 50000), (250000, 8192)):
        got = drawn.read("embeddings.word_embeddings.weight", first, rows)
        assert torch.equal(got, table[first : first + rows])
    assert drawn.identity() != SeededTensors("tiny", 4, dtype).identity()


@pytest.mark.parametrize(("task", "precision"), [("panx", "int8"), ("xcopa", "int4"), ("xnli", "fp32")])
def test_a_mapped_arm_computes_what_the_arm_in_memory_does(task: str, precision: str, tmp_path: Path) -> None:
    engine, dtype = EngineName("native", precision), torch.bfloat16 if precision == "int4" else torch.float32
    settings = replace(TINY, tasks=(task,), seed=2)
    seeded = Seeded("tiny", precision, 3, dtype)  # the intermediate arm's
    found = seeded.make(tmp_path, lambda _: None)
    assert (found.precision, found.dtype) == (precision, dtype)
    assert 0.99 < artifacts.bytes_of(arms.size_facts("tiny"), precision, dtype) / found.bytes <= 1.01
    ids = torch.randint(5, 1000, (3, 2, 9) if task == "xcopa" else (4, 9))
    mask = torch.ones_like(ids)
    mask[..., 1, 4:] = 0
    for one in (task, "tatoeba"):
        made = arms.model_of(settings, "tiny", INTERMEDIATE, one, dtype)
        want = Runner(arms.accelerate(made, engine, keep_weights=False), "cpu")((ids, mask))
        mapped = arms.mapped_model(found, one, settings.seed)
        assert arms.accelerate(mapped, engine) is mapped and "mapped from" in str(xfast.explain(mapped))
        assert torch.equal(Runner(mapped, "cpu")((ids, mask))[0], want[0])
    before = found.folder / artifact.layer_file(0)
    changed = before.stat().st_mtime_ns
    assert seeded.make(tmp_path, lambda _: None) == found and before.stat().st_mtime_ns == changed
    seeded.remove(tmp_path)
    assert not list(tmp_path.iterdir())


# --- which arms fit


def planned(size: str, engine: str, memory: int, **options: Any) -> Any:
    settings = replace(TINY, sizes=(size,), engines=(engine,), **options.pop("settings", {}))
    return run.plan(settings, Texts(settings), available=memory, **options)


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ceiling", lambda *_, **__: 10.0)


@pytest.mark.parametrize(
    ("size", "engine", "mapped", "names"),
    [
        ("xl", "native:int8", False, {BASELINE, INTERMEDIATE, CONTROL}),
        ("xxl", "native:int8", True, {BASELINE, CONTROL}),
        ("13b", "native:int8", True, {BASELINE, CONTROL}),
        ("xxl", "native:int4", True, {BASELINE, INTERMEDIATE, CONTROL}),
        ("13b", "native:int4", True, {BASELINE, INTERMEDIATE, CONTROL}),
    ],
)
def test_what_fits_into_22_gb(size: str, engine: str, mapped: bool, names: set[str]) -> None:
    made = planned(size, engine, 22 * GB, disk=60 * GB)
    (group,) = made.groups
    assert (group.fit.build.mapped, set(group.fit.arms)) == (mapped, names)
    assert not group.shared_control and group.fit.memory_bytes < 22 * GB
    assert set(group.fit.seeded) == (names if mapped else set())
    if mapped:
        assert group.fit.seeded[CONTROL] == group.fit.seeded[BASELINE]
        copies = len(names) - 1
        assert group.fit.to_make == copies and made.disk_bytes == group.fit.disk_bytes
        each = made.disk_bytes / copies
        assert group.fit.memory_bytes == made.disk_bytes + fit._SPARE_BYTES
        assert each / {"int8": 1.01, "int4": 0.58}[engine.split(":")[1]] < group.facts["parameters"] < 2 * each
        assert made.seconds and made.converting_s > 1e-8 * copies * group.facts["parameters"]
    lost = [one for one in made.skipped if one["what"] == f"{INTERMEDIATE} arm of {size} {engine}"]
    assert len(lost) == (INTERMEDIATE not in names)
    assert all("2 packed artifacts need about" in one["why"] and "22.0 GB are free" in one["why"] for one in lost)


def test_artifacts_are_the_cpus_and_of_seeded_weights_only() -> None:
    for engine in ("stock:bf16", "auto:int8", "native:fp16"):
        assert not planned("13b", engine, 22 * GB, disk=60 * GB).groups
    assert not artifacts.can_be_made(replace(TINY, device="cuda"), EngineName("native", "int8"))
    (skipped,) = planned("13b", "native:int8", 12 * GB, disk=60 * GB).skipped
    assert skipped["why"].startswith("1 packed artifact needs about 13.") and "12.0 GB are free" in skipped["why"]


def test_a_disk_that_is_too_small_is_said_beforehand(tmp_path: Path) -> None:
    (skipped,) = planned("13b", "native:int8", 22 * GB, disk=9 * GB).skipped
    assert skipped["what"] == "13b native:int8"
    assert "1 packed artifact would take 13.1 GB of the study's disk, 8.5 GB can be used" in skipped["why"]
    made = planned("13b", "native:int4", 22 * GB, disk=12 * GB)
    assert made.groups[0].fit.arms == (BASELINE, CONTROL)
    assert "2 packed artifacts would take 14." in made.skipped[0]["why"]
    both = {"sizes": ("xxl", "13b"), "engines": ("native:int8",)}
    settings = replace(TINY, **both)
    one_by_one = run.plan(settings, Texts(settings), 22 * GB, disk=16 * GB, output=tmp_path)
    assert len(one_by_one.groups) == 2 and one_by_one.disk_bytes < 14 * GB
    kept = run.plan(settings, Texts(settings), 22 * GB, disk=16 * GB, output=tmp_path, keep_artifacts=True)
    assert [group.size for group in kept.groups] == ["xxl"]
    # What a former run has written needs no room again.
    there = Seeded("13b", "int8", 0, torch.bfloat16).folder(tmp_path)
    there.mkdir(parents=True)
    with (there / "layer").open("wb") as file:
        file.truncate(8 * GB)
    made = planned("13b", "native:int8", 22 * GB, disk=9 * GB, output=tmp_path)
    assert made.groups[0].fit.to_make == 1 and 5 * GB < made.disk_bytes < 5.3 * GB


def test_free_disk_is_that_of_a_folder_to_be(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    room = artifacts.disk_room(tmp_path / "a" / "b", None)
    assert room is not None and abs(free - room - artifacts._SPARE_DISK_BYTES) < GB
    assert artifacts.disk_room(tmp_path, GB) == GB - artifacts._SPARE_DISK_BYTES


# --- a whole study


def test_a_study_of_artifacts_from_its_plan_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, TWO_FIT)
    settings = replace(TINY, tasks=("panx", "xnli"), languages=("sw", "en"), responses=1)
    said = io.StringIO()
    console = Console(file=said, width=300)
    studied = run.start(settings, tmp_path, resume=False, console=console)
    assert "disk about 0.0 GB at a time for packed artifacts" in said.getvalue()
    (lost,) = studied["skipped"]
    assert lost["what"] == "intermediate arm of tiny native:int8"
    for cell in studied["cells"]:
        assert set(cell["throughput"] or cell["latency"]) == {BASELINE, CONTROL} and set(cell["ratios"]) == {CONTROL}
    assert {one["arm"] for one in studied["equivalence"]} == {CONTROL}
    assert len(studied["cells"]) == 2 * 2 * 2
    how = studied["held"]["tiny native:int8"]
    assert how[BASELINE] == "packed artifact of seeded weights (float32), mapped"
    assert how[CONTROL].endswith("the baseline's files") and INTERMEDIATE not in how
    (memory,) = studied["memory"]
    assert memory["arms"] == 2 and memory["peak_bytes"] > 1e8
    assert not (tmp_path / artifacts.FOLDER).exists()  # it was needed for the measurements
    page = report.write(studied, tmp_path)["index.html"].read_text(encoding="utf-8")  # type: ignore[arg-type]
    assert "How the weights are held" in page and "packed artifact of seeded weights" in page
    # Ids and cells are those of the same study in memory.
    digests = {record["cell"]: record["digest"] for record in records(tmp_path, "cell")}
    group = run.plan(settings, Texts(settings), 100 * GB).groups[0]
    assert not group.fit.build.mapped and group.digests == {cell: {"digest": one} for cell, one in digests.items()}


def test_conversion_that_was_killed_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Seeded("tiny", "int8", 0, torch.float32).folder(tmp_path)
    process = multiprocessing.get_context("forkserver").Process(target=processes.begin, args=(TINY, tmp_path, ALL_FIT))
    process.start()
    written = folder / artifact.STAGING / artifact.layer_file(1)
    deadline = time.monotonic() + 60
    while not written.is_file() and time.monotonic() < deadline:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert artifact.is_artifact(folder) and not (folder / artifact.MANIFEST).exists()
    with pytest.raises(ArtifactError, match="not finished"):
        artifacts.find(folder)
    begun = (folder / artifact.STAGING / artifact.layer_file(0)).stat().st_mtime_ns
    limited(monkeypatch, ALL_FIT)
    studied = run.start(TINY, tmp_path, resume=True, console=quiet(), keep_artifacts=True)
    assert not studied["skipped"] and set(studied["cells"][0]["ratios"]) == {INTERMEDIATE, CONTROL}
    assert (folder / artifact.layer_file(0)).stat().st_mtime_ns == begun
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["tiny-int8-seed0", "tiny-int8-seed1"]
    for name in names:
        xfast.load(folder.parent / name, verify=True)


def test_an_artifact_that_was_damaged_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = Seeded("tiny", "int8", 0, torch.float32)
    layer = seeded.make(tmp_path, lambda _: None).folder / artifact.layer_file(1)
    good = layer.read_bytes()
    layer.write_bytes(good[:-9] + b"\x55" + good[-8:])
    limited(monkeypatch, TWO_FIT)
    studied = run.start(TINY, tmp_path, resume=False, console=quiet(), keep_artifacts=True)
    assert len(studied["cells"]) == 1 and not records(tmp_path, "failed")
    assert layer.read_bytes() == good


def test_a_disk_that_is_full_after_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, TWO_FIT)
    folder = Seeded("tiny", "int8", 0, torch.float32).folder(tmp_path)
    folder.parent.mkdir(parents=True)
    folder.write_text("something else")
    settings = replace(TINY, engines=("native:int8", "native:int4"))
    studied = run.start(settings, tmp_path, resume=False, console=quiet())
    why = {one["what"]: one["why"] for one in studied["skipped"]}
    assert str(folder) in why["tiny native:int8"] and "tiny native:int4" not in why
    assert {cell["engine"] for cell in studied["cells"]} == {"native:int4"}


@pytest.mark.parametrize(("faults", "doubted"), [(0, 0), (1, 0), (500, 1)])
def test_weights_that_memory_did_not_hold_are_said(
    faults: int, doubted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = itertools.count(0, faults)
    monkeypatch.setattr(worker, "_page_faults", lambda: next(counter))
    settings = replace(TINY, threads=None)
    group = run.plan(settings, Texts(settings), TWO_FIT, output=tmp_path).groups[0]
    sent: list[dict[str, Any]] = []
    made = (settings, "tiny", "native:int8", group.cells, group.fit, frozenset(), group.facts, group.work)
    worker._Group(worker.Job(*made, tmp_path), sent.append).run()
    notes = [record["text"] for record in sent if record["kind"] == "note"]
    assert len(notes) == doubted and all("tiny native:int8: weights were read from disk" in text for text in notes)
    assert worker.ALIVE in sent  # while it was converted


def test_arms_that_ran_in_some_visits_only_are_left_out() -> None:
    settings = replace(TINY, rounds=2)
    facts = {"samples": 4, "tokens": 9, "sequences": 4, "words": None, "padding": 0.0}
    key = "tiny/native:int8/panx/sw/sorted/16"
    begin = {"kind": "study", "settings": settings.as_dict(), "machine": {}}
    cell = {"kind": "cell", "cell": key, "fertility": None, "windows_per_example": None, **facts}
    found = [begin, cell]
    for number, names in enumerate(((BASELINE, CONTROL), (BASELINE, INTERMEDIATE, CONTROL))):
        visit = {"kind": "visit", "cell": key, "round": number}
        found.append({**visit, "seconds": {name: [1.0] for name in names}, "joules": dict.fromkeys(names)})
    made = summary.document_of(found, Path("x"))
    assert set(made["cells"][0]["throughput"]) == {BASELINE, CONTROL}
    assert {one["arm"] for one in made["scaling"]} == {BASELINE} and made["held"] == {}
    assert "held" not in document.Study.__required_keys__  # which older documents have not


# --- checkpoints that are artifacts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with XNLI's labels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    labels = dict(enumerate(arms.get("xnli").labels))
    config = transformers.XLMRobertaConfig(
        vocab_size=250002,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        type_vocab_size=1,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    transformers.XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int8"
    convert(str(checkpoint), folder, "int8")
    return folder


def given(**folders: Path) -> Settings:
    named = {arm: {"": str(folder)} for arm, folder in folders.items()}
    return replace(TINY, sizes=(CHECKPOINT,), tasks=("xnli", "panx"), **named)


def test_an_artifact_is_a_checkpoint(checkpoint: Path, packed: Path, tmp_path: Path) -> None:
    settings = replace(given(baseline=checkpoint, intermediate=packed), probes=True)
    studied = run.start(settings, tmp_path, resume=False, console=quiet())
    assert {cell["task"] for cell in studied["cells"]} == {"xnli", "panx"}
    assert all(set(cell["ratios"]) == {INTERMEDIATE, CONTROL} for cell in studied["cells"])
    how = studied["held"]["checkpoint native:int8"]
    assert how[INTERMEDIATE] == "packed artifact, mapped" and how[CONTROL] == how[BASELINE]
    assert how[BASELINE] == "checkpoint in float32, packed beside them"
    assert [note for note in studied["notes"] if "random head for panx in intermediate" in note]
    assert not [note for note in studied["notes"] if "random head for xnli" in note]
    lost = {one["what"]: one["why"] for one in studied["skipped"]}
    assert "which packed artifacts do not have" in lost["probe quantisation of checkpoint native:int8"]
    ids = torch.randint(5, 1000, (3, 9))
    for task in ("xnli", "panx", "tatoeba"):
        made = [arms.model_of(settings, CHECKPOINT, arm, task, torch.float32) for arm in (BASELINE, INTERMEDIATE)]
        engine = EngineName("native", "int8")
        one, two = (Runner(arms.accelerate(model, engine, keep_weights=False), "cpu") for model in made)
        assert torch.equal(one((ids, torch.ones_like(ids)))[0], two((ids, torch.ones_like(ids)))[0])


def test_engines_that_cannot_run_an_artifact_are_skipped_with_the_reason(packed: Path, checkpoint: Path) -> None:
    settings = replace(given(baseline=packed), engines=("native:fp32", "native:int8", "stock:fp32"))
    made = run.plan(settings, Texts(settings), 100 * GB)
    assert [group.engine for group in made.groups] == ["native:int8"]
    assert made.groups[0].fit.arms == (BASELINE, CONTROL) and made.groups[0].fit.build.mapped
    why = {one["what"]: one["why"] for one in made.skipped}
    for engine in ("native:fp32", "stock:fp32"):
        assert why[f"checkpoint {engine}"].startswith(
            f"{packed} is a packed artifact; accepted: the engine native:int8"
        )
    mixed = replace(settings, baseline={"xnli": str(packed), "": str(checkpoint)})
    made = run.plan(mixed, Texts(mixed), 100 * GB)
    tasks = {group.engine: {cell.task for cell in group.cells} for group in made.groups}
    assert tasks == {"native:fp32": {"panx"}, "native:int8": {"xnli", "panx"}, "stock:fp32": {"panx"}}
    assert "checkpoint native:fp32 xnli" in {one["what"] for one in made.skipped}
    small = run.plan(replace(mixed, engines=("native:int8",)), Texts(mixed), fit._SPARE_BYTES + 1000)
    assert not small.groups and "packed artifacts among them, need" in small.skipped[-1]["why"]


def _cut(folder: Path) -> None:
    path = folder / artifact.layer_file(0)
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    content = bytearray((folder / artifact.layer_file(1)).read_bytes())
    content[-20] ^= 1
    (folder / artifact.layer_file(1)).write_bytes(content)


def _unfinished(folder: Path) -> None:
    (folder / artifact.MANIFEST).unlink()
    (folder / artifact.STAGING).mkdir()


def _fewer_layers(folder: Path) -> None:
    model = xfast.accelerate(random_model("tiny"), precision="int8", layers=1)
    shutil.rmtree(folder)
    xfast.save(model, folder)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / artifact.MANIFEST).write_text("{}"), "names no format"),
        (_unfinished, "is not finished"),
        (_fewer_layers, "runs 1 layers only"),
        (_cut, "bytes"),
        (_flip, "damaged"),
        (lambda f: (f / artifact.layer_file(1)).unlink(), "cannot be read"),
    ],
)
def test_artifacts_that_cannot_be_used_are_said(packed: Path, tmp_path: Path, damage: Any, text: str) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(packed, folder)
    damage(folder)
    settings = replace(given(baseline=packed), baseline={"xnli": str(folder), "": str(packed)})
    studied = run.start(settings, tmp_path / "out", resume=False, console=quiet())
    assert {cell["task"] for cell in studied["cells"]} == {"panx"}
    (why,) = [one["why"] for one in studied["skipped"] if one["what"].endswith(" xnli")]
    assert text in why and str(folder) in why


def test_another_artifact_does_not_continue_a_study(packed: Path, tmp_path: Path) -> None:
    before = arms.stamp(packed)
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    assert arms.stamp(copy) == before
    manifest = copy / artifact.MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert arms.stamp(copy) != before
    with pytest.raises(InvalidOptionError, match="neither config"):
        arms.folder_of({"": str(tmp_path)}, "xnli")
