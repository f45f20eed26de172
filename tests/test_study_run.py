"""Planning, workers, the store: a study end to end on a tiny model, killed, resumed, and with workers that die."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import study_processes as processes
import torch
from study_processes import alone, quiet

from xfast import machine as machines
from xfast.errors import BackendUnavailableError, DataFileError, InvalidInputError, InvalidOptionError
from xfast.machine import machine
from xfast.study import arms, run, store, timing, worker
from xfast.study.document import BASELINE, CONTROL, INTERMEDIATE, Study
from xfast.study.factors import EngineName, Settings
from xfast.study.store import Store
from xfast.study.work import Texts

TINY = Settings(sizes=("tiny",), tasks=("panx",), languages=("sw", "en"), samples=4, responses=2, rounds=2, threads=1)
FEW = replace(TINY, languages=("sw",), responses=0, probes=False)
GIB = 2**30


_forked = pytest.fixture(scope="module", autouse=True)(processes.forked)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / store.NAME).read_text().splitlines()]


# --- a whole study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study") / "größe 1"  # paths with spaces and other letters are paths
    return folder, run.start(TINY, folder, resume=False, console=quiet())


def test_every_cell_is_measured_in_every_arm(finished: tuple[Path, dict[str, Any]]) -> None:
    _, document = finished
    assert set(document) == Study.__required_keys__ | Study.__optional_keys__
    assert len(document["cells"]) == 2 * 2 * 2  # engines, languages, throughput and latency
    for cell in document["cells"]:
        figures = cell["throughput"] or cell["latency"]
        assert set(figures) == {BASELINE, INTERMEDIATE, CONTROL}
        assert set(cell["ratios"]) == {INTERMEDIATE, CONTROL}
        assert cell["rounds"] == 2
    assert not document["skipped"]
    assert document["machine"]["threads"] == TINY.threads
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
            assert (latency["texts"], latency["responses"]) == (2, sum(map(len, mine)))
            texts = [median(seconds for visit in mine for seconds in visit[text::2]) for text in range(2)]
            assert latency["quantiles_ms"][0] == pytest.approx(1e3 * min(texts))
            assert latency["quantiles_ms"][-1] == pytest.approx(1e3 * max(texts))
            assert latency["p99_ms"] is None and "2 texts" in latency["unknown"]["p99_ms"]


def test_probes_show_exact_and_coarse_arithmetic(finished: tuple[Path, dict[str, Any]]) -> None:
    probes = [one for one in finished[1]["probes"] if one["probe"] == "quantisation"]
    assert {one["arm"] for one in probes} == {BASELINE, INTERMEDIATE}
    cosines = [one["value"] for one in probes if one["what"].startswith("cosine")]
    assert cosines and all(0.99 < value <= 1 + 1e-6 for value in cosines)
    early = [one for one in finished[1]["probes"] if one["probe"] == "early" and one["x"] == 2]
    assert early and all(one["value"] == 1.0 for one in early)  # the last layer agrees with itself


def test_what_no_arithmetic_touches_is_probed_once_and_by_an_exact_engine_too(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    order = [line for line in lines(finished[0]) if line["kind"] in ("probe", "engine")]
    kinds = [line.get("probe", line.get("engine")) for line in order]
    begun = kinds.index("native:fp32")  # an engine says what it is when its probes are done
    assert set(kinds[:begun]) == {"early"} and kinds[begun + 1] == "quantisation"
    assert "early" not in kinds[begun:]
    figures = [(one["arm"], one["language"], one["x"]) for one in order[:begun]]
    assert sorted(figures) == sorted(
        (arm, language, layer) for arm in (BASELINE, INTERMEDIATE) for language in ("sw", "en") for layer in (1, 2)
    )


def test_a_finished_study_is_not_measured_again(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, document = finished
    before = len(lines(folder))
    again = run.start(TINY, folder, resume=True, console=quiet())
    assert again["cells"] == document["cells"]
    assert [line["kind"] for line in lines(folder)[before:]] == ["plan", "ended"]
    with pytest.raises(InvalidOptionError, match="--resume"):
        run.start(TINY, folder, resume=False, console=quiet())
    with pytest.raises(InvalidOptionError, match="another study"):
        run.start(Settings(sizes=("tiny",)), folder, resume=True, console=quiet())


# --- killed


def _lives(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_continues_and_loses_nothing(tmp_path: Path) -> None:
    settings = replace(TINY, engines=("native:int8",))
    path = tmp_path / store.NAME
    # A process that knows nothing of this module's fixtures: its worker is spawned, as a user's is.
    process = multiprocessing.get_context("forkserver").Process(target=processes.begin, args=(settings, tmp_path))
    process.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if path.exists() and path.read_bytes().count(b'"visit"') >= 3:
            break
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    assert children
    while any(_lives(child) for child in children):  # a worker ends with its parent, in the middle of a visit
        assert time.monotonic() < deadline
        time.sleep(0.02)
    had = [line for line in path.read_bytes().split(b"\n")[:-1] if b'"visit"' in line]
    assert len(had) >= 3
    with path.open("ab") as file:
        file.write(b'{"kind": "visit", "cell": "tiny/na')  # what a crash of the machine leaves
    document = run.start(settings, tmp_path, resume=True, console=quiet())
    visits = [(line["cell"], line["round"]) for line in lines(tmp_path) if line["kind"] == "visit"]
    assert len(visits) == len(set(visits)) == 8
    assert [line for line in path.read_bytes().split(b"\n") if b'"visit"' in line][: len(had)] == had
    assert all(cell["rounds"] == 2 for cell in document["cells"])
    runs = {number: [line["after"] for line in lines(tmp_path) if line["run"] == number] for number in (1, 2)}
    assert all(times == sorted(times) and times[-1] > 0.3 for times in runs.values())
    assert document["seconds"] == pytest.approx(runs[1][-1] + runs[2][-1], abs=0.1)


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
    document = run.start(FEW, tmp_path, resume=False, console=quiet())
    (skipped,) = document["skipped"]
    assert skipped["what"] == "tiny native:fp32"
    assert "killed, as the system does when memory runs out" in skipped["why"]
    (whole,) = [cell for cell in document["cells"] if cell["engine"] == "native:int8"]
    assert whole["rounds"] == 2


def test_an_engine_that_cannot_run_says_why(tmp_path: Path) -> None:
    changed = replace(FEW, engines=("native:fp8", "native:int8"), rounds=1)
    document = run.start(changed, tmp_path / "one", resume=False, console=quiet())
    (skipped,) = document["skipped"]
    assert skipped["what"] == "tiny native:fp8" and "precision fp8 is not available on the CPU" in skipped["why"]
    assert {cell["engine"] for cell in document["cells"]} == {"native:int8"}
    only = replace(FEW, engines=("native:fp8",), rounds=1)
    with pytest.raises(BackendUnavailableError, match="precision fp8 is not available on the CPU"):
        run.start(only, tmp_path / "two", resume=False, console=quiet())
    with pytest.raises(InvalidOptionError, match="transformers itself runs fp32, fp16, bf16"):
        replace(FEW, engines=("stock:int8",))


def test_no_gpu_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = Settings.from_dict({**TINY.as_dict(), "device": "cuda"})
    with pytest.raises(BackendUnavailableError, match="no GPU"):
        run.start(gpu, tmp_path, resume=False, console=quiet())
    assert not (tmp_path / store.NAME).exists()


# --- planning


def test_what_does_not_fit_is_skipped_and_said() -> None:
    settings = Settings(sizes=("base", "13b"), engines=("native:int8",), tasks=("panx",), languages=("sw",))
    made = run.plan(settings, Texts(settings), available=12 * GIB)
    assert [(group.size, group.fit.arms) for group in made.groups] == [("base", (BASELINE, INTERMEDIATE, CONTROL))]
    (skipped,) = made.skipped
    assert skipped["what"] == "13b native:int8" and "12.9 GB are free" in skipped["why"]
    assert made.seconds and made.memory_bytes < 12 * GIB


def test_the_control_shares_memory_where_a_copy_does_not_fit() -> None:
    settings = Settings(sizes=("large",), engines=("native:fp32",), languages=("sw",))
    made = run.plan(settings, Texts(settings), available=10 * GIB)
    (group,) = made.groups
    assert group.shared_control and group.fit.arms == (BASELINE, INTERMEDIATE)
    assert group.fit.held[CONTROL] == "runs the baseline's copy"
    assert group.fit.held[BASELINE] == "seeded weights in float32, packed beside them"
    assert "a second copy does not fit" in made.notes[0]


def test_probes_that_cannot_be_run_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ceiling", lambda *_, **__: 10.0)
    large = Settings(sizes=("xl",), engines=("native:fp32", "native:int8"), tasks=("panx",), languages=("sw",))
    made = run.plan(large, Texts(large), available=200 * GIB)
    assert all(not group.fit.build.probes for group in made.groups) and len(made.groups) == 2
    why = {one["what"]: one["why"] for one in made.skipped}
    assert set(why) == {"probe quantisation of xl native:int8", "probe early of xl"}
    assert all("2 billion parameters" in reason for reason in why.values())
    assert [note for note in made.notes if note.startswith("xl: probes are left out")]
    without = Settings.from_dict({**large.as_dict(), "probes": False})
    assert not run.plan(without, Texts(without), available=200 * GIB).skipped

    tight = Settings(sizes=("large",), engines=("stock:bf16", "stock:fp32"), tasks=("panx",), languages=("sw",))
    made = run.plan(tight, Texts(tight), available=8 * GIB + GIB // 2)
    assert [(group.fit.build.probes, len(group.fit.arms)) for group in made.groups] == [
        (("quantisation", "early"), 3),
        ((), 3),
    ]
    made = run.plan(tight, Texts(tight), available=6 * GIB)
    assert [(group.fit.build.probes, len(group.fit.arms)) for group in made.groups] == [((), 3), ((), 2)]
    assert {one["what"] for one in made.skipped} == {"probe quantisation of large stock:bf16", "probe early of large"}
    assert all("no memory" in one["why"] for one in made.skipped)


@pytest.mark.parametrize("engine", ["native:int8", "stock:bf16"])
def test_footprints_hold_on_a_real_model(engine: str) -> None:
    assert 0.7 < alone(processes.footprint, engine) <= 1.03  # no spare for Python and torch in it


def test_stock_engines_are_planned_with_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ceiling", lambda *_, **__: 10.0)
    seconds = {}
    for policy in ("arrival", "sorted"):
        settings = Settings(engines=("stock:fp32",), languages=("sw",), policies=(policy,), responses=0)
        settings = replace(settings, probes=False)
        seconds[policy] = run.plan(settings, Texts(settings), 100 * GIB).seconds
    both = Settings.from_dict({**settings.as_dict(), "policies": ("arrival", "sorted")})
    together = run.plan(both, Texts(both), 100 * GIB).seconds
    build = 3 * 277_453_056 * run._BUILD_S_PER_PARAMETER + 5
    assert seconds["arrival"] and seconds["sorted"] and together
    assert seconds["arrival"] > 1.1 * seconds["sorted"]
    assert together == pytest.approx(seconds["arrival"] + seconds["sorted"] - build)


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


def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / store.NAME).symlink_to("/dev/full")
    with pytest.raises(DataFileError, match=r"No space left.*--resume"):
        Store(tmp_path, TINY, machine(), resume=False)
    with pytest.raises(DataFileError, match="cannot write"):
        Store(Path("/dev/null/x"), TINY, machine(), resume=False)


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    assert "File too large; --resume continues" in alone(processes.fill_up, tmp_path)
    records, _ = store.read(tmp_path / store.NAME)
    assert [record["text"] for record in records[1:]] == ["a", "c"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = Store(tmp_path, TINY, machine(), resume=False)
    with pytest.raises(InvalidOptionError, match="another run writes"):
        Store(tmp_path, TINY, machine(), resume=True)
    first.close()
    Store(tmp_path, TINY, machine(), resume=True).close()


def test_another_machine_or_other_data_do_not_continue(tmp_path: Path) -> None:
    Store(tmp_path, TINY, machine(), resume=False).close()
    with pytest.raises(InvalidOptionError, match=r"another machine \(cpu: .*'other'"):
        Store(tmp_path, TINY, {**machine(), "cpu": "other"}, resume=True)
    made = Store(tmp_path, TINY, {**machine(), "commit": "newer"}, resume=True)
    assert "Continued with xfast newer" in lines(tmp_path)[-1]["text"]
    assert [line["run"] for line in lines(tmp_path)] == [1, 2] and lines(tmp_path)[-1]["after"] < 60
    made.add({"kind": "cell", "cell": "a", "digest": "0123"})
    made.match("cell", "cell", {"a": {"digest": "0123"}, "b": {"digest": "new"}})
    with pytest.raises(InvalidOptionError, match=r"a was measured with other data.*'0123' there, '4567' now"):
        made.match("cell", "cell", {"a": {"digest": "4567"}})
    made.close()


def test_numbers_that_are_not_finite_become_null_with_a_note(tmp_path: Path) -> None:
    made = Store(tmp_path, TINY, machine(), resume=False)
    made.add({"kind": "probe", "what": "cosine", "value": float("nan"), "parts": [1.0, float("inf")]})
    made.add({"kind": "probe", "what": "cosine", "value": 0.5, "parts": (1, 2)})
    made.close()
    _, note, bad, good = lines(tmp_path)
    assert note["text"] == "Not finite, stored as null: kind probe, what cosine"
    assert (bad["value"], bad["parts"], good["value"], good["parts"]) == (None, [1.0, None], 0.5, [1, 2])
    assert made.records[2]["value"] is None


# --- workers that go silent


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    made = Store(tmp_path, TINY, machine(), resume=False)
    ours, other = multiprocessing.Pipe()
    assert run._receive(ours, made, None, 0.01) == "its process said nothing for 0 minutes"
    other.send(worker.ALIVE)
    other.send({"kind": "note", "text": "stored before it is answered"})
    os.write(other.fileno(), b"\x00\x00\x10\x00half a record")
    other.close()
    assert run._receive(ours, made, None, 10) == ""  # killed in the middle of it
    assert [record["kind"] for record in made.records] == ["study", "note"]
    made.close()


# --- memory


def test_control_groups_bound_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 64 kB\n")
    monkeypatch.setattr(machines, "_PROC", proc)
    monkeypatch.setattr(machines, "_CGROUPS", groups)
    assert machines.available_memory() == 64 * 1024
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    for name, limit in (("a", "50000"), ("a/b", "max")):
        (groups / name).mkdir(parents=True)
        (groups / name / "memory.max").write_text(f"{limit}\n")
        (groups / name / "memory.current").write_text("45000\n")
        (groups / name / "memory.stat").write_text("anon 5\ninactive_file 4000\n")
    assert machines.available_memory() == 50000 - 41000  # the parent's limit; what is cached can be dropped
    (proc / "self" / "cgroup").write_text("0::/\n7:cpu,memory:/docker/x\n")  # as a container sees version 1
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("9000\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("9500\n")
    (groups / "memory" / "memory.stat").write_text("total_inactive_file 0\n")
    assert machines.available_memory() == 0


@pytest.mark.parametrize(
    ("parameters", "engine", "dtype", "held"),
    [
        (10**9, "native:bf16", torch.float32, 4 + 2),  # the originals stay fp32
        (10**9, "stock:fp32", torch.float32, 4),
        (3 * 10**9, "stock:fp32", torch.float32, 4),  # large, but nothing is packed
        (3 * 10**9, "stock:bf16", torch.bfloat16, 2),
        (3 * 10**9, "native:bf16", torch.bfloat16, 2),  # the originals are given up
    ],
)
def test_memory_is_counted_in_the_dtype_that_is_built(
    parameters: int, engine: str, dtype: torch.dtype, held: int
) -> None:
    name = EngineName.parse(engine)
    build = arms.build_of(Settings(probes=False), parameters, name)
    assert build.dtype == dtype
    assert arms.footprint(parameters, 0, name, build).held == held * parameters


# --- the clock and energy


def test_a_coarse_clock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = time.get_clock_info("perf_counter")
    coarse.resolution = 0.015  # Windows before perf_counter
    monkeypatch.setattr(timing.time, "get_clock_info", lambda _: coarse)
    with pytest.raises(InvalidInputError, match="too coarse"):
        timing.seconds_of(lambda batch: None, [None])  # type: ignore[list-item]


def test_energy_counters_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("package-0", "package-1", "psys", "core")  # psys has the packages in it, core is a part of one
    for index, (value, top) in enumerate([(900, 1000), (5, 1000), (999, 1000), (1, 1000)]):
        zone = tmp_path / f"intel-rapl:{index if index < 3 else '0:0'}"
        zone.mkdir()
        (zone / "name").write_text(f"{names[index]}\n")
        (zone / "energy_uj").write_text(f"{value}000000\n")
        (zone / "max_energy_range_uj").write_text(f"{top}000000\n")
    (tmp_path / "intel-rapl:3").mkdir()  # unreadable
    monkeypatch.setattr(timing, "_RAPL", tmp_path)
    energy = timing.Energy("cpu")
    before = energy.read()
    assert before == [900, 5] and energy.source == "RAPL"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("20000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("8000000\n")
    assert energy.since(before) == pytest.approx(120 + 3)
    monkeypatch.setattr(timing, "_RAPL", tmp_path / "nowhere")
    nothing = timing.Energy("cpu")
    assert nothing.source is None and nothing.since(nothing.read()) is None and nothing.ticks(1.0) is None


def test_how_coarse_a_counter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.001
        return clock[0]

    monkeypatch.setattr(timing.time, "perf_counter", now)
    energy = timing.Energy("cpu")
    monkeypatch.setattr(energy, "read", lambda: [clock[0] // 0.05])
    assert energy.ticks(1.0) == pytest.approx(20, rel=0.05)
    stands = timing.Energy("cpu")
    monkeypatch.setattr(stands, "read", lambda: [7.0])
    assert stands.ticks(1.0) is None


def test_weights_that_would_be_held_in_another_way_do_not_continue(tmp_path: Path) -> None:
    (group, *_) = run.plan(FEW, Texts(FEW)).groups
    made = Store(tmp_path, FEW, machine(), resume=False)
    mine = {"size": group.size, "engine": group.engine}
    made.add({"kind": "engine", **mine, "held": {BASELINE: "packed artifact"}})
    run._require_same_holding(group, made)  # nothing of it was measured
    made.add({"kind": "visit", "cell": group.cells[0].key, "round": 0})
    with pytest.raises(InvalidOptionError, match=r"tiny native:fp32 were held in another way.*packed artifact"):
        run._require_same_holding(group, made)
    made.add({"kind": "ended_group", **mine})
    run._require_same_holding(group, made)  # nothing of it is left to measure
    made.close()
