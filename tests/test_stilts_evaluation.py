"""Evaluation of every target type, on the accelerated and the stock model; the grid; the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import xfast
from xfast.cli import app
from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts import evaluation
from xfast.stilts import grid as grids
from xfast.stilts.config import RunConfig
from xfast.stilts.data import Source
from xfast.stilts.evaluation import Evaluation, evaluate, write_predictions
from xfast.stilts.folders import Lock
from xfast.stilts.languages import XTREME_R
from xfast.stilts.scoring import score
from xfast.stilts.search import layer_of
from xfast.stilts.tasks import get
from xfast.stilts.training import train

LANGUAGES = ("en", "ur", "tr")  # in all tasks but Tatoeba, which pairs English with the others
TRAIN = {"batch_size": 16, "device_batch_size": 16, "learning_rate": 2e-3, "max_length": 64, "dev_examples": 0}


_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in XTREME's layout with every target in a few languages, all of it made up."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    root = folder / "xtreme"
    stilts.nli(rng, root / "xnli/train-en.tsv", 60)
    stilts.squad(rng, root / "squad/train-v1.1.json", 60)
    stilts.tagged(rng, root / "udpos/train-en.tsv", 60)
    stilts.hellaswag(rng, folder / "intermediate/hellaswag/hellaswag_train.jsonl", 60)
    stilts.hellaswag(rng, folder / "intermediate/hellaswag/hellaswag_val.jsonl", 20)
    for language in LANGUAGES:
        stilts.nli(rng, root / f"xnli/dev-{language}.tsv", 21)
        stilts.squad(rng, root / f"xquad/xquad.{language}.json", 15)
        stilts.tagged(rng, root / f"udpos/dev-{language}.tsv", 18)
        _unlabelled(root, "xnli", language, rng)
        _unlabelled(root, "udpos", language, rng)
        _xcopa(root, language, rng)
    for language in LANGUAGES[1:]:
        _tatoeba(root, language, rng)
    _bucc(root, "de", rng)
    return folder


def _unlabelled(root: Path, task: str, language: str, rng: Any) -> None:
    """Test files without labels and their gold apart, as XTREME keeps them."""
    make = stilts.nli if task == "xnli" else stilts.tagged
    full = make(rng, root / task / f"full-{language}.tsv", 12).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in full]
    stilts.write_lines(root / task / f"test-{language}.tsv", ["\t".join(row[:-1]) if row[-1] else "" for row in rows])
    stilts.write_lines(root / "labels" / task / f"test-{language}.tsv", [row[-1] for row in rows])


def _tatoeba(root: Path, language: str, rng: Any) -> None:
    texts = stilts.sentences(rng, 30)
    order = rng.permutation(30)  # English sentence i translates foreign sentence order[i]
    stilts.write_lines(root / f"tatoeba/{language}-en.{language}", texts)
    stilts.write_lines(root / f"tatoeba/{language}-en.en", [texts[i] for i in order])
    stilts.write_lines(root / f"labels/tatoeba/test-{language}.tsv", map(str, order))


def _bucc(root: Path, language: str, rng: Any) -> None:
    for split in ("dev", "test"):
        texts = stilts.sentences(rng, 40)
        english = [*texts[:20], *stilts.sentences(rng, 20)]
        stilts.write_lines(
            root / f"bucc2018/{language}-en.{split}.{language}", (f"x-{i}\t{t}" for i, t in enumerate(texts))
        )
        stilts.write_lines(root / f"bucc2018/{language}-en.{split}.en", (f"e-{i}\t{t}" for i, t in enumerate(english)))
        stilts.write_lines(root / f"bucc2018/{language}-en.{split}.gold", (f"x-{i}\te-{i}" for i in range(20)))


def _xcopa(root: Path, language: str, rng: Any) -> None:
    for split in ("val", "test"):
        rows = []
        for i in range(10):
            premise = " ".join(rng.choice(stilts.WORDS, 5))
            choices = {f"choice{k}": " ".join(rng.choice(stilts.WORDS, 3)) for k in (1, 2)}
            rows.append(json.dumps({"premise": premise, **choices, "question": "cause", "label": i % 2}))
        stilts.write_lines(root / f"xcopa/{split}-{language}.jsonl", rows)


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with a head for each type."""
    torch.set_num_threads(1)
    tasks = ("xnli", "xquad", "udpos", "hellaswag")
    output = tmp_path_factory.mktemp("run")
    return train(RunConfig(str(base), tasks, str(output), data=str(data), epochs=12, **TRAIN)).folder


