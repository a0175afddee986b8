"""Which source positions belong to which target positions, read from the attention of an encoder-decoder."""

from collections.abc import Mapping, Sequence

import torch
from transformers.utils import ModelOutput


def align(outputs: ModelOutput) -> torch.Tensor:
    """
    The attention weights of the words that a model returned, heads averaged.

    Args:
        outputs (`ModelOutput`): What an encoder-decoder returned for `output_attentions=True`: a forward, or `generate`
            with `return_dict_in_generate=True`, by whatever kind of search.

    Returns:
        `torch.Tensor` of shape `(batch, target, source)`. For a forward its row t has the weights with which position t
        predicts the label t. For `generate` row t belongs to `outputs.sequences[:, t + 1]`, since nothing attends for
        the first token. Beams are traced back, so that the weights are those of the returned sequences; behind the end
        of a beam they are zero. Weights of several attending layers are averaged as those of heads are.

    Raises:
        `ValueError`: There are no weights in `outputs`.
    """
    attentions = outputs.get("cross_attentions")
    if not attentions:
        raise ValueError("`outputs` must hold `cross_attentions`: ask the model for `output_attentions=True`.")
    if torch.is_tensor(attentions[0]):
        return _mean_of_heads(attentions)
    first, *others = (_mean_of_heads(layers) for layers in attentions)
    # Without a cache a step has all positions before as well.
    steps = [first[:, -1], *(weights[:, -1] for weights in others)]
    num_prompt, length = first.shape[1] - 1, outputs.sequences.shape[1]
    steps = steps[: length - num_prompt - 1]
    beams = outputs.get("beam_indices")
    if beams is None:
        return torch.cat([first[:, :num_prompt], torch.stack(steps, dim=1)], dim=1)
    beams = beams[:, : len(steps)].to(first.device)
    is_used = beams >= 0
    traced = torch.stack([weights[beam.long()] for weights, beam in zip(steps, beams.clamp(min=0).T)], dim=1)
    # All beams of a source begin alike.
    prompt = first[beams[:, 0].long(), :num_prompt]
    return torch.cat([prompt, traced * is_used.unsqueeze(-1)], dim=1)


def _mean_of_heads(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """From one tensor `[batch, heads, target, source]` for each layer to `[batch, target, source]`."""
    return torch.stack([weights.mean(1) for weights in layers]).mean(0)


def replace_unknowns(
    outputs: ModelOutput,
    source_words: Sequence[Sequence[str | None]],
    tokenizer,
    lexicon: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """
    Puts, for every unknown word that a model generated, the source word that it attended to most
    ([Luong et al., 2015](https://huggingface.co/papers/1410.8206), by attention in place of marked alignments).

    Args:
        outputs (`ModelOutput`): What `generate` returned with `return_dict_in_generate=True, output_attentions=True`.
        source_words (`list` of `list` of `str`): For each row of the sources the word that stands at each position of
            its `input_ids`; None where there is none to copy, such as padding and special tokens.
        tokenizer: The tokenizer of the target, with `convert_ids_to_tokens`, `unk_token_id` and `all_special_ids`.
        lexicon (`dict`, *optional*): Translations of source words; a word that it lacks is copied.

    Returns:
        For each returned sequence its tokens, without special ones. An unknown word stays the unknown token where no
        source word can be copied.

    Raises:
        `ValueError`: Numbers of rows or positions that do not fit, or a tokenizer without an unknown token.
    """
    if tokenizer.unk_token_id is None:
        raise ValueError("`tokenizer` must have an `unk_token_id`, got None.")
    weights = align(outputs)
    num_rows, _, num_positions = weights.shape
    if not source_words or num_rows % len(source_words):
        raise ValueError(f"`source_words` must have a row for each source of {num_rows} rows, got {len(source_words)}.")
    if any(len(words) != num_positions for words in source_words):
        lengths = sorted({len(words) for words in source_words})
        raise ValueError(f"`source_words` must have {num_positions} positions in each row, got {lengths}.")
    per_source = num_rows // len(source_words)
    skipped = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    texts = []
    for row, token_ids in enumerate(outputs.sequences.tolist()):
        words = source_words[row // per_source]
        can_copy = torch.tensor([word is not None for word in words], device=weights.device)
        texts.append([])
        for position, token_id in enumerate(token_ids):
            if token_id in skipped:
                continue
            token = tokenizer.convert_ids_to_tokens(token_id)
            if token_id == tokenizer.unk_token_id and position > 0 and can_copy.any():
                attended = weights[row, position - 1].masked_fill(~can_copy, -1)
                word = words[int(attended.argmax())]
                token = (lexicon or {}).get(word, word)
            texts[-1].append(token)
    return texts
