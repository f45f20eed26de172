"""The study's cells for pytest-benchmark: one benchmark per language and precision, grouped by language.

    pytest benchmarks/bench_languages.py --benchmark-only --benchmark-json=languages.json
    pytest-benchmark compare languages.json other.json --group-by=group

``XFAST_BENCH_LANGUAGES`` (comma-separated) and ``XFAST_BENCH_TASK`` choose; the default is every language of the
shipped profiles with one task each, low-resource languages first. Real text is used where ``XFAST_TEST_DATA`` names it.
For paired comparisons, intervals and a report use ``xfast study run``.
"""

from __future__ import annotations

import os

import pytest
import torch

import xfast
from xfast.benchmarks import workloads
from xfast.benchmarks.models import random_model
from xfast.study.arms import detach_head, with_head
from xfast.study.factors import ONE_TASK, SORTED, Settings, pairs_of
from xfast.study.languages import LOW_RESOURCE
from xfast.study.profiles import load_profiles
from xfast.study.work import Texts, batches_of, facts
from xfast.terminal import listed

THREADS = torch.get_num_threads()  # read early: the other stems measure on one thread and leave it at that
SAMPLES = 32


def _settings() -> Settings:
    languages = os.environ.get("XFAST_BENCH_LANGUAGES")
    return Settings(
        tasks=(os.environ.get("XFAST_BENCH_TASK", ONE_TASK),),
        languages=listed(languages) if languages else None,
        data=os.environ.get("XFAST_TEST_DATA") or None,
        samples=SAMPLES,
    )


SETTINGS = _settings()
PAIRS, _ = pairs_of(SETTINGS, [(one.task, one.language) for one in load_profiles()])


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(SETTINGS)


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    return random_model("base")


@pytest.mark.parametrize(
    ("task", "language"),
    [pytest.param(*pair, marks=pytest.mark.quick) if pair[1] in LOW_RESOURCE[:2] else pair for pair in PAIRS],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_languages(benchmark, texts: Texts, encoder: torch.nn.Module, precision: str, task: str, language: str) -> None:
    torch.set_num_threads(THREADS)
    if (task, language) not in texts.there:
        pytest.skip(f"XFAST_TEST_DATA has no {task} in {language}")
    work = texts.work(task, language, SAMPLES, workloads.XLMR)
    batches = batches_of(work, SORTED, 16, workloads.PAD)
    model = with_head(encoder, task, SETTINGS.seed)

    def run() -> None:
        with torch.inference_mode():
            for ids, mask in batches:
                model(input_ids=ids, attention_mask=mask)

    benchmark.group = language
    with xfast.accelerated(model, precision=precision):
        benchmark(run)
    detach_head(model)
    known = facts(work, batches)
    benchmark.extra_info.update(known, task=task, language=language, precision=precision)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(tokens_per_s=work.tokens / median, samples_per_s=len(work.examples) / median)
