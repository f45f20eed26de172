"""A run's configuration, and what it trains on: examples, dev sets, labels, and how much of each."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from xfast.errors import DataFileError, InvalidOptionError
from xfast.stilts import config as configs
from xfast.stilts import features, mixture, readers
from xfast.stilts.config import RunConfig, from_dict
from xfast.stilts.mixture import examples_task, probabilities, steps, training_sets
from xfast.stilts.tasks import get

MINIMAL = {"model": "m", "tasks": ["mnli"], "output": "o"}


def run(*tasks: str, **changes: Any) -> RunConfig:
    return RunConfig(model="m", tasks=tasks or ("mnli",), output="o", **changes)


# --- configuration --------------------------------------------------------------------------------


def test_values_are_taken_as_they_are_written_in_yaml() -> None:
    found = from_dict({**MINIMAL, "learning_rate": "1e-5", "epochs": 2, "tensorboard": True, "mlm_files": ["a"]})
    assert (found.learning_rate, found.epochs, found.tensorboard) == (1e-5, 2.0, True)
    assert found.tasks == ("mnli",) and found.mlm_files == ("a",) and found == dataclasses.replace(found)
    assert from_dict({**MINIMAL, "dev_examples": None, "cap": None}).dev_examples is None


@dataclasses.dataclass(frozen=True)
class Other:
    """Another configuration, with lists that a run has not."""

    seeds: tuple[int, ...] = (0,)
    languages: tuple[str, ...] | None = None


def test_other_configurations_are_read_alike() -> None:
    assert from_dict({"seeds": [1, 2], "languages": None}, kind=Other) == Other((1, 2), None)
    assert from_dict({"languages": ["sw"]}, kind=Other) == Other(languages=("sw",))
    for wrong in ({"seeds": None}, {"seeds": [True]}, {"seeds": ["1"]}, {"seeds": "12"}):
        with pytest.raises(InvalidOptionError, match="accepted: a list of int"):
            from_dict(wrong, kind=Other)
    with pytest.raises(InvalidOptionError, match="config: languages: 'sw'; accepted: a list of str"):
        from_dict({"languages": "sw"}, kind=Other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["mnli"]}, "file: model, output missing"),
        ({**MINIMAL, "learning_rat": 1, 5: 2}, "file: no option learning_rat, 5; accepted: model, tasks, output, data"),
        ({**MINIMAL, "tasks": "mnli"}, "file: tasks: 'mnli'; accepted: a list of str"),
        ({**MINIMAL, "tasks": [["mnli"]]}, r"file: tasks: \[\['mnli'\]\]; accepted: a list of str"),
        ({**MINIMAL, "mlm_files": [3]}, r"file: mlm_files: \[3\]; accepted: a list of str"),
        ({**MINIMAL, "batch_size": 8.0}, "file: batch_size: 8.0; accepted: int or none"),
        ({**MINIMAL, "batch_size": True}, "file: batch_size: True; accepted: int or none"),
        ({**MINIMAL, "eval_steps": None}, "file: eval_steps: None; accepted: int"),
        ({**MINIMAL, "learning_rate": "fast"}, "file: learning_rate: 'fast'; accepted: float or none"),
        ({**MINIMAL, "temperature": False}, "file: temperature: False; accepted: float"),
        ({**MINIMAL, "tensorboard": 1}, "file: tensorboard: 1; accepted: bool"),
        ({**MINIMAL, "data": 3}, "file: data: 3; accepted: str or none"),
        ({**MINIMAL, "files": ["a"]}, r"file: files: \['a'\]; accepted: dict"),
    ],
)
def test_wrong_types_and_names_are_typed_errors(values: Any, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        from_dict(values, "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, f"{name}: 0; accepted: more than 0") for name in configs._POSITIVE),
        *(({name: -1}, f"{name}: -1; accepted: 0 or more") for name in configs._NOT_NEGATIVE),
        *(({name: float("nan")}, f"{name}: nan; accepted") for name in ("learning_rate", "mlm_share", "weight_decay")),
        *(({name: float("inf")}, f"{name}: inf; accepted") for name in ("epochs", "mlm_smoothing")),
        *(({name: 1.1}, f"{name}: 1.1; accepted: 0 to 1") for name in ("mlm_share", "warmup_share")),
        ({"seed": 2**32}, r"seed: 4294967296; accepted: less than 2\*\*32"),
        ({"batching": "long"}, "batching: 'long' is not accepted; accepted: length, random, packed"),
        ({"precision": "fp8"}, "precision: 'fp8' is not accepted; accepted: fp32, bf16, fp16"),
        ({"tasks": ()}, "tasks: none given"),
        ({"tasks": ("mnli", "qqp", "mnli")}, "tasks: mnli, qqp, mnli names a task twice"),
        ({"tasks": ("tatoeba",)}, "tasks: tatoeba is evaluated without training"),
        ({"tasks": ("mnl",)}, "tasks: 'mnl' is no task"),
        ({"tasks": ("mlm",)}, "mlm_files: masked language modelling needs text files"),
        ({"files": {"mnl": {}}}, "files: 'mnl' is no task"),
        ({"files": {"mnli": ["a"]}}, r"files: mnli: \['a'\]; accepted: files by split"),
        ({"files": {"mnli": {"validation": ["a"]}}}, "files: mnli: 'validation' is not accepted; accepted: train"),
        ({"files": {"mnli": {"dev": "a.tsv"}}}, "files: mnli: dev: 'a.tsv'; accepted: a list of files"),
        ({"files": {"mnli": {"dev": []}}}, r"files: mnli: dev: \[\]; accepted: a list of files"),
        ({"files": {"xquad": {"train": ["a"]}}}, "files: xquad: fine-tuned on squad_v1; name training files there"),
        ({"translated": {"mnli": "a.tsv"}}, "translated: mnli: 'a.tsv'; accepted: a list of files"),
        ({"translated": {"mnl": ["a"]}}, "translated: 'mnl' is no task"),
        ({"hub": {"mnl": ""}}, "hub: 'mnl' is no task"),
        ({"hub": {"mnli": None}}, "hub: mnli: None; accepted: a dataset's name"),
    ],
)
def test_values_out_of_range_are_typed_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        RunConfig(**{**MINIMAL, **change})
    RunConfig(**MINIMAL)  # it was the change


def test_a_run_has_its_tasks_recipe_and_what_it_changes() -> None:
    assert run("mnli").recipe == get("mnli").recipe and run("mnli").passes == 3
    assert run("xnli").passes == 2 and run("xnli", epochs=0.5).passes == 0.5
    several = run("mnli", "squad_v1", "mlm", mlm_files=("a",))
    assert [task.name for task in several.supervised] == ["mnli", "squad_v1"]
    assert (several.recipe.max_length, several.recipe.batch_size) == (384, 32)
    changed = run("squad_v1", max_length=99, batch_size=5, learning_rate=0.1).recipe
    assert (changed.max_length, changed.batch_size, changed.learning_rate) == (99, 5, 0.1)
    assert changed.doc_stride == 128 and run("squad_v1").recipe.max_length == 384
    assert run("mlm", mlm_files=("a",)).recipe == get("mlm").recipe


def full() -> RunConfig:
    return run(
        *("xnli", "mlm"),
        data="d",
        tokenizer="t",
        learning_rate=2e-5,
        epochs=1.5,
        mlm_files=("a.txt", "b.txt"),
        files={"mnli": {"train": ["ä.tsv"]}},
        hub={"qqp": ""},
        translated={"mnli": ["sw.tsv"]},
        dev_examples=None,
        trainer={"fsdp": ["full_shard"], "optim": "adamw"},
    )


def test_saving_and_loading_gives_the_same_run(tmp_path: Path) -> None:
    for config in (full(), run()):
        config.save(tmp_path / "run.yaml")
        assert from_dict(configs.load(tmp_path / "run.yaml")) == config
    full().save(tmp_path / "run.yaml")
    assert "ä.tsv" in (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert full().as_dict()["tasks"] == ["xnli", "mlm"]
    source = full().source
    assert (source.folder, source.files, source.hub) == (Path("d"), full().files, {"qqp": ""})
    assert run().source.folder is None


def test_yaml_toml_and_json_say_the_same(tmp_path: Path) -> None:
    texts = {
        "a.yaml": "model: m\ntasks: [mnli]\noutput: o\nlearning_rate: 1e-5\nfiles: {mnli: {dev: [a]}}\n",
        "a.json": '{\n\t"model": "m", "tasks": ["mnli"], "output": "o",\n\t"learning_rate": 1e-5, '
        '"files": {"mnli": {"dev": ["a"]}}\n}',
    }
    if sys.version_info >= (3, 11):
        texts["a.toml"] = (
            'model = "m"\ntasks = ["mnli"]\noutput = "o"\nlearning_rate = 1e-5\n[files.mnli]\ndev = ["a"]\n'
        )
    for name, text in texts.items():
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        found = from_dict(configs.load(tmp_path / name), name)
        assert found == run(learning_rate=1e-5, files={"mnli": {"dev": ["a"]}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"model: [m\n", "a.yaml: while parsing"),
        ("a.json", b'{"model": ', "a.json: Expecting value"),
        ("a.yaml", b"- m\n", "a.yaml: expected options by name, got list"),
        ("a.yaml", b"", "a.yaml: expected options by name, got NoneType"),
        ("a.yaml", b"model: \xff\n", "a.yaml: 'utf-8' codec"),
        pytest.param(
            *("a.toml", b"model = \n", "a.toml: Invalid value"),
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11"),
        ),
    ],
)
def test_files_that_are_no_configuration_are_typed_errors(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        configs.load(tmp_path / name)
    with pytest.raises(DataFileError, match=r"none\.yaml: cannot be read: No such file"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(DataFileError, match="cannot be read: Is a directory"):
        configs.load(tmp_path)


# --- what a run trains on -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Every word one token, numbered as in its name: ``w17`` is 17."""
    core = Tokenizer(
        models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 99)}}, "<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>"
    )


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., str]:
    """Writes numbered pairs, whose first text tells them apart."""

    def save(name: str, first: int, count: int, labels: tuple[str, ...] = ("neutral", "entailment")) -> str:
        rows = [f"w{first + i}\tw4\t{labels[i % len(labels)]}\n" for i in range(count)]
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
        return str(tmp_path / name)

    return save


