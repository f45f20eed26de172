"""Libraries that hold an XLM-R encoder and call it in their own way: their scores, vectors and spans stay as they were.

None of them is a dependency: what is not installed is skipped. ``make test-libraries`` installs all of them, in two
environments (some want transformers 4, others 5), and runs this file in both.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import assert_alike, build, fallbacks, quick_settings
from torch import nn
from words import TEXTS, make_tokenizer

import xfast

_settings = pytest.fixture(autouse=True)(quick_settings)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

PAIRS = [(a, b) for a in TEXTS for b in TEXTS]
SEGMENTS = [{"src": a, "mt": b, "ref": c} for a, b in PAIRS for c in TEXTS[:2]]


@dataclass
class Use:
    """How a library uses an encoder.

    Attributes:
        model: what its user hands to ``xfast.accelerate``.
        run: what the library answers, as numbers and other things in any nesting.
        reason: why its calls run the original code; None: they do not.
    """

    model: Any
    run: Callable[[], Any]
    reason: str | None = None


def checkpoint(folder: Path, family: str = "xlm-roberta", head: str = "base", **changes: Any) -> str:
    """A random checkpoint with a tokenizer, as the libraries load it."""
    build(family, head, pad_token_id=1, max_position_embeddings=130, **changes).save_pretrained(folder)
    make_tokenizer(longest=128).save_pretrained(folder)
    return str(folder)


def bge_m3(folder: Path) -> Use:
    """Dense, sparse and ColBERT vectors of FlagEmbedding's BGE-M3."""
    library = pytest.importorskip("FlagEmbedding")
    path = checkpoint(folder)
    torch.save(nn.Linear(64, 64).state_dict(), folder / "colbert_linear.pt")
    torch.save(nn.Linear(64, 1).state_dict(), folder / "sparse_linear.pt")
    model = library.BGEM3FlagModel(path, use_fp16=False, devices="cpu")
    return Use(model, lambda: model.encode(TEXTS, return_dense=True, return_sparse=True, return_colbert_vecs=True))


def flag_model(folder: Path) -> Use:
    library = pytest.importorskip("FlagEmbedding")
    model = library.FlagModel(checkpoint(folder), use_fp16=False, devices="cpu")
    return Use(model, lambda: model.encode(TEXTS))


def flag_reranker(folder: Path) -> Use:
    library = pytest.importorskip("FlagEmbedding")
    path = checkpoint(folder, head="sequence-classification", num_labels=1)
    model = library.FlagReranker(path, use_fp16=False, devices="cpu")
    return Use(model, lambda: model.compute_score(PAIRS))


def splade(folder: Path) -> Use:
    """A sparse encoder over the masked-LM head."""
    library = pytest.importorskip("sentence_transformers", "5")
    model = library.SparseEncoder(checkpoint(folder, head="masked-lm"), device="cpu")
    return Use(model, lambda: model.encode(TEXTS).to_dense())


def bert_score(folder: Path) -> Use:
    """Which cuts the encoder's layers."""
    library = pytest.importorskip("bert_score")
    scorer = library.BERTScorer(model_type=checkpoint(folder), num_layers=2, device="cpu", nthreads=0)
    return Use(scorer._model, lambda: scorer.score(TEXTS, TEXTS[::-1]))


def setfit(folder: Path) -> Use:
    library = pytest.importorskip("setfit")
    model = library.SetFitModel.from_pretrained(checkpoint(folder))
    model.fit(TEXTS, [0, 1, 0, 1], num_epochs=1)
    return Use(model.model_body, lambda: model.predict_proba(TEXTS))


def merged_lora(folder: Path) -> Use:
    library = pytest.importorskip("peft")
    model, batch = _lora(library, folder)
    merged = model.merge_and_unload()
    return Use(merged, lambda: merged(**batch).logits)


def flair_words(folder: Path) -> Use:
    embeddings = pytest.importorskip("flair.embeddings")
    return _flair(embeddings.TransformerWordEmbeddings(checkpoint(folder), layers="all", subtoken_pooling="mean"))


def flair_documents(folder: Path) -> Use:
    embeddings = pytest.importorskip("flair.embeddings")
    return _flair(embeddings.TransformerDocumentEmbeddings(checkpoint(folder), cls_pooling="mean"))


def gliner(folder: Path) -> Use:
    library = pytest.importorskip("gliner")
    sizes = {"hidden_size": 64, "max_width": 6, "fine_tune": True}
    model = library.GLiNER.from_config(library.GLiNERConfig(model_name=checkpoint(folder), **sizes)).eval()
    return Use(model, lambda: [model.predict_entities(text, ["cat", "house"], threshold=0.0) for text in TEXTS])


def span_marker(folder: Path) -> Use:
    """Whose attention masks are matrices."""
    library = pytest.importorskip("span_marker")
    lengths = {"model_max_length": 100, "marker_max_length": 24, "entity_max_length": 4}
    model = library.SpanMarkerModel.from_pretrained(checkpoint(folder), labels=["O", "PER", "LOC"], **lengths).eval()
    return Use(model, lambda: model.predict(TEXTS), "the attention mask has more than 2 dimensions")


def comet(folder: Path) -> Use:
    """COMET's regression on references, over a mix of all layers (wmt22-comet-da)."""
    return _comet("RegressionMetric", "XLM-RoBERTa", checkpoint(folder))


