"""What a study varies and the token ids that it is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xfast.benchmarks import workloads
from xfast.benchmarks.models import SIZES
from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts.data import Source
from xfast.stilts.features import encode
from xfast.stilts.languages import XTREME, XTREME_R
from xfast.stilts.tasks import XTREME_R_TARGETS, XTREME_TARGETS, get
from xfast.study import factors, inputs, languages
from xfast.study.factors import BUDGET, ONE_TASK, SINGLE, SORTED, TYPES, EngineName, Settings, cells_of, pairs_of
from xfast.study.profiles import JOSHI_CLASS, load_profiles, save_profiles
from xfast.study.work import Texts, Work, batches_of, facts


def work_of(lengths: list[list[int]], task: str = "panx") -> Work:
    examples = tuple(tuple(torch.full((length,), 7) for length in one) for one in lengths)
    return Work(task, "sw", examples, 10, None, 1.5)


def test_profiles_of_ones_own(tmp_path: Path) -> None:
    mine = [replace(one, mean=20.0, quantiles=(20.0,) * len(one.quantiles)) for one in load_profiles()[:2]]
    save_profiles(mine, tmp_path / "mine.json", tokenizer="a", measured="b", date="2026-01-01")
    texts = Texts(Settings(profiles=str(tmp_path / "mine.json"), samples=3))
    assert texts.there == sorted((one.task, one.language) for one in mine)
    assert texts.source == f"length profiles {tmp_path / 'mine.json'}"
    work = texts.work(mine[0].task, mine[0].language, 3, workloads.XLMR)
    assert {len(ids) for example in work.examples for ids in example} == {20}


# --- languages and settings


def test_low_resource_languages_lead() -> None:
    ordered = languages.ordered(JOSHI_CLASS)
    assert ordered[:7] == ["jv", "my", "ml", "te", "sw", "yo", "mr"]
    assert sorted(ordered) == sorted(JOSHI_CLASS)
    classes = [JOSHI_CLASS[code] for code in ordered[7:]]
    assert classes == sorted(classes)
    for code in ordered:
        known = languages.language(code)
        assert known["cc100_gb"] > 0
        assert (known["group"] == "low-resource") == (JOSHI_CLASS[code] <= 2)
    with pytest.raises(InvalidOptionError, match="'xx'"):
        languages.language("xx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engines": ("native",)}, "engine: 'native'"),
        ({"engines": ("native:int3",)}, "native:int3"),
        ({"engines": ()}, "engines: at least one"),
        ({"tasks": ("xnli", "nope")}, "task: 'nope'"),
        ({"tasks": (ONE_TASK, "xnli")}, "stands for a choice"),
        ({"languages": ("sw", "xx")}, "language: 'xx'"),
        ({"sizes": ("huge",)}, "size: 'huge'"),
        ({"policies": ("random",)}, "policy: 'random'"),
        ({"rounds": 0}, "rounds: 0"),
        ({"samples": 0}, "samples: 0"),
        ({"batch_sizes": (16, 0)}, "batch_sizes: 0"),
        ({"margin": 0.0}, "margin: 0.0"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"intermediate": {"": "x"}}, "none for the baseline"),
        ({"baseline": {"": "x"}}, "size: 'base' is not accepted; accepted: checkpoint"),
        ({"baseline": {"nope": "x"}, "sizes": ("checkpoint",)}, "'nope'"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Settings(**changes)


def test_settings_survive_json() -> None:
    settings = Settings(sizes=("checkpoint",), baseline={"": "a", "xnli": "b"}, languages=("sw",), batch_sizes=(1, 8))
    assert Settings.from_dict(settings.as_dict()) == settings


def test_one_task_covers_every_language_of_the_profiles_once() -> None:
    there = [(one.task, one.language) for one in load_profiles()]
    pairs, _ = pairs_of(Settings(), there)
    assert sorted(language for _, language in pairs) == sorted({language for _, language in there})
    assert dict(map(reversed, pairs))["qu"] == "xcopa"
    assert [language for _, language in pairs][:7] == list(languages.LOW_RESOURCE)


def test_what_is_missing_is_said() -> None:
    there = [("xnli", "sw"), ("panx", "te")]
    pairs, missing = pairs_of(Settings(tasks=("xnli", "udpos"), languages=("sw", "te")), there)
    assert pairs == [("xnli", "sw")]
    foreign = "no language of the task in XTREME or XTREME-R"
    assert {one["what"]: one["why"] for one in missing} == {
        "xnli in te": foreign,
        "udpos in te": "not in the data",
        "udpos in sw": foreign,
    }
    with pytest.raises(InvalidOptionError, match="no data for xquad in any language; it has panx, xnli"):
        pairs_of(Settings(tasks=("xquad",)), there)


def _named(missing: list[dict[str, str]]) -> set[str]:
    return {name for one in missing for name in one["what"].partition(" in ")[0].split(", ")}


def test_every_benchmark_task_and_language_is_studied_or_said() -> None:
    there = [(one.task, one.language) for one in load_profiles()]
    targets = {*XTREME_TARGETS, *XTREME_R_TARGETS}
    assert targets <= set(TYPES)
    pairs, missing = pairs_of(Settings(), there, "profiles")
    assert targets <= {task for task, _ in pairs} | _named(missing)
    why = {one["what"]: one["why"] for one in missing}
    assert why[f"any task in {_gone(there)}"] == "not in the profiles"
    assert why["mewslix"] == "not in the profiles"

    every = Settings(tasks=tuple(TYPES))
    pairs, missing = pairs_of(every, there, "profiles")
    for table in (XTREME, XTREME_R):
        for task, codes in table.items():
            for code in codes:
                lines = [one for one in missing if one["what"].startswith(f"{task} in ")]
                said = any(code in one["what"].partition(" in ")[2].split(", ") for one in lines)
                assert ((task, code) in pairs) != said, (task, code)


def _gone(there: list[tuple[str, str]]) -> str:
    return ", ".join(languages.ordered(set(JOSHI_CLASS) - {language for _, language in there}))


def test_a_task_that_cannot_be_read_is_said_and_raises_where_it_was_named(tmp_path: Path, data_dir: Path) -> None:
    tokenizer = str(data_dir / "tokenizer" / "xlmr")
    for name, text in {"tatoeba/jv-en.jv": "siji\n", "mewslix/wikinews_mentions-test.jsonl": "{}\n"}.items():
        (tmp_path / "xtreme" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "xtreme" / name).write_text(text)
    texts = Texts(Settings(data=str(tmp_path), tokenizer=tokenizer))
    pairs, missing = pairs_of(Settings(), texts.there, texts.source, texts.unread)
    assert pairs == [("tatoeba", "jv")]
    assert [one["why"] for one in missing if one["what"] == "mewslix"] == [texts.unread["mewslix"]]
    assert "wikinews_mentions-test.jsonl:1: expected" in texts.unread["mewslix"]
    with pytest.raises(DataFileError, match="wikinews_mentions-test"):
        Texts(Settings(data=str(tmp_path), tokenizer=tokenizer, tasks=("tatoeba", "mewslix")))


def test_cells_are_the_product_of_the_factors() -> None:
    settings = Settings(policies=(SORTED, BUDGET), batch_sizes=(1, 8), responses=2)
    cells = cells_of(settings, "base", "native:int8", [("xnli", "sw")])
    assert [(cell.policy, cell.batch_size) for cell in cells] == [(SORTED, 1), (SORTED, 8), (BUDGET, 2048), (SINGLE, 1)]
    assert cells[0].key == "base/native:int8/xnli/sw/sorted/1"
    assert [cell.is_latency for cell in cells] == [False, False, False, True]
    assert not any(c.is_latency for c in cells_of(Settings(responses=0), "base", "native:int8", [("xnli", "sw")]))


def test_engines_are_named() -> None:
    assert str(EngineName.parse("stock:bf16")) == "stock:bf16"
    assert EngineName.parse("native:int8").quantised
    assert not EngineName.parse("stock:fp32").quantised


def test_every_task_of_the_profiles_has_a_type() -> None:
    assert {one.task for one in load_profiles()} == set(TYPES) - {"mewslix"}  # its texts are the user's to make
    assert set(factors.PREFERRED) == set(TYPES)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_count_their_parameters(size: str) -> None:
    known = {
        "base": 277_453_056,
        "large": 558_840_832,
        "xl": 3_475_929_600,
        "xxl": 10_695_954_432,
        "13b": 13_112_512_512,
    }
    assert SIZES[size].parameters() == known.get(size, SIZES[size].parameters())


# --- token ids


def test_profiles_give_the_same_ids_for_the_same_seed() -> None:
    texts = Texts(Settings())
    one, again = (texts.work("panx", "sw", 20, workloads.XLMR) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.examples, again.examples, strict=True))
    assert one.sequences == 20
    assert one.words == round((one.tokens - 2 * 20) / one.fertility)  # type: ignore[operator]
    assert texts.work("panx", "zh", 3, workloads.XLMR).words is None
    other = Texts(Settings(seed=1)).work("panx", "sw", 20, workloads.XLMR)
    assert other.tokens != one.tokens


def test_choices_are_one_example() -> None:
    work = Texts(Settings()).work("xcopa", "qu", 5, workloads.XLMR)
    assert [len(example) for example in work.examples] == [2] * 5
    ((ids, mask),) = batches_of(work, SORTED, 8, 1)
    assert ids.shape[:2] == (5, 2)
    assert mask.sum() == work.tokens


def test_policies_keep_every_example() -> None:
    work = work_of([[9], [3], [30], [5, 6], [12], [1]])
    for policy, size in (("arrival", 2), (SORTED, 4), (BUDGET, 32), (BUDGET, 1), (SINGLE, 1)):
        batches = batches_of(work, policy, size, 1)
        lengths = sorted(int(row.sum()) for _, mask in batches for row in mask)
        assert lengths == [1, 3, 5, 6, 9, 12, 30], policy
        assert all((ids[mask == 0] == 1).all() for ids, mask in batches)
    widths = [ids.shape[1] for ids, _ in batches_of(work, SORTED, 2, 1)]
    assert widths == sorted(widths, reverse=True)
    assert all(ids.numel() <= 32 for ids, _ in batches_of(work, BUDGET, 32, 1))
    assert [ids.shape[0] for ids, _ in batches_of(work, "arrival", 2, 1)] == [2, 3, 2]


def test_facts_by_hand() -> None:
    work = work_of([[4], [2]])
    assert facts(work, batches_of(work, "arrival", 2, 1)) == {
        "samples": 2,
        "tokens": 6,
        "sequences": 2,
        "words": 10,
        "padding": 0.25,
        "fertility": 1.5,
        "windows_per_example": None,
    }


@pytest.fixture(scope="module")
def real(data_dir: Path) -> Texts:
    return Texts(Settings(data=str(data_dir), tasks=("xnli", "panx", "udpos", "xcopa", "mlqa", "lareqa", "tatoeba")))


def test_real_text_gives_the_tokenizers_ids(real: Texts) -> None:
    work = real.work("xnli", "sw", 4, workloads.XLMR)
    known = {tuple(real.tokenizers["xnli"](*row)["input_ids"]) for row in real._samples["xnli", "sw"]}
    assert all(tuple(example[0].tolist()) in known for example in work.examples)
    assert work.fertility and 1 < work.fertility < 3
    with pytest.raises(DataFileError, match="the model has 1000 ids"):
        real.work("xnli", "sw", 4, workloads.Model(vocab=1000))


@pytest.mark.parametrize(
    ("task", "language", "split"),
    [
        ("xnli", "sw", "dev"),
        ("panx", "te", "test"),
        ("udpos", "yo", "test"),
        ("xcopa", "qu", "test"),
        ("mlqa", "hi", "dev"),
    ],
)
def test_real_text_is_encoded_as_evaluations_encode_it(
    real: Texts, data_dir: Path, task: str, language: str, split: str
) -> None:
    work = real.work(task, language, 10**6, workloads.XLMR)
    timed = {tuple(ids.tolist()) for example in work.examples for ids in example}
    examples = Source(folder=data_dir).load(get(task), split, language)
    del examples.items[60:]
    features = encode(examples, get(task), real.tokenizers[task], get(task).recipe)
    assert len(features) >= 60 and {tuple(row.tolist()) for one in features.items for row in one.rows} <= timed


def test_retrieval_is_encoded_as_its_search_encodes_it(real: Texts) -> None:
    tokenizer = real.tokenizers["lareqa"]
    sentence, paragraph = real._samples["lareqa", "th"][0]
    ((row,),) = inputs.rows("lareqa", [[(sentence, 30 * paragraph)]], tokenizer, 512)
    pair = tokenizer(sentence, 30 * paragraph)["input_ids"]
    assert len(row) == 256 and row.tolist() == [*pair[:255], pair[-1]]  # the paragraph is cut at its end
    ((query,),) = inputs.rows("mewslix", [["river stone " * 50]], tokenizer, 512)
    assert len(query) == 64
    ((short,),) = inputs.rows("mewslix", [["river stone " * 50]], tokenizer, 32)
    assert len(short) == 32
    ((text,),) = inputs.rows("tatoeba", [["river stone " * 500]], tokenizer, 512)
    assert len(text) == 512


def test_long_contexts_become_windows_that_cover_them(real: Texts) -> None:
    model = workloads.Model(limit=96)
    work = real.work("mlqa", "hi", 12, model)
    assert work.windows and work.windows > 1
    assert all(len(ids) <= 96 for example in work.examples for ids in example)
    tokenizer = real.tokenizers["mlqa"]
    question, context = real._samples["mlqa", "hi"][0]
    whole = tokenizer(context, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(question.strip(), add_special_tokens=False)["input_ids"][:64]) + 3
    for positions in (96, 512):
        (windows,) = inputs.rows("mlqa", [[(question, context)]], tokenizer, positions)
        stride = min(128, min(positions, 384) - start - 1)
        covered = {stride * i + offset for i, ids in enumerate(windows) for offset in range(len(ids) - start - 1)}
        assert covered == set(range(len(whole)))
        for index, ids in enumerate(windows):
            assert ids[start:-1].tolist() == whole[stride * index : stride * index + len(ids) - start - 1]


def test_random_ids_are_cut_where_texts_are() -> None:
    texts = Texts(Settings())
    for task, language, limit in (("xquad", "en", 384), ("lareqa", "th", 256), ("tatoeba", "sw", 512)):
        work = texts.work(task, language, 400, workloads.XLMR)
        assert max(len(ids) for example in work.examples for ids in example) <= limit
    longest = max(len(ids) for example in texts.work("xquad", "en", 400, workloads.XLMR).examples for ids in example)
    assert longest == 384


def test_a_folder_without_tasks_is_refused(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(DataFileError, match="no task files"):
        Texts(Settings(data=str(tmp_path), tokenizer=str(data_dir / "tokenizer" / "xlmr")))
    with pytest.raises(DataFileError, match="no folder"):
        Texts(Settings(data=str(tmp_path)))
