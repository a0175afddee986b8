"""Word alignments in batches, for attention that is guided by them."""

from collections.abc import Callable, Sequence

import torch


Pairs = Sequence[tuple[int, int]]


def read_alignment(line: str) -> list[tuple[int, int]]:
    """
    The pairs of positions (source, target) of a line such as `"0-0 1-2"`, as aligners of words write them.

    Raises:
        `ValueError`: Something in the line is no pair.
    """
    pairs = []
    for part in line.split():
        source, _, target = part.partition("-")
        if not (source.isdecimal() and target.isdecimal()):
            raise ValueError(f"An alignment must consist of pairs such as '0-1', got {part!r} in {line!r}.")
        pairs.append((int(source), int(target)))
    return pairs


class AlignmentCollator:
    """
    Batches of another collator with `alignments` `(batch, target, source)`, by which encoder-decoders guide their
    attention while they are trained (`guided_alignment_weight`).

    Args:
        collator: Makes batches of everything else, such as `DataCollatorForSeq2Seq(tokenizer, model=model)`. Its
            `tokenizer` says on which side it pads.

    Each example may have `alignments`: pairs (source, target) of positions in its `input_ids` and `labels`, counted in
    tokens from 0, or a line that [`read_alignment`] reads. Without them its attention is free.
    """

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        """
        Raises:
            `ValueError`: A pair lies outside its example.
        """
        others = [{name: value for name, value in feature.items() if name != "alignments"} for feature in features]
        batch = self.collator(others) if return_tensors is None else self.collator(others, return_tensors)
        num_sources, num_targets = batch["input_ids"].shape[1], batch["labels"].shape[1]
        pads_left = getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right") == "left"
        alignments = torch.zeros(len(features), num_targets, num_sources)
        for row, feature in enumerate(features):
            lengths = len(feature["input_ids"]), len(feature["labels"])
            source_start = num_sources - lengths[0] if pads_left else 0
            target_start = num_targets - lengths[1] if pads_left else 0
            pairs = feature.get("alignments") or ()
            for source, target in read_alignment(pairs) if isinstance(pairs, str) else pairs:
                if not (0 <= source < lengths[0] and 0 <= target < lengths[1]):
                    raise ValueError(
                        f"`alignments` must be below the {lengths[0]} source and {lengths[1]} target tokens of their "
                        f"example, got {(source, target)}."
                    )
                alignments[row, target_start + target, source_start + source] = 1
        batch["alignments"] = alignments
        return batch
