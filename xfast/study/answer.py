"""What a study found, in plain sentences computed from its figures, and what a reader has to be warned of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from xfast.pages import signed
from xfast.study import view
from xfast.study.document import (
    BASELINE,
    CONTROL,
    DIFFERENT,
    EQUIVALENT,
    INTERMEDIATE,
    Accuracy,
    Cell,
    CostModel,
    Equivalence,
    Study,
    passed,
)
from xfast.study.languages import LOW_RESOURCE
from xfast.study.profiles import GROUPS
from xfast.study.tables import grouped

_Rows = dict[str, dict[str, Cell]]

_NAMED = 3  # what is not measured is named up to so many, then counted


@dataclass(frozen=True)
class Answer:
    """Sentences.

    Attributes:
        warnings: (what is wrong, what follows from it): the figures are not to be trusted.
        cautions: the same of what the figures do not cover.
        lead: the findings, most important first; a paragraph each.
        languages: (name, finding) of XTREME's low-resource languages, or of the study's first ones without any.
    """

    warnings: list[tuple[str, str]]
    cautions: list[tuple[str, str]]
    lead: list[str]
    languages: list[tuple[str, str]]


def answer(study: Study) -> Answer:
    """The findings of a study that :func:`xfast.study.view.check` accepts."""
    chosen = view.setting(study)
    rows = view.throughput_cells(study, chosen) if chosen else {}
    speed = _speed(study, rows, chosen) if chosen and rows else ["No throughput was measured."]
    lead = [*_cost(study), *_gain(study), *speed]
    lead += [*(_between(study, rows, chosen) if chosen else ()), *_left_out(study)]
    return Answer(list(_warnings(study)), list(_cautions(study)), lead, list(_languages(study)))


def control_failed(study: Study) -> bool:
    """Whether the baseline measured against itself is not surely the same: then noise is too high."""
    return not passed(study["control"])


def _warnings(study: Study) -> Iterator[tuple[str, str]]:
    control = study["control"]
    if not control["pairs"]:
        so = "the baseline was not measured against itself, so how much of a difference is noise is not known."
        yield "There is no control:", so
    elif view.too_few(control):
        so = "how much of a difference is noise is not known: measure more rounds."
        yield "The control has too few pairs:", f"of {_count(control['pairs'], 'pair')} nothing can be said, so {so}"
    elif control_failed(study):
        change = view.change_text(control["ratio"], control["interval95"])
        what = f"The baseline measured against itself differs by {change}"
        so = "No comparison below can be trusted; measure again on an idle machine."
        verdict = f"which is not inside the margin of {_percent(control['margin'])}"
        yield "The control failed: the noise is too high.", f"{what}, {verdict}. {so}"


def _cautions(study: Study) -> Iterator[tuple[str, str]]:
    if study["accuracy"] and (limit := study["settings"].get("limit")):
        so = "scores are rough, and retrieval, which looks among no more sentences, is easier than on whole test sets."
        yield "Scores are of the first examples alone.", f"At most {limit} of each language: {so}"
    if seeded := view.seeded(study):
        which = f"That is so for {_joined(seeded)}. Speed, memory and padding are those of the architecture;"
        so = "nothing is claimed about accuracy, and probes say nothing about trained models."
        yield "The weights are seeded: random numbers of the right shape.", f"{which} {so}"


# --- findings -------------------------------------------------------------------------------------


def _cost(study: Study) -> Iterator[str]:
    found = [one for one in study["equivalence"] if one["arm"] != CONTROL and one["scope"] == view.ALL and one["pairs"]]
    if not found:
        yield "No other weights were compared with the baseline: nothing is said about intermediate training."
    for one in found:
        yield f"{_arm(one['arm'])} changes the time of inference by {view.change_of(one)}: {_verdict(study, one)}."


def _arm(arm: str) -> str:
    return "Intermediate training" if arm == INTERMEDIATE else f"The arm {arm}"


def _verdict(study: Study, one: Equivalence) -> str:
    margin = _percent(one["margin"])
    if view.too_few(one):
        return f"too few pairs ({one['pairs']}) to be judged"
    if control_failed(study):
        return "not to be judged, since the control failed"
    if one["verdict"] == EQUIVALENT:
        return f"equivalent within {margin}"
    if one["verdict"] == DIFFERENT and view.like_the_control(one, view.all_tests(study)):
        return "different, but as much as the baseline's two copies there: not to be told from the control"
    if one["verdict"] == DIFFERENT:
        return f"different, by more than {margin}" if view.outside(one) else f"different, whether by {margin} is open"
    if (needed := view.needed(one)) is None:
        return f"undecided at {margin}"
    had, wanted, unit = needed
    return f"undecided at {margin} ({_count(had, unit[:-1])}, about {wanted} are needed)"


def _gain(study: Study) -> Iterator[str]:
    """Mean difference of scores between the arms, with one engine and size, over tasks and languages that both have."""
    if view.seeded(study) or not study["accuracy"]:
        return
    first = min(study["accuracy"], key=lambda row: _place(study, row))
    where = f"{first['size']}, {first['engine']}"
    scores: dict[tuple[str, str], dict[str, Accuracy]] = {}
    for row in study["accuracy"]:
        same = (row["size"], row["engine"]) == (first["size"], first["engine"])
        if same and view.whole(study, row["size"], row["layers"]):
            scores.setdefault((row["task"], row["language"]), {})[row["arm"]] = row
    for arm in view.trained_arms(study):
        pairs = {key: both for key, both in scores.items() if arm != BASELINE and arm in both and BASELINE in both}
        if not pairs:
            continue
        gains = {key: both[arm]["value"] - both[BASELINE]["value"] for key, both in pairs.items()}
        low = [gain for (_, language), gain in gains.items() if study["languages"][language]["group"] == GROUPS[0]]
        half = _half_width([row for both in pairs.values() for row in (both[arm], both[BASELINE])])
        tasks, languages = {key[0] for key in pairs}, {key[1] for key in pairs}
        extra = f", {signed(fmean(low))} in the low-resource ones" if low and len(low) < len(pairs) else ""
        scope = f"{_count(len(tasks), 'task')} and {_count(len(languages), 'language')}{extra}"
        change = f"{signed(fmean(gains.values()))} points (give or take {half:.1f}, by the number of examples)"
        yield f"{_arm(arm)} changes accuracy by {change} over {scope} ({where})."


def _place(study: Study, row: Accuracy) -> tuple[int, int]:
    """Of the size and the engine in the order in which they were asked for."""
    return view.ranked(study, "sizes", row["size"]), view.ranked(study, "engines", row["engine"])


def _half_width(rows: Sequence[Accuracy]) -> float:
    """Half of a 95 % interval of the mean difference of pairs of scores, were each a share of right examples.

    Agresti and Coull's, so that scores of 0 and 100 are not certain. Both of a pair are scores of the same examples,
    which makes the true interval narrower.
    """
    variance = 0.0
    for row in rows:
        count = row["examples"] + 4
        share = (row["value"] / 100 * row["examples"] + 2) / count
        variance += share * (1 - share) / count
    return 100 * 1.96 * variance**0.5 / (len(rows) / 2)


def _speed(study: Study, rows: _Rows, chosen: view.Setting) -> Iterator[str]:
    where = view.described(study, chosen)
    engine = view.fastest(rows)
    reference = view.reference(study, list(rows))
    mine = rows[engine]
    shown = f"{engine} handles {_rate(view.speed(mine))} samples per second"
    over = "" if len(mine) == 1 else f" over {len(mine)} languages (geometric mean)"
    if reference is None or reference == engine or not (shared := mine.keys() & rows[reference].keys()):
        yield f"{shown}{over}, in {where}."
        return
    gains = {code: _times(mine[code], rows[reference][code]) for code in view.languages(study) if code in shared}
    least, most = min(gains, key=lambda code: gains[code]), max(gains, key=lambda code: gains[code])
    mean = view.speed(mine, list(gains)) / view.speed(rows[reference], list(gains))
    spread = (
        f", from {gains[least]:.1f}× in {view.language_name(study, least)} to {gains[most]:.1f}× in "
        f"{view.language_name(study, most)}"
    )
    yield f"{shown}{over}, {mean:.1f}× {reference}{spread if len(gains) > 1 else ''} ({where})."


def _between(study: Study, rows: _Rows, chosen: view.Setting) -> Iterator[str]:
    """What differs between languages, and what explains it."""
    engine = view.fastest(rows)
    mine = rows[engine]
    if len(mine) < 2:
        return
    ranked = sorted(mine, key=lambda code: view.rate(mine[code])["samples_per_s"])
    names = [
        f"{view.language_name(study, code)} ({_rate(view.rate(mine[code])['samples_per_s'])} samples/s)"
        for code in (ranked[0], ranked[-1])
    ]
    groups = {code: study["languages"][code]["group"] for code in mine}
    means = [
        f"{group} {_rate(view.speed(mine, [code for code in mine if groups[code] == group]))}"
        for group in dict.fromkeys(groups.values())
    ]
    by_group = f"; by group: {', '.join(means)}" if len(means) > 1 else ""
    yield f"With {engine} the slowest language is {names[0]}, the fastest {names[1]}{by_group}."
    for model in study["cost_models"]:
        where = (model["size"], model["engine"], model["task"], model["policy"], model["batch_size"])
        if where == (chosen.size, engine, chosen.task, chosen.policy, chosen.batch_size) and model["explained"]:
            yield _explained(study, model)
            return


def _explained(study: Study, model: CostModel) -> str:
    """What explains most, then the rest, each with the languages that are behind it."""
    over, without = view.explained_over(study, model)
    most = max(model["explained"], key=lambda cause: model["explained"][cause])
    by_count: dict[int, list[str]] = {over[most]: []}
    for cause, share in sorted(model["explained"].items(), key=lambda item: -item[1]):
        text = f"{cause} {_percent(share, 0)}"
        if cause == most:
            what = f"of the variance of speed between {_count(over[most], 'language')}"
            text = f"{most} explains {_percent(share, 0)} {what}"
        by_count.setdefault(over[cause], []).append(text)
    parts = []
    for count, texts in by_count.items():
        names = ""
        if without and count < len(model["seen"]):
            names = (
                f" (tokens per word are not known of {_joined(view.language_name(study, code) for code in without)})"
            )
        parts.append(f"{', '.join(texts)}{'' if count == over[most] else f' over {count}'}{names}")
    sentence = f"{'; '.join(parts)}."
    return sentence[0].upper() + sentence[1:]


def _left_out(study: Study) -> Iterator[str]:
    """What is missing: named where it is little, else counted."""
    named = [f"{one['what']} ({one['why']})" for one in study["skipped"]]
    if len(named) > _NAMED:
        yield f"{len(named)} parts were not measured; the last table says which and why."
    elif named:
        yield f"Not measured: {'; '.join(named)}."


# --- languages ------------------------------------------------------------------------------------


def _languages(study: Study) -> Iterator[tuple[str, str]]:
    codes = view.languages(study)
    overall = view.setting(study)
    for code in [code for code in codes if code in LOW_RESOURCE] or codes[: len(LOW_RESOURCE)]:
        chosen = view.setting(study, code)
        name = view.language_name(study, code)
        if chosen is None:
            yield name, "no throughput was measured."
            continue
        rows = {engine: row for engine, row in view.throughput_cells(study, chosen).items() if code in row}
        sentence = "; ".join(_language(study, code, rows))
        yield name, f"{sentence} ({view.described(study, chosen)})." if chosen != overall else f"{sentence}."


def _language(study: Study, code: str, rows: _Rows) -> Iterator[str]:
    engine = max(rows, key=lambda name: view.rate(rows[name][code])["samples_per_s"])
    cell, reference = rows[engine][code], view.reference(study, list(rows))
    first = f"{_rate(view.rate(cell)['samples_per_s'])} samples/s with {engine}"
    if reference is not None and reference != engine:
        first += f", {_times(cell, rows[reference][code]):.1f}× {reference}"
    yield first
    for one in view.tests_of(study, code):
        change = view.change_of(one)
        verdict = "" if control_failed(study) else f": {_verdict(study, one)}"
        yield f"{_arm(one['arm']).lower()} changes the cost by {change}{verdict}"


# --- words ----------------------------------------------------------------------------------------


def _times(cell: Cell, reference: Cell) -> float:
    return view.rate(cell)["samples_per_s"] / view.rate(reference)["samples_per_s"]


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else grouped(value)


def _percent(share: float, decimals: int | None = None) -> str:
    number = f"{100 * share:g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number}\N{NO-BREAK SPACE}%"


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _joined(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else str(last)
