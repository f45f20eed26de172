"""A word-level tokenizer with XLM-R's special tokens, made without any download, and texts in its words."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

WORDS = (
    "the cat sat on a mat while dog ran far away from big red house and small green tree who where is what are ? . ,"
)
TEXTS = ["the cat sat on a mat .", "who is far away ?", "dog", "a small green tree and a big red house ."]


def make_tokenizer(longest: int = 36) -> Any:
    """A fast tokenizer that cuts at ``longest`` tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {word: i for i, word in enumerate([*special, *WORDS.split()])}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    roles = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    names = {f"{role}_token": token for role, token in roles.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=longest, **names)
