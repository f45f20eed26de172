"""Data as XTREME's and XTREME-R's download scripts leave it: other places than the owners', and gold taken away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stilts

from xfast.errors import DataFileError
from xfast.stilts import scoring
from xfast.stilts.data import Source
from xfast.stilts.doctor import ERROR, OK, WARNING, diagnose
from xfast.stilts.evaluation import Evaluation, evaluate
from xfast.stilts.retrieval_data import mewslix_entities, mewslix_mentions, mewslix_pairs
from xfast.stilts.tasks import get
from xfast.study import corpus

_one_thread = pytest.fixture(autouse=True)(stilts.one_thread)
base = pytest.fixture(scope="module")(stilts.base)

LANGUAGES = ("ar", "de")
WITHHELD = "labels withheld: predictions can be written but not scored here"


def _articles(language: str, entity: str) -> list[dict[str, Any]]:
    """Three articles with one mention each."""
    rows = []
    for i in range(3):
        text = f"river {stilts.WORDS[i]}"
        span = {"start": 0, "end": 5, "text": "river"}
        mention = {"example_id": f"{language}{i}", "entity_id": entity and f"{entity}{i}", "mention_span": span}
        spans = [{"start": 0, "end": len(text)}]
        context = {"language": language, "text": text, "sentence_spans": spans}
        rows.append({"context": context, "mentions": [mention]})
    return rows


def _mewslix(folder: Path, entity: str, joined: bool = False, split: str = "test") -> None:
    """The owner's one file, or what XTREME-R makes of it: the texts of each language, and its labels apart."""
    place = folder / "mewslix"
    entities = ({"entity_id": f"Q{i}", "description": stilts.WORDS[i], "sentence_spans": []} for i in range(4))
    stilts.write_lines(place / "candidate_set_entities.jsonl", map(json.dumps, entities))
    rows = {language: _articles(language, entity) for language in LANGUAGES}
    if joined:
        every = (json.dumps(row) for language in LANGUAGES for row in rows[language])
        stilts.write_lines(place / f"wikinews_mentions-{split}.jsonl", every)
        return
    for language, of in rows.items():
        stilts.write_lines(place / f"wikinews_mentions/{split}-{language}.jsonl", map(json.dumps, of))
        labels = {m["example_id"]: [m["entity_id"]] for row in of for m in row["mentions"]}
        stilts.write_json(place / f"wikinews_labels/{split}-{language}.json", labels)


def _evaluate(base: Path, folder: Path, split: str = "test", output: Path | None = None) -> dict[str, Any]:
    source = Source(folder)
    run = Evaluation(str(base), "mewslix", output, source, split, benchmark="xtreme-r", languages=LANGUAGES)
    return evaluate(run)


@pytest.mark.parametrize("joined", [False, True])
def test_blank_entities_are_withheld_gold(joined: bool, base: Path, tmp_path: Path) -> None:
    _mewslix(tmp_path, "", joined)
    result = _evaluate(base, tmp_path, output=tmp_path / "predictions")
    assert result["score"] is None and result["withheld"] == list(LANGUAGES) and not result["languages"]
    found = diagnose(tmp_path, "xtreme-r")
    assert [(f.rows, f.labelled) for f in found.found if f.task == "mewslix"] == [(3, 0)] * 2
    said = {(f.severity, f.message, f.language) for f in found.findings if (f.task, f.split) == ("mewslix", "test")}
    assert (WARNING, WITHHELD, "ar de") in said
    assert any(severity == (ERROR if joined else OK) for severity, *_ in said)  # of the joined file's other languages

    for language in LANGUAGES:
        labels = {f"{language}{i}": [f"Q{i}"] for i in range(3)}
        stilts.write_json(tmp_path / f"labels/mewslix/test-{language}.json", labels)
    result = _evaluate(base, tmp_path)
    official = scoring.score(tmp_path / "predictions", tmp_path / "labels", "xtreme-r", allow_missing=True)
    assert result["score"] == official["tasks"]["mewslix"]["score"] > 0 and not result["withheld"]
    assert [f.labelled for f in diagnose(tmp_path, "xtreme-r").found if f.task == "mewslix"] == [3, 3]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_entities_that_lie_beside_blanked_mentions_are_found(split: str, base: Path, tmp_path: Path) -> None:
    _mewslix(tmp_path, "Q", split=split)
    whole = _evaluate(base, tmp_path, split)
    assert list(whole["languages"]) == list(LANGUAGES) and not whole["withheld"]
    for language in LANGUAGES:
        rows = map(json.dumps, _articles(language, ""))
        stilts.write_lines(tmp_path / f"mewslix/wikinews_mentions/{split}-{language}.jsonl", rows)
    assert _evaluate(base, tmp_path, split)["languages"] == whole["languages"]


