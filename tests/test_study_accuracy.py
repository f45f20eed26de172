"""A study with checkpoints: two STILTs runs as arms, scores, layers, answers, and what tells the arms apart."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import study_processes as processes
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from xfast.benchmarks import workloads
from xfast.convert import convert
from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts import evaluation
from xfast.stilts.config import RunConfig
from xfast.stilts.data import Source
from xfast.stilts.evaluation import Evaluation, _Predictor, evaluate
from xfast.stilts.model import load_packed_task_model, load_task_model
from xfast.stilts.tasks import get
from xfast.stilts.tokenizer import load_tokenizer
from xfast.stilts.training import train
from xfast.study import accuracy, arms, probes, run
from xfast.study.document import BASELINE, INTERMEDIATE
from xfast.study.factors import CHECKPOINT, EARLY, QUANTISATION, EngineName, Settings
from xfast.study.timing import Runner
from xfast.study.work import Texts

LANGUAGES = ("sw", "en")

base = pytest.fixture(scope="module")(stilts.base)
_forked = pytest.fixture(scope="module", autouse=True)(processes.forked)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng, root = np.random.default_rng(3), folder / "xtreme"
    stilts.nli(rng, root / "xnli/train-en.tsv", 48)
    stilts.squad(rng, root / "squad/train-v1.1.json", 48)
    for language in LANGUAGES:
        rows = stilts.nli(rng, root / f"xnli/full-{language}.tsv", 12).read_text().splitlines()
        stilts.write_lines(root / f"xnli/test-{language}.tsv", ["\t".join(row.split("\t")[:2]) for row in rows])
        stilts.write_lines(root / f"labels/xnli/test-{language}.tsv", [row.split("\t")[2] for row in rows])
        stilts.squad(rng, root / f"xquad/xquad.{language}.json", 8)
    texts = stilts.sentences(rng, 20)
    order = rng.permutation(20)
    stilts.write_lines(root / "tatoeba/sw-en.sw", texts)
    stilts.write_lines(root / "tatoeba/sw-en.en", [texts[i] for i in order])
    stilts.write_lines(root / "labels/tatoeba/test-sw.tsv", map(str, order))
    return folder


@pytest.fixture(scope="module")
def checkpoints(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The arms: the same recipe from the same checkpoint, one of them trained longer."""
    found = {}
    for arm, epochs in ((BASELINE, 1), (INTERMEDIATE, 6)):
        output = str(tmp_path_factory.mktemp(arm))
        options: dict[str, Any] = {"batch_size": 16, "device_batch_size": 16, "max_length": 64, "dev_examples": 0}
        config = RunConfig(str(base), ("xnli", "xquad"), output, data=str(data), epochs=epochs, **options)
        found[arm] = train(config).folder
    return found


@pytest.fixture(scope="module")
def settings(base: Path, data: Path, checkpoints: dict[str, Path]) -> Settings:
    return Settings(
        sizes=(CHECKPOINT,),
        engines=("native:fp32", "native:int8"),
        tasks=("xnli", "xquad", "tatoeba"),
        languages=LANGUAGES,
        samples=4,
        responses=0,
        rounds=1,
        data=str(data),
        tokenizer=str(base),
        baseline={"": str(checkpoints[BASELINE])},
        intermediate={"": str(checkpoints[INTERMEDIATE])},
        threads=1,
    )


