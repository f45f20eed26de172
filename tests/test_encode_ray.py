"""``xfast encode --engine ray``: the same files as the local engine's, whichever processes die on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import encode
import numpy as np
import psutil
import pytest
import stilts

from xfast.encode import ray_engine, source, store
from xfast.encode.model import head_of
from xfast.encode.settings import Execution, Settings
from xfast.encode.worker import Task
from xfast.errors import BackendUnavailableError

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

SECONDS = 240
LOCAL = Execution(batch_tokens=60, threads=1)


class Job:
    """``xfast encode`` in a process of its own; its cluster keeps pipes open, so its output goes to files."""

    def __init__(self, path: Path, output: Path, model: Path, *more: str) -> None:
        engine = ["--engine", "ray", "--threads", "1", "--batch-tokens", "60", "--json", *more]
        self.files = [output.parent / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        with self.files[0].open("w") as stdout, self.files[1].open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xfast", "encode", str(path), str(output), "--model", str(model), *engine],
                cwd=output.parent,
                stdout=stdout,
                stderr=stderr,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: Any) -> None:
        """Kills the job as ``kill -9`` does. Its workers end by themselves; some of Ray's agents take their time."""
        below = self.below()
        workers = [one for one in below if "ShardActor" in _title(one)]
        self.process.kill()
        self.process.wait(SECONDS)
        assert not psutil.wait_procs(workers, 60)[1]
        for one in psutil.wait_procs(below, 1)[1]:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def below(self) -> list[psutil.Process]:
        """The processes of the job's cluster."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    @property
    def stdout(self) -> str:
        return self.files[0].read_text()

    @property
    def stderr(self) -> str:
        return self.files[1].read_text()

    def until(self, what: Callable[[], bool]) -> None:
        """Waits for ``what``, as long as the job runs."""
        end = time.monotonic() + SECONDS
        while not what():
            assert time.monotonic() < end and self.process.poll() is None, self.stderr
            time.sleep(0.01)


def shards_of(output: Path) -> int:
    return len(list(output.glob("shard-*.parquet")))


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def marks_of(output: Path) -> set[str]:
    return {path.name for path in output.glob(".attempt-*")}


def kill_in_the_middle_of_a_shard(job: Job, output: Path) -> None:
    """Halts one of the job's workers and kills it if a shard stays begun; else lets it go on and tries again."""

    def killed() -> bool:
        worker = next((one for one in job.below() if "ShardActor" in _title(one)), None)
        if worker is None:
            return False
        worker.suspend()
        begun = marks_of(output)
        time.sleep(1)
        in_the_middle = bool(begun & marks_of(output))
        if in_the_middle:
            worker.kill()
        else:
            worker.resume()
        return in_the_middle

    job.until(killed)


@needs_ray
@pytest.mark.slow
def test_neither_a_killed_driver_nor_a_killed_worker_loses_or_doubles_a_row(
    tmp_path: Path, base: Path, rng: Any
) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(encode.texts(rng, 9000))]
    path, output = encode.jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    more = ("--workers", "2", "--shard-rows", "150")
    with Job(path, output, base, *more) as job:
        job.until(lambda: shards_of(output) >= 2)
    assert shards_of(output) < 60
    with Job(path, output, base, *more) as job:
        job.until(lambda: len(marks_of(output)) >= 2)  # both workers are busy
        kill_in_the_middle_of_a_shard(job, output)
        assert shards_of(output) < 60
        assert job.process.wait(SECONDS) == 0, job.stderr
    assert json.loads(job.stdout)["totals"]["rows"] == 9000
    encode.run(path, tmp_path / "local", base, LOCAL, shard_rows=150)
    assert sorted(one.name for one in output.iterdir()) == sorted(one.name for one in (tmp_path / "local").iterdir())
    table, expected = encode.read(output), encode.read(tmp_path / "local")
    assert table.column("id").to_pylist() == list(range(9000))
    assert table.drop("embedding").equals(expected.drop("embedding"))
    np.testing.assert_allclose(encode.embeddings(output), encode.embeddings(tmp_path / "local"), atol=1e-6)


