"""Small tokenizers, checkpoints and data for the STILTs tests: everything is made here, nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from models import one_thread as one_thread  # what its users take from here
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from xfast.stilts.config import RunConfig
from xfast.stilts.grid import GridConfig

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

WORDS = [
    *(
        "river",
        "stone",
        "green",
        "seven",
        "window",
        "market",
        "slowly",
        "bread",
        "winter",
        "teacher",
        "yellow",
        "garden",
    ),
    *("silent", "engine", "north", "paper", "ship", "lamp", "bright", "copper", "village", "song", "early", "table"),
    *("horse", "cloud", "letter", "quiet", "forest", "glass", "road", "island", "morning", "coat", "bridge", "salt"),
]


def tokenizer(texts: Iterable[str], folder: Path, size: int = 600) -> Any:
    """A unigram tokenizer in XLM-R's manner (▁, ``<s> A </s></s> B </s>``), trained on the texts and saved."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    fast.save_pretrained(folder)
    return fast


def checkpoint(folder: Path, vocabulary: int, *, seed: int = 0, **changes: Any) -> Path:
    """An untrained XLM-R with a masked language model's head."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 514,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **changes,
    }
    config = transformers.XLMRobertaConfig(
        vocab_size=vocabulary,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        initializer_range=0.05,
        **sizes,
    )
    torch.manual_seed(seed)
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For ``pytest.fixture(scope="module")(base)``: a tokenizer and an untrained checkpoint in one folder."""
    folder = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(0)
    made = tokenizer([*sentences(rng, 200), "not what follows is then"], folder)
    return checkpoint(folder, len(made))


def write(tmp_path: Path) -> Callable[..., Path]:
    """For ``pytest.fixture(write)``: writes text as UTF-8, objects as JSON lines (``.jsonl``) or one JSON value."""

    def save(name: str, content: Any) -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl") and isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif not isinstance(content, (str, bytes)):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return save


def sentences(rng: Any, count: int, words: int = 8) -> list[str]:
    """Made-up sentences."""
    return [" ".join(rng.choice(WORDS, words)) for _ in range(count)]


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    return write_lines(path, [json.dumps(value, ensure_ascii=False)])


def nli(rng: Any, path: Path, count: int, labels: bool = True) -> Path:
    """Pairs whose label can only be memorised or, for entailment, seen: XTREME's TSV."""
    rows = []
    for i in range(count):
        first = " ".join(rng.choice(WORDS, 7))
        label = ("entailment", "neutral", "contradiction")[i % 3]
        second = {
            "entailment": " ".join(first.split()[:3]),
            "neutral": " ".join(rng.choice(WORDS, 4)),
            "contradiction": "not " + " ".join(first.split()[:3]),
        }[label]
        rows.append("\t".join([first, second, label][: 3 if labels else 2]))
    return write_lines(path, rows)


def squad(rng: Any, path: Path, count: int) -> Path:
    """One paragraph a question: the answer is the word after the one asked for."""
    paragraphs = []
    for i in range(count):
        words = list(rng.permutation(WORDS)[:12])
        at = int(rng.integers(1, 10))
        context = " ".join(words)
        start = len(" ".join(words[: at + 1])) + 1
        answer = {"text": words[at + 1], "answer_start": start}
        qas = [{"id": f"q{i}", "question": f"what follows {words[at]}", "answers": [answer]}]
        paragraphs.append({"context": context, "qas": qas})
    return write_json(path, {"data": [{"title": "t", "paragraphs": paragraphs}]})


def tagged(rng: Any, path: Path, count: int, tags: tuple[str, ...] = ("NOUN", "VERB", "ADJ")) -> Path:
    """Each word always has the same tag."""
    lines: list[str] = []
    for sentence in sentences(rng, count, 6):
        lines += [f"{word}\t{tags[WORDS.index(word) % len(tags)]}" for word in sentence.split()] + [""]
    return write_lines(path, lines)


