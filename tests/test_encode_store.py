"""``xfast encode``: whatever interrupts a job, the same command completes it with nothing lost and nothing doubled."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import encode
import numpy as np
import pyarrow.parquet as pq
import pytest
import stilts

from xfast.encode import job, store
from xfast.encode.settings import Execution, Settings
from xfast.errors import DataFileError, InvalidOptionError

base = pytest.fixture(scope="module")(stilts.base)
one_thread = pytest.fixture(autouse=True)(stilts.one_thread)


def rows_of(rng: Any, count: int) -> list[dict[str, Any]]:
    return [{"text": text, "id": i} for i, text in enumerate(encode.texts(rng, count))]


def same(output: Path, expected: Path) -> None:
    """Both folders hold the same rows in the same shards, and nothing else."""
    files = sorted(path.name for path in output.iterdir())
    assert files == sorted(path.name for path in expected.iterdir())
    assert encode.read(output).equals(encode.read(expected))
    assert encode.manifest(output)["totals"] == encode.manifest(expected)["totals"]


def command(source: Path, output: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["encode", str(source), str(output), "--model", str(model), "--threads", "1", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "xfast", *arguments],
        cwd=output.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell are born with SIGINT ignored, and so would this process be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def shards_of(output: Path) -> int:
    return len(list(output.glob("shard-*.parquet")))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "overlap"), [(signal.SIGKILL, "--overlap"), (signal.SIGINT, "--no-overlap")])
def test_a_killed_job_is_continued(tmp_path: Path, base: Path, rng: Any, number: int, overlap: str) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 1200))
    more = ("--shard-rows", "50", "--batch-tokens", "60", overlap)
    process = command(source, tmp_path / "out", base, *more)
    end = time.monotonic() + 120
    while shards_of(tmp_path / "out") < 2:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), stderr
    there = shards_of(tmp_path / "out")
    assert 2 <= there < 24 and encode.manifest(tmp_path / "out")["complete"] is False
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*.parquet")}
    execution = Execution(batch_tokens=60)
    summary = encode.run(source, tmp_path / "out", base, execution, shard_rows=50)
    assert summary.encoded == 24 - there
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())  # what was done is not done again
    assert encode.read(tmp_path / "out").column("id").to_pylist() == list(range(1200))
    encode.run(source, tmp_path / "whole", base, execution, shard_rows=50)
    same(tmp_path / "out", tmp_path / "whole")


class Interrupting(encode.Quiet):
    """Stops the job after some batches."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.after, self.error = after, error

    def advance(self, rows: int, tokens: int) -> None:
        super().advance(rows, tokens)
        self.after -= 1
        if not self.after:
            raise self.error


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_job_that_is_stopped_at_any_batch(
    tmp_path: Path, base: Path, rng: Any, overlap: bool, error: BaseException
) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 40))
    settings, execution = Settings(model=str(base), shard_rows=9), Execution(batch_tokens=60, window=5, overlap=overlap)
    encode.run(source, tmp_path / "whole", base, execution, shard_rows=9)
    for after in (1, 2, 5, 8):
        with pytest.raises(type(error)):
            job.encode(str(source), tmp_path / "out", settings, execution, Interrupting(after, error))
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("xfast")]
        assert not left  # only the job's own: libraries start threads when they like
        assert not list((tmp_path / "out").glob(".*.partial"))
    encode.run(source, tmp_path / "out", base, execution, shard_rows=9)
    same(tmp_path / "out", tmp_path / "whole")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes: writes fail as they do on a full disk (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_full_disk_at_every_write(tmp_path: Path, base: Path, rng: Any, overlap: bool) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 40))
    execution = Execution(batch_tokens=60, overlap=overlap)
    encode.run(source, tmp_path / "whole", base, execution, shard_rows=15)
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").iterdir()})
    failed: list[str] = []
    for limit in sorted({0, 1, 100, *(size - 1 for size in sizes if size), *(size // 2 for size in sizes)}):
        try:
            with full_disk(limit):
                encode.run(source, tmp_path / "out", base, execution, shard_rows=15)
        except DataFileError as error:
            failed.append(str(error))
        assert not list((tmp_path / "out").glob(".*.partial"))
        for path in (tmp_path / "out").glob("shard-*.parquet"):
            store.read_facts(path)  # whatever is there is whole
    assert len(failed) >= 4
    assert all("cannot write" in text and str(tmp_path / "out") in text for text in failed)
    encode.run(source, tmp_path / "out", base, execution, shard_rows=15)
    same(tmp_path / "out", tmp_path / "whole")


def test_a_folder_that_cannot_be_written(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 2))
    places = [source / "out", Path("/proc/xfast-encode")]
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "out")
    for place in places:
        with pytest.raises(DataFileError, match="output: cannot write"):
            encode.run(source, place, base)


def test_another_job_in_the_folder(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 9))
    model = shutil.copytree(base, tmp_path / "model")
    encode.run(source, tmp_path / "out", model)
    for options, part in (
        ({"normalize": True}, "normalize was false, now true"),
        ({"shard_rows": 5}, "shard_rows was 10000, now 5"),
        ({"keep": ("id",)}, "keep was null"),
    ):
        with pytest.raises(InvalidOptionError, match=part):
            encode.run(source, tmp_path / "out", model, **options)
    stilts.checkpoint(model, 600, seed=1)  # other weights under the same name
    with pytest.raises(InvalidOptionError, match="model_identity"):
        encode.run(source, tmp_path / "out", model)
    encode.jsonl(source, rows_of(rng, 10))
    with pytest.raises(InvalidOptionError, match="input was"):
        encode.run(source, tmp_path / "out", model)


