"""Classification of texts of any length, in memory that does not grow with them."""

from collections.abc import Iterable, Iterator

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from ..pooling import token_mask


@torch.no_grad()
def classify_in_chunks(
    model,
    input_ids: torch.Tensor | Iterable[torch.Tensor],
    attention_mask: torch.Tensor | Iterable[torch.Tensor] | None = None,
    *,
    chunk_size: int = 512,
    output_attentions: bool = False,
) -> SequenceClassifierOutput:
    r"""
    What a classifier with one direction says of a text of any length, read in chunks with the state carried from one to
    the next: the logits of `model(input_ids, attention_mask)`, for every kind of pooling and up to rounding, in memory
    that depends on the size of a chunk alone. For inference: there are no gradients.

    Args:
        model (`RNNForSequenceClassification`): The classifier, in evaluation mode, with `bidirectional=False`.
        input_ids (`torch.LongTensor` of shape `(batch, seq)`, or an iterable of them):
            The tokens. An iterable gives the text piece by piece, `(batch, any number)` each, so that not even all of
            its tokens are in memory at once.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`, or an iterable of them, *optional*):
            Non-zero where there is a token; an iterable where `input_ids` is one, with as many pieces.
        chunk_size (`int`, *optional*, defaults to 512): How many tokens are read at once, at most.
        output_attentions (`bool`, *optional*, defaults to `False`):
            Whether to return the weights of `pooling="attention"`, which takes one number for each token and head.

    Returns:
        `SequenceClassifierOutput`: `logits` `(batch, num_labels)` and, if asked for, `attentions`: one tensor
        `(batch, heads, 1, seq)`.

    Raises:
        `ValueError`: Another model, one that reads in two directions or reads words of several tokens, a `chunk_size`
            below 1, weights asked for where the pooling has none, no piece at all, pieces of different batches, or a
            mask that does not fit.

    Example:

    ```python
    >>> import torch
    >>> from hf_rnn import RNNConfig, RNNForSequenceClassification, classify_in_chunks

    >>> model = RNNForSequenceClassification(RNNConfig(vocab_size=1000, hidden_size=64, pooling="max")).eval()
    >>> lines = (torch.randint(3, 1000, (1, 20)) for _ in range(100))  # such as tokenizer(line, return_tensors="pt")
    >>> classify_in_chunks(model, (line for line in lines)).logits.shape
    torch.Size([1, 2])
    ```"""
    # By name, because code that came with a checkpoint has a class of its own.
    if all(base.__name__ != "RNNForSequenceClassification" for base in type(model).__mro__):
        raise ValueError(f"`model` must be a sequence classifier of this library, got {type(model).__name__}.")
    if model.config.word_encoder is not None:
        raise ValueError(
            "`word_encoder` must be None to read in chunks, which could part a word, got "
            f"{model.config.word_encoder!r}."
        )
    if model.config.bidirectional:
        raise ValueError(
            "`bidirectional` must be False to read in chunks, got True: the second direction begins at the end of the "
            "text. Give the whole text to the model, or cut it into texts of their own and average their logits, or "
            "train a model with one direction."
        )
    pooling = model.pooling
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"`chunk_size` must be an integer of at least 1, got {chunk_size!r}.")
    if output_attentions and pooling.pooling != "attention":
        raise ValueError(f"`output_attentions` needs `pooling='attention'`, got {pooling.pooling!r}.")

    cache, pooled, all_scores, masks, batch = None, None, [], [], None
    for ids, mask in _chunks(input_ids, attention_mask, chunk_size):
        if batch is not None and len(ids) != batch:
            raise ValueError(f"All pieces of `input_ids` must have as many rows, got {batch} and {len(ids)}.")
        batch = len(ids)
        ids = ids.to(model.device)
        mask = None if mask is None else mask.to(model.device)
        outputs = model.model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True)
        cache = outputs.past_key_values
        scores = pooling.scores(outputs.last_hidden_state) if output_attentions else None
        pooled = pooling.read(outputs.last_hidden_state, mask, pooled, scores)
        if output_attentions:
            all_scores.append(scores)
            masks.append(token_mask(outputs.last_hidden_state, mask))
    if pooled is None:
        raise ValueError("`input_ids` must have at least one piece, got none.")
    logits = model.classifier(model.dropout(pooling.pooled(pooled).to(model.classifier.weight.dtype)))
    attentions = None
    if output_attentions:
        attentions = (pooling.weights(torch.cat(all_scores, dim=-1), torch.cat(masks, dim=1)).unsqueeze(2),)
    return SequenceClassifierOutput(logits=logits, attentions=attentions)


def _chunks(
    input_ids: torch.Tensor | Iterable[torch.Tensor],
    attention_mask: torch.Tensor | Iterable[torch.Tensor] | None,
    chunk_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Tokens and mask `(batch, at most chunk_size)`, one after the other; a piece without tokens is a chunk too."""
    is_whole = isinstance(input_ids, torch.Tensor)
    if attention_mask is not None and isinstance(attention_mask, torch.Tensor) != is_whole:
        raise ValueError("`attention_mask` must be a tensor where `input_ids` is one, and an iterable where it is not.")
    pieces = iter([input_ids] if is_whole else input_ids)
    masks = None if attention_mask is None else iter([attention_mask] if is_whole else attention_mask)
    end = object()
    for piece in pieces:
        mask = None if masks is None else next(masks, end)
        if mask is end:
            raise ValueError("`attention_mask` must have as many pieces as `input_ids`, got fewer.")
        if piece.dim() != 2:
            raise ValueError(f"`input_ids` must have the shape (batch, seq), got {tuple(piece.shape)}.")
        if mask is not None and mask.shape != piece.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids` {tuple(piece.shape)}, got {tuple(mask.shape)}."
            )
        for start in range(0, max(1, piece.shape[1]), chunk_size):
            chunk = slice(start, start + chunk_size)
            yield piece[:, chunk], None if mask is None else mask[:, chunk]
    if masks is not None and next(masks, end) is not end:
        raise ValueError("`attention_mask` must have as many pieces as `input_ids`, got more.")
