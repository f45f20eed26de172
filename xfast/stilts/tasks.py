"""Every task as data: where its files lie, what its labels are, how it is scored, and how the papers trained on it.

Sources: Phang et al. 2020 (arXiv 2005.13013) through the authors' code (jiant), Hu et al. 2020 (XTREME), Ruder et al.
2021 (XTREME-R). Figures that could only be recalled, not read at a source, are marked ``recall``.
"""

from __future__ import annotations

from dataclasses import replace

from xfast.errors import InvalidOptionError
from xfast.stilts.task import (
    BITEXT,
    CHOICE,
    CLASSIFICATION,
    INTERMEDIATE,
    MATCHING,
    MLM,
    PART,
    SPAN,
    TAGGING,
    TARGET,
    Hub,
    Recipe,
    Task,
)

NLI = ("contradiction", "entailment", "neutral")
UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X", "_"),
)
BIO = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


def _one(*paths: str) -> tuple[tuple[str, ...], ...]:
    return tuple((path,) for path in paths)


_SPAN = Recipe(max_length=384, epochs=2, batch_size=16)
_INTERMEDIATE_SPAN = Recipe(max_length=384, epochs=3, batch_size=16)
_GLUE = {"train": "train", "dev": "validation"}
_GLUE_NLI = ("entailment", "neutral", "contradiction")