def numbers(found: features.Features) -> list[int]:
    return [int(feature.rows[0][1]) for feature in found.items]


def test_what_trains_a_target() -> None:
    origins = {"xnli": "mnli", "xquad": "squad_v1", "mlqa": "squad_v1", "tydiqa": "tydiqa", "panx": "panx"}
    assert {name: examples_task(get(name)).name for name in origins} == origins
    assert examples_task(get("anli_plus")).name == "anli_plus" and examples_task(get("siqa")).name == "siqa"
    with pytest.raises(InvalidOptionError, match="xcopa is fine-tuned on siqa and then copa: one run after another"):
        examples_task(get("xcopa"))


def test_a_target_is_trained_and_stopped_on_english_examples(pairs: Any, tokenizer: Any) -> None:
    files = {"mnli": {"train": [pairs("t.tsv", 10, 5)], "dev": [pairs("d.tsv", 30, 4)]}}
    (found,) = training_sets(run("xnli", files=files, train_examples=3, dev_examples=2), tokenizer).values()
    assert found.task.name == "xnli" and found.labels == get("mnli").labels
    assert numbers(found.features) == [10, 11, 12] and numbers(found.dev_features) == [30, 31]
    assert [example.first for example in found.dev.items] == ["w30", "w31"]
    assert [feature.label for feature in found.features.items] == [2, 1, 2]  # neutral, entailment, neutral
    (found,) = training_sets(run("xnli", files=files, dev_examples=None), tokenizer).values()
    assert len(found.features) == 5 and len(found.dev) == 4
    # dev examples without a label are left out and counted; without any label nothing is trained
    unlabelled = pairs("unlabelled.tsv", 40, 2, ("",))
    files["mnli"]["dev"].append(unlabelled)
    (found,) = training_sets(run("xnli", files=files), tokenizer).values()
    assert numbers(found.dev_features) == [30, 31, 32, 33] and found.dev.skipped == Counter({mixture.UNLABELLED: 2})
    files["mnli"]["dev"] = [unlabelled]
    with pytest.raises(DataFileError, match=r"mnli: none of the 2 English dev examples has a label"):
        training_sets(run("xnli", files=files), tokenizer)


