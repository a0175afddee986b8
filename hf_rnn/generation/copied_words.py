"""Texts of words for a pointer-generator: words that the vocabulary lacks as ids of their own, and back."""

from collections.abc import Sequence


def encode_with_copies(
    source: Sequence[str], tokenizer, num_copy_ids: int, target: Sequence[str] | None = None
) -> dict[str, list]:
    """
    The ids of a source and of its target. Words of the source that the vocabulary lacks get the ids `len(tokenizer)`,
    `len(tokenizer)` + 1, ... in their order, one for each word, wherever it stands; so do the same words of the target.
    Further ones, and words that only the target has, are the unknown token.

    Args:
        source (`list` of `str`): The words of the source.
        tokenizer: A tokenizer of words, whose length is the `vocab_size` of the model, with an unknown token.
        num_copy_ids (`int`): `num_copy_ids` of the model.
        target (`list` of `str`, *optional*): The words of the target.

    Returns:
        `dict`: `input_ids` and, for a target, `labels`, both with the end-of-sequence token if there is one; and
        `copied_words`, for [`decode_with_copies`]. The stock collator for seq2seq pads the first two.

    Raises:
        `ValueError`: The tokenizer has no unknown token.
    """
    if tokenizer.unk_token_id is None:
        raise ValueError("`tokenizer` must have an `unk_token_id`, got None.")
    size, end = len(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    copied: dict[str, int] = {}

    def ids_of(words: Sequence[str], may_add: bool) -> list[int]:
        ids = []
        for word in words:
            token_id = tokenizer.convert_tokens_to_ids(word)
            if token_id in (None, tokenizer.unk_token_id):
                if may_add and word not in copied and len(copied) < num_copy_ids:
                    copied[word] = size + len(copied)
                token_id = copied.get(word, tokenizer.unk_token_id)
            ids.append(token_id)
        return ids + end

    encoded = {"input_ids": ids_of(source, may_add=True)}
    if target is not None:
        encoded["labels"] = ids_of(target, may_add=False)
    return encoded | {"copied_words": list(copied)}


def decode_with_copies(token_ids: Sequence[int], tokenizer, copied_words: Sequence[str]) -> list[str]:
    """
    The words of a generated sequence, without special tokens but with unknown ones.

    Args:
        token_ids (`list` of `int`, or a tensor): The ids.
        tokenizer: The tokenizer that the source was encoded with.
        copied_words (`list` of `str`): What [`encode_with_copies`] returned for that source. An id behind them, which
            no source word has, is the unknown token.
    """
    size = len(tokenizer)
    skipped = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    words = []
    for token_id in map(int, token_ids):
        if token_id >= size:
            place = token_id - size
            words.append(copied_words[place] if place < len(copied_words) else tokenizer.unk_token)
        elif token_id not in skipped:
            words.append(tokenizer.convert_ids_to_tokens(token_id))
    return words