_TASKS = [
    Task(
        "anli_plus",
        CLASSIFICATION,
        INTERMEDIATE,
        "ANLI+",
        "accuracy",
        "pairs",
        labels=NLI,
        parts=("snli", "mnli", "anli"),
        train_size=1_104_934,
        owner="https://github.com/facebookresearch/anli (and SNLI, MNLI)",
    ),
    Task(
        "mnli",
        CLASSIFICATION,
        INTERMEDIATE,
        "MNLI",
        "accuracy",
        "pairs",
        labels=NLI,
        train_size=392_702,
        files={
            "train": _one(
                "intermediate/mnli/multinli_1.0_train.jsonl", "intermediate/mnli/mnli_train.jsonl", "xnli/train-en.tsv"
            ),
            "dev": _one(
                "intermediate/mnli/multinli_1.0_dev_matched.jsonl",
                "intermediate/mnli/mnli_val.jsonl",
                "xnli/dev-en.tsv",
            ),
        },
        owner="https://cims.nyu.edu/~sbowman/multinli/",
        hub=Hub("nyu-mll/glue", "mnli", {"train": "train", "dev": "validation_matched"}, _GLUE_NLI),
    ),
    Task(
        "snli",
        CLASSIFICATION,
        PART,
        "SNLI",
        "accuracy",
        "pairs",
        labels=NLI,
        train_size=549_367,
        files={
            "train": _one("intermediate/snli/snli_1.0_train.jsonl"),
            "dev": _one("intermediate/snli/snli_1.0_dev.jsonl"),
        },
        owner="https://nlp.stanford.edu/projects/snli/",
        hub=Hub("stanfordnlp/snli", None, _GLUE, _GLUE_NLI),
    ),
    Task(
        "anli",
        CLASSIFICATION,
        PART,
        "ANLI",
        "accuracy",
        "pairs",
        labels=NLI,
        train_size=162_865,
        files={
            split: (tuple(f"intermediate/anli/R{part}/{split}.jsonl" for part in (1, 2, 3)),)
            for split in ("train", "dev")
        },
        owner="https://github.com/facebookresearch/anli",
        hub=Hub(
            "facebook/anli", None, {"train": "train_r1+train_r2+train_r3", "dev": "dev_r1+dev_r2+dev_r3"}, _GLUE_NLI
        ),
    ),
    Task(
        "qqp",
        CLASSIFICATION,
        INTERMEDIATE,
        "QQP",
        "accuracy_f1",
        "pairs",
        labels=("0", "1"),
        train_size=363_846,
        recall=True,
        files={
            "train": _one("intermediate/qqp/train.tsv", "intermediate/qqp/train.jsonl"),
            "dev": _one("intermediate/qqp/dev.tsv", "intermediate/qqp/dev.jsonl"),
        },
        owner="https://quoradata.quora.com/First-Quora-Dataset-Release-Question-Pairs (GLUE's split)",
        hub=Hub("nyu-mll/glue", "qqp", _GLUE, ("0", "1")),
    ),
    Task(
        "squad_v2",
        SPAN,
        INTERMEDIATE,
        "SQuAD v2.0",
        "squad_v2",
        "squad",
        recipe=_INTERMEDIATE_SPAN,
        train_size=130_319,
        files={
            "train": _one("intermediate/squad_v2.0/train-v2.0.json"),
            "dev": _one("intermediate/squad_v2.0/dev-v2.0.json"),
        },
        owner="https://rajpurkar.github.io/SQuAD-explorer/",
        hub=Hub("rajpurkar/squad_v2", None, _GLUE),
    ),
    Task(
        "squad_v1",
        SPAN,
        INTERMEDIATE,
        "SQuAD v1.1",
        "squad",
        "squad",
        recipe=_INTERMEDIATE_SPAN,
        train_size=87_599,
        files={
            "train": _one("intermediate/squad_v1.1/train-v1.1.json", "squad/train-v1.1.json"),
            "dev": _one("intermediate/squad_v1.1/dev-v1.1.json", "squad/dev-v1.1.json"),
        },
        owner="https://rajpurkar.github.io/SQuAD-explorer/",
        hub=Hub("rajpurkar/squad", None, _GLUE),
    ),
    Task(
        "hellaswag",
        CHOICE,
        INTERMEDIATE,
        "HellaSwag",
        "accuracy",
        "hellaswag",
        train_size=39_905,
        recall=True,
        files={
            "train": _one("intermediate/hellaswag/hellaswag_train.jsonl"),
            "dev": _one("intermediate/hellaswag/hellaswag_val.jsonl"),
        },
        owner="https://github.com/rowanz/hellaswag",
        hub=Hub("Rowan/hellaswag", None, _GLUE),
    ),
    Task(
        "ccg",
        TAGGING,
        INTERMEDIATE,
        "CCG",
        "token_accuracy",
        "ccg",
        train_size=38_015,
        recall=True,
        files={"train": _one("intermediate/ccg/ccg.train"), "dev": _one("intermediate/ccg/ccg.dev")},
        owner="https://catalog.ldc.upenn.edu/LDC2005T13 (licensed by the LDC)",
    ),
    Task(
        "cosmosqa",
        CHOICE,
        INTERMEDIATE,
        "Cosmos QA",
        "accuracy",
        "cosmosqa",
        train_size=25_588,
        recall=True,
        files={
            "train": _one("intermediate/cosmosqa/train.csv", "intermediate/cosmosqa/train.jsonl"),
            "dev": _one("intermediate/cosmosqa/valid.csv", "intermediate/cosmosqa/valid.jsonl"),
        },
        owner="https://github.com/wilburOne/cosmosqa",
        hub=Hub("allenai/cosmos_qa", None, _GLUE),
    ),
    Task(
        "commonsenseqa",
        CHOICE,
        INTERMEDIATE,
        "CommonsenseQA",
        "accuracy",
        "commonsenseqa",
        train_size=9_741,
        recall=True,
        files={
            "train": _one("intermediate/commonsenseqa/train_rand_split.jsonl"),
            "dev": _one("intermediate/commonsenseqa/dev_rand_split.jsonl"),
        },
        owner="https://www.tau-nlp.sites.tau.ac.il/commonsenseqa",
        hub=Hub("tau/commonsense_qa", None, _GLUE),
    ),
    Task(
        "siqa",
        CHOICE,
        PART,
        "Social IQa",
        "accuracy",
        "siqa",
        recipe=Recipe(128, 5, 32, 3e-5),
        files={
            "train": _one("siqa/socialIQa_v1.4_trn.jsonl"),
            "dev": _one("siqa/socialIQa_v1.4_dev.jsonl"),
        },
        owner="https://leaderboard.allenai.org/socialiqa",
        hub=Hub("allenai/social_i_qa", None, _GLUE),
    ),
    Task(
        "copa",
        CHOICE,
        PART,
        "COPA",
        "accuracy",
        "copa",
        recipe=Recipe(128, 5, 32, 3e-5),
        files={
            "train": _one("copa/train.jsonl", "xcopa/train-en.jsonl"),
            "dev": _one("copa/val.jsonl", "xcopa/val-en.jsonl"),
        },
        owner="https://super.gluebenchmark.com/tasks",
        hub=Hub("aps/super_glue", "copa", _GLUE),
    ),
    Task(
        "xnli",
        CLASSIFICATION,
        TARGET,
        "XNLI",
        "accuracy",
        "pairs",
        labels=NLI,
        train_on=("mnli",),
        recipe=Recipe(epochs=2),
        files={"dev": _one("xnli/dev-{language}.tsv"), "test": _one("xnli/test-{language}.tsv")},
        gold={"test": "labels/xnli/test-{language}.tsv"},
        owner="https://github.com/facebookresearch/XNLI",
        hub=Hub("facebook/xnli", "{language}", labels=_GLUE_NLI),
    ),
    Task(
        "pawsx",
        CLASSIFICATION,
        TARGET,
        "PAWS-X",
        "accuracy",
        "pairs",
        labels=("0", "1"),
        train_on=("pawsx",),
        recipe=Recipe(epochs=5),
        train_size=49_401,
        files={
            "train": _one("pawsx/train-{language}.tsv"),
            "dev": _one("pawsx/dev-{language}.tsv"),
            "test": _one("pawsx/test-{language}.tsv"),
        },
        gold={"test": "labels/pawsx/test-{language}.tsv"},
        owner="https://github.com/google-research-datasets/paws/tree/master/pawsx",
        hub=Hub("google-research-datasets/paws-x", "{language}", labels=("0", "1")),
    ),
    Task(
        "udpos",
        TAGGING,
        TARGET,
        "UD-POS",
        "tag_f1",
        "tagged",
        labels=UPOS,
        train_on=("udpos",),
        recipe=Recipe(epochs=10),
        train_size=21_253,
        files={split: _one(f"udpos/{split}-{{language}}.tsv") for split in ("train", "dev", "test")},
        gold={"test": "labels/udpos/test-{language}.tsv"},
        owner="https://universaldependencies.org (v2.5; v2.7 for lt pl uk wo ro)",
        hub=Hub("google/xtreme", "udpos.{name}", spelled={"af": "Afrikans"}),
    ),
    Task(
        "panx",
        TAGGING,
        TARGET,
        "PANX",
        "tag_f1",
        "tagged",
        labels=BIO,
        train_on=("panx",),
        recipe=Recipe(epochs=10),
        train_size=20_000,
        files={split: _one(f"panx/{split}-{{language}}.tsv") for split in ("train", "dev", "test")},
        gold={"test": "labels/panx/test-{language}.tsv"},
        owner="https://github.com/afshinrahimi/mmner (WikiAnn)",
        hub=Hub("google/xtreme", "PAN-X.{language}"),
    ),
    Task(
        "xquad",
        SPAN,
        TARGET,
        "XQuAD",
        "squad",
        "squad",
        train_on=("squad_v1",),
        recipe=_SPAN,
        files={"test": _one("xquad/xquad.{language}.json")},
        gold={"test": "labels/xquad/test-{language}.json"},
        owner="https://github.com/google-deepmind/xquad",
        hub=Hub("google/xquad", "xquad.{language}", {"test": "validation"}),
    ),
    Task(
        "mlqa",
        SPAN,
        TARGET,
        "MLQA",
        "mlqa",
        "squad",
        train_on=("squad_v1",),
        recipe=_SPAN,
        files={
            split: _one(f"mlqa/MLQA_V1/{split}/{split}-context-{{language}}-question-{{language}}.json")
            for split in ("dev", "test")
        },
        gold={"test": "labels/mlqa/test-{language}.json"},
        owner="https://github.com/facebookresearch/MLQA",
        hub=Hub("google/xtreme", "MLQA.{language}.{language}", {"dev": "validation", "test": "test"}),
    ),
    Task(
        "tydiqa",
        SPAN,
        TARGET,
        "TyDiQA-GoldP",
        "squad",
        "squad",
        train_on=("tydiqa",),
        recipe=replace(_SPAN, holdout=370),  # a tenth
        train_size=3_696,
        files={
            "train": _one("tydiqa/tydiqa-goldp-v1.1-train/tydiqa.goldp.{language}.train.json"),
            "test": _one("tydiqa/tydiqa-goldp-v1.1-dev/tydiqa.goldp.{language}.dev.json"),
        },
        gold={"test": "labels/tydiqa/test-{language}.json"},
        owner="https://github.com/google-research-datasets/tydiqa",
        hub=Hub("google-research-datasets/tydiqa", "secondary_task", {"train": "train", "test": "validation"}),
    ),
    Task(
        "bucc2018",
        BITEXT,
        TARGET,
        "BUCC 2018",
        "bucc_f1",
        "bitext",
        recipe=Recipe(max_length=512),
        owner="https://comparable.limsi.fr/bucc2018/bucc2018-task.html",
    ),
    Task(
        "tatoeba",
        BITEXT,
        TARGET,
        "Tatoeba",
        "accuracy",
        "bitext",
        recipe=Recipe(max_length=512),
        owner="https://github.com/facebookresearch/LASER/tree/main/data/tatoeba/v1",
    ),
    Task(
        "xcopa",
        CHOICE,
        TARGET,
        "XCOPA",
        "accuracy",
        "copa",
        train_on=("siqa", "copa"),
        recipe=Recipe(128, 5, 32, 3e-5),
        files={"dev": _one("xcopa/val-{language}.jsonl"), "test": _one("xcopa/test-{language}.jsonl")},
        gold={"test": "labels/xcopa/test-{language}.jsonl"},
        owner="https://github.com/cambridgeltl/xcopa",
        hub=Hub("cambridgeltl/xcopa", "{language}"),
    ),
    Task(
        "lareqa",
        MATCHING,
        TARGET,
        "LAReQA",
        "map_20",
        "lareqa",
        train_on=("lareqa",),
        recipe=Recipe(256, 3, 16, 2e-5, query_length=96),
        train_size=87_599,
        files={
            "train": _one("intermediate/squad_v1.1/train-v1.1.json", "squad/train-v1.1.json"),
            "dev": _one("intermediate/squad_v1.1/dev-v1.1.json", "squad/dev-v1.1.json"),
            "test": _one("lareqa/xquad-r/{language}.json"),
        },
        owner="https://github.com/google-research-datasets/lareqa",
    ),
    Task(
        "mewslix",
        MATCHING,
        TARGET,
        "Mewsli-X",
        "map_20",
        "mewslix",
        train_on=("mewslix",),
        recipe=Recipe(64, 2, 32, 1e-5),
        files={
            "train": _one("mewslix/wikipedia_pairs-train.jsonl"),
            "dev": _one("mewslix/wikipedia_pairs-dev.jsonl"),
            "test": _one("mewslix/wikinews_mentions/test-{language}.jsonl", "mewslix/wikinews_mentions-test.jsonl"),
        },
        owner="https://github.com/google-research/google-research/tree/master/dense_representations_for_entity_retrieval",
    ),
    Task("mlm", MLM, PART, "masked language modelling", "perplexity", "lines", owner="any text, one line an example"),
]

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
"""Every task by name."""

BASELINE, ALL = "none", "all"
"""Names of a grid's rows without an intermediate task, and with all of them at once."""

INTERMEDIATE_TASKS: tuple[str, ...] = tuple(task.name for task in _TASKS if task.role == INTERMEDIATE)
"""The nine of the paper's second version, in its order of training-set size."""

XTREME_TARGETS: tuple[str, ...] = ("xnli", "pawsx", "udpos", "panx", "xquad", "mlqa", "tydiqa", "bucc2018", "tatoeba")
XTREME_R_TARGETS: tuple[str, ...] = (
    *("xnli", "xcopa", "udpos", "panx", "xquad", "mlqa", "tydiqa", "tatoeba", "mewslix", "lareqa"),
)


def get(name: str, argument: str = "task") -> Task:
    """The task of that name.

    Raises:
        InvalidOptionError: there is none; the message lists all.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise InvalidOptionError(f"{argument}: {name!r} is no task; accepted: {', '.join(TASKS)}") from None