CASES = {"xnli": "xnli", "xquad": "xquad", "udpos": "udpos", "xcopa": "hellaswag"}


@pytest.mark.parametrize("task", list(CASES))
@pytest.mark.parametrize("split", ["dev", "test"])
def test_accelerated_equals_stock(task: str, split: str, trained: Path, data: Path, tmp_path: Path) -> None:
    if task == "xquad" and split == "dev":
        pytest.skip("XQuAD has no dev set")
    model = str(trained / "tasks" / CASES[task])
    run: dict[str, Any] = {"source": Source(data), "split": split, "languages": LANGUAGES}
    fast = evaluate(Evaluation(model, task, tmp_path / "fast", **run))
    stock = evaluate(Evaluation(model, task, tmp_path / "stock", backend="none", **run))
    assert fast["score"] == stock["score"] is not None and fast["languages"] == stock["languages"]
    assert not fast["withheld"] and not fast["missing"]
    written = sorted((tmp_path / "fast" / task).glob(f"{split}-*"))
    assert len(written) == 3
    for path in written:
        assert path.read_bytes() == (tmp_path / "stock" / task / path.name).read_bytes()
    assert "native" in fast["explain"] and stock["explain"] == "stock transformers"


def test_written_predictions_score_the_same(trained: Path, data: Path, tmp_path: Path) -> None:
    model = str(trained / "tasks" / "udpos")
    result = evaluate(Evaluation(model, "udpos", tmp_path, Source(data), languages=LANGUAGES))
    official = score(tmp_path, data / "xtreme" / "labels", allow_missing=True)
    assert official["tasks"]["udpos"]["languages"] == pytest.approx(result["languages"], abs=1e-9)
    assert result["metrics"]["token_accuracy"]["average"] > 50  # a word always has the same tag


def test_translations_that_are_copies_are_all_found(base: Path, data: Path, tmp_path: Path) -> None:
    result = evaluate(Evaluation(str(base), "tatoeba", tmp_path, Source(data), languages=LANGUAGES[1:]))
    assert result["score"] == 100 and result["examples"] == dict.fromkeys(LANGUAGES[1:], 30)
    cls = evaluate(
        Evaluation(str(base), "tatoeba", None, Source(data), languages=LANGUAGES[1:], pooling="cls", layer=2)
    )
    assert cls["score"] == 100
    mined = evaluate(Evaluation(str(base), "bucc2018", tmp_path, Source(data), languages=("de",)))
    assert mined["languages"]["de"] > 90
    on_dev = evaluate(Evaluation(str(base), "bucc2018", None, Source(data), languages=("de",), split="dev"))
    assert on_dev["notes"]["de"] == {"threshold chosen on the data it is scored on": 1}