@needs_ray
@pytest.mark.slow
def test_a_bad_row_on_a_worker_is_a_typed_error_here(tmp_path: Path, base: Path) -> None:
    path = encode.parquet(tmp_path / "in.parquet", {"text": ["a", "b", None]})
    with Job(path, tmp_path / "out", base, "--shard-rows", "2") as job:
        assert job.process.wait(SECONDS) == 2
    assert f"error: {path}, row 2: 'text' is null (--on-error skip leaves such rows out)" in job.stderr
    assert shards_of(tmp_path / "out") <= 1


@pytest.fixture
def task(tmp_path: Path, base: Path, rng: Any) -> tuple[Task, dict[str, Any]]:
    """A task of two shards whose output folder is there, and its shards as Ray hands them to an actor."""
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": text} for text in encode.texts(rng, 8)])
    settings = Settings(model=str(base), shard_rows=4)
    shards, schema, _ = source.plan(source.find(str(path), tmp_path / "out"), settings)
    (tmp_path / "out").mkdir()
    made = Task(settings, LOCAL, head_of(settings)[0], str(tmp_path / "out"), "abc", schema)
    return made, {"shard": np.array([json.dumps(dataclasses.asdict(shard)) for shard in shards])}


def test_an_actor_writes_its_shards_and_leaves_those_that_are_there(
    task: tuple[Task, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ray_engine.ShardActor(task[0])(task[1])
    assert answer["rows"].tolist() == [4, 4] and answer["error"].tolist() == ["", ""]
    monkeypatch.setattr(ray_engine, "Worker", lambda _: pytest.fail("encoded again"))
    again = ray_engine.ShardActor(task[0])(task[1])
    assert again["tokens"].tolist() == answer["tokens"].tolist()


def test_an_actor_hands_errors_back(task: tuple[Task, dict[str, Any]]) -> None:
    shards = [json.loads(text) for text in task[1]["shard"]]
    shards[1]["path"] = "/nowhere.jsonl"
    answer = ray_engine.ShardActor(task[0])({"shard": np.array([json.dumps(shard) for shard in shards])})
    assert answer["error"].tolist() == ["", "DataFileError"] and "/nowhere.jsonl" in answer["message"][1]
    assert not list(Path(task[0].output).glob(".*"))


def test_a_shard_that_kills_its_workers_ends_the_job(task: tuple[Task, dict[str, Any]]) -> None:
    folder = Path(task[0].output)
    marks = [store.attempt(folder, 0) for _ in range(ray_engine.DEATHS)]
    for i, mark in enumerate(marks):
        assert mark.__enter__() == i  # and never left, as by a process that was killed
    answer = ray_engine.ShardActor(task[0])(task[1])
    assert answer["error"].tolist() == ["BackendUnavailableError", ""]
    assert "5 workers died on shard 0" in answer["message"][0]


def test_a_cluster_that_is_too_small_is_refused() -> None:
    one, three = [{"CPU": 2.0}], [{"CPU": 4.0, "GPU": 1.0}] * 2 + [{"memory": 1e9}]
    for machines, workers, cpus, gpus in ((one, 2, 1, 0), (three, 8, 1, 0), (three, 2, 3, 0), (three, 2, 4, 1)):
        ray_engine._require(machines, workers, {"CPU": cpus, "GPU": gpus})
    for machines, workers, cpus, gpus, message in (
        (one, 2, 2, 0, "2 of 2 CPU each do not fit the cluster: 1 do; its machines have 2 CPU$"),
        (one, 1, 1, 1, "1 of 1 CPU and 1 GPU each .*have 2 CPU, 0 GPU$"),
        (three, 1, 6, 0, "1 of 6 CPU each .*: 0 do; its machines have 4 CPU; 4 CPU; 0 CPU$"),  # 8 between two machines
        (three, 3, 1, 1, "3 of 1 CPU and 1 GPU"),
        ([], 1, 1, 0, "have nothing"),
    ):
        with pytest.raises(BackendUnavailableError, match=message):
            ray_engine._require(machines, workers, {"CPU": cpus, "GPU": gpus})


def test_without_ray_a_hint_how_to_install_it(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode.jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(BackendUnavailableError, match=r"encode: needs ray\.data; pip install 'ray\[data\]'"):
        encode.run(path, tmp_path / "out", base, Execution(engine="ray"))
    assert not (tmp_path / "out").exists()
