"""A tokenizer of words for the vocabulary of the test matrix."""

import re

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matrix import BOS, EOS, PAD, VOCAB_SIZE


MASK, UNKNOWN = 4, 0
WORDS = [
    "a",
    "text",
    "to",
    "start",
    "from",
    "read",
    "judge",
    "tag",
    "once",
    "upon",
    "time",
    "the",
    "cat",
    "sits",
    "on",
    "mat",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces and punctuation; words that it does not know are one token."""
    vocabulary = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS, "<pad>": PAD, "<mask>": MASK}
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(WORDS)}
    assert len(vocabulary) <= VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def snippets(card: str) -> list[str]:
    """The programs in Python in a card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)