def test_predictions_of_two_models_do_not_share_a_folder(base: Path, data: Path, tmp_path: Path) -> None:
    other, output = tmp_path / "other", tmp_path / "out"
    shutil.copytree(base, other)
    stilts.checkpoint(other, AutoConfig.from_pretrained(base).vocab_size, seed=1)

    def run(model: Path, language: str, **changes: Any) -> Any:
        return evaluate(Evaluation(str(model), "tatoeba", output, Source(data), languages=(language,), **changes))

    run(base, "tr")
    with pytest.raises(InvalidOptionError, match=r"out/tatoeba holds test predictions of another model, .*; remove"):
        run(other, "ur")
    with pytest.raises(InvalidOptionError, match="holds test predictions of another layer; remove"):
        run(base, "ur", layer=2)
    run(other, "ur", limit=5)  # which writes nothing
    assert not (output / "tatoeba/test-ur.tsv").exists()
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    run(moved, "ur")
    files = {path.name for path in (output / "tatoeba").iterdir() if not path.name.startswith(".")}
    assert files == {"made-by.json", "test-tr.tsv", "test-ur.tsv"}
    # as before where nothing says who made them
    labels = data / "xtreme/labels"
    before = score(output, labels, allow_missing=True)
    (output / "tatoeba/made-by.json").unlink()
    assert score(output, labels, allow_missing=True) == before
    run(other, "ur")


