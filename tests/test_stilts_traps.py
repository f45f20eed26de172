"""Input that was once taken silently and gave a wrong score or a wrong model: each is now right, said or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

from xfast.errors import DataFileError, InvalidInputError, InvalidOptionError
from xfast.stilts import doctor, features, grid, mixture, training
from xfast.stilts.arguments import trainer_arguments
from xfast.stilts.config import RunConfig
from xfast.stilts.data import Source
from xfast.stilts.evaluation import Evaluation, _Predictor, evaluate
from xfast.stilts.examples import Examples, TaggedExample
from xfast.stilts.report import as_dict, load_cells, summarize
from xfast.stilts.report_html import notes
from xfast.stilts.scoring import UNANSWERED, UNKNOWN, score
from xfast.stilts.tasks import get
from xfast.stilts.training import train

_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)
write = pytest.fixture(stilts.write)
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads for pairs, questions and tags, hardly trained."""
    output = tmp_path_factory.mktemp("trained") / "run"
    rng = np.random.default_rng(0)
    run = stilts.run_config(base, output, ["xnli", "xquad", "udpos"], rng, 16, max_steps=2, dev_examples=0)
    return train(run).folder / "tasks"


def _questions(path: Path, count: int, answers: bool = True) -> Path:
    stilts.squad(np.random.default_rng(1), path, count)
    if not answers:
        document = json.loads(path.read_text())
        for paragraph in document["data"][0]["paragraphs"]:
            for qa in paragraph["qas"]:
                qa["answers"] = [{"text": "", "answer_start": 0}]
        stilts.write_json(path, document)
    return path


# --- gold --------------------------------------------------------------------------------------------


def test_labels_for_some_questions_are_no_gold_for_all(trained: Path, tmp_path: Path) -> None:
    _questions(tmp_path / "xquad/xquad.de.json", 8, answers=False)
    _questions(tmp_path / "labels/xquad/test-de.json", 3)
    run = Evaluation(str(trained / "xquad"), "xquad", source=Source(tmp_path), languages=("de",))
    with pytest.raises(DataFileError, match=r"test-de\.json: answers to 3 of the 8 questions of de"):
        evaluate(run)
    _questions(tmp_path / "labels/xquad/test-de.json", 8)
    assert evaluate(run)["score"] is not None


def test_a_blanked_label_file_withholds_its_own_language_alone(trained: Path, tmp_path: Path) -> None:
    _questions(tmp_path / "xquad/xquad.en.json", 5)
    _questions(tmp_path / "xquad/xquad.de.json", 5, answers=False)
    _questions(tmp_path / "labels/xquad/test-de.json", 5, answers=False)
    found = evaluate(Evaluation(str(trained / "xquad"), "xquad", source=Source(tmp_path), languages=("en", "de")))
    assert list(found["languages"]) == ["en"] and found["withheld"] == ["de"]


def test_named_files_have_no_gold_in_the_data_folder(trained: Path, tmp_path: Path) -> None:
    """XQuAD's ids are the same in every language, so another file's answers would fit."""
    mine = _questions(tmp_path / "mine.json", 4, answers=False)
    _questions(tmp_path / "labels/xquad/test-en.json", 4)
    source = Source(tmp_path, files={"xquad": {"test": [str(mine)]}})
    found = evaluate(Evaluation(str(trained / "xquad"), "xquad", source=source, languages=("en",)))
    assert found["withheld"] == ["en"] and found["score"] is None
    with pytest.raises(DataFileError, match=r"question 'q0' is in more than one \(4 questions are\)"):
        Source(files={"xquad": {"test": [str(mine), str(mine)]}}).load(get("xquad"), "test")


