"""``xfast bench``: real worker processes on a tiny model, its document, tables and plot, and what it refuses."""

from __future__ import annotations

import ast
import io
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import make_config
from rich.console import Console
from typer.testing import CliRunner

import xfast
from xfast import _C
from xfast.benchmarks import bench, harness, isa, peers, plot, report
from xfast.cli import app
from xfast.errors import BackendUnavailableError, InvalidInputError, InvalidOptionError

runner = CliRunner()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint so small that a worker spends its time on importing torch."""
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = make_config("xlm-roberta", vocab_size=300, max_position_embeddings=258, **sizes)
    transformers.XLMRobertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short_turns() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TURN_SECONDS", 0.01)
        patch.setattr(harness, "CEILING_SECONDS", 0.01)
        yield


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory, short_turns: None) -> tuple[dict[str, Any], str, Path]:
    """The document of one run, what was printed, and the plot."""
    folder = tmp_path_factory.mktemp("out")
    command = ["bench", "--model", str(small), "--workload", "1x8,mixed,alpha=0.4,alpha=1.0", "--precision", "int8"]
    command += ["--peers", "transformers-fp32,zentorch-bf16", "--threads", "1", "--rounds", "2"]
    command += ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
    result = runner.invoke(app, command, env={"XFAST_ZENTORCH_PYTHON": "", "XFAST_TEST_DATA": ""})
    assert result.exit_code == 0, result.output
    return json.loads((folder / "out.json").read_text()), result.stdout, folder / "out.png"


def test_document(run: tuple[dict[str, Any], str, Path]) -> None:
    document = run[0]
    assert list(document) == [
        *("format", "date", "machine", "model", "run", "workloads"),
        *("engines", "skipped", "results", "summaries", "rounds"),
    ]
    assert document["format"] == bench.FORMAT
    assert document["machine"]["cpu"] and document["machine"]["versions"]["torch"] == torch.__version__
    assert "commit" in document["machine"]
    assert document["run"] | {"threads": [1], "rounds": 2, "isa": None} == document["run"]
    assert [work["name"] for work in document["workloads"]] == ["1x8", "mixed", "alpha=0.4", "alpha=1.0"]
    assert [engine["label"] for engine in document["engines"]] == ["xfast-int8", "transformers-fp32"]
    for engine in document["engines"]:
        assert engine["versions"]
        assert 0 < engine["first_result_s"] < 60
        assert 0 < engine["process_gb"] < 10
        assert sys.platform != "linux" or 0.05 < engine["resident_gb"] <= engine["rss_gb"] < 10


def test_what_is_skipped_says_what_would_add_it(run: tuple[dict[str, Any], str, Path]) -> None:
    (skipped,) = run[0]["skipped"]
    assert skipped["label"] == "zentorch-bf16"
    assert "pip install zentorch" in skipped["reason"] and "--zentorch-python" in skipped["reason"]
    assert "skipped zentorch-bf16: pip install zentorch" in run[1]


def test_results(run: tuple[dict[str, Any], str, Path]) -> None:
    document = run[0]
    pairs = [(row["workload"], row["label"]) for row in document["results"]]
    assert pairs == [(w["name"], e["label"]) for w in document["workloads"] for e in document["engines"]]
    for row in document["results"]:
        assert row["tokens_per_s"] > row["samples_per_s"] > 0
        known = [row[name] for name in ("p50_ms", "p95_ms", "p99_ms") if row[name] is not None]
        assert known == sorted(known) and known[0] > 0
        assert 0 < row["ceiling_percent"] < 100
        assert all(math.isfinite(value) for value in row["error"].values())
        if row["label"] == "xfast-int8":
            assert 0 < row["error"]["max_rel"] < 0.1 and row["error"]["cosine_min"] > 0.99
            assert row["same_precision"] is None
            assert row["best_peer"]["peer"] == "transformers-fp32"
        else:
            assert row["error"]["max_rel"] == 0 and row["best_peer"] is None
    assert set(document["summaries"]["alpha_flatness"]) == {"xfast-int8", "transformers-fp32"}


def test_raw_rounds(run: tuple[dict[str, Any], str, Path]) -> None:
    rounds = run[0]["rounds"]
    assert [one["workload"] for one in rounds] == [w["name"] for w in run[0]["workloads"] for _ in range(2)]
    for one in rounds:
        assert set(one["ceilings"]["1"]) == {"int8", "fp32", "read"}
        assert all(value > 0 for value in one["ceilings"]["1"].values())
        batches = 4 if one["workload"] == "mixed" else 1
        for passes in one["seconds"].values():
            assert passes and all(len(batch_seconds) == batches for batch_seconds in passes)


def test_tables_fit_100_columns(run: tuple[dict[str, Any], str, Path]) -> None:
    tables = [line.rstrip() for line in run[1].splitlines() if "skipped" not in line and "threads on" not in line]
    assert max(map(len, tables)) <= report.WIDTH
    for text in ("tokens/s", "p99", "GOP/s", "% max", "x same", "x best", "error", "memory GB", "first result s"):
        assert text in run[1]
    assert "…" not in run[1]
    assert "xfast-int8: most over least tokens/s along alpha: " in run[1]


def test_the_widest_table_fits_100_columns() -> None:
    label = max(peers.ENGINES, key=len)
    row = {
        "label": label,
        "engine": "xfast-int8",
        "tokens_per_s": 123456.0,
        "tokens_per_s_quartiles": [1e5, 1.5e5],
        "samples_per_s": 12345.6,
        **dict.fromkeys(("p50_ms", "p95_ms", "p99_ms"), 99999.0),
        "gops": 1999.0,
        "ceiling_percent": 100.0,
        "same_precision": {"median": 12.34},
        "best_peer": {"median": 12.34},
        "error": {"max_rel": 1e-3},
    }
    work = {"name": "mixed", "source": "random", "samples": 1, "tokens": 1, "padding": 0.5}
    out = io.StringIO()
    Console(file=out, width=report.WIDTH).print(report._workload(work, [row]))
    assert "…" not in out.getvalue() and "12.34" in out.getvalue()


def test_plot_is_a_png(run: tuple[dict[str, Any], str, Path]) -> None:
    pytest.importorskip("matplotlib")
    assert run[2].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_that_cannot_be_written(run: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidOptionError, match=r"plot: cannot write .*: Is a directory"):
        plot.save(run[0], tmp_path)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = runner.invoke(app, ["bench", "--plot", "never.png"])
    assert result.exit_code == 2 and "pip install matplotlib" in result.stderr, result.output


@pytest.mark.usefixtures("short_turns")
def test_threads_are_compared_and_an_instruction_set_is_held(small: Path) -> None:
    held = max((name for name in isa.SWITCHES if name in xfast.available_isas()), default=None)
    options = bench.Options(str(small), "1x8", "int8", "none", "1,2", rounds=1, isa=held)
    document = bench.run(options, Console(file=io.StringIO()))
    assert document["run"]["isa"] == held
    assert [engine["label"] for engine in document["engines"]] == ["xfast-int8@1", "xfast-int8@2"]
    assert set(document["summaries"]["thread_scaling"]) == {"xfast-int8@2"}
    assert all(row["error"]["max_rel"] > 0 for row in document["results"])  # the reference ran, though not asked for
    assert report.summary_lines(document["summaries"])


@pytest.mark.parametrize("held", isa.SWITCHES)
def test_the_mask_hides_what_it_should(tmp_path: Path, held: str) -> None:
    mask, refusal = isa.build_mask(tmp_path, held)
    if mask is None:
        pytest.skip(str(refusal))
    code = "from xfast import _C; print(_C.available_isas())"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_PRELOAD": str(mask), "PATH": "/usr/bin:/bin", "PYTHONPATH": harness._python_path(False)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    hidden = {"avx512", "avx512_vnni", "avx512_bf16", "amx"} | ({"avx2_vnni"} if held == "avx2" else set())
    assert ast.literal_eval(shown) == [name for name in _C.available_isas() if name not in hidden]


def test_without_a_mask_engines_without_a_switch_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isa.platform, "machine", lambda: "riscv64")
    assert isa.build_mask(tmp_path, "avx2") == (None, "masking CPUID needs Linux on x86-64")
    assert "no switch for avx2" in str(isa.unforceable("onnxruntime-int8", "avx2", None))
    assert isa.unforceable("ctranslate2-int8", "avx2", None) is None
    assert isa.unforceable("onnxruntime-int8", "avx2", tmp_path) is None
    assert isa.environment(None, None) == {}
    assert isa.environment("avx2", tmp_path)["LD_PRELOAD"] == str(tmp_path)


def test_what_goes_wrong_in_a_worker_is_reported(small: Path, tmp_path: Path) -> None:
    settings = harness.Settings(["xfast-int8"], [1], rounds=1, slowest_pass_s=0.0)
    works, _, job = bench._prepare(bench.Options(str(small), "1x8", "int8", "none", "1"), tmp_path)
    with harness.Session(settings, tmp_path, lambda *_: None) as session:
        session.start(job)
        slow = session.warm(works)
        session.measure(works, slow)
        assert slow == {("1x8", "xfast-int8")}
        assert [one.passes for one in session.measured.rounds] == [{}]
        assert "not measured there" in session.measured.skipped.pop()[1]
        (worker,) = session._workers
        worker._process.send_signal(signal.SIGKILL)
        session.warm(works)
        assert session.measured.runners == []
        assert session.measured.skipped == [("xfast-int8", "was killed, probably because memory ran out")]
        reason = session._build(harness.runners_of(settings)[0], {**job, "first": "/no/such/file"}, {})
        assert reason is not None and reason.startswith("FileNotFoundError")


def test_too_little_memory_is_a_reason_and_no_crash() -> None:
    reason = harness._memory_obstacle("onnxruntime-int8", 10**15)
    assert sys.platform != "linux" or (reason is not None and "needs about 4000001.5 GB" in reason)
    assert harness._memory_obstacle("xfast-int8", 1000) is None


def test_no_engine_at_all_is_an_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.Session, "_build", lambda *_: "out of luck")
    monkeypatch.delattr(bench, "_reference")  # nobody needs it
    with pytest.raises(BackendUnavailableError, match="xfast-int8: out of luck"):
        bench.run(bench.Options(str(small), "1x8", "int8", "none", "1", rounds=1), Console(file=io.StringIO()))


def test_only_engines_that_are_calibrated_need_text_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xtreme" / "tatoeba").mkdir(parents=True)
    options = bench.Options(workload="1x8", precision="int8", peers="openvino", data=tmp_path)
    monkeypatch.setattr(peers, "missing", lambda _: "openvino nncf")
    assert bench._calibration(options) is None
    monkeypatch.setattr(peers, "missing", lambda _: None)
    with pytest.raises(InvalidInputError, match=r"openvino-int8 is calibrated on xnli: .*; or leave it out"):
        bench._calibration(options)
    assert bench._calibration(bench.Options(workload="1x8", precision="int8", peers="none", data=tmp_path)) is None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workload", "mixd"], ["workload: 'mixd'", "accepted: mixed"]),
        (["--precision", "int4"], ["precision: 'int4'", "accepted: fp32"]),
        (["--peers", "tensorrt"], ["peers: 'tensorrt'", "accepted: all, none"]),
        (["--threads", "0"], ["threads: '0'", "accepted"]),
        (["--threads", "two"], ["threads: 'two'"]),
        (["--rounds", "0"], ["rounds: 0", "accepted: 1 to"]),
        (["--isa", "sse2"], ["isa: 'sse2'", "accepted: avx2"]),
        (["--model", "./no/such/folder"], ["'./no/such/folder'"]),
        (["--data", "/no/such/folder", "--workload", "xnli"], ["data: /no/such/folder"]),
        (["--json", "/no/such/folder/x.json"], ["json: /no/such/folder"]),
        (["--plot", "/no/such/folder/x.png"], ["plot: /no/such/folder"]),
        (["--plot", "."], ["plot: .; accepted: a file's name"]),
        (["--plot", "/proc/x.png"], ["plot: /proc/x.png: "]),  # where nobody can make a file, root included
    ],
)
def test_bad_options(arguments: list[str], parts: list[str]) -> None:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert all(part in message for part in parts), message


def test_an_instruction_set_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xfast, "available_isas", lambda: ["portable", "avx2", "avx512"])
    with pytest.raises(InvalidOptionError, match=r"isa: 'avx2_vnni'.*accepted: avx2$"):
        bench.Options(isa="avx2_vnni")


def test_options_are_checked_at_once() -> None:
    options = bench.Options(workload="alpha,1x8,1x8", precision="int8", peers="none", threads="2,1,2")
    assert options.works == ("alpha=0.2", "alpha=0.4", "alpha=0.6", "alpha=0.8", "alpha=1.0", "1x8")
    assert options.counts == (2, 1)
    with pytest.raises(InvalidOptionError):
        bench.Options(rounds=0)
    with pytest.raises(InvalidOptionError, match="zentorch-python: /nowhere/python is no program"):
        bench.Options(zentorch_python="/nowhere/python")


@pytest.mark.parametrize(("passes", "slow"), [([0.3, 0.0, 0.0, 0.0], False), ([0.3, 0.3], True)])
def test_compilation_is_not_taken_for_a_slow_engine(
    passes: list[float], slow: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # the module drops its own folder, which is first in a script's
    from xfast.benchmarks import worker

    engine, left = object.__new__(worker._Engine), list(passes)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        time.sleep(left.pop(0))
        return np.zeros((*ids.shape, 2), np.float32)

    ids = torch.ones(1, 3, dtype=torch.int64)
    engine._batches, engine._run = {"mixed": [(ids, ids)]}, run
    found = engine.warm("mixed", str(tmp_path / "out.npy"), slowest_s=0.2)["too_slow_s"]
    assert (found is not None) is slow and not left