def test_how_a_job_runs_is_no_part_of_what_it_is(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 9))
    encode.run(source, tmp_path / "out", base)
    execution = Execution(batch_tokens=7, window=2, threads=2, overlap=True)
    assert encode.run(source, tmp_path / "out", base, execution).encoded == 0
    assert encode.run(source, tmp_path / "other", base, execution).encoded == 1
    np.testing.assert_allclose(encode.embeddings(tmp_path / "other"), encode.embeddings(tmp_path / "out"), atol=1e-6)


def test_a_job_that_failed_before_its_first_shard_may_be_changed(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 4))
    with pytest.raises(InvalidOptionError, match="max-length"):
        encode.run(source, tmp_path / "out", base, max_length=600)
    assert encode.run(source, tmp_path / "out", base, max_length=60).totals["rows"] == 4


def test_files_that_are_not_of_the_job(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 9))
    output = tmp_path / "out"
    encode.parquet(output / "mine.parquet", {"a": [1]})
    with pytest.raises(InvalidOptionError, match=r"mine\.parquet and no manifest"):
        encode.run(source, output, base)
    (output / "mine.parquet").unlink()
    encode.run(source, output, base, shard_rows=4)
    whole = {path: path.read_bytes() for path in output.glob("*.parquet")}
    first, second = sorted(whole)[:2]
    damages = {
        "cut": lambda: first.write_bytes(whole[first][:-9]),
        "swapped": lambda: first.write_bytes(whole[second]),
        "foreign": lambda: encode.parquet(first, {"a": [1]}),
        "beyond": lambda: shutil.copy(first, output / "shard-000009.parquet"),
        "empty": lambda: first.write_bytes(b""),
    }
    for damage in damages.values():
        damage()
        with pytest.raises(DataFileError, match=r"shard-00000\d\.parquet"):
            encode.run(source, output, base, shard_rows=4)
        (output / "shard-000009.parquet").unlink(missing_ok=True)
        first.write_bytes(whole[first])
    assert encode.run(source, output, base, shard_rows=4).encoded == 0
    for path in (first, second):  # deleted shards are made again
        path.unlink()
    assert encode.run(source, output, base, shard_rows=4).encoded == 2
    assert {path: path.read_bytes() for path in output.glob("*.parquet")} == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', "\x00"])
def test_a_damaged_manifest(tmp_path: Path, base: Path, rng: Any, text: str) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 3))
    encode.run(source, tmp_path / "out", base)
    (tmp_path / "out" / "_manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataFileError, match=r"_manifest\.json"):
        encode.run(source, tmp_path / "out", base)


def test_a_manifest_of_another_format(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 3))
    encode.run(source, tmp_path / "out", base)
    path = tmp_path / "out" / "_manifest.json"
    path.write_text(json.dumps({**encode.manifest(tmp_path / "out"), "format": 2}), encoding="utf-8")
    with pytest.raises(DataFileError, match="format 2; known: 1"):
        encode.run(source, tmp_path / "out", base)


def test_two_jobs_in_one_folder(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 3))
    with store.opened(tmp_path / "out"), pytest.raises(InvalidOptionError, match="another job is writing"):
        encode.run(source, tmp_path / "out", base)
    assert encode.run(source, tmp_path / "out", base).totals["rows"] == 3


def test_what_a_killed_job_left_half_written_is_removed(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".shard-000000.parquet.abc.partial").write_bytes(b"half")
    encode.run(source, tmp_path / "out", base)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "_manifest.json",
        "shard-000000.parquet",
    ]


def test_a_folder_that_is_somebody_elses_is_left_as_it_is(tmp_path: Path, base: Path, rng: Any) -> None:
    source, output = encode.jsonl(tmp_path / "in.jsonl", rows_of(rng, 3)), tmp_path / "out"
    output.mkdir()
    half = f".shard-000000.parquet.{'a' * 32}.partial"
    theirs = {".lock": "theirs", ".download.partial": "half", half: "another job's", "mine.txt": "mine"}
    for name, text in theirs.items():
        (output / name).write_text(text)
    with pytest.raises(InvalidOptionError, match=r"mine\.txt and no manifest"):
        encode.run(source, output, base)
    assert {path.name: path.read_text() for path in output.iterdir()} == theirs
    for name in ("mine.txt", half):
        (output / name).unlink()
    for name in (".folder.partial", half):
        (output / name).mkdir()
    assert encode.run(source, output, base).totals["rows"] == 3
    assert {".lock", ".download.partial", ".folder.partial", half} < {path.name for path in output.iterdir()}
    assert (output / ".lock").read_text() == "theirs"


def test_the_manifest_and_the_footers_tell_the_whole_job(tmp_path: Path, base: Path, rng: Any) -> None:
    source = encode.jsonl(tmp_path / "in.jsonl", [*rows_of(rng, 9), {"text": None}])
    encode.run(source, tmp_path / "out", base, shard_rows=6, on_error="skip", max_length=10)
    manifest = encode.manifest(tmp_path / "out")
    assert manifest["complete"] and manifest["settings"]["max_length"] == 10
    assert [output["rows"] for output in manifest["outputs"]] == [6, 3]
    for output in manifest["outputs"]:
        path = tmp_path / "out" / output["file"]
        facts = store.read_facts(path)
        assert facts.fingerprint == manifest["fingerprint"] and pq.read_metadata(path).num_rows == facts.rows
        assert (facts.truncated, facts.tokens) == (output["truncated"], output["tokens"])
    assert manifest["totals"]["skipped"] == 1
