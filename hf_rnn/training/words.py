"""For models with a `word_encoder`: a tokenizer of words spelled in bytes, and the table of known words."""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..word_encoder import WordTable, find_words


PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # with the ids 0 to 3
CONTINUATION = "##"
BYTE = "[!-~¡-¬®-\u0143]"  # a character of `ByteLevel.alphabet()`

# Close to the words of treebanks: addresses, short forms and their dots, n't and 's apart, numbers with their dots.
# Signs of one kind stay together, others stand alone. Linear in time: an address begins behind white space, and only
# the first @ behind its first character is tried.
WORD_PATTERN = (
    r"https?://\S+|www\.\S+|(?<!\S)\S[^\s@]*@\S+\.\w+"
    r"|\p{L}+(?=n['’]t\b)|n['’]t\b|['’](?:s|S|m|d|ll|re|ve)\b"
    r"|(?:\p{L}\.){2,}|(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|etc|No|Inc|Co|Corp|Ltd|Gen|Sen|Rep|Gov|Prof)\."
    r"|\p{N}+(?:[.,:]\p{N}+)*|[\p{L}\p{M}\p{N}_]+(?:&\p{L}+)*"
    r"|([^\s\p{L}\p{N}])\1*"
)
SPLITS = ("words", "whitespace")

_FOLDED = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ123456789", "abcdefghijklmnopqrstuvwxyz000000000")


