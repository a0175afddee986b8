"""Trains small tokenizers with `tokenizers` and wraps them so that `AutoTokenizer` loads what they save.

Those of subwords and of characters are exact: `decode(encode(text))` is the text again, whatever white space or symbols
it has (the tokenizer of characters as far as it has seen the characters).
"""

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # with the ids 0 to 3

LEVELS = ("characters", "words")  # what is a symbol

# A word takes the space before it and an apostrophe after it (l'|ami, don'|t); digits stand alone; a run of other signs
# takes any white space before it, so that a narrow no-break space and the sign it belongs to can become one token.
PIECES = r" ?[\p{L}\p{M}]+['’]?|\s?\p{N}|\s?[^\s\p{L}\p{M}\p{N}]+|\s"
WORDS = r"[\p{L}\p{M}\p{N}_]+|[^\p{L}\p{M}\p{N}_]"  # words and single signs, where there is no white space


def train_subword_tokenizer(
    texts: Iterable[str], vocab_size: int, normalization: str | None = None, add_eos: bool = True
) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer; it has no unknown tokens. The same texts give the same tokenizer.

    Args:
        texts (`Iterable[str]`): The training text, for translation of both languages.
        vocab_size (`int`): Number of tokens, at least 260 (256 bytes and 4 special tokens); fewer if the text is short.
        normalization (`str`, *optional*):
            `"nfc"`, `"nfkc"` or `"lowercase"`, applied before anything else; decoding then gives the normalised text.
        add_eos (`bool`, *optional*, defaults to `True`): Whether every encoded text ends with `</s>`.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    minimum = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < minimum:
        raise ValueError(f"`vocab_size` must be at least {minimum} (bytes and special tokens), got {vocab_size}.")
    normalizer = _normalizer(normalization)
    tokenizer = Tokenizer(models.BPE())
    # The space in front makes the first word of a sentence the same token as elsewhere; decoding takes it off again.
    first = [] if normalizer is None else [normalizer]
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, add_eos)


def train_character_tokenizer(
    texts: Iterable[str], add_eos: bool = False, normalization: str | None = None
) -> PreTrainedTokenizerFast:
    """
    Makes a tokenizer with one token for each character of `texts`, in code point order; others become `<unk>`.
    `normalization` as in [`train_subword_tokenizer`].
    """
    normalizer = _normalizer(normalization)
    if normalizer is not None:
        texts = map(normalizer.normalize_str, texts)
    characters = sorted(set().union(*texts))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, add_eos)


def train_symbol_tokenizer(
    sources: Iterable[str], targets: Iterable[str], source_level: str, target_level: str
) -> PreTrainedTokenizerFast:
    """
    Makes a tokenizer with one token for each symbol of two kinds of texts: its characters, or the words between white
    space. Other symbols become `<unk>`, every encoded text ends with `</s>`.

    Args:
        sources, targets (`Iterable[str]`): The texts.
        source_level, target_level (`str`): `"characters"` or `"words"`. White space is a symbol only where both are
            characters.

    Raises:
        `ValueError`: A level is neither of the two, or a text of characters holds a word of the other texts, so that
            nobody could tell how to read it.
    """
    symbols, spelled = set(), set()
    for name, level, texts in (("source", source_level, sources), ("target", target_level, targets)):
        if level not in LEVELS:
            raise ValueError(f"`{name}_level` must be one of {list(LEVELS)}, got {level!r}.")
        (spelled if level == "characters" else symbols).update(word for text in texts for word in text.split())
    if not symbols:
        return train_character_tokenizer([*sources, *targets], add_eos=True)
    words = sorted(symbol for symbol in symbols if len(symbol) > 1)
    unclear = sorted(spelled.intersection(words))
    if unclear:
        raise ValueError(f"{unclear[0]!r} is a symbol of one side and a word to be read by characters on the other.")
    vocabulary = [*SPECIAL_TOKENS, *sorted(symbols.union(*spelled))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNK))
    splits = [pre_tokenizers.WhitespaceSplit()]
    if spelled:
        known_words = "|".join(map(re.escape, words))
        splits.append(pre_tokenizers.Split(Regex(rf"^(?:{known_words})$|[\s\S]"), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if target_level == "characters":
        tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, add_eos=True)


def train_word_tokenizer(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 1, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """
    Makes a tokenizer with one token for each word of `texts`, the most frequent first. White space and signs end a
    word; each sign is a token. Other words become `<unk>`.

    Args:
        texts (`Iterable[str]`): The training text.
        vocab_size (`int`): Number of tokens, the special ones included; fewer if there are not as many words.
        min_frequency (`int`): How often a word has to occur.
        lowercase (`bool`): Whether capital letters are read as small ones.

    Raises:
        `ValueError`: There is no room for a word, or `min_frequency` is below 1.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"`vocab_size` must be above {len(SPECIAL_TOKENS)} (the special tokens), got {vocab_size}.")
    if min_frequency < 1:
        raise ValueError(f"`min_frequency` must be at least 1, got {min_frequency}.")
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(WORDS), behavior="isolated")]
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, add_eos=False)


def token_pieces(tokenizer: PreTrainedTokenizerFast, token_ids: Iterable[int]) -> list[str]:
    """A label for each token of a subword tokenizer: its text without white space; `-` leads what continues a word."""
    byte_decoder, special_ids = decoders.ByteLevel(), set(tokenizer.all_special_ids)
    labels = []
    for token_id in token_ids:
        token = tokenizer.convert_ids_to_tokens(int(token_id))
        piece = token if token_id in special_ids else byte_decoder.decode([token])
        continues = token_id not in special_ids and piece[:1].isalnum() and labels
        labels.append("-" + piece if continues else piece.strip() or "␣")
    return labels


def _normalizer(normalization: str | None) -> normalizers.Normalizer | None:
    classes = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, "lowercase": normalizers.Lowercase}
    if normalization is not None and normalization not in classes:
        raise ValueError(f"`normalization` must be one of {sorted(classes)}, got {normalization!r}.")
    return None if normalization is None else classes[normalization]()


def _wrap(tokenizer: Tokenizer, add_eos: bool) -> PreTrainedTokenizerFast:
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))]
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