def test_a_part_of_the_entities_is_no_gold(base: Path, tmp_path: Path) -> None:
    _mewslix(tmp_path, "")
    path = stilts.write_json(tmp_path / "labels/mewslix/test-de.json", {"de0": ["Q0"], "de1": [""]})
    with pytest.raises(DataFileError, match=r"test-de\.json: the entities of 1 of the 3 mentions in de"):
        _evaluate(base, tmp_path)
    with pytest.raises(DataFileError, match=r"test-de\.json: de1: an empty id; is the gold withheld\?"):
        scoring.score_file("mewslix", "de", path, path)


def test_the_files_of_each_language_come_first(base: Path, tmp_path: Path) -> None:
    _mewslix(tmp_path, "", joined=True)
    _mewslix(tmp_path, "Q")
    assert list(_evaluate(base, tmp_path)["languages"]) == list(LANGUAGES)
    (tmp_path / "mewslix/wikinews_mentions/test-ar.jsonl").unlink()
    (tmp_path / "mewslix/wikinews_mentions-test.jsonl").unlink()
    result = _evaluate(base, tmp_path)
    assert list(result["languages"]) == ["de"]
    assert "mentions/test-ar.jsonl or mewslix/wikinews_mentions-test.jsonl" in result["missing"]["ar"]


def test_the_study_reads_the_files_of_each_language(tmp_path: Path) -> None:
    _mewslix(tmp_path / "xtreme", "")
    assert {key: len(texts) for key, texts in corpus.collect(tmp_path).items()} == {
        ("mewslix", language): 3 for language in LANGUAGES
    }


@pytest.mark.parametrize(("identity", "said"), [("", "an empty entity_id"), (["Q1"], r"entity_id \['Q1'\] is no text")])
@pytest.mark.parametrize("whose", ["mention", "entity"])
def test_a_pair_names_its_entity(whose: str, identity: Any, said: str, tmp_path: Path) -> None:
    mention = _articles("en", "Q")[0]
    mention = {"context": mention["context"], "mention": mention["mentions"][0]}
    entity = {"entity_id": "Q0", "description": "green", "sentence_spans": []}
    (mention["mention"] if whose == "mention" else entity)["entity_id"] = identity
    path = stilts.write_json(tmp_path / "pairs.jsonl", {"contextual_mention": mention, "entity": entity})
    with pytest.raises(DataFileError, match=rf"pairs\.jsonl:1: {said}"):
        mewslix_pairs(path)
    if whose == "entity":
        with pytest.raises(DataFileError, match=rf"entities\.jsonl:1: {said}"):
            mewslix_entities(stilts.write_json(tmp_path / "entities.jsonl", entity))


@pytest.mark.parametrize("name", ["example_id", "entity_id"])
def test_ids_of_mentions_are_texts(name: str, tmp_path: Path) -> None:
    article = _articles("en", "Q")[0]
    article["mentions"][0][name] = ["Q1"]
    with pytest.raises(DataFileError, match=rf"m\.jsonl:1: .*{name} \['Q1'\] is no text"):
        mewslix_mentions(stilts.write_json(tmp_path / "m.jsonl", article), "en")


def test_english_copa_lies_beside_the_other_languages(tmp_path: Path) -> None:
    row = {"premise": "river", "choice1": "stone", "choice2": "green", "question": "cause", "label": 1}
    for name, count in (("train", 2), ("val", 1)):
        stilts.write_lines(tmp_path / f"xcopa/{name}-en.jsonl", [json.dumps(row)] * count)
    source = Source(tmp_path)
    assert [len(source.load(get("copa"), split)) for split in ("train", "dev")] == [2, 1]


def test_the_hub_spells_afrikaans_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load(name: str, config: str, split: str) -> Any:
        asked.append((name, config))
        return datasets.Dataset.from_list([{"tokens": ["river"], "pos_tags": ["NOUN"]}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for language in ("af", "ar"):
        Source(hub={"udpos": ""}).load(get("udpos"), "test", language)
    assert asked == [("google/xtreme", "udpos.Afrikans"), ("google/xtreme", "udpos.Arabic")]
