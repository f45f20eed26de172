"""Planning, workers, the store: a study end to end on a tiny model, killed, resumed, and with workers that die."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xfast.errors import BackendUnavailableError, DataFileError, InvalidInputError, InvalidOptionError
from xfast.machine import machine
from xfast.study import run, store, timing
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE, Study
from xfast.study.factors import EngineName, Settings
from xfast.study.store import Store
from xfast.study.work import Texts

TINY = Settings(sizes=("tiny",), languages=("sw", "en"), samples=4, responses=2, rounds=2, threads=1)
GIB = 2**30


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / store.NAME).read_text().splitlines()]


# --- a whole study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study") / "größe 1"  # paths with spaces and other letters are paths
    return folder, run.start(TINY, folder, resume=False, console=quiet())


def test_every_cell_is_measured_in_every_arm(finished: tuple[Path, dict[str, Any]]) -> None:
    _, document = finished
    assert set(document) == set(Study.__required_keys__)
    assert len(document["cells"]) == 2 * 2 * 2  # engines, languages, throughput and latency
    for cell in document["cells"]:
        figures = cell["throughput"] or cell["latency"]
        assert set(figures) == {BASELINE, INTERMEDIATE, CONTROL}
        assert set(cell["ratios"]) == {INTERMEDIATE, CONTROL}
        assert cell["rounds"] == 2
    assert not document["skipped"]
    assert {one["engine"] for one in document["memory"]} == set(TINY.engines)
    assert all(one["peak_bytes"] > 1e8 for one in document["memory"])
    assert [cell["language"] for cell in document["cells"]] == ["sw"] * 4 + ["en"] * 4
    json.dumps(document, allow_nan=False)


def test_figures_follow_from_the_visits(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, document = finished
    visits = [line for line in lines(folder) if line["kind"] == "visit"]
    assert len(visits) == 8 * 2
    for cell in document["cells"]:
        mine = [visit["seconds"][BASELINE] for visit in visits if visit["cell"] == cell["key"]]
        if cell["kind"] == "throughput":
            middle = sum(map(sum, mine)) / 2  # the median of two
            assert cell["throughput"][BASELINE]["samples_per_s"] == pytest.approx(4 / middle)
            assert cell["throughput"][BASELINE]["tokens_per_s"] == pytest.approx(cell["tokens"] / middle)
        else:
            latency = cell["latency"][BASELINE]
            assert latency["responses"] == sum(map(len, mine))
            assert latency["quantiles_ms"][0] == pytest.approx(1e3 * min(map(min, mine)))
            assert latency["quantiles_ms"][-1] == pytest.approx(1e3 * max(map(max, mine)))


def test_probes_show_exact_and_coarse_arithmetic(finished: tuple[Path, dict[str, Any]]) -> None:
    probes = [one for one in finished[1]["probes"] if one["probe"] == "quantisation"]
    assert {one["arm"] for one in probes} == {BASELINE, INTERMEDIATE}
    cosines = [one["value"] for one in probes if one["what"].startswith("cosine")]
    assert cosines and all(0.99 < value <= 1 + 1e-6 for value in cosines)
    early = [one for one in finished[1]["probes"] if one["probe"] == "early" and one["x"] == 2]
    assert early and all(one["value"] == 1.0 for one in early)  # the last layer agrees with itself


def test_a_finished_study_is_not_measured_again(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, document = finished
    before = len(lines(folder))
    again = run.start(TINY, folder, resume=True, console=quiet())
    assert again["cells"] == document["cells"]
    assert [line["kind"] for line in lines(folder)[before:]] == ["ended"]
    with pytest.raises(InvalidOptionError, match="--resume"):
        run.start(TINY, folder, resume=False, console=quiet())
    with pytest.raises(InvalidOptionError, match="another study"):
        run.start(Settings(sizes=("tiny",)), folder, resume=True, console=quiet())


# --- killed


def test_a_killed_run_continues_and_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import io, pathlib\n"
        "from rich.console import Console\n"
        "from xfast.study import run\n"
        "from xfast.study.factors import Settings\n"
        f"settings = Settings.from_dict({TINY.as_dict()!r})\n"
        f"if __name__ == '__main__':\n    run.start(settings, pathlib.Path({str(tmp_path)!r}), resume=False, "
        "console=Console(file=io.StringIO()))\n"
    )
    (tmp_path / "script.py").write_text(script)
    path = tmp_path / store.NAME
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b'"visit"') >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = [line for line in path.read_bytes().split(b"\n")[:-1] if b'"visit"' in line]
    assert len(had) >= 3
    with path.open("ab") as file:
        file.write(b'{"kind": "visit", "cell": "tiny/na')  # what a crash of the machine leaves
    document = run.start(TINY, tmp_path, resume=True, console=quiet())
    visits = [(line["cell"], line["round"]) for line in lines(tmp_path) if line["kind"] == "visit"]
    assert len(visits) == len(set(visits)) == 16
    assert [line for line in path.read_bytes().split(b"\n") if b'"visit"' in line][: len(had)] == had
    assert all(cell["rounds"] == 2 for cell in document["cells"])


def test_a_worker_that_is_killed_costs_only_its_own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Store.add
    killed: list[int] = []

    def kill_at_the_first_visit(self: Store, record: dict[str, Any]) -> None:
        add(self, record)
        if record["kind"] == "visit" and not killed:
            (child,) = multiprocessing.active_children()
            assert child.pid is not None
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(Store, "add", kill_at_the_first_visit)
    document = run.start(TINY, tmp_path, resume=False, console=quiet())
    (skipped,) = document["skipped"]
    assert skipped["what"] == "tiny native:fp32"
    assert "killed, as the system does when memory runs out" in skipped["why"]
    whole = [cell for cell in document["cells"] if cell["engine"] == "native:int8"]
    assert len(whole) == 4 and all(cell["rounds"] == 2 for cell in whole)


def test_an_engine_that_cannot_run_says_why(tmp_path: Path) -> None:
    changed = Settings.from_dict({**TINY.as_dict(), "engines": ["native:fp8", "native:int8"], "probes": False})
    document = run.start(changed, tmp_path / "one", resume=False, console=quiet())
    (skipped,) = document["skipped"]
    assert skipped["what"] == "tiny native:fp8" and "precision fp8 is not available on the CPU" in skipped["why"]
    assert {cell["engine"] for cell in document["cells"]} == {"native:int8"}
    only = Settings.from_dict({**TINY.as_dict(), "engines": ["stock:int8"], "probes": False})
    with pytest.raises(BackendUnavailableError, match="transformers itself runs fp32, fp16 and bf16"):
        run.start(only, tmp_path / "two", resume=False, console=quiet())


def test_no_gpu_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = Settings.from_dict({**TINY.as_dict(), "device": "cuda"})
    with pytest.raises(BackendUnavailableError, match="no GPU"):
        run.start(gpu, tmp_path, resume=False, console=quiet())
    assert not (tmp_path / store.NAME).exists()


# --- planning


def test_what_does_not_fit_is_skipped_and_said() -> None:
    settings = Settings(sizes=("base", "13b"), engines=("native:int8",), languages=("sw",))
    made = run.plan(settings, Texts(settings), available=12 * GIB)
    assert [(group.size, group.arms) for group in made.groups] == [("base", (BASELINE, INTERMEDIATE, CONTROL))]
    (skipped,) = made.skipped
    assert skipped["what"] == "13b native:int8" and "12.9 GB are free" in skipped["why"]
    assert made.seconds and made.memory_bytes < 12 * GIB


def test_the_control_shares_memory_where_a_copy_does_not_fit() -> None:
    settings = Settings(sizes=("large",), engines=("native:fp32",), languages=("sw",))
    made = run.plan(settings, Texts(settings), available=10 * GIB)
    (group,) = made.groups
    assert group.shared_control and group.arms == (BASELINE, INTERMEDIATE)
    assert "a second copy does not fit" in made.notes[0]


def test_footprints_hold_on_a_real_model(finished: tuple[Path, dict[str, Any]]) -> None:
    planned = run.plan(TINY, Texts(TINY), available=100 * GIB)
    for group in planned.groups:
        (seen,) = [one["peak_bytes"] for one in finished[1]["memory"] if one["engine"] == group.engine]
        assert seen <= group.memory_bytes


def test_stock_engines_are_planned_with_their_padding() -> None:
    settings = Settings(languages=("sw",), policies=("arrival",))
    seconds = [
        run.plan(Settings.from_dict({**settings.as_dict(), "engines": [engine]}), Texts(settings), 100 * GIB).seconds
        for engine in ("native:fp32", "stock:fp32")
    ]
    assert seconds[0] is not None and seconds[1] is not None
    assert seconds[1] > seconds[0]


# --- the store


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    first = Store(tmp_path, TINY, machine(), resume=False)
    for number in range(3):
        first.add({"kind": "visit", "cell": "a", "round": number})
    first.close()
    path = tmp_path / store.NAME
    whole = path.read_bytes()
    for cut in range(1, len(whole.split(b"\n")[-2])):  # cut anywhere in the last line: it is dropped
        path.write_bytes(whole[: len(whole) - 1 - cut])
        again = Store(tmp_path, TINY, machine(), resume=True)
        assert again.done == {"a#0", "a#1"}
        again.close()
        assert path.read_bytes() == whole[: whole.rindex(b"\n", 0, len(whole) - 1) + 1]
    rows = whole.split(b"\n")
    for damage in (b"{", b"[]", b"null", b'{"cell": 1}', b"\xff\xfe"):
        path.write_bytes(b"\n".join([rows[0], damage, *rows[2:]]))
        with pytest.raises(DataFileError, match=r"observations.jsonl:2: not an observation"):
            Store(tmp_path, TINY, machine(), resume=True)
    path.write_bytes(whole.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(DataFileError, match="format 1 are expected, got 9"):
        Store(tmp_path, TINY, machine(), resume=True)
    path.write_bytes(whole.replace(b'"rounds"', b'"wounds"'))
    with pytest.raises(DataFileError, match="no settings"):
        Store(tmp_path, TINY, machine(), resume=True)
    path.write_bytes(whole[:20])
    with pytest.raises(DataFileError, match="no whole line"):
        Store(tmp_path, TINY, machine(), resume=True)


class _Full:
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    made = Store(tmp_path, TINY, machine(), resume=False)
    file, made._file = made._file, _Full()  # type: ignore[assignment]
    with pytest.raises(DataFileError, match=r"No space left.*--resume"):
        made.add({"kind": "visit", "cell": "a", "round": 0})
    file.close()
    with pytest.raises(DataFileError, match="cannot write"):
        Store(Path("/dev/null/x"), TINY, machine(), resume=False)


# --- the clock and energy


def test_a_coarse_clock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = time.get_clock_info("perf_counter")
    coarse.resolution = 0.015  # Windows before perf_counter
    monkeypatch.setattr(timing.time, "get_clock_info", lambda _: coarse)
    with pytest.raises(InvalidInputError, match="too coarse"):
        timing.seconds_of(lambda batch: None, [None])  # type: ignore[list-item]


def test_energy_counters_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (value, top) in enumerate([(900, 1000), (5, 1000)]):
        zone = tmp_path / f"intel-rapl:{index}"
        zone.mkdir()
        (zone / "energy_uj").write_text(f"{value}000000\n")
        (zone / "max_energy_range_uj").write_text(f"{top}000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the first: not counted twice
    (tmp_path / "intel-rapl:2").mkdir()  # unreadable
    monkeypatch.setattr(timing, "_RAPL", tmp_path)
    energy = timing.Energy("cpu")
    before = energy.read()
    assert before == [900, 5] and energy.source == "RAPL"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("20000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("8000000\n")
    assert energy.since(before) == pytest.approx(120 + 3)
    monkeypatch.setattr(timing, "_RAPL", tmp_path / "nowhere")
    nothing = timing.Energy("cpu")
    assert nothing.source is None and nothing.since(nothing.read()) is None


def test_engines_parse(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="engine: 'x:y'"):
        EngineName.parse("x:y")
