"""Synthetic studies for the tests of the report: figures follow a simple law, so that tests can recompute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from xfast.study.document import (
    BASELINE,
    CONTROL,
    DIFFERENT,
    EQUIVALENT,
    FORMAT,
    INTERMEDIATE,
    PERCENTILES,
    UNDECIDED,
    Cell,
    CostModel,
    Equivalence,
    Latency,
    ParetoPoint,
    Ratio,
    Scaling,
    Study,
    Throughput,
    Trade,
)
from xfast.study.languages import language, ordered
from xfast.study.profiles import GROUPS, PERCENTS, LengthProfile, load_profiles

SIZES = {
    "base": {"parameters": 278_043_648, "layers": 12, "hidden_size": 768},
    "large": {"parameters": 559_890_432, "layers": 24, "hidden_size": 1024},
    "xl": {"parameters": 3_482_741_760, "layers": 36, "hidden_size": 2560},
}
# Microseconds per token and per sequence of base; padding counts for transformers only.
COSTS = {"stock fp32": (2100.0, 900.0), "native fp32": (760.0, 300.0), "native int8": (265.0, 220.0)}
LANGUAGES = ("en", "sw", "yo", "my", "te", "jv", "ml", "mr", "bn", "th", "fi", "de", "zh", "ar", "hi", "ta")
HOSTILE = "<script>alert(\"x\")</script> & 'co' $x_1$ \\end{table} | %"
PADDING = 0.35


@cache
def profiles(task: str) -> dict[str, LengthProfile]:
    return {profile.language: profile for profile in load_profiles() if profile.task == task}


def ratio(rng: np.random.Generator, effect: float, noise: float) -> Ratio:
    middle = math.exp(effect + rng.normal(0, noise / 2))
    return Ratio(ratio=middle, interval95=[middle * math.exp(-noise), middle * math.exp(noise)], pairs=40)


def seconds(engine: str, size: str, tokens: float) -> float:
    """Time of one sample."""
    per_token, per_sequence = COSTS.get(engine, (500.0, 300.0))
    slots = tokens / (1 - PADDING) if engine.startswith("stock") else tokens
    return (per_token * slots + per_sequence) * 1e-6 * SIZES[size]["parameters"] / SIZES["base"]["parameters"]


def cell(
    kind: str, size: str, engine: str, task: str, code: str, arms: Sequence[str], rng: np.random.Generator
) -> Cell:
    profile = profiles(task)[code]
    spaced = profile.words_mean is not None
    each = seconds(engine, size, profile.mean)
    throughput: dict[str, Throughput] = {}
    latency: dict[str, Latency] = {}
    for arm in arms:
        slower = 1 + 0.001 * float(rng.normal())
        tokens = profile.mean / each / slower
        if kind == "throughput":
            throughput[arm] = Throughput(
                samples_per_s=1 / each / slower,
                tokens_per_s=tokens,
                words_per_s=(profile.words_mean or 0) / each / slower if spaced else None,
                tokens_per_s_interval=[tokens * 0.99, tokens * 1.01],
                joules_per_sample=each * 35 if engine == "native int8" else None,
            )
        else:
            lengths = np.interp(PERCENTILES, PERCENTS, profile.quantiles).tolist()
            ms = [1000 * seconds(engine, size, length) * slower * 1.15 for length in lengths]
            latency[arm] = Latency(
                p50_ms=ms[10], p95_ms=ms[19], p99_ms=ms[20], texts=400, responses=1200, quantiles_ms=ms, unknown={}
            )
    return Cell(
        key=f"{kind} {size} {engine} {task} {code}",
        kind=kind,
        size=size,
        engine=engine,
        task=task,
        language=code,
        policy="sorted" if kind == "throughput" else "single",
        batch_size=16 if kind == "throughput" else 1,
        samples=400,
        tokens=round(profile.mean * 400),
        words=round((profile.words_mean or 0) * 400) if spaced else None,
        padding=PADDING if kind == "throughput" else 0.0,
        fertility=profile.fertility,
        windows_per_example=1.25 if task in ("xquad", "tydiqa") else None,
        rounds=5,
        throughput=throughput,
        latency=latency,
        ratios={arm: ratio(rng, 0.0, 0.006) for arm in arms if arm != BASELINE},
    )


def equivalence(scope: str, arm: str, middle: float, half: float, margin: float = 0.02) -> Equivalence:
    ends = [middle * math.exp(-half), middle * math.exp(half)]
    low, high = 1 / (1 + margin), 1 + margin
    wider = [middle * math.exp(-1.2 * half), middle * math.exp(1.2 * half)]
    inside, apart = low < ends[0] and ends[1] < high, not wider[0] <= 1 <= wider[1]
    return Equivalence(
        scope=scope,
        arm=arm,
        ratio=middle,
        interval90=ends,
        interval95=wider,
        p_value=0.0004 if inside else 0.31,
        margin=margin,
        verdict=EQUIVALENT if inside else DIFFERENT if apart else UNDECIDED,
        pairs=640,
        cells=128,
        pairs_needed=None,
        cells_needed=310 if low < middle < high and not inside else None,
    )


def scaling(cells: Sequence[Cell], size: str, engine: str, group: str) -> Scaling | None:
    first = cells[0]["task"]
    mine = [one for one in cells if (one["size"], one["engine"]) == (size, engine) and one["throughput"]]
    mine = [one for one in mine if one["task"] == first]
    mine = [one for one in mine if group in ("all", language(one["language"])["group"])]
    if not mine:
        return None
    return Scaling(
        size=size,
        engine=engine,
        arm=BASELINE,
        group=group,
        task=mine[0]["task"],
        parameters=SIZES[size]["parameters"],
        samples_per_s=float(np.exp(np.mean([np.log(one["throughput"][BASELINE]["samples_per_s"]) for one in mine]))),
        tokens_per_s=float(np.exp(np.mean([np.log(one["throughput"][BASELINE]["tokens_per_s"]) for one in mine]))),
        p50_ms=1000 * seconds(engine, size, 20),
    )


def cost_model(cells: Sequence[Cell], size: str, engine: str) -> CostModel:
    mine = [one for one in cells if (one["size"], one["engine"]) == (size, engine) and one["throughput"]]
    seen = {one["language"]: one["throughput"][BASELINE]["samples_per_s"] for one in mine}
    per_token, per_sequence = COSTS.get(engine, (500.0, 300.0))
    return CostModel(
        size=size,
        engine=engine,
        task=mine[0]["task"],
        policy="sorted",
        batch_size=16,
        us_per_token=per_token,
        us_per_sequence=per_sequence,
        r2=0.992,
        languages=len(seen),
        explained={"fertility": 0.62, "padding": 0.11},
        explained_over={"fertility": sum(one["fertility"] is not None for one in mine), "padding": len(seen)},
        predicted={code: value * 1.02 for code, value in seen.items()},
        seen=seen,
    )


def labelled(found: Study, sizes: Sequence[str], tasks: Sequence[str], arms: Sequence[str]) -> None:
    """Adds scores and what follows from them: trained weights."""
    rng = np.random.default_rng(1)
    for size in sizes:
        for engine in found["engines"]:
            for task in tasks:
                for code in found["languages"]:
                    start = 55 + 6 * found["languages"][code]["joshi_class"] + 3 * (size == "large")
                    for arm in (arm for arm in arms if arm != CONTROL):
                        value = float(
                            start + 3.5 * (arm == INTERMEDIATE) - 0.4 * ("int8" in engine) + rng.normal(0, 0.5)
                        )
                        row = {"arm": arm, "size": size, "engine": engine, "task": task, "language": code}
                        found["accuracy"].append(
                            {**row, "layers": None, "metric": "F1", "value": value, "examples": 900}
                        )
                for arm in (arm for arm in arms if arm != CONTROL):
                    for layers, share in ((6, 0.55), (9, 0.78), (None, 1.0)):
                        point = ParetoPoint(
                            arm=arm,
                            size=size,
                            engine=engine,
                            task=task,
                            group="all",
                            layers=layers,
                            accuracy=70 + 3.5 * (arm == INTERMEDIATE) - 14 * (1 - share) + 3 * (size == "large"),
                            ms_per_sample=1000 * seconds(engine, size, 30) * share,
                            estimated=layers is not None,
                            on_front=False,
                        )
                        found["pareto"].append(point)
    reference = next(iter(found["engines"]))
    found["trades"] = [
        Trade(
            size=score["size"],
            task=score["task"],
            language=score["language"],
            engine=reference,
            accuracy=score["value"],
            ms_per_sample=40.0,
            best_accuracy=score["value"] + 3,
            best_by="native:int8",
            least_ms=None if score["language"] == "sw" else 12.5,
            least_by=None if score["language"] == "sw" else "native:int8, 9 layers",
        )
        for score in found["accuracy"]
        if (score["arm"], score["engine"], score["layers"]) == (BASELINE, reference, None)
    ]
    for one in found["pareto"]:
        rivals = [other for other in found["pareto"] if other["task"] == one["task"]]
        one["on_front"] = not any(
            (other["ms_per_sample"], -other["accuracy"]) != (one["ms_per_sample"], -one["accuracy"])
            and other["ms_per_sample"] <= one["ms_per_sample"]
            and other["accuracy"] >= one["accuracy"]
            for other in rivals
        )


def probed(found: Study, arms: Sequence[str]) -> None:
    """Adds probes of four kinds: over layers, by engine, and figures without an abscissa."""
    rng = np.random.default_rng(2)
    for arm in (arm for arm in arms if arm != CONTROL):
        for code in found["languages"]:
            row: dict[str, Any] = {"arm": arm, "size": next(iter(found["sizes"])), "task": "panx", "language": code}
            for layer in range(1, 13):
                value = float(90 * math.exp(-((layer - 7.5) ** 2) / 30) + 2 * (arm == INTERMEDIATE) + rng.normal(0, 1))
                found["probes"].append(
                    {**row, "probe": "layer", "x": float(layer), "what": "retrieval, %", "value": value}
                )
                value = float(1 - math.exp(-layer / 3) + rng.normal(0, 0.01))
                what = "share of answers that this layer gives already"
                found["probes"].append({**row, "probe": "early", "x": float(layer), "what": what, "value": value})
            for engine in found["engines"]:
                value = float(1 - abs(rng.normal(0, 0.004)) * (1 + 3 * ("int8" in engine)))
                what = "cosine with fp32, worst sentence"
                found["probes"].append({**row, "probe": "quantisation", "x": engine, "what": what, "value": value})
            found["probes"].append(
                {
                    **row,
                    "probe": "windows",
                    "x": None,
                    "what": "windows per question",
                    "value": 1.2 + 0.1 * rng.random(),
                }
            )


def study(
    *,
    languages: Sequence[str] = LANGUAGES,
    engines: Sequence[str] = tuple(COSTS),
    sizes: Sequence[str] = ("base", "large"),
    tasks: Sequence[str] = ("panx",),
    arms: Sequence[str] = (BASELINE, INTERMEDIATE, CONTROL),
    labels: bool = True,
    probes: bool = True,
    latency: bool = True,
    control: float = 1.0004,
) -> Study:
    """A whole document. Without labels its weights are seeded; ``control`` is the ratio that the A/A test found."""
    rng = np.random.default_rng(0)
    kinds = ("throughput", "latency") if latency else ("throughput",)
    known = {task: profiles(task) for task in tasks}
    cells = [
        cell(kind, size, engine, task, code, arms, rng)
        for size in sizes
        for engine in engines
        for task in tasks
        for code in ordered(languages)
        if code in known[task]
        for kind in kinds
    ]
    present = [group for group in ("all", *GROUPS) for code in languages if group in ("all", language(code)["group"])]
    scopes = [*dict.fromkeys(present), *(f"{size} {engine}" for size in sizes for engine in engines)]
    scopes += ordered(languages)
    pairs = [(size, engine) for size in sizes for engine in engines]
    found = Study(
        format=FORMAT,
        title="Throughput, latency and accuracy per language",
        created="2026-11-21T12:00:00+00:00",
        seconds=5400.0,
        settings={"rounds": 5, "margin": 0.02, "tasks": list(tasks), "threads": 2},
        text="real text" if labels else "profiles",
        machine={"cpu": "AMD EPYC 9005", "cores": 2, "instruction set": "avx512_bf16", "torch": "2.13.0"},
        arms={arm: {"source": f"runs/{arm}" if labels else "seeded", "description": f"the {arm}"} for arm in arms},
        sizes={size: {**SIZES[size]} for size in sizes},  # type: ignore[typeddict-item]
        engines={
            engine: {
                "backend": engine.split()[0],
                "precision": engine.split()[-1],
                "device": "cpu",
                "explain": f"{engine} on 2 threads",
            }
            for engine in engines
        },
        languages={code: language(code) for code in ordered(languages)},
        cells=cells,
        control=equivalence("all", CONTROL, control, 0.0015),
        equivalence=[equivalence(scope, INTERMEDIATE, 0.999 + 0.0003 * at, 0.004) for at, scope in enumerate(scopes)]
        if INTERMEDIATE in arms
        else [],
        scaling=[
            one
            for size, engine in pairs
            for group in ("all", *GROUPS)
            if (one := scaling(cells, size, engine, group)) is not None
        ],
        cost_models=[cost_model(cells, size, engine) for size, engine in pairs],
        accuracy=[],
        pareto=[],
        trades=[],
        probes=[],
        memory=[
            {"size": size, "engine": engine, "arms": len(arms), "peak_bytes": SIZES[size]["parameters"] * 5}
            for size, engine in pairs
        ],
        skipped=[{"what": "xxl", "why": "needs 43 GB of memory, 31 GB are there"}],
        notes=["Batches are formed inside one language."],
    )
    if labels:
        labelled(found, sizes, tasks, arms)
    if probes:
        probed(found, arms)
    return found


def minimal() -> Study:
    """One language, one arm, one engine: no comparison, no reference, no latency, no probe."""
    found = study(
        languages=("sw",),
        engines=("native int8",),
        sizes=("base",),
        arms=(BASELINE,),
        labels=False,
        probes=False,
        latency=False,
    )
    found["arms"][CONTROL] = {"source": "seeded", "description": "the baseline a second time"}
    found["scaling"], found["cost_models"], found["memory"], found["skipped"] = [], [], [], []
    return found


def wide() -> Study:
    """Every language with a profile by two engines, on a task that reaches the most of them."""
    codes = sorted({profile.language for profile in load_profiles()})
    tasks = ("panx", "tatoeba", "udpos")
    return study(
        languages=codes, engines=("stock fp32", "native int8"), sizes=("base",), tasks=tasks, labels=False, probes=False
    )


def hostile() -> Study:
    """Names that would break a page, a table or a formula: of a task, an engine, an arm's folder, a language."""
    found = study(languages=("sw", "en"), sizes=("base",), engines=("native int8", HOSTILE))
    found["title"] = f"{HOSTILE}\x00\ud800"
    found["arms"][INTERMEDIATE]["source"] = f"/data/{HOSTILE}"
    found["languages"]["sw"]["name"] = HOSTILE
    found["machine"][HOSTILE] = HOSTILE
    found["skipped"].append({"what": HOSTILE, "why": HOSTILE})
    found["notes"].append(HOSTILE)
    for part in (found["cells"], found["probes"], found["accuracy"], found["pareto"]):
        for row in part:
            row["task"] = HOSTILE  # type: ignore[index]
    return found