def test_without_a_dev_set_examples_are_held_out_or_nothing_is_evaluated(pairs: Any, tokenizer: Any) -> None:
    files = {"mnli": {"train": [pairs("t.tsv", 10, 6)]}}
    with pytest.raises(DataFileError, match=r"^mnli: no English dev set; give its file, or `holdout` examples of the "):
        training_sets(run(files=files), tokenizer)
    (found,) = training_sets(run(files=files, holdout=2), tokenizer).values()
    assert numbers(found.features) == [10, 11, 12, 13] and numbers(found.dev_features) == [14, 15]
    (found,) = training_sets(run(files=files, dev_examples=0, holdout=2), tokenizer).values()
    assert len(found.features) == 6 and not len(found.dev) and not len(found.dev_features)
    with pytest.raises(InvalidOptionError, match="holdout: 6; mnli has 6 training examples"):
        training_sets(run(files=files, holdout=6), tokenizer)
    given = {"mnli": {**files["mnli"], "dev": [pairs("d.tsv", 30, 3)]}}
    (found,) = training_sets(run(files=given, holdout=2), tokenizer).values()
    assert len(found.features) == 6 and numbers(found.dev_features) == [30, 31, 32]


def test_translated_examples_are_added_under_either_name(pairs: Any, tokenizer: Any) -> None:
    files = {"mnli": {"train": [pairs("t.tsv", 10, 4)]}}
    for name in ("mnli", "xnli"):
        translated = {name: [pairs("sw.tsv", 50, 2), pairs("tr.tsv", 60, 1)]}
        config = run("xnli", files=files, holdout=1, train_examples=3, translated=translated)
        (found,) = training_sets(config, tokenizer).values()
        # what is held out for dev does not count as training examples
        assert numbers(found.features) == [10, 11, 12, 50, 51, 60] and numbers(found.dev_features) == [13]


