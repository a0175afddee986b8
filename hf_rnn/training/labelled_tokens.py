"""Which tokens of a tokenizer never have a label of their own."""

from transformers import PreTrainedTokenizerBase


# What the first token of a word begins with: a space, as SentencePiece and byte-level tokenizers write it.
WORD_BEGINNINGS = ("▁", "Ġ")


def ids_without_label(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The `crf_ignored_ids` of a configuration for data whose labels stand at the first token of each word: special tokens
    except the unknown one, and all tokens that continue a word.

    These are the ones that begin with the prefix of such tokens (`##` in WordPiece) or, where the tokenizer marks the
    beginning of words, that do not begin with that mark; then words have to be separated by spaces, and the first one
    needs one too (`add_prefix_space=True`). Of other tokenizers only the special tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.

    Raises:
        `ValueError`: The tokenizer has no `backend_tokenizer`, which says how it parts words.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"`tokenizer` must be a fast one, got a {type(tokenizer).__name__}.")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    marks_words = any(token.startswith(WORD_BEGINNINGS) and len(token) > 1 for token in tokens)

    def continues_word(token: str) -> bool:
        if prefix:
            return token.startswith(prefix) and token != prefix
        return marks_words and not token.startswith(WORD_BEGINNINGS)

    # An unknown token is a word of its own in tokenizers that have one.
    return [
        index
        for index, token in enumerate(tokens)
        if index in special or (index != tokenizer.unk_token_id and continues_word(token))
    ]
