"""The score of finished hypotheses in GNMT, for the beam search of `generate`."""

import torch
from transformers import LogitsProcessor


class GNMTScore(LogitsProcessor):
    r"""
    Length normalisation and coverage penalty of [Wu et al., 2016](https://huggingface.co/papers/1609.08144) (equation
    14) in beam search. A finished hypothesis Y for the source X, with p_ij the attention to the source position i when
    the word j is predicted, has the score

        s(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y)
        lp(Y) = (5 + |Y|)^alpha / 6^alpha
        cp(X; Y) = beta sum_i log(min(sum_j p_ij, 1))

    and that is what `sequences_scores` holds. Hypotheses that go on have the score without cp, since they may cover
    more yet. A hypothesis that is cut off by `max_new_tokens` before it ends has no cp either.

    `generate` divides the sum of what this returns by the number of words, so leave `length_penalty` at 1. Where all
    words of the source are to be covered, pass `early_stopping=False`, which is the default.

    Args:
        num_beams (`int`): The number of beams of `generate`.
        length_penalty (`float`): alpha; 0 for none.
        coverage_penalty (`float`, *optional*, defaults to 0.0): beta.
        model (`RNNSeq2SeqForConditionalGeneration`, *optional*):
            The model whose attention is watched; needed with a coverage penalty. It is watched until
            [`~GNMTScore.close`], or within a `with` statement.

    Raises:
        `ValueError`: A value out of range, or no model where one is needed.

    Example:

    ```python
    with GNMTScore(num_beams=4, length_penalty=0.6, coverage_penalty=0.2, model=model) as score:
        model.generate(**inputs, num_beams=4, logits_processor=LogitsProcessorList([score]))
    ```"""

    def __init__(self, num_beams: int, length_penalty: float, coverage_penalty: float = 0.0, model=None):
        if num_beams < 2:
            raise ValueError(f"`num_beams` must be at least 2, got {num_beams}.")
        if length_penalty < 0 or coverage_penalty < 0:
            raise ValueError(
                "`length_penalty` and `coverage_penalty` must be at least 0, got "
                f"{length_penalty} and {coverage_penalty}."
            )
        if coverage_penalty > 0 and model is None:
            raise ValueError("`model` must be given with a `coverage_penalty`, which reads its attention.")
        self.num_beams = num_beams
        self.length_penalty = length_penalty
        self.coverage_penalty = coverage_penalty
        self._hooks = []
        self._end_tokens: list[int] = []
        self._weights = self._source_mask = None
        self._forget()
        if coverage_penalty > 0:
            decoder = model.get_decoder()
            end = model.generation_config.eos_token_id
            self._end_tokens = [] if end is None else [end] if isinstance(end, int) else list(end)
            self._hooks = [
                decoder.cross_attentions.register_forward_hook(self._see_weights),
                decoder.register_forward_pre_hook(self._see_mask, with_kwargs=True),
            ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Stops watching the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._forget()

    def _forget(self) -> None:
        # Of the step before: the sequences, their log-probabilities so far, those of all next words, and the coverage.
        self._sequences = self._sums = self._next = self._covered = None
        self._num_prompt = 0

    def _see_weights(self, module, args, weights):
        self._weights = weights[:, :, -1].mean(1)

    def _see_mask(self, module, args, kwargs):
        mask = kwargs.get("encoder_attention_mask")
        # Beams may share the mask of their source.
        self._source_mask = None if mask is None else mask.repeat_interleave(kwargs.get("rows_per_source", 1), dim=0)

    def _normalizer(self, length: int) -> float:
        return ((5 + length) / 6) ** self.length_penalty

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch * num_beams, length)`): The sequences so far.
            scores (`torch.FloatTensor` of shape `(batch * num_beams, vocab_size)`): Log-probabilities of the next word.

        Returns:
            What to add to the scores of the sequences so far.

        Raises:
            `ValueError`: The number of rows is no multiple of `num_beams`.
        """
        if len(input_ids) % self.num_beams:
            raise ValueError(f"There must be a multiple of `num_beams` ({self.num_beams}) rows, got {len(input_ids)}.")
        parents = self._parents(input_ids)
        if parents is None:
            self._forget()
            self._num_prompt = input_ids.shape[1]
            self._sums = scores.new_zeros(len(scores))
        else:
            chosen = input_ids[:, -1:]
            self._sums = self._sums[parents] + self._next[parents].gather(1, chosen).squeeze(1)
        self._sequences, self._next = input_ids.clone(), scores.clone()
        length = input_ids.shape[1] - self._num_prompt
        # The sum of what is returned is the score so far times the number of words, by which `generate` divides it.
        before = length * self._sums / self._normalizer(length)
        factor = (length + 1) / self._normalizer(length + 1)
        result = factor * (self._sums.unsqueeze(1) + scores) - before.unsqueeze(1)
        if self.coverage_penalty > 0:
            weights = self._weights.to(scores)
            self._covered = weights if parents is None else self._covered[parents] + weights
            result[:, self._end_tokens] += (length + 1) * self._penalty().unsqueeze(1)
        return result

    def _parents(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The row of the step before that each row goes on from; None where a new text begins."""
        if self._sequences is None or self._sequences.shape != input_ids[:, :-1].shape:
            return None
        before, now = (rows.unflatten(0, (-1, self.num_beams)) for rows in (self._sequences, input_ids[:, :-1]))
        # Rows of the same source that are the same so far have the same sums.
        is_parent = (now.unsqueeze(2) == before.unsqueeze(1)).all(-1)  # [batch, beams, beams before]
        if not is_parent.any(-1).all():
            return None
        first = torch.arange(0, len(input_ids), self.num_beams, device=input_ids.device)
        return (is_parent.int().argmax(-1) + first.unsqueeze(1)).flatten()

    def _penalty(self) -> torch.Tensor:
        """cp of each row."""
        covered = self._covered.clamp(min=torch.finfo(self._covered.dtype).tiny, max=1).log()
        if self._source_mask is not None:
            covered = covered.masked_fill(self._source_mask == 0, 0)
        return self.coverage_penalty * covered.sum(-1)