def test_translated_questions_keep_the_language_that_their_ids_name(tmp_path: Path, tokenizer: Any) -> None:
    def save(name: str, *identities: str) -> str:
        answers = [{"text": "w7", "answer_start": 3}]
        asked = [{"id": identity, "question": "w5", "answers": answers} for identity in identities]
        document = {"data": [{"paragraphs": [{"context": "w6 w7", "qas": asked}]}]}
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
        return str(tmp_path / name)

    files = {"tydiqa": {"train": [save("en.json", "english-1", "thai-1")]}}
    config = run("tydiqa", files=files, dev_examples=0, translated={"tydiqa": [save("sw.json", "english-1")]})
    (found,) = training_sets(config, tokenizer).values()
    assert len(found.features) == 2 and found.features.notes == Counter({readers.OTHER_LANGUAGE: 1})
    assert {feature.label for feature in found.features.items} == {(5, 5)}


def test_a_part_of_joined_tasks_has_some_of_each(pairs: Any, tokenizer: Any) -> None:
    splits = {
        "train": (("snli", 10, 12), ("mnli", 40, 6), ("anli", 70, 6)),
        "dev": (("snli", 22, 2), ("mnli", 46, 2), ("anli", 76, 4)),
    }
    files = {
        part: {
            split: [pairs(f"{part}-{split}.tsv", first, count)]
            for split, rows in splits.items()
            for name, first, count in rows
            if name == part
        }
        for part in ("snli", "mnli", "anli")
    }
    (found,) = training_sets(run("anli_plus", files=files, train_examples=8, dev_examples=4), tokenizer).values()
    assert [number // 30 for number in numbers(found.features)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert len(set(numbers(found.features))) == 8
    assert numbers(found.dev_features) == [22, 46, 76, 78]
    (found,) = training_sets(run("anli_plus", files=files, train_examples=24), tokenizer).values()
    assert numbers(found.features) == [*range(10, 22), *range(40, 46), *range(70, 76)]


def test_ccg_has_the_tags_of_its_file_or_those_that_occur(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "ccg.train").write_text("w4 w5 w6\tN/N N NP\nw7\tN\n", encoding="utf-8")
    config = run("ccg", files={"ccg": {"train": [str(tmp_path / "ccg.train")]}}, dev_examples=0)

    def labels() -> tuple[tuple[str, ...], list[list[int]], Counter[str]]:
        (found,) = training_sets(config, tokenizer).values()
        return found.labels, [f.label[1:-1].tolist() for f in found.features.items], found.features.notes

    assert labels() == (("N", "N/N", "NP"), [[1, 0, 2], [0]], Counter())
    ids = tmp_path / "tags_to_id.json"
    ids.write_text(json.dumps({"S": 3, "NP": 0, "N": 2, "N/N": 1}), encoding="utf-8")
    assert labels() == (("NP", "N/N", "N", "S"), [[1, 2, 0], [2]], Counter())
    ids.write_text(json.dumps({f"T{i}": str(i) for i in range(11)} | {"N": "11"}), encoding="utf-8")
    assert labels()[0] == (*(f"T{i}" for i in range(11)), "N")  # ids as text: 10 comes after 9
    ids.write_text(json.dumps({"NP": 0, "N": 1}), encoding="utf-8")
    assert labels() == (("NP", "N"), [[-100, 1, 0], [1]], Counter({features.UNKNOWN_TAG: 1}))
    for wrong in ({"N": 1, "NP": 2}, {"N": 0, "NP": 0}, {"N": 0, "NP": "x"}, {"N": 0, "NP": None}, ["N"]):
        ids.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(DataFileError, match=r"tags_to_id\.json: expected the ids 0 to n - 1 by tag"):
            training_sets(config, tokenizer)


def test_text_files_are_sets_of_their_own_with_a_part_held_out(tmp_path: Path, pairs: Any, tokenizer: Any) -> None:
    for name, count in (("sw", 50), ("yo", 21)):
        (tmp_path / f"{name}.txt").write_text("".join(f"w{4 + i}\n" for i in range(count)) + "\n", encoding="utf-8")
    texts = (str(tmp_path / "sw.txt"), str(tmp_path / "yo.txt"))
    files = {"mnli": {"train": [pairs("t.tsv", 10, 4)], "dev": [pairs("d.tsv", 30, 1)]}}
    found = training_sets(run(files=files, mlm_files=texts), tokenizer)
    assert list(found) == ["mnli", "mlm:sw", "mlm:yo"] and found["mlm:yo"].labels == ()
    assert numbers(found["mlm:sw"].features) == list(range(4, 51)) and numbers(found["mlm:sw"].dev_features) == [
        51,
        52,
        53,
    ]
    assert len(found["mlm:yo"].features) == 19 and len(found["mlm:yo"].dev) == 2
    assert found["mlm:yo"].features.notes == Counter({readers.EMPTY_LINE: 1})
    found = training_sets(run("mlm", mlm_files=texts[:1], dev_examples=1), tokenizer)
    assert list(found) == ["mlm:sw"] and len(found["mlm:sw"].dev) == 1 and len(found["mlm:sw"].features) == 49
    (few,) = training_sets(run("mlm", mlm_files=texts[:1], dev_examples=1, train_examples=2), tokenizer).values()
    assert len(few.features) == 2 and len(few.dev) == 1
    found = training_sets(run("mlm", mlm_files=texts[:1], dev_examples=0), tokenizer)
    assert len(found["mlm:sw"].features) == 50 and not len(found["mlm:sw"].dev_features)
    with pytest.raises(InvalidOptionError, match="mlm_files: two files are called sw"):
        training_sets(run("mlm", mlm_files=(texts[0], texts[0])), tokenizer)


def test_an_empty_dev_set_does_not_switch_early_stopping_off(tmp_path: Path, pairs: Any, tokenizer: Any) -> None:
    files = {"mnli": {"train": [pairs("t.tsv", 10, 6)], "dev": [pairs("empty.tsv", 0, 0)]}}
    with pytest.raises(DataFileError, match=r"mnli: .*empty\.tsv: no example; left out: \{\}; give a dev set, or"):
        training_sets(run(files=files), tokenizer)
    rows = json.dumps({"premise": "a", "hypothesis": "b", "label": "-"}) + "\n"
    (tmp_path / "d.jsonl").write_text(rows, encoding="utf-8")
    files["mnli"]["dev"] = [str(tmp_path / "d.jsonl")]
    with pytest.raises(DataFileError, match=f"mnli: .*d.jsonl: no example; left out: .*{readers.UNLABELLED}': 1"):
        training_sets(run(files=files), tokenizer)
    (found,) = training_sets(run(files=files, dev_examples=0), tokenizer).values()
    assert len(found.features) == 6 and not len(found.dev)


def test_lines_without_a_piece_to_mask_are_no_perplexity(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("unknown\n" + "w4 w5\n" * 20 + "w6\nunknown words\n", encoding="utf-8")
    (found,) = training_sets(run("mlm", mlm_files=(str(path),), dev_examples=2), tokenizer).values()
    assert numbers(found.dev_features) == [6] and found.dev.skipped == Counter({features.UNMASKABLE: 1})
    assert len(found.features) == 20 and found.features.notes == Counter({features.UNMASKABLE: 1})
    with pytest.raises(DataFileError, match=r"text\.txt: none of the last 1 lines, .* has a piece to mask; left out"):
        training_sets(run("mlm", mlm_files=(str(path),), dev_examples=1), tokenizer)


def test_nothing_to_train_on_says_why(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"premise": "a", "hypothesis": "b", "label": "-"}) + "\n", encoding="utf-8")
    with pytest.raises(DataFileError, match=f"mnli: no example to train on; left out: .*{readers.UNLABELLED}': 1"):
        training_sets(run(files={"mnli": {"train": [str(path)]}}, dev_examples=0), tokenizer)