def hellaswag(rng: Any, path: Path, count: int) -> Path:
    """The right ending repeats the last word of the story."""
    rows = []
    for i in range(count):
        words = list(rng.permutation(WORDS)[:12])
        label = int(rng.integers(0, 4))
        endings = [" ".join(rng.choice(WORDS, 3)) for _ in range(4)]
        endings[label] = f"{words[3]} {words[3]} {words[3]}"
        row = {"ind": i, "ctx_a": " ".join(words[:4]), "ctx_b": "then", "endings": endings, "label": label}
        rows.append(json.dumps(row))
    return write_lines(path, rows)


def mewslix_pairs(rng: Any, path: Path, count: int) -> Path:
    """Mentions whose entity's description begins with the mention."""
    rows = []
    for i in range(count):
        name = " ".join(rng.permutation(WORDS)[:2])
        text = f"{name} " + " ".join(rng.choice(WORDS, 4))
        spans = [{"start": 0, "end": len(text)}]
        context = {
            "document_title": "t", "document_url": "u", "document_id": str(i), "language": "en", "text": text,
            "sentence_spans": spans,
        }  # fmt: skip
        mention = {
            "example_id": f"m{i}", "entity_id": f"Q{i}", "mention_span": {"start": 0, "end": len(name), "text": name}
        }  # fmt: skip
        description = f"{name} is {' '.join(rng.choice(WORDS, 3))}"
        entity = {
            "entity_id": f"Q{i}", "title": name, "description": description, "description_language": "en",
            "description_url": "u", "sentence_spans": [{"start": 0, "end": len(description)}],
        }  # fmt: skip
        row = {"contextual_mention": {"context": context, "mention": mention}, "entity": entity}
        rows.append(json.dumps(row))
    return write_lines(path, rows)


# --- runs ------------------------------------------------------------------------------------------------

DATA = {
    "xnli": (nli, "mnli", "train.tsv"),
    "xquad": (squad, "squad_v1", "train.json"),
    "udpos": (tagged, "udpos", "train.tsv"),
    "hellaswag": (hellaswag, "hellaswag", "train.jsonl"),
    "mewslix": (mewslix_pairs, "mewslix", "train.jsonl"),
}
SETTINGS = {
    "batch_size": 16,
    "device_batch_size": 16,
    "learning_rate": 2e-3,
    "max_length": 64,
    "eval_steps": 1000,
    "warmup_share": 0.05,
}

RUN = """
import sys, torch
torch.set_num_threads(1)
from xfast.stilts.config import from_dict, load
from xfast.stilts.training import train
from pathlib import Path
train(from_dict(load(Path(sys.argv[1]))))
"""
"""A program that trains what the file named by its argument says."""


def run_config(base: Path, output: Path, tasks: list[str], rng: Any, count: int = 64, **changes: Any) -> RunConfig:
    """A run of some of ``DATA`` on ``count`` examples each, which are its dev set, too."""
    files = {}
    for task in tasks:
        make, origin, name = DATA[task]
        path = make(rng, output.parent / "data" / origin / name, count)
        files[origin] = {"train": [str(path)], "dev": [str(path)]}
    return RunConfig(str(base), tuple(tasks), str(output), files=files, **{**SETTINGS, **changes})


def grid_config(base: Path, folder: Path, **changes: Any) -> GridConfig:
    """A grid of one cell, on pairs that are written below ``folder``; it lies in ``folder/grid``."""
    rng = np.random.default_rng(0)
    nli(rng, folder / "data/xnli/train-en.tsv", 24)
    for split in ("dev", "test"):
        nli(rng, folder / f"data/xnli/{split}-en.tsv", 9)
    options = {"max_steps": 2, "batch_size": 8, "max_length": 64, "dev_examples": 0}
    values = {"intermediates": ("none",), "targets": ("xnli",), "seeds": (0,), "target": options, **changes}
    return GridConfig(str(base), str(folder / "grid"), str(folder / "data"), **values)


def changed(run: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(run, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(next(folder.glob("**/model.safetensors")))


def torchrun(run: RunConfig, folder: Path, program: str = RUN, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes, with the run's file, which is written into ``folder``, as its argument."""
    name = Path(run.output).name
    run.save(folder / f"{name}.yaml")
    script = folder / f"{name}.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), str(folder / f"{name}.yaml")],
        cwd=folder,  # -m puts the current folder on the path: not the checkout
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