def test_two_processes_do_not_write_one_splits_predictions(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be two models': the second is refused, wherever the first stands; another split's may be written."""
    run = Evaluation(str(base), "tatoeba", tmp_path / "out", Source(data), languages=("tr",))
    folder, busy = tmp_path / "out/tatoeba", "output: another process is at work in .*tatoeba; wait"
    written = write_predictions

    def at_once(*given: Any) -> Path:
        with pytest.raises(InvalidOptionError, match=busy):
            evaluate(run)
        return written(*given)

    monkeypatch.setattr(evaluation, "write_predictions", at_once)
    evaluate(run)
    monkeypatch.undo()
    before = (folder / "test-tr.tsv").stat().st_mtime_ns
    with Lock("output", folder, ".test.lock"), pytest.raises(InvalidOptionError, match=busy):
        evaluate(run)
    assert (folder / "test-tr.tsv").stat().st_mtime_ns == before
    with Lock("output", folder, ".dev.lock"):
        evaluate(run)
    assert (folder / "test-tr.tsv").stat().st_mtime_ns > before


def test_who_comes_first_where_there_was_no_folder_decides(base: Path, data: Path, tmp_path: Path) -> None:
    other, output = tmp_path / "other", tmp_path / "out"
    shutil.copytree(base, other)
    stilts.checkpoint(other, AutoConfig.from_pretrained(base).vocab_size, seed=1)
    first, second = (
        Evaluation(str(model), "tatoeba", output, Source(data), languages=("tr",)) for model in (base, other)
    )
    with evaluation._Written(second, get("tatoeba")) as written:  # as it is before its first language is done
        written.check()
        evaluate(first)
        with pytest.raises(InvalidOptionError, match="holds test predictions of another model"):
            written.add("tr", [])


def test_gold_that_is_withheld_is_said(trained: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "xnli"
    folder.mkdir()
    for language in LANGUAGES:
        (folder / f"test-{language}.tsv").write_bytes((data / f"xtreme/xnli/test-{language}.tsv").read_bytes())
    result = evaluate(Evaluation(str(trained / "tasks/xnli"), "xnli", tmp_path / "out", Source(tmp_path)))
    assert result["score"] is None and result["withheld"] == ["en", "tr", "ur"]  # in the benchmark's order
    assert len(result["missing"]) == 12 and (tmp_path / "out/xnli/test-ur.tsv").is_file()


def test_limit_pooling_and_splits_are_checked(trained: Path, data: Path) -> None:
    model = str(trained / "tasks/xnli")
    limited = evaluate(Evaluation(model, "xnli", None, Source(data), split="dev", languages=("ur",), limit=5))
    assert limited["examples"] == {"ur": 5} and limited["limit"] == 5
    for changes, match in (
        ({"pooling": "max"}, "pooling: 'max'"),
        ({"pooling": "cls"}, "pooling: cls; xnli has a head"),
        ({"layer": 1}, "layer: 1; xnli reads the last one; accepted for tatoeba, bucc2018"),
        ({"split": "train"}, "split: 'train'"),
        ({"benchmark": "glue"}, "benchmark: 'glue'"),
        ({"limit": 0}, "limit: 0"),
        ({"backend": "onnx"}, "backend: 'onnx' is not accepted; accepted: auto, native, triton, tensorrt, none"),
        ({"precision": "auto"}, "precision: 'auto' is not accepted; accepted: model, .*fp8$"),
    ):
        with pytest.raises(InvalidOptionError, match=match):
            Evaluation(model, "xnli", **changes)


def test_a_model_that_does_not_fit_is_refused(trained: Path, base: Path, data: Path) -> None:
    run = {"source": Source(data), "languages": ("ur",)}
    with pytest.raises(DataFileError, match=r"no trained weights for.*train udpos first"):
        evaluate(Evaluation(str(base), "udpos", **run))
    with pytest.raises(DataFileError, match=r"has the labels.*pawsx has 0, 1"):
        evaluate(
            Evaluation(
                str(trained / "tasks/xnli"),
                "pawsx",
                source=Source(data, {"pawsx": {"test": [str(data / "xtreme/xnli/test-ur.tsv")]}}),
                languages=("de",),
            )
        )
    with pytest.raises(InvalidOptionError, match=r"task: mlm; accepted: xnli"):
        evaluate(Evaluation(str(base), "mlm", **run))
    with pytest.raises(DataFileError, match=r"mlqa test: no data in any of"):
        evaluate(Evaluation(str(trained / "tasks/xquad"), "mlqa", source=Source(data)))


def test_the_default_layer_is_14_of_24() -> None:
    def layers(count: int) -> Any:
        return type("Config", (), {"num_hidden_layers": count})

    assert [layer_of(layers(n), None) for n in (1, 12, 24, 36, 48)] == [1, 7, 14, 21, 28]
    with pytest.raises(InvalidOptionError, match=r"layer: 13; the model has 1 to 12"):
        layer_of(layers(12), 13)


# --- the grid ------------------------------------------------------------------------------------------


def _grid(base: Path, data: Path, output: Path, **changes: Any) -> grids.GridConfig:
    options = {**TRAIN, "max_steps": 2}
    return grids.GridConfig(
        str(base),
        str(output),
        str(data),
        intermediates=("none", "hellaswag", "cosmosqa"),
        targets=("xnli", "tatoeba"),
        seeds=(0, 1),
        languages=("ur", "tr"),
        intermediate=options,
        target=options,
        **changes,
    )


def test_a_grid_runs_resumes_and_isolates_failures(base: Path, data: Path, tmp_path: Path) -> None:
    config = _grid(base, data, tmp_path / "grid")
    heard: list[str] = []
    rows = grids.run(config, lambda cell, what: heard.append(what))
    assert len(rows) == 12
    failed = [row for row in rows if row["status"] == "failed"]
    assert {row["intermediate"] for row in failed} == {"cosmosqa"} and len(failed) == 4
    assert all("cosmosqa train" in row["error"] for row in failed)
    assert heard.count("intermediate training") == 4 + 2  # what failed is not tried for the next target
    assert all(set(row["languages"]) == {"ur", "tr"} for row in rows if row["status"] == "done")
    assert {row["split"] for row in rows if row["target"] == "xnli"} == {"dev"}
    assert {row["split"] for row in rows if row["target"] == "tatoeba"} == {"test"}
    assert not list((tmp_path / "grid/targets").rglob("model.safetensors"))
    assert list((tmp_path / "grid/intermediate/hellaswag/seed1/encoder").glob("model.safetensors"))
    # a crash in the middle of a line, then again: only the failed cells are run
    with (tmp_path / "grid/cells.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"intermediate": "no')
    heard.clear()
    again = grids.run(config, lambda cell, what: heard.append(what))
    assert [row["score"] for row in again if row["status"] == "done"] == [
        row["score"] for row in rows if row["status"] == "done"
    ]
    assert heard.count("evaluating") == 0 and heard.count("intermediate training") == 2
    assert len(grids.done(config)) == 12
    with pytest.raises(InvalidOptionError, match=r"holds a grid with another limit"):
        grids.run(_grid(base, data, tmp_path / "grid", limit=3))


def test_xcopa_is_trained_in_two_stages_with_one_head(base: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    rng = np.random.default_rng(5)
    letters = "ABC"
    siqa = [
        json.dumps(
            {
                "context": "a b",
                "question": "c",
                **{f"answer{x}": f"{x} {i}" for x in letters},
                "correct": letters[i % 3],
            }
        )
        for i in range(20)
    ]
    stilts.write_lines(root / "siqa/socialIQa_v1.4_trn.jsonl", siqa)
    _xcopa(root, "sw", rng)
    (root / "copa").mkdir()
    (root / "copa/train.jsonl").write_bytes((root / "xcopa/val-sw.jsonl").read_bytes())
    config = grids.GridConfig(
        str(base),
        str(tmp_path / "grid"),
        str(root),
        intermediates=("none",),
        targets=("xcopa",),
        seeds=(0,),
        benchmark="xtreme-r",
        target={**TRAIN, "max_steps": 2},
        keep_models=True,
    )
    (row,) = grids.run(config)
    assert row["status"] == "done" and set(row["languages"]) == {"sw"}, row
    stages = tmp_path / "grid/targets/none/xcopa/seed0"
    assert [(stages / f"stage{i}/tasks" / name).is_dir() for i, name in enumerate(("siqa", "copa"))] == [True, True]


def test_grid_options_are_checked(base: Path) -> None:
    for changes, match in (
        ({"intermediates": ("xnli",)}, "intermediates: xnli"),
        ({"targets": ("mnli",)}, "targets: mnli"),
        ({"seeds": ()}, "seeds: none given"),
        ({"target": {"seed": 1}}, "target: seed is set by the grid"),
        ({"splits": ("validation",)}, "splits: validation; accepted: dev, test"),
        ({"splits": ("dve",), "targets": ("xnli",)}, "splits: dve; accepted: dev, test"),
        ({"splits": ("dev", "dev")}, "splits: dev given more than once"),
        ({"seeds": (0, 0)}, "seeds: 0 given more than once"),
        ({"benchmark": "xtreme-r"}, "task: pawsx is not in xtreme-r"),
        ({"hub": {"tatoeba": "x"}}, "hub: tatoeba is evaluated on files of the data folder alone"),
        ({"files": {"xnli": {"dev": ["my.tsv"]}}}, "xnli dev: what `files` or `hub` names is one language's"),
        ({"precision": "int7"}, "precision.*int7"),
        ({"backend": "none", "precision": "int8"}, "precision: 'int8' with backend none"),
        ({"limit": 0}, "limit: 0"),
        ({"all_tasks": ("mnli", "mnli"), "intermediates": ("all",)}, "all_tasks: mnli given more"),
        ({"intermediate": {"epoch": 2}}, "no option epoch"),
        ({"target": {"batching": "long"}}, "batching: 'long'"),
        ({"files": {"xnli": {"valid": ["a"]}}}, "files: xnli: 'valid'"),
        ({"target": {"translated": {"mnlj": ["a"]}}}, "target: translated: mnlj is no task of this grid"),
        ({"intermediate": {"translated": ["a"]}}, "translated: .*accepted: dict"),
    ):
        with pytest.raises(InvalidOptionError, match=match):
            grids.GridConfig(str(base), "out", **changes)


def test_translated_files_go_to_the_rows_that_they_belong_to(base: Path) -> None:
    options = {"translated": {"mnli": ["sw.tsv"], "xquad": ["sw.json"]}}
    config = grids.GridConfig(str(base), "out", targets=("xnli", "xquad"), target=options)

    def translated(target: str) -> Any:
        return grids.run_config(config, options, "model", (target,), Path("x"), 0).translated

    assert translated("xnli") == {"mnli": ["sw.tsv"]} and translated("xquad") == {"xquad": ["sw.json"]}
    assert translated("panx") == {}


# --- the command line ------------------------------------------------------------------------------------


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["stilts", *map(str, arguments)])


def test_commands_from_training_to_scores(base: Path, data: Path, tmp_path: Path) -> None:
    options = [
        "--set",
        "dev_examples=0",
        "--set",
        "max_steps=2",
        "--set",
        "max_length=64",
        "--set",
        "learning_rate=1e-3",
    ]
    common = ["--data", str(data), "--model", str(base)]
    done = _run("train", "--tasks", "udpos", "--output", str(tmp_path / "run"), *common, *options, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 2
    model = str(tmp_path / "run/tasks/udpos")
    done = _run(
        "evaluate", model, "udpos", "--data", data, "--languages", "ur,tr", "--output", tmp_path / "p", "--json"
    )
    assert done.exit_code == 0, done.output
    evaluated = json.loads(done.stdout)
    assert set(evaluated["languages"]) == {"ur", "tr"}
    done = _run("predict", model, "udpos", tmp_path / "q", "--data", data, "--languages", "ur")
    assert done.exit_code == 0 and "12 predictions in 1 languages" in done.stdout
    done = _run("predict", model, "udpos", tmp_path / "q", "--data", data, "--languages", "ur", "--json")
    assert json.loads(done.stdout)["examples"] == {"ur": 12}
    assert (tmp_path / "q/udpos/test-ur.tsv").read_bytes() == (tmp_path / "p/udpos/test-ur.tsv").read_bytes()
    done = _run("score", tmp_path / "p", data / "xtreme/labels", "--allow-missing", "--json")
    assert json.loads(done.stdout)["tasks"]["udpos"]["languages"] == pytest.approx(evaluated["languages"])
    shown = _run("score", tmp_path / "p", data / "xtreme/labels", "--allow-missing").stdout
    assert "(tagging)" in shown and "overall" in shown and "missing tasks: xnli" in shown
    done = _run("score", tmp_path / "p", data / "xtreme/labels")
    assert done.exit_code == 2 and "test-af.tsv" in done.stderr


def test_grid_and_report_commands(base: Path, data: Path, tmp_path: Path) -> None:
    options = "{dev_examples: 0, max_steps: 2, max_length: 64}"
    config = tmp_path / "grid.yaml"
    config.write_text(
        f"model: {base}\ndata: {data}\noutput: {tmp_path / 'grid'}\n"
        "intermediates: [none, hellaswag]\ntargets: [tatoeba]\n"
        f"seeds: [0]\nlanguages: [ur]\nintermediate: {options}\ntarget: {options}\n",
        encoding="utf-8",
    )
    done = _run("grid", config)
    assert done.exit_code == 0 and "2 cells done, 0 failed" in done.stdout, done.output
    done = _run("report", tmp_path / "grid", "--output", tmp_path / "report", "--json")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.html", "report.md", "heatmap.png"}


def test_tasks_and_errors(data: Path, tmp_path: Path) -> None:
    listed = json.loads(_run("tasks", "--json").stdout)
    assert listed["ccg"]["recall"] and not listed["anli_plus"]["recall"]
    assert set(XTREME_R) <= set(listed)
    assert "commonsenseqa" in _run("tasks").stdout
    done = _run("train", "--tasks", "nonsense", "--model", "m", "--output", tmp_path)
    assert done.exit_code == 2 and "nonsense" in done.stderr
    done = _run("train", "--tasks", "xnli")
    assert done.exit_code == 2 and "model, output missing" in done.stderr
    done = _run("train", "--set", "oops")
    assert done.exit_code == 2 and "KEY=VALUE" in done.stderr
    done = _run("doctor", data, "--json")
    assert done.exit_code == 0, done.output
    assert issubclass(DataFileError, xfast.XfastError)