def test_each_task_keeps_its_own_question_length(tmp_path: Path, pairs: Any, tokenizer: Any) -> None:
    words = " ".join(["w9"] * 120)
    asked = {"id": "1", "question": words, "answers": [{"text": "w9", "answer_start": 0}]}
    document = {"data": [{"paragraphs": [{"context": words, "qas": [asked]}]}]}
    (tmp_path / "s.json").write_text(json.dumps(document), encoding="utf-8")
    files = {"mnli": {"train": [pairs("t.tsv", 10, 4)]}, "lareqa": {"train": [str(tmp_path / "s.json")]}}
    found = training_sets(run("mnli", "lareqa", files=files, dev_examples=0), tokenizer)
    assert len(found["lareqa"].features.items[0].rows[0]) == get("lareqa").recipe.query_length == 96


# --- how much of each -----------------------------------------------------------------------------


def sized(**sizes: int) -> Any:
    return {name.replace("_", ":"): SimpleNamespace(features=[None] * size) for name, size in sizes.items()}


def test_probabilities_by_hand() -> None:
    alone = sized(mnli=100, qqp=300)
    assert probabilities(run(), alone) == pytest.approx({"mnli": 0.25, "qqp": 0.75})
    assert probabilities(run(cap=150), alone) == pytest.approx({"mnli": 0.4, "qqp": 0.6})
    assert probabilities(run(temperature=2.0), sized(mnli=100, qqp=400)) == pytest.approx({"mnli": 1 / 3, "qqp": 2 / 3})
    mixed = sized(mnli=100, qqp=300, mlm_sw=100, mlm_yo=900)
    # texts by the square root of their lines: 10 to 30
    found = probabilities(run(mlm_files=("a",), mlm_share=0.2, mlm_smoothing=0.5), mixed)
    assert found == pytest.approx({"mnli": 0.2, "qqp": 0.6, "mlm:sw": 0.05, "mlm:yo": 0.15})
    found = probabilities(run(mlm_files=("a",), mlm_share=0.2, mlm_smoothing=0.0, cap=150), mixed)
    assert found == pytest.approx({"mnli": 0.32, "qqp": 0.48, "mlm:sw": 0.1, "mlm:yo": 0.1})
    for steep in (1e3, 1e300):
        found = probabilities(run("mlm", mlm_files=("a",), mlm_smoothing=steep), sized(mlm_sw=100, mlm_yo=900))
        assert found == {"mlm:sw": 0, "mlm:yo": 1}
    found = probabilities(run("mlm", mlm_files=("a",), mlm_smoothing=1.0), sized(mlm_sw=100, mlm_yo=900))
    assert found == pytest.approx({"mlm:sw": 0.1, "mlm:yo": 0.9})