def test_zeros_written_over_labels_are_no_gold_wherever_they_are(tmp_path: Path) -> None:
    rows = [{"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "idx": i} for i in range(24)]
    stilts.write_lines(tmp_path / "xcopa/test-sw.jsonl", map(json.dumps, rows))
    labels = stilts.write_lines(tmp_path / "labels/xcopa/test-sw.jsonl", ['{"label": 0}'] * 24)
    examples = Source(tmp_path).load(get("xcopa"), "test", "sw")
    assert {example.label for example in examples.items} == {None}
    for content, message in (
        (['{"label": 0}'] * 24, "every label is 0"),
        (['{"label": null}'] * 24, r"test-sw\.jsonl:1: label None; accepted: 0, 1"),
    ):
        stilts.write_lines(labels, content)
        shutil.copytree(tmp_path / "labels", tmp_path / "guess", dirs_exist_ok=True)
        with pytest.raises(DataFileError, match=message):
            score(tmp_path / "guess", tmp_path / "labels", "xtreme-r", allow_missing=True)
    stilts.write_lines(tmp_path / "gold/xnli/test-sw.tsv", ["neutral", ""])
    stilts.write_lines(tmp_path / "guess/xnli/test-sw.tsv", ["neutral", "neutral"])
    with pytest.raises(DataFileError, match=r"test-sw\.tsv:2: no label; is the gold withheld"):
        score(tmp_path / "guess", tmp_path / "gold", allow_missing=True)


def test_what_is_not_answered_is_counted(tmp_path: Path) -> None:
    _questions(tmp_path / "gold/xquad/test-de.json", 4)
    for answers in ({"q0": "x"}, {"q0": "x", "q9": "y"}):
        stilts.write_json(tmp_path / "guess/xquad/test-de.json", answers)
        found = score(tmp_path / "guess", tmp_path / "gold", allow_missing=True)
        expected = {UNANSWERED: 3, **({UNKNOWN: 1} if "q9" in answers else {})}
        assert found["notes"] == {"xquad": {"de": expected}}
    stilts.write_json(tmp_path / "guess/xquad/test-de.json", {"q9": "y"})
    with pytest.raises(DataFileError, match="has none of the 4 ids"):
        score(tmp_path / "guess", tmp_path / "gold", allow_missing=True)
    stilts.write_json(tmp_path / "gold/xquad/test-de.json", _with_number_for_a_text())
    with pytest.raises(DataFileError, match=r"not SQuAD's format.*1945 is no text"):
        score(tmp_path / "guess", tmp_path / "gold", allow_missing=True)


def _with_number_for_a_text() -> Any:
    qas = [{"id": 7, "question": "?", "answers": [{"text": 1945, "answer_start": 0}]}]
    return {"data": [{"paragraphs": [{"context": "1945", "qas": qas}]}]}


def test_bucc_gold_that_is_kept_apart_is_found(write: Write, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        stilts.write_lines(tmp_path / f"bucc2018/zh-en.{split}.zh", ["zh-1\tyi", "", "zh-2\ter"])
        stilts.write_lines(tmp_path / f"bucc2018/zh-en.{split}.en", ["en-1\tone", "en-2\ttwo"])
    stilts.write_lines(tmp_path / "bucc2018/zh-en.dev.gold", ["zh-1\ten-1"])
    stilts.write_lines(tmp_path / "labels/bucc2018/test-zh.tsv", ["zh-2\ten-2"])
    found = {(one.split, one.rows, one.labelled) for one in doctor.diagnose(tmp_path).found if one.task == "bucc2018"}
    assert found == {("dev", 2, 1), ("test", 2, 1)}  # an empty line is no sentence, to doctor as to evaluation


def test_sentences_without_words_keep_their_place(trained: Path, tmp_path: Path) -> None:
    """The official reader ends a sentence at every empty line, so predictions must have as many."""
    lines = ["river\tNOUN", "", "", "stone\tVERB", "green\tADJ", "", "", "", "bread\tNOUN", ""]
    stilts.write_lines(tmp_path / "full/test-en.tsv", lines)
    stilts.write_lines(tmp_path / "udpos/test-en.tsv", [line.split("\t")[0] for line in lines])
    stilts.write_lines(tmp_path / "labels/udpos/test-en.tsv", [line.split("\t")[-1] for line in lines])
    source, run = Source(tmp_path), {"languages": ("en",)}
    found = evaluate(Evaluation(str(trained / "udpos"), "udpos", tmp_path / "out", source, **run))
    assert found["examples"] == {"en": 6} and found["score"] is not None
    again = score(tmp_path / "out", tmp_path / "labels", allow_missing=True)["tasks"]["udpos"]
    assert again["score"] == found["score"]
    full = Source(files={"udpos": {"test": [str(tmp_path / "full/test-en.tsv")]}}).load(get("udpos"), "test")
    assert [len(example.words) for example in full.items] == [1, 0, 2, 0, 0, 1]


# --- what is read -------------------------------------------------------------------------------------


def test_words_keep_their_spaces_with_byte_level_tokenizers(tmp_path: Path) -> None:
    """RoBERTa's first piece of a word holds the space before it."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(stilts.sentences(np.random.default_rng(0), 50), 400, special_tokens=list(stilts.SPECIAL))
    core.save_model(str(tmp_path))
    roberta = transformers.RobertaTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    words = ("green", "river", "stone", "bread")
    examples = Examples([TaggedExample("0", words, ("NOUN",) * 4)])
    (feature,) = features.encode(examples, get("udpos"), roberta, get("udpos").recipe, labels=("NOUN",)).items
    assert feature.rows[0].tolist() == roberta(" ".join(words))["input_ids"]
    first, starts = feature.extra
    pieces = roberta.convert_ids_to_tokens(feature.rows[0][starts].tolist())
    assert first == 0 and [piece.startswith("Ġ") for piece in pieces] == [False, True, True, True]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"hub": {"tatoeba": "x"}}, "hub: tatoeba is evaluated on files of the data folder alone"),
        ({"files": {"bucc2018": {"test": ["x"]}}}, "files: bucc2018 is evaluated"),
        ({"files": {"lareqa": {"test": ["x"]}}}, "files: lareqa is evaluated"),
        ({"hub": {"mewslix": ""}}, "hub: mewslix is evaluated"),
    ],
)
def test_files_that_would_not_be_read_are_refused(sources: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Source(**sources)
    with pytest.raises(InvalidOptionError, match=message):
        RunConfig("m", ("mnli",), "o", **sources)


def test_one_languages_file_is_not_scored_as_all(tmp_path: Path) -> None:
    for sources in ({"files": {"xnli": {"test": ["my.tsv"]}}}, {"hub": {"xnli": str(tmp_path)}}):
        with pytest.raises(InvalidOptionError, match=r"what `files` or `hub` names is one language's"):
            Evaluation("m", "xnli", source=Source(**sources))
        Evaluation("m", "xnli", source=Source(**sources), languages=("sw",))
    for sources in ({"files": {"xnli": {"test": ["{language}.tsv"]}}}, {"hub": {"xnli": f"{tmp_path}/{{language}}"}}):
        Evaluation("m", "xnli", source=Source(**sources))


def test_a_hub_dataset_may_lack_a_language(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, config: str, split: str) -> Any:
        if "Kazakh" in config:
            raise ValueError("Unknown split \"validation\". Should be one of ['test'].")
        return datasets.Dataset.from_list(
            [{"tokens": ["river"], "pos_tags": None if "Swahili" in config else ["NOUN"]}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert not Source(hub={"udpos": ""}).has(get("udpos"), "dev", "kk")
    run = Evaluation(str(trained / "udpos"), "udpos", source=Source(hub={"udpos": ""}), languages=("kk", "en"))
    found = evaluate(run)
    assert list(found["languages"]) == ["en"] and list(found["missing"]) == ["kk"]
    assert Source(hub={"udpos": ""}).load(get("udpos"), "test", "sw").items[0].tags is None  # withheld


def test_text_that_no_tokenizer_takes_is_named(write: Write) -> None:
    half = '{"sentence1": "cut \\ud83d", "sentence2": "b", "gold_label": "neutral"}\n'
    whole = half.replace("\\ud83d", "\\ud83d\\ude00")
    path = write("t.jsonl", whole + half)
    with pytest.raises(DataFileError, match=r"t\.jsonl:2: half of a surrogate pair"):
        Source(files={"mnli": {"train": [str(path)]}}).load(get("mnli"), "train")
    write("t.jsonl", whole)
    assert Source(files={"mnli": {"train": [str(path)]}}).load(get("mnli"), "train").items[0].first == "cut 😀"
    qa = '{"id": "1", "question": "?", "answers": [{"text": "a", "answer_start": 1e400}]}'
    infinite = '{"data": [{"paragraphs": [{"context": "a", "qas": [' + qa + "]}]}]}"
    for content in ("[" * 100_000, infinite):
        with pytest.raises(DataFileError, match=r"q\.json"):
            Source(files={"squad_v1": {"train": [str(write("q.json", content))]}}).load(get("squad_v1"), "train")


def test_a_heading_is_no_example(write: Write) -> None:
    path = write("test-en.tsv", "sentence1\tsentence2\na\tb\n")
    with pytest.raises(DataFileError, match=r"test-en\.tsv:1: a heading"):
        Source(files={"pawsx": {"test": [str(path)]}}).load(get("pawsx"), "test")


# --- models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["xnli", "xquad", "udpos"])
def test_scores_that_are_no_numbers_are_no_predictions(task: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / task, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["roberta.encoder.layer.0.output.dense.weight"][:] = float("nan")
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    rng = np.random.default_rng(0)
    stilts.nli(rng, tmp_path / "xnli/test-en.tsv", 6)
    _questions(tmp_path / "xquad/xquad.en.json", 6)
    stilts.tagged(rng, tmp_path / "udpos/test-en.tsv", 6)
    run = {"source": Source(tmp_path), "languages": ("en",), "backend": "none"}
    with pytest.raises(InvalidInputError, match="model: NaN or infinity instead of scores"):
        evaluate(Evaluation(str(tmp_path / "model"), task, **run))


def test_sequences_are_as_long_as_in_training(trained: Path) -> None:
    model = str(trained / "xnli")
    for asked, length in ((None, get("xnli").recipe.max_length), (48, 48)):
        run = Evaluation(model, "xnli", max_length=asked)
        assert _Predictor(run, get("xnli")).recipe.max_length == length
    with pytest.raises(InvalidOptionError, match=r"max_length: 999; .* has positions for 512"):
        _Predictor(Evaluation(model, "xnli", max_length=999), get("xnli"))
    config = grid.GridConfig("m", "o", targets=("xnli", "tatoeba"), target={"max_length": 48})
    made = [grid.evaluation(config, "m", name, "test", Path("x")).max_length for name in config.targets]
    assert made == [48, None]


def test_tasks_and_their_benchmarks() -> None:
    for task in ("pawsx", "bucc2018"):
        with pytest.raises(InvalidOptionError, match=f"task: {task} is not in xtreme-r, which has xnli"):
            Evaluation("m", task, benchmark="xtreme-r")
        Evaluation("m", task, benchmark="xtreme-r", languages=("de",))
    assert len(Evaluation("m", "xcopa").wanted) == 11  # in XTREME-R alone


def test_an_output_that_cannot_be_written_is_named(trained: Path, tmp_path: Path) -> None:
    stilts.nli(np.random.default_rng(0), tmp_path / "xnli/test-en.tsv", 6)
    (tmp_path / "file").write_text("")
    run = {"source": Source(tmp_path), "languages": ("en",)}
    with pytest.raises(InvalidOptionError, match="output: cannot write"):
        evaluate(Evaluation(str(trained / "xnli"), "xnli", tmp_path / "file", **run))
    evaluate(Evaluation(str(trained / "xnli"), "xnli", tmp_path / "part", limit=2, **run))
    assert not (tmp_path / "part").exists()  # predictions for a part are no submission


# --- training -----------------------------------------------------------------------------------------


def test_processes_that_do_not_join_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(0), 16)
    assert trainer_arguments(run).use_cpu == (not torch.accelerator.is_available())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidOptionError, match="of 2 processes 1 would train together"):
        trainer_arguments(stilts.changed(run, trainer={"use_cpu": False}))
    with pytest.raises(InvalidOptionError, match="grid: one process runs it"):
        grid.run(grid.GridConfig(str(base), str(tmp_path / "grid")))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"save_only_model": True}, "save_only_model is not accepted: a run that is continued"),
        ({"ignore_data_skip": True}, "ignore_data_skip is not accepted"),
        ({"eval_on_start": True}, "eval_on_start is not accepted"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not accepted: the heads"),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: split_batches: the run makes its batches",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches: the run makes .*accepted: even_batches",
        ),
        ({"adam_beta2": "9.8e-1"}, r"adam_beta2: '9.8e-1'; accepted: a number"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs follows from the run's own options"),
        *(
            ({name: value}, f"{name} is not accepted: the run makes its batches")
            for name, value in {
                "auto_find_batch_size": True,
                "length_column_name": "size",
                "data_seed": 1,
                "dataloader_drop_last": True,
                "dataloader_prefetch_factor": 2,
                "dataloader_persistent_workers": True,
            }.items()
        ),
        *(
            ({name: value}, f"{name} is not accepted: the run evaluates on its dev sets itself")
            for name, value in {
                "per_device_eval_batch_size": 2,
                "eval_accumulation_steps": 2,
                "prediction_loss_only": True,
                "label_names": ["labels"],
                "bf16_full_eval": True,
                "fp16_full_eval": True,
                "do_eval": False,
            }.items()
        ),
    ],
)
def test_trainer_options_that_would_do_harm_are_refused(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        trainer_arguments(RunConfig("m", ("mnli",), str(tmp_path), trainer=trainer))


def test_sampling_is_the_runs_own_whatever_transformers_calls_it(tmp_path: Path) -> None:
    known = transformers.TrainingArguments.__dataclass_fields__  # transformers 4 has the second name
    for name, value in (("train_sampling_strategy", "sequential"), ("group_by_length", True)):
        message = "the run makes its batches" if name in known else "TrainingArguments has no"
        with pytest.raises(InvalidOptionError, match=message):
            trainer_arguments(RunConfig("m", ("mnli",), str(tmp_path), trainer={name: value}))


def test_a_run_begun_anew_and_killed_is_not_the_old_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = stilts.run_config(base, tmp_path / "run", ["xnli"], np.random.default_rng(0), max_steps=4, eval_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    other = stilts.changed(run, learning_rate=1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(other, resume=False)
    with pytest.raises(InvalidOptionError, match="another learning_rate"):
        train(other)
    (tmp_path / "run/run.yaml").unlink()
    with pytest.raises(InvalidOptionError, match=r"holds a run without its run\.yaml"):
        train(other)
    assert train(other, resume=False).steps == 4


def test_a_dual_encoder_needs_others_to_compare_with() -> None:
    for changes in ({"device_batch_size": 1}, {"batch_size": 1}):
        with pytest.raises(InvalidOptionError, match="device_batch_size: mewslix learns from the other examples"):
            RunConfig("m", ("mewslix",), "o", **changes)


def test_an_output_that_is_a_file_is_named_first(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InvalidOptionError, match=r"output: .*file is no folder"):
            train(RunConfig(str(base), ("mnli",), str(output)))
    with pytest.raises(InvalidOptionError, match="output: cannot write"):
        grid.run(grid.GridConfig(str(base), str(tmp_path / "file")))


def test_examples_that_are_held_out_do_not_count(base: Path, tmp_path: Path) -> None:
    path = stilts.squad(np.random.default_rng(0), tmp_path / "t.json", 400)
    run = RunConfig(str(base), ("tydiqa",), "o", files={"tydiqa": {"train": [str(path)]}}, train_examples=20)
    (found,) = mixture.training_sets(run, transformers.AutoTokenizer.from_pretrained(base)).values()
    assert (
        len(found.features) == 20 and len(found.dev) == 370
    )  # TyDiQA has no English dev set: its recipe holds out 370


# --- the grid -----------------------------------------------------------------------------------------


def test_a_cell_killed_before_its_row_is_written_is_not_trained_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    config = stilts.grid_config(base, tmp_path, splits=("dev", "test"))
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            grid.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_trainer", killed)  # a finished run is read, not made
        rows = grid.run(config)
    assert [(row["split"], row["status"]) for row in rows] == [("dev", "done"), ("test", "done")]
    assert rows[0]["training"]["steps"] == 2 and rows[0]["partial"] == "1 of 15 languages"
    folder = tmp_path / "grid/targets/none/xnli/seed0"
    assert not list(folder.rglob("*.safetensors")) and json.loads((folder / "stage0/trained.json").read_text())["steps"]
    assert {path.name for path in folder.glob("evaluation-*")} == {"evaluation-dev.json", "evaluation-test.json"}
    said = notes(as_dict(summarize(load_cells(tmp_path / "grid/cells.jsonl"))))
    assert any(line.endswith(": 1 of 15 languages; official figures are over all.") for line in said)


def test_a_part_of_a_target_is_marked_and_writes_no_predictions(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = stilts.sentences(rng, 9)
    for side in ("sw", "en"):
        stilts.write_lines(tmp_path / f"data/tatoeba/sw-en.{side}", texts)
    stilts.write_lines(tmp_path / "data/labels/tatoeba/test-sw.tsv", map(str, range(9)))
    (row,) = grid.run(stilts.grid_config(base, tmp_path, targets=("tatoeba",), languages=("sw",), limit=5))
    assert row["status"] == "done", row
    assert row["partial"] == "1 of 36 languages, at most 5 examples a language"
    assert not list((tmp_path / "grid").rglob("predictions"))


def test_a_row_cut_off_by_a_crash_is_gone_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    row = {"intermediate": "none", "target": "xnli", "seed": 0, "split": "dev", "status": "done", "score": 1.0}
    grid._append(path, {**row, "error": "a\u2028b"})
    path.write_bytes(path.read_bytes() + '{"intermediate": "ä'.encode()[:-1])
    config = grid.GridConfig("m", str(tmp_path))
    assert list(grid.done(config)) == [("none", "xnli", 0, "dev")]
    grid._append(path, {**row, "seed": 1})
    assert [cell.seed for cell in load_cells(path)] == [0, 1]
    (tmp_path / "grid.json").write_text('{"model":')
    with pytest.raises(DataFileError, match=r"grid\.json:1: not JSON"):
        grid.run(config)