@pytest.fixture(scope="module")
def studied(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    console = Console(file=io.StringIO())
    return run.start(settings, tmp_path_factory.mktemp("study"), resume=False, console=console)


def test_scores_are_the_official_ones(studied: dict[str, Any], settings: Settings, data: Path) -> None:
    for arm, given in ((BASELINE, settings.baseline), (INTERMEDIATE, settings.intermediate)):
        model = str(Path(given[""]) / "tasks" / "xnli")
        asked = Evaluation(
            model, "xnli", source=Source(data), languages=LANGUAGES, precision="int8", tokenizer=settings.tokenizer
        )
        expected = evaluate(asked)["languages"]
        rows = [
            row
            for row in studied["accuracy"]
            if (row["arm"], row["task"], row["engine"]) == (arm, "xnli", "native:int8")
        ]
        assert {row["language"]: row["value"] for row in rows} == expected
        assert {row["examples"] for row in rows} == {12}
    assert {row["task"] for row in studied["accuracy"]} == {"xnli", "xquad", "tatoeba"}
    assert [one["what"] for one in studied["skipped"]] == ["accuracy on tatoeba in en"]
    json.dumps(studied, allow_nan=False)


def test_retrieval_is_scored_by_layer_and_the_best_one_named(studied: dict[str, Any]) -> None:
    rows = [row for row in studied["accuracy"] if row["task"] == "tatoeba" and row["arm"] == BASELINE]
    assert {row["layers"] for row in rows} == {1, 2}
    assert all(row["value"] == 100.0 for row in rows)  # translations that are copies are all found
    best = [one for one in studied["probes"] if one["probe"] == "layer"]
    assert {one["arm"] for one in best} == {BASELINE, INTERMEDIATE}
    assert {one["value"] for one in best} == {1.0}
    points = [one for one in studied["pareto"] if one["task"] == "tatoeba" and one["group"] == "all"]
    fronts = {(one["engine"], one["layers"]) for one in points if one["on_front"]}
    assert all(layers == 1 for _, layers in fronts)  # half the cost at the same accuracy


def test_answers_and_windows_are_figures_of_question_answering(studied: dict[str, Any], settings: Settings) -> None:
    answers = [one for one in studied["probes"] if one["probe"] == "answers"]
    assert {(one["arm"], one["language"]) for one in answers} <= {
        (arm, language) for arm in (BASELINE, INTERMEDIATE) for language in LANGUAGES
    }
    assert answers and all(one["value"] > 0 for one in answers)
    assert {one["x"] for one in answers} == set(settings.engines)  # coarse arithmetic may choose other answers
    windows = [cell["windows_per_example"] for cell in studied["cells"] if cell["task"] == "xquad"]
    assert windows and set(windows) == {1.0}


def test_probes_tell_the_arms_apart(studied: dict[str, Any]) -> None:
    by_arm = {
        arm: [p["value"] for p in studied["probes"] if p["arm"] == arm and p["probe"] == "quantisation"]
        for arm in (BASELINE, INTERMEDIATE)
    }
    assert len(by_arm[BASELINE]) == len(by_arm[INTERMEDIATE]) > 0
    assert by_arm[BASELINE] != by_arm[INTERMEDIATE]
    assert studied["arms"][INTERMEDIATE]["source"] != studied["arms"][BASELINE]["source"]
    assert studied["text"] == "real text"


def test_artifacts_are_scored_as_what_they_were_made_from(
    studied: dict[str, Any], settings: Settings, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("tasks/xnli", "tasks/xquad", "encoder"):
        convert(str(checkpoints[BASELINE] / name), tmp_path / name, "fp32")
    packed = Settings.from_dict({**settings.as_dict(), "baseline": {"": str(tmp_path)}, "intermediate": {}})
    found = arms.resolve(packed, CHECKPOINT, ["xnli", "xquad", "tatoeba"])
    assert {task: one[BASELINE].precision for task, one in found.artifacts.items()} == dict.fromkeys(
        found.tasks, "fp32"
    )
    for task in found.tasks:
        languages = [language for language in LANGUAGES if task != "tatoeba" or language != "en"]
        got = [one for one in accuracy.measure(packed, "native:fp32", BASELINE, task, languages, 2) if "value" in one]
        want = [one for one in studied["accuracy"] if (one["task"], one["arm"]) == (task, BASELINE)]
        scores = [
            {(one["language"], one["layers"]): one["value"] for one in rows if one.get("engine") == "native:fp32"}
            for rows in (want, [one for one in got if one["kind"] == "accuracy"])
        ]
        assert scores[0] == scores[1] != {}
    for changes in ({"precision": "int8"}, {"backend": "none"}, {"device": "meta"}):
        asked = {"source": Source(Path(str(settings.data))), "tokenizer": settings.tokenizer, **changes}
        with pytest.raises(InvalidOptionError, match="packed artifact; accepted: precision fp32 or model"):
            evaluate(Evaluation(str(tmp_path / "tasks/xnli"), "xnli", languages=LANGUAGES, **asked))
    with pytest.raises(DataFileError, match="needs a model ForQuestionAnswering"):
        load_packed_task_model(str(tmp_path / "tasks/xnli"), get("xquad"))


def test_a_checkpoint_without_the_head_is_skipped_and_said(settings: Settings, base: Path) -> None:
    bare = Settings.from_dict({**settings.as_dict(), "baseline": {"": str(base)}, "intermediate": {}})
    (record,) = accuracy.measure(bare, "native:fp32", BASELINE, "xnli", ["sw"], 2)
    assert record["kind"] == "skipped" and "no head that was trained" in record["why"]
    wrong = Settings.from_dict({**bare.as_dict(), "tokenizer": str(base / "nowhere")})
    (record,) = accuracy.measure(wrong, "native:fp32", BASELINE, "tatoeba", ["sw"], 1)
    assert record["kind"] == "skipped" and "nowhere" in record["why"]


def test_checkpoints_are_found_and_checked(
    settings: Settings, checkpoints: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    given = {"": str(checkpoints[BASELINE]), "udpos": str(base)}
    assert arms.folder_of(given, "xnli") == checkpoints[BASELINE] / "tasks" / "xnli"
    assert arms.folder_of(given, "tatoeba") == checkpoints[BASELINE] / "encoder"
    assert arms.folder_of(given, "udpos") == base
    with pytest.raises(InvalidOptionError, match="none for xnli"):
        arms.folder_of({"udpos": str(base)}, "xnli")
    with pytest.raises(InvalidOptionError, match=r"neither config\.json nor encoder/"):
        arms.folder_of({"": str(tmp_path)}, "xnli")
    other = stilts.checkpoint(tmp_path / "other", 700, hidden_size=32, num_attention_heads=2)
    mixed = Settings.from_dict({**settings.as_dict(), "intermediate": {"": str(other)}})
    with pytest.raises(InvalidOptionError, match="differ in size"):
        arms.resolve(mixed, CHECKPOINT, ["xnli"])
    assert arms.resolve(settings, CHECKPOINT, ["xnli"]).facts["layers"] == 2


def _long(rng: Any, root: Path) -> None:
    """Texts that need windows or are cut, of one example a task."""
    first, second, context = (" ".join(rng.choice(stilts.WORDS, count)) for count in (200, 300, 900))
    stilts.write_lines(root / "xnli/test-sw.tsv", [f"{first}\t{second}"])
    stilts.write_lines(root / "labels/xnli/test-sw.tsv", ["neutral"])
    answers = [{"text": context.split()[0], "answer_start": 0}]
    qas = [{"id": "q", "question": "what follows river", "answers": answers}]
    document = {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}
    stilts.write_json(root / "xquad/xquad.sw.json", document)


@pytest.mark.parametrize(("task", "sequences", "longest"), [("xnli", 1, 256), ("xquad", 4, 384), ("tatoeba", 20, 0)])
def test_what_is_timed_is_what_is_scored(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: Any, task: str, sequences: int, longest: int
) -> None:
    shutil.copytree(data, tmp_path / "data")
    _long(np.random.default_rng(0), tmp_path / "data" / "xtreme")
    changed = Settings.from_dict({**settings.as_dict(), "data": str(tmp_path / "data")})
    scored: set[tuple[int, ...]] = set()

    def watched(*arguments: Any) -> Any:
        model = load_task_model(*arguments)
        model.register_forward_pre_hook(seen, with_kwargs=True)
        return model

    def seen(model: Any, _: Any, given: dict[str, torch.Tensor]) -> None:
        rows = zip(given["input_ids"], given["attention_mask"], strict=True)
        scored.update(tuple(ids[mask.bool()].tolist()) for ids, mask in rows)

    monkeypatch.setattr(evaluation, "load_task_model", watched)
    records = list(accuracy.measure(changed, "stock:fp32", BASELINE, task, ["sw"], 1))
    assert "accuracy" in {record["kind"] for record in records}
    known = arms.resolve(changed, CHECKPOINT, [task]).facts
    work = Texts(changed).work(task, "sw", 100, workloads.Model(known["vocab"], known["pad"], known["limit"]))
    timed = {tuple(ids.tolist()) for example in work.examples for ids in example}
    assert timed == scored  # both sides of Tatoeba have the same texts here
    assert len(timed) >= sequences and max(map(len, timed)) == (longest or max(map(len, scored)))


def test_the_tokenizer_is_one_for_times_and_scores(settings: Settings, base: Path, tmp_path: Path) -> None:
    named = arms.tokenizer_of(settings, "xnli")
    assert named == base
    own = Settings.from_dict({**settings.as_dict(), "tokenizer": None})
    folder = arms.folder_of(settings.baseline, "xnli")
    assert arms.tokenizer_of(own, "xnli") == folder  # a STILTs run leaves it beside the weights
    assert accuracy._evaluation(own, "native:fp32", folder, "xnli", ["sw"], None, tmp_path).tokenizer == str(folder)
    assert Texts(own).tokenizers["xnli"].name_or_path == str(folder)
    bare = Settings.from_dict({**own.as_dict(), "baseline": {"xnli": str(tmp_path)}, "intermediate": {}})
    assert arms.tokenizer_of(bare, "xnli") == Path(str(settings.data)) / "tokenizer" / "xlmr"


def test_what_has_no_score_is_said(settings: Settings) -> None:
    pairs = [("xnli", "sw"), ("tatoeba", "sw"), ("tatoeba", "en"), ("mlm", "sw")]
    assert [one["what"] for one in accuracy.left_out(settings, pairs)] == [
        "accuracy on tatoeba in en",
        "accuracy on mlm",
    ]
    assert not list(accuracy.left_out(settings, [("xnli", "en"), ("mewslix", "de")]))
    without = Settings.from_dict({**settings.as_dict(), "data": None, "tokenizer": None, "limit": None})
    assert [one["what"] for one in accuracy.left_out(without, pairs)] == ["accuracy"]
    seeded = Settings.from_dict({**settings.as_dict(), "baseline": {}, "intermediate": {}, "sizes": ["tiny"]})
    assert not list(accuracy.left_out(seeded, pairs))  # its note says that nothing is claimed


# --- arms and probes on seeded models


@pytest.mark.parametrize("task", ["xnli", "udpos", "xquad", "xcopa", "tatoeba"])
def test_heads_come_and_go_around_one_encoder(task: str) -> None:
    from xfast.benchmarks.models import random_model

    encoder = random_model("tiny")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = arms.with_head(encoder, task, seed=5)
    again = arms.with_head(encoder, task, seed=5)
    assert arms.without_head(model) is encoder
    shape = (2, 2, 6) if task == "xcopa" else (2, 6)
    ids = torch.randint(5, 1000, shape)
    with torch.inference_mode():
        first, second = (m(input_ids=ids, attention_mask=torch.ones_like(ids))[0] for m in (model, again))
    assert torch.equal(first, second) and torch.isfinite(first).all()
    left = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
    assert left.keys() == before.keys()
    assert all(torch.equal(left[name], before[name]) for name in before)


def test_probes_know_exact_arithmetic_from_coarse() -> None:
    from xfast.benchmarks.models import random_model

    ids = torch.randint(5, 1000, (4, 12))
    inputs = {("panx", "sw"): (ids, torch.ones_like(ids))}
    worst, early = {}, {}
    for engine in ("native:fp32", "native:int8"):
        model = arms.with_head(random_model("tiny"), "panx", 0)
        found = list(probes.compare(model, EngineName.parse(engine), inputs, (QUANTISATION, EARLY)))
        assert {one["probe"] for one in found} == {QUANTISATION, EARLY}
        assert all(0 <= one["value"] <= 1 + 1e-6 for one in found)
        worst[engine] = next(one["value"] for one in found if "worst" in one["what"])
        early[engine] = [one for one in found if one["probe"] == EARLY]
        for wanted in (QUANTISATION, EARLY):
            alone = list(probes.compare(model, EngineName.parse(engine), inputs, (wanted,)))
            assert alone == [one for one in found if one["probe"] == wanted]
    assert worst["native:fp32"] == pytest.approx(1, abs=1e-6)
    assert 0.99 < worst["native:int8"] < worst["native:fp32"]
    assert early["native:fp32"] == early["native:int8"]  # the weights' own, whatever runs them


def test_text_towers_have_no_head_and_are_studied_whole() -> None:
    from xfast.benchmarks.models import config_of

    config = config_of("altclip")
    assert config.num_hidden_layers == 24
    config.num_hidden_layers, config.hidden_size, config.vocab_size, config.project_dim = 2, 32, 100, 16
    config.num_attention_heads, config.intermediate_size = 2, 64
    tower = transformers.AltCLIPTextModel(config).eval()
    assert arms.with_head(tower, "xcopa", 0) is tower
    assert arms.without_head(tower) is tower and arms.detach_head(tower) is tower
    ids = torch.randint(5, 100, (3, 2, 6))
    batch = ids, torch.ones_like(ids)
    assert Runner(tower, "cpu")(batch).last_hidden_state.shape == (6, 6, 16)  # projected, choices as sequences
    inputs = {("xcopa", "sw"): batch}
    found = list(probes.compare(tower, EngineName.parse("native:int8"), inputs, (QUANTISATION, EARLY)))
    assert {one["probe"] for one in found} == {QUANTISATION}


def test_a_head_that_brought_a_pooler_takes_it_along() -> None:
    from xfast.benchmarks.models import random_model

    encoder = random_model("tiny")
    model = arms.with_head(encoder, "xcopa", 0)
    assert encoder.pooler is not None
    assert arms.detach_head(model) is encoder and encoder.pooler is None


def test_new_weights_are_drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from xfast.benchmarks import models

    devices = set()
    monkeypatch.setattr(models, "fill", lambda module, *_: devices.update(p.device.type for p in module.parameters()))
    head = arms.with_head(models.random_model("tiny").to("meta"), "xnli", 0)  # any device that is not the CPU
    assert devices == {"cpu"} and {p.device.type for p in head.parameters()} == {"meta"}


def test_trained_heads_of_plain_folders_are_used_where_they_fit(
    settings: Settings, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(checkpoints[BASELINE] / "tasks" / "xnli", plain)
    changed = Settings.from_dict({**settings.as_dict(), "baseline": {"": str(plain)}, "intermediate": {}})
    found = arms.resolve(changed, CHECKPOINT, ["xnli", "pawsx", "tatoeba"])
    assert found.tasks == ("xnli", "pawsx", "tatoeba")
    assert [note.partition(":")[0] for note in found.notes] == ["random head for pawsx in baseline"]
    assert not [note for note in found.notes if "tatoeba" in note]
    run = Settings.from_dict({**settings.as_dict(), "intermediate": {}})  # whose encoder xnli has tuned
    (note,) = [note for note in arms.resolve(run, CHECKPOINT, ["xnli", "tatoeba"]).notes if "tatoeba" in note]
    assert re.fullmatch(r"tatoeba in baseline: .*encoder has been fine-tuned on .*xnli.*; .* name tatoeba=FOLDER", note)
    trained = load_file(plain / "model.safetensors")["classifier.out_proj.weight"]
    model = arms.model_of(changed, CHECKPOINT, BASELINE, "xnli", torch.float32)
    assert torch.equal(model.classifier.out_proj.weight, trained)
    wrong = {"": str(checkpoints[BASELINE] / "tasks" / "xnli")}  # a STILTs folder, but another task's
    assert not arms.has_trained_head(arms.folder_of(wrong, "udpos"), "udpos")


@pytest.mark.parametrize("content", ["{}", "{", '{"model_type": "nope"}', '{"model_type": "clip"}'])
def test_bad_checkpoints_are_skipped_by_task_and_said(
    settings: Settings, base: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    mixed = {"": str(base), "xnli": str(tmp_path)}
    changed = Settings.from_dict({**settings.as_dict(), "baseline": mixed, "intermediate": {}})
    found = arms.resolve(changed, CHECKPOINT, ["xnli", "tatoeba"])
    assert found.tasks == ("tatoeba",)
    (skipped,) = found.skipped
    assert skipped["what"] == "checkpoint xnli" and str(tmp_path) in skipped["why"]
    with pytest.raises(InvalidOptionError, match="checkpoints"):
        arms.resolve(changed, CHECKPOINT, ["xnli"])


def test_a_checkpoint_that_no_engine_takes_costs_its_task_alone(
    settings: Settings, checkpoints: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints[BASELINE] / "tasks" / "xnli", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["roberta.encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    values = {"baseline": {"": str(base), "xnli": str(tmp_path / "nan")}, "intermediate": {}, "accuracy": False}
    changed = replace(settings, tasks=("xnli", "tatoeba"), engines=("native:fp32",), **values)
    document = run.start(changed, tmp_path / "study", resume=False, console=Console(file=io.StringIO()))
    assert {cell["task"] for cell in document["cells"]} == {"tatoeba"}
    assert any("xnli" in one["what"] and "NaN" in one["why"] for one in document["skipped"])


def test_stock_scores_are_those_of_its_own_precision(settings: Settings, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[BASELINE] / "tasks" / "xnli"
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        asked = accuracy._evaluation(settings, f"stock:{precision}", folder, "xnli", ["sw"], None, folder)
        loaded = _Predictor(asked, get("xnli")).model
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_a_language_without_labels_is_said(settings: Settings, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "xtreme" / "labels" / "xnli" / "test-sw.tsv").unlink()
    changed = Settings.from_dict({**settings.as_dict(), "data": str(tmp_path / "data")})
    records = list(accuracy.measure(changed, "native:fp32", BASELINE, "xnli", ["sw", "en", "te"], 2))
    assert [record["language"] for record in records if record["kind"] == "accuracy"] == ["en"]
    skipped = {record["what"].rpartition(" ")[2]: record["why"] for record in records if record["kind"] == "skipped"}
    assert skipped.keys() == {"sw", "te"} and "labels" in skipped["sw"] and "te" in skipped["te"]


def test_a_limit_leaves_the_answers_out_and_says_so(settings: Settings) -> None:
    limited = replace(settings, limit=2)
    records = list(accuracy.measure(limited, "native:fp32", BASELINE, "xquad", ["sw"], 2))
    assert [one["kind"] for one in records if one["kind"] != "note"] == ["accuracy", "skipped"]
    assert records[-1]["what"] == "probe answers of baseline on xquad (native:fp32)"
    assert "with a limit (2 examples a language)" in records[-1]["why"] and "job" not in records[-1]


def test_what_was_done_to_examples_is_a_note(settings: Settings, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    _long(np.random.default_rng(0), tmp_path / "data" / "xtreme")
    changed = replace(settings, data=str(tmp_path / "data"))
    records = list(accuracy.measure(changed, "native:fp32", BASELINE, "xnli", ["sw"], 2))
    (note,) = [record["text"] for record in records if record["kind"] == "note"]
    assert note.startswith("accuracy of baseline on xnli (native:fp32), sw: 1 times ") and "length limit" in note


def test_the_bare_tokenizer_folder_is_read_everywhere(data_dir: Path) -> None:
    found = load_tokenizer(str(data_dir / "tokenizer" / "xlmr"))
    assert found("hello")["input_ids"] == [0, 33600, 31, 2]