def comet_kiwi(folder: Path) -> Use:
    """Without references, with words tagged beside the sentence's score."""
    words = {"word_level_training": True, "word_layer": 2, "error_labels": ["minor", "major", "critical"]}
    return _comet("UnifiedMetric", "XLM-RoBERTa", checkpoint(folder), input_segments=["mt", "src"], **words)


def xcomet(folder: Path) -> Use:
    """Over the pre-norm family."""
    path = checkpoint(folder, "xlm-roberta-xl")
    return _comet("UnifiedMetric", "XLM-RoBERTa-XL", path, input_segments=["mt", "src", "ref"])


def _comet(kind: str, encoder: str, path: str, **options: Any) -> Use:
    library = pytest.importorskip("comet.models")
    model = getattr(library, kind)(
        encoder_model=encoder, pretrained_model=path, hidden_sizes=[64, 32], **options
    ).eval()

    def run() -> Any:
        found = model.predict(SEGMENTS, batch_size=8, gpus=0, progress_bar=False, num_workers=0)
        return [found.scores, found["metadata"].get("error_spans") if "metadata" in found else None]

    return Use(model, run)


def _flair(embeddings: Any) -> Use:
    data = pytest.importorskip("flair.data")

    def run() -> list[np.ndarray]:
        sentences = [data.Sentence(text) for text in TEXTS]
        embeddings.embed(sentences)
        tokens = embeddings.embedding_type == "word-level"
        return [part.embedding.numpy() for one in sentences for part in (one if tokens else [one])]

    return Use(embeddings, run)


def _lora(library: Any, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A classifier with LoRA beside two of its products, and a batch."""
    checkpoint(folder)
    model = build(head="sequence-classification")
    config = library.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    model = library.get_peft_model(model, config).eval()
    for name, values in model.named_parameters():
        if "lora_B" in name:  # zeros, which would change nothing
            nn.init.normal_(values, std=0.1)
    return model, dict(make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))


USES = (bge_m3, flag_model, flag_reranker, splade, bert_score, setfit, merged_lora, flair_words, flair_documents)
USES += (gliner, span_marker, comet, comet_kiwi, xcomet)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_answers_stay(use: Callable[[Path], Use], tmp_path: Path) -> None:
    used = use(tmp_path)
    want = used.run()
    xfast.accelerate(used.model)
    assert assert_alike(used.run(), want) > len(TEXTS) - 1
    assert list(fallbacks(used.model)) == ([] if used.reason is None else [used.reason])
    xfast.restore(used.model)
    assert_alike(used.run(), want)


def test_lora_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    model, _ = _lora(library, tmp_path)
    with pytest.raises(xfast.UnsupportedModelError, match=r"merge_and_unload\(\)"):
        xfast.accelerate(model)
    model.merge_adapter()  # the weights hold it, but the modules are still peft's
    with pytest.raises(xfast.UnsupportedModelError, match=r"merge_and_unload\(\)"):
        xfast.accelerate(model)


def test_lora_beside_an_accelerated_model_is_seen(tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    model = xfast.accelerate(build(head="sequence-classification"))
    batch = dict(make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    model(**batch)
    around = library.get_peft_model(model, library.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    for name, values in around.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(values, std=0.1)
    got = around(**batch).logits
    assert len(fallbacks(around)) == 1
    xfast.restore(around)
    assert_alike(got, around(**batch).logits)


def test_several_processes_of_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", "5")
    model = library.SentenceTransformer(checkpoint(tmp_path), device="cpu")
    want = model.encode(TEXTS)
    xfast.accelerate(model)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        assert_alike(model.encode(TEXTS, pool=pool), want)
    finally:
        model.stop_multi_process_pool(pool)


def test_copies_of_comet(tmp_path: Path) -> None:
    used = comet(tmp_path)
    want = used.run()
    xfast.accelerate(used.model)
    for twin in (copy.deepcopy(used.model), pickle.loads(pickle.dumps(used.model))):  # noqa: S301
        found = twin.predict(SEGMENTS, batch_size=8, gpus=0, progress_bar=False, num_workers=0)
        assert_alike(found.scores, want[0])
        assert fallbacks(twin) == {}


def test_dropout_of_comet_is_the_originals(tmp_path: Path) -> None:
    used = comet(tmp_path)
    xfast.accelerate(used.model)
    found = used.model.predict(SEGMENTS, gpus=0, progress_bar=False, num_workers=0, mc_dropout=3)
    assert min(found["metadata"]["mcd_std"]) > 0
    assert list(fallbacks(used.model)) == ["the model is in training mode"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_sentence_transformers_around_weights_that_were_given_up(precision: str, tmp_path: Path) -> None:
    """It takes its device from the first parameter, and sends itself there before each call."""
    library = pytest.importorskip("sentence_transformers", "5")
    name = checkpoint(tmp_path / "model")
    model = library.SentenceTransformer(name, device="cpu")
    want = xfast.accelerate(library.SentenceTransformer(name, device="cpu"), precision=precision).encode(TEXTS)
    xfast.accelerate(model, precision=precision, keep_weights=False)
    got = model.encode(TEXTS)
    assert model.device.type == "cpu"
    np.testing.assert_allclose(got, want, atol=2e-5 if precision == "fp32" else 0.05)
    xfast.save(model[0].auto_model, tmp_path / "packed")
    model[0].auto_model = xfast.load(tmp_path / "packed")
    np.testing.assert_array_equal(model.encode(TEXTS), got)