def make_word_tokenizer(split: str = "words") -> PreTrainedTokenizerFast:
    r"""
    A tokenizer whose tokens are the bytes of words, for [`RNNConfig`] with a `word_encoder`.

    There is nothing to train and no unknown token: the first byte of a word is one of 256 tokens, any other byte one of
    256 further ones, which begin with `##`. To collators, `Trainer` and pipelines these are sub-words as those of
    BERT: `word_ids()` tells the words, and `aggregation_strategy="first"` reads their labels. (Pipelines decode the
    `word` that they return twice, and a word that is one letter such as `é` looks like the token of a byte: it comes
    out as `\ufffd`. `start` and `end` are right.)

    Args:
        split (`str`, *optional*, defaults to `"words"`):
            How a text becomes words: `"words"` splits off punctuation, n't and 's, as treebanks of English do;
            `"whitespace"` splits at white space alone, for texts that are words already.

    Returns:
        `PreTrainedTokenizerFast`; [`first_continuation_id`] says which field of a configuration it wants.

    Raises:
        `ValueError`: Another `split`.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *(CONTINUATION + byte for byte in alphabet)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], continuing_subword_prefix=CONTINUATION, unk_token=UNK)
    )
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if split == "words":
        steps.insert(0, pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            # What is not the token of a byte stays text: special tokens, and words that pipelines decode a second time.
            decoders.Replace(Regex(rf"\A(?!(?:{CONTINUATION})?{BYTE}\z)(?=.)"), " "),
            decoders.Replace(Regex(rf"\A(?={BYTE}\z)"), "Ġ"),  # a space, spelled as a byte
            decoders.Replace(Regex(rf"\A{CONTINUATION}(?={BYTE}\z)"), ""),
            decoders.ByteLevel(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,  # it would take out spaces before punctuation
        model_input_names=["input_ids", "attention_mask"],  # recurrent models have no token_type_ids
    )


def first_continuation_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """
    The `first_continuation_id` of a configuration for a tokenizer: the id from which on all tokens begin with `##`.

    Raises:
        `ValueError`: There is none, because such tokens stand between others.
    """
    continues = [
        token.startswith(CONTINUATION) and token != CONTINUATION
        for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ]
    first = continues.index(True) if any(continues) else len(continues)
    if first == len(continues) or not all(continues[first:]):
        raise ValueError(
            f"The tokens that begin with {CONTINUATION!r} must be the last ones of the tokenizer, as in those of "
            "`make_word_tokenizer`."
        )
    return first


def fold_word(word: str) -> str:
    """The spelling in which a word that is not known is looked for: small letters and, for digits, zeros (of ASCII)."""
    return word.translate(_FOLDED)


def frequent_words(words: Iterable[str], min_count: int = 2, max_words: int | None = None) -> list[str]:
    """
    The words that are to be known: those that occur `min_count` times, and the folded spellings ([`fold_word`]) of all
    words that occur as often; the most frequent ones first, `max_words` of them at the most.
    """
    words = Counter(words)
    counts = Counter()
    for word, count in words.items():
        counts[fold_word(word)] += count
    for word, count in words.items():
        counts[word] = max(counts[word], count)
    kept = [word for word, count in counts.most_common() if count >= min_count]
    return kept[:max_words]


@torch.no_grad()
def set_word_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    words: Sequence[str],
    vectors: torch.Tensor | None = None,
) -> int:
    """
    Makes words known to a model with a `word_encoder` and a `word_vocab_size`, in the place of those that were known.
    Words that are known already keep their embeddings.

    Args:
        model (`PreTrainedModel`): The model, or a head on it.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        words (`Sequence[str]`): The words, fewer than `word_vocab_size`, with the most important ones first. What the
            tokenizer takes for several words is left out.
        vectors (`torch.Tensor` of shape `(len(words), word_embedding_size)`, *optional*):
            Their embeddings, such as pretrained ones; rows of NaN leave the embedding of a word as it is.

    Returns:
        `int`: How many words are known.

    Raises:
        `ValueError`: The model has no table, or there are more words or vectors of another shape than it takes.
    """
    table = next((module for module in model.modules() if isinstance(module, WordTable)), None)
    if table is None:
        raise ValueError("`word_encoder` and `word_vocab_size` must be set in the configuration of a model with words.")
    words = list(dict.fromkeys(words)) if vectors is None else list(words)
    if len(words) > len(table.keys):
        raise ValueError(
            f"`words` must be fewer than `word_vocab_size`, which is {len(table.keys) + 1} with the unknown word, got "
            f"{len(words)}."
        )
    size = table.embed_words.embedding_dim
    if vectors is not None and vectors.shape != (len(words), size):
        raise ValueError(f"`vectors` must have the shape {(len(words), size)}, got {tuple(vectors.shape)}.")
    device = table.keys.device
    continuation = model.config.first_continuation_id
    keys: dict[int, int] = {}
    for start in range(0, len(words), 1024):
        batch = words[start : start + 1024]
        inputs = tokenizer(batch, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        inputs = inputs.to(device)
        found = find_words(inputs["input_ids"], continuation, inputs["attention_mask"])
        of_words = table.word_keys(inputs["input_ids"], found)[:, 0].tolist()
        for index, (key, number) in enumerate(zip(of_words, found.starts.sum(1).tolist()), start):
            if number == 1:
                keys.setdefault(key, index)
    order = sorted(keys)
    table.know(torch.tensor(order, dtype=torch.long, device=device))
    if vectors is not None:
        rows = vectors[[keys[key] for key in order]].to(table.embed_words.weight)
        old = table.embed_words.weight[1 : 1 + len(order)]
        table.embed_words.weight[1 : 1 + len(order)] = torch.where(rows.isnan(), old, rows)
    tokens = tokenizer.convert_ids_to_tokens(range(len(table.folded)))
    ids = tokenizer.get_vocab()
    folded = [ids.get(fold_word(token or ""), index) for index, token in enumerate(tokens)]
    table.folded.copy_(torch.tensor(folded, device=device))
    return len(order)


def whole_words(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """
    A copy of a tokenizer of [`make_word_tokenizer`] that splits at white space alone, for `is_split_into_words=True`:
    the words of a corpus stay whole, whatever signs they hold. Other tokenizers are returned as they are.
    """
    try:
        first_continuation_id(tokenizer)
    except ValueError:
        return tokenizer
    copied = copy.deepcopy(tokenizer)
    copied.backend_tokenizer.pre_tokenizer = make_word_tokenizer("whitespace").backend_tokenizer.pre_tokenizer
    return copied
