"""The grid over its whole life: refused before it trains, moved, run twice at once, failed in a phase."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stilts
import torch

import xfast
from xfast.errors import BackendUnavailableError, InvalidOptionError
from xfast.stilts import grid, report, training

_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)


def test_a_target_of_the_other_benchmark_has_a_row(base: Path, tmp_path: Path) -> None:
    for name, count in (("train-en", 16), ("dev-en", 6), ("dev-de", 6)):
        rows = (f"river stone\tgreen {i}\t{i % 2}" for i in range(count))
        stilts.write_lines(tmp_path / f"data/pawsx/{name}.tsv", rows)
    config = stilts.grid_config(
        base, tmp_path, targets=("pawsx",), benchmark="xtreme-r", languages=("de", "en"), splits=("dev",)
    )
    (row,) = grid.run(config)
    assert row["status"] == "done" and set(row["languages"]) == {"de", "en"}, row
    assert row["partial"] == "2 of 7 languages"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 12}, "batch_size: 12 is no multiple"),
        ({"trainer": {"typo": 1}}, "TrainingArguments has no typo"),
        ({"trainer": {"fsdp": True}}, "fsdp: shards over several processes"),
        ({"max_length": 1024}, "max_length: 1024; .* has positions for 512"),
        ({"batching": "packed", "gradient_checkpointing": True}, "packed keeps all activations"),
    ],
)
def test_what_a_target_refuses_is_refused_before_its_intermediate_phase(
    options: dict[str, Any], match: str, base: Path, tmp_path: Path
) -> None:
    few = {"max_steps": 1, "batch_size": 8, "max_length": 64, "dev_examples": 0}
    config = stilts.grid_config(
        base, tmp_path, intermediates=("mnli",), intermediate=few, target={**few, "device_batch_size": 8, **options}
    )
    with pytest.raises(InvalidOptionError, match=f"target: xnli: .*{match}"):
        grid.run(config)
    assert not (tmp_path / "grid/intermediate").exists()
    with pytest.raises(InvalidOptionError, match=f"intermediate: mnli: .*{match}"):
        grid.run(dataclasses.replace(config, intermediate=config.target, target=few))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backend": "tensorrt"}, "tensorrt: the model is on cpu, this backend runs on cuda"),
        ({"precision": "fp8"}, "precision='fp8': .*fp8 is not available on the CPU"),
    ],
)
def test_what_evaluation_refuses_is_refused_before_training(
    options: dict[str, Any], match: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    with pytest.raises(BackendUnavailableError, match=match):
        grid.run(stilts.grid_config(base, tmp_path, **options), lambda cell, what: said.append(what))
    assert not said and not (tmp_path / "grid/targets").exists()


def test_a_finished_grid_is_read_where_its_backend_is_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stilts.grid_config(base, tmp_path, precision="int8")
    assert grid.run(config)[0]["status"] == "done"

    def absent(*_: Any, **__: Any) -> None:
        raise BackendUnavailableError("native: not here")

    monkeypatch.setattr(xfast, "accelerate", absent)
    assert len(grid.run(config)) == 1
    with pytest.raises(BackendUnavailableError, match="not here"):
        grid.run(dataclasses.replace(config, seeds=(0, 1)))


def test_languages_that_a_target_has_not_are_refused(base: Path, tmp_path: Path) -> None:
    for wrong, match in (
        (("sw", "xx"), "languages: no target has xx; accepted: ar bg de"),
        (("yo",), "languages: no target has yo; accepted"),
        ((), "languages: none given"),
    ):
        with pytest.raises(InvalidOptionError, match=match):
            stilts.grid_config(base, tmp_path, languages=wrong)
    message = r"languages: sw: leave out of `targets` what has none of these: pawsx \(de en es fr ja ko zh\)$"
    with pytest.raises(InvalidOptionError, match=message):
        stilts.grid_config(base, tmp_path, languages=("sw",), targets=("xnli", "pawsx", "tatoeba"))
    # what users add themselves: a file in the data folder, named files, a dataset
    stilts.nli(np.random.default_rng(0), tmp_path / "data/xnli/test-yo.tsv", 3)
    stilts.grid_config(base, tmp_path, languages=("yo",))
    stilts.nli(np.random.default_rng(0), tmp_path / "mine-ha.tsv", 3)
    mine = {"xnli": {"test": [f"{tmp_path}/mine-{{language}}.tsv"]}}
    stilts.grid_config(base, tmp_path, languages=("ha",), files=mine, splits=("test",))
    stilts.grid_config(base, tmp_path, languages=("ha",), hub={"xnli": "someone/afrixnli"})
    with pytest.raises(InvalidOptionError, match="no target has ha"):
        stilts.grid_config(base, tmp_path, languages=("ha",), hub={"xnli": ""})


def test_a_moved_grid_goes_on_with_what_it_trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    few = {"max_steps": 1, "batch_size": 8, "max_length": 64, "dev_examples": 0}
    config = stilts.grid_config(base, tmp_path, intermediates=("mnli",), intermediate=few, splits=("dev", "test"))
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            grid.run(config)
    (tmp_path / "grid").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", killed)  # a finished run is read, not made
        rows = grid.run(dataclasses.replace(config, output="moved"))
    assert [(row["split"], row["status"]) for row in rows] == [("dev", "done"), ("test", "done")], rows


def test_a_target_trained_from_a_model_elsewhere_is_another_run(base: Path, tmp_path: Path) -> None:
    """As far from its run as before, but outside of what was moved with it."""
    run = stilts.run_config(base, tmp_path / "a/grid/run", ["xnli"], np.random.default_rng(0), 16, max_steps=1)
    stilts.checkpoint(tmp_path / "a/model", 600)
    for name in base.glob("tokenizer*"):
        (tmp_path / "a/model" / name.name).write_bytes(name.read_bytes())
    run = stilts.changed(run, model=str(tmp_path / "a/model"))
    training.train(run, root=tmp_path / "a/grid")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = stilts.changed(run, model=str(tmp_path / "b/model"), output=str(tmp_path / "b/grid/run"))
    with pytest.raises(InvalidOptionError, match="another model"):
        training.train(moved, root=tmp_path / "b/grid")
    assert training.train(moved, root=tmp_path / "b").steps == 1


def test_cells_whose_gold_is_withheld_are_predicted_once(base: Path, tmp_path: Path) -> None:
    """XTREME's test sets have no labels: their predictions are for the leaderboard, and no failure."""
    config = stilts.grid_config(base, tmp_path, splits=("dev", "test"))
    stilts.nli(np.random.default_rng(1), tmp_path / "data/xnli/test-en.tsv", 9, labels=False)
    for _ in range(2):
        said: list[str] = []
        dev, test = grid.run(config, lambda _, what: said.append(what))  # noqa: B023
        assert dev["status"] == "done" and dev["score"] is not None
        assert test["status"] == "unscored" and test["score"] is None
        assert said[-1] == "unscored: no gold in any language for xnli test; its predictions are written"
    assert said == said[-1:]  # nothing was run again
    assert len(list((tmp_path / "grid").rglob("predictions/xnli/test-en*"))) == 1
    (tmp_path / "grid/cells.jsonl").write_text(json.dumps(test) + "\n")  # none is done, and the grid's all the same
    with pytest.raises(InvalidOptionError, match=r"output: .*grid holds a grid with another target$"):
        grid.run(dataclasses.replace(config, splits=("test",), target={**config.target, "learning_rate": 1e-2}))
    (tmp_path / "grid/cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (dev, test)))
    assert not list((tmp_path / "grid").rglob("*.safetensors"))
    found = report.load_cells(tmp_path / "grid/cells.jsonl")
    assert [(cell.split, cell.status, cell.score is None) for cell in found] == [
        ("dev", "done", False),
        ("test", "unscored", True),
    ]


@pytest.mark.parametrize("seeds", [(0, -1), (2**32,), (True,), (0.5,)])
def test_seeds_that_training_refuses_are_refused_at_once(seeds: Any, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"seeds: .*; accepted: whole numbers"):
        stilts.grid_config(base, tmp_path, seeds=seeds)


def test_two_grids_in_one_folder_are_refused(base: Path, tmp_path: Path) -> None:
    config = stilts.grid_config(base, tmp_path)
    refused: list[str] = []

    def again(*_: Any) -> None:
        if not refused:
            with pytest.raises(
                InvalidOptionError, match=r"output: another process is at work in .*grid; wait"
            ) as found:
                grid.run(config)
            refused.append(str(found.value))

    (row,) = grid.run(config, again)
    assert row["status"] == "done" and refused
    assert len(grid.run(config)) == 1  # it is given back
    assert len((tmp_path / "grid/cells.jsonl").read_text().splitlines()) == 1