@pytest.mark.parametrize(
    ("sizes", "options", "wanted"),
    [
        ({"mnli": 100}, {}, 10),  # 3 epochs of 100, 32 a step: 9.4
        ({"mnli": 96}, {}, 9),
        ({"mnli": 100, "qqp": 300}, {}, 38),
        ({"mnli": 100, "qqp": 300}, {"cap": 150}, 24),
        ({"mnli": 100}, {"epochs": 0.1}, 1),
        ({"mnli": 1}, {"epochs": 0.01}, 1),
        ({"mnli": 100}, {"max_steps": 4}, 4),
        ({"mnli": 100}, {"max_steps": 40}, 10),
        ({"mnli": 100}, {"batch_size": 8}, 38),
        ({"mnli": 100, "mlm_sw": 7000}, {"mlm_share": 0.2}, 13),  # 10 steps of the task are 80 %
        ({"mnli": 100, "mlm_sw": 7000}, {"mlm_share": 0.0}, 10),
    ],
)
def test_steps_by_hand(sizes: dict[str, int], options: dict[str, Any], wanted: int) -> None:
    assert steps(run(**options), sized(**sizes)) == wanted


def test_steps_of_masked_language_modelling_alone_and_with_no_room_for_tasks() -> None:
    alone = run("mlm", mlm_files=("a",), epochs=2, mlm_share=1.0)
    assert steps(alone, sized(mlm_sw=100, mlm_yo=60)) == 10
    with pytest.raises(InvalidOptionError, match="mlm_share: 1 leaves no step for the tasks"):
        steps(run(mlm_files=("a",), mlm_share=1.0), sized(mnli=100, mlm_sw=100))
