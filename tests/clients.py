"""What the tests of other people's software share: a small tokenizer, tiny models, and their checkpoints."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import hf_rnn
from hf_rnn.recurrent_cells import RecurrentCell


SENTENCES = [
    "the cat sat on the mat",
    "a dog ate the fish in the house",
    "who sat on the mat ?",
    "London is where Anna lives",
    "the fish sat in the house on the mat where the dog ate a cat",
    "no",
]
SPECIAL_TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def make_tokenizer(special_tokens: bool = True, **options) -> PreTrainedTokenizerFast:
    """
    A tokenizer of the words of `SENTENCES`, which returns `token_type_ids` as bare ones do; with `special_tokens` it
    puts `[CLS]` before and `[SEP]` behind a text, as a causal language model's would not.
    """
    words = {word for sentence in SENTENCES for word in sentence.split()} | {"user", "assistant", "system", ":"}
    words |= {"This", "example", "is", ".", "not", "good", "bad"}
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
        )
    options = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} | options
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        bos_token="[CLS]",
        clean_up_tokenization_spaces=False,
        **options,
    )


def make_client_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options):
    """A tiny model of the class `name` whose weights are far from zero, so that its results differ."""
    torch.manual_seed(seed)
    model_class = getattr(hf_rnn, name)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 1.0,
    } | options
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_checkpoint(folder: Path, name: str, tokenizer=None, seed: int = 0, **options) -> str:
    """Saves a tiny model of the class `name` beside its tokenizer; returns the folder's name."""
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    make_client_model(name, tokenizer, seed, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class LowRankCell(RecurrentCell):
    """A cell as a user might add it, with parameters and a module of its own: h' = tanh(W x + U h + A B h)"""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.weight_left = nn.Parameter(torch.empty(hidden_size, 2))
        self.inner = nn.Linear(hidden_size, 2, bias=False)

    def init_weights(self, config):
        super().init_weights(config)
        nn.init.normal_(self.weight_left)

    def step(self, projected, state, linear=F.linear):
        (hidden,) = state
        recurrent = self.inner(hidden) @ self.weight_left.T + linear(hidden, self.weight_hh, self.bias_hh)
        return (torch.tanh(projected + recurrent),)
