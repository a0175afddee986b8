"""Words made of several tokens, such as characters: where they lie in a row, and one vector for each of them.

A word begins at a token that is not marked as a continuation (`##` in the tokenizers of words). The recurrent layers
read the words of a row one behind the other; what they make of a word is shown at each of its tokens. So the tokens go
through tokenizers, collators and pipelines like the sub-words of any other model. Imports the layer, the padding
and the products.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .linear_modules import apply_linear
from .packed_sequences import PackedPadding
from .recurrent_layer import RecurrentLayer
from .recurrent_onnx import in_scan
from .recurrent_padding import reading_order


def _is_exporting() -> bool:
    # Within its graphs torch 2.11 takes every compiler for an exporter.
    exports = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exports or torch.onnx.is_in_onnx_export()


class Words(NamedTuple):
    """
    Where the words of a batch lie. Padding belongs to the word before it, at the beginning of a row to the first one.
    """

    number: torch.Tensor  # [batch, seq], which word of the row a token belongs to, from 0
    is_token: torch.Tensor  # [batch, seq], False at padding
    starts: torch.Tensor  # [batch, seq], True at the first token of a word
    is_word: torch.Tensor  # [batch, words], False behind the last word of a row
    first: torch.Tensor  # [batch, words], the position of the first token of a word; 0 where there is no word
    last: torch.Tensor  # [batch, words], the position of the last one

    @property
    def ends(self) -> torch.Tensor:
        """True at the last token of a word `[batch, seq]`."""
        positions = torch.arange(self.number.shape[1], device=self.number.device)
        return self.is_token & (self.last.gather(1, self.number) == positions)

    def move_to_edges(
        self, start: torch.Tensor | None, end: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Positions `[batch]` at the first, and at the last token of the word that they lie in; those that lie outside of
        the row stay where they are.
        """
        moved = []
        for positions, edges in ((start, self.first), (end, self.last)):
            if positions is not None:
                column = positions.reshape(-1, 1)
                at_edge = edges.gather(1, self.number.gather(1, column.clamp(0, self.number.shape[1] - 1)))
                is_inside = (column >= 0) & (column < self.number.shape[1])
                positions = torch.where(is_inside, at_edge, column).view_as(positions)
            moved.append(positions)
        return tuple(moved)

    def spread(self, features: torch.Tensor) -> torch.Tensor:
        """Features of words `[batch, words, size]` at each of their tokens `[batch, seq, size]`."""
        return features.gather(1, self.number.unsqueeze(-1).expand(-1, -1, features.shape[-1]))

    def repeat_first(self, features: torch.Tensor) -> torch.Tensor:
        """Features of tokens `[batch, seq, size]` with those of a word's first token at each of its tokens."""
        return self.spread(self.gather(features, self.first))

    def gather(self, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Features of tokens `[batch, seq, size]` at one position for each word `[batch, words]`."""
        return features.gather(1, positions.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def find_words(
    input_ids: torch.Tensor,
    first_continuation_id: int,
    attention_mask: torch.Tensor | None = None,
    text_starts: torch.Tensor | None = None,
) -> Words:
    """
    The words of a batch. In the graph of a compiler or an exporter there is room for as many words as tokens, otherwise
    for those of the longest row.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`): The tokens.
        first_continuation_id (`int`): Tokens from this one on belong to the word before them. The first token of a text
            begins a word in any case.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*):
            Non-zero where there is a token. Padding may lie within a word too.
        text_starts (`torch.Tensor` of shape `(batch, seq)`, *optional*): True where a text begins within a row.
    """
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    begins = (input_ids < first_continuation_id) | (is_token.long().cumsum(1) == 1)
    if text_starts is not None:
        begins = begins | text_starts
    starts = begins & is_token
    number = (starts.long().cumsum(1) - 1).clamp(min=0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(number)
    nowhere = torch.zeros_like(number)
    first = nowhere.scatter_reduce(1, number, positions * starts, "amax")
    last = nowhere.scatter_reduce(1, number, positions * is_token, "amax")
    count = starts.sum(1, keepdim=True)
    is_word = positions < count
    if not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export() and count.numel() > 0:
        most = max(int(count.max()), 1)
        is_word, first, last = is_word[:, :most], first[:, :most], last[:, :most]
    return Words(number, is_token, starts, is_word, first, last)


def _signed(number: int) -> int:
    """What an integer is in 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


# Of the factor in Knuth's MMIX generator, for the tokens of a word; those behind the last power share it, and count
# without their order.
KEY_POWERS = tuple(_signed(pow(6364136223846793005, exponent, 2**64)) for exponent in range(64))

NO_KEY = torch.iinfo(torch.long).max  # in places of a table that no word has


class WordTable(nn.Module):
    r"""
    Embeddings of known words, found by how they are spelled.

    A word is known by the number sum_k (t_k + 1) p^k mod 2^64 of its tokens t_k, so that the table needs no words but
    one integer for each, in ascending order. A word that is not there is looked for once more with every token
    replaced by its `folded` one, such as a capital by its small letter; if that fails too, it gets the embedding of
    unknown words, which is the first one.

    Args:
        vocab_size (`int`): Number of tokens.
        num_words (`int`): Number of words, the unknown one included.
        embedding_size (`int`): Width of the embeddings.
        word_dropout (`float`): Chance to read a known word as unknown while training, from which the embedding of
            unknown words learns.
    """

    def __init__(self, vocab_size: int, num_words: int, embedding_size: int, word_dropout: float = 0.0):
        super().__init__()
        self.word_dropout = word_dropout
        self.embed_words = nn.Embedding(num_words, embedding_size)
        # No word is known, no token has another one.
        self.register_buffer("keys", torch.full((num_words - 1,), NO_KEY))
        self.register_buffer("folded", torch.arange(vocab_size))

    def init_weights(self, config) -> None:
        """As it was made, for a table that comes from the meta device."""
        init.constant_(self.keys, NO_KEY)
        init.copy_(self.folded, torch.arange(len(self.folded), device=self.folded.device))

    def resize_vocabulary(self, vocab_size: int) -> None:
        """For another number of tokens, of which new ones have no other one."""
        tokens = torch.arange(vocab_size, device=self.folded.device)
        self.folded = torch.cat([self.folded[:vocab_size], tokens[len(self.folded) :]])

    @torch.no_grad()
    def know(self, keys: torch.Tensor) -> None:
        """
        Makes the words with these keys `[words]`, in ascending order, the known ones. Those that were known before keep
        their embeddings; new ones get those that no word has, at last those of words that are no longer known.
        """
        known, number = int((self.keys < NO_KEY).sum()), len(self.keys)
        rows = self.find(keys).tolist()
        taken = set(rows)
        left = iter([row for row in (*range(known + 1, number + 1), *range(1, known + 1)) if row not in taken])
        rows = [row or next(left) for row in rows]
        weight = self.embed_words.weight
        weight[1:] = weight[[*rows, *left]]
        self.keys.fill_(NO_KEY)
        self.keys[: len(keys)] = keys

    def word_keys(self, tokens: torch.Tensor, words: Words) -> torch.Tensor:
        """The numbers `[batch, words]` by which the words of rows of `tokens` `[batch, seq]` are known."""
        tokens_until = words.is_token.long().cumsum(1)
        before = tokens_until.gather(1, words.first).gather(1, words.number)
        place = (tokens_until - before).clamp(0, len(KEY_POWERS) - 1)
        parts = (tokens + 1) * torch.tensor(KEY_POWERS, device=tokens.device)[place] * words.is_token
        return torch.zeros_like(words.first).scatter_add(1, words.number, parts)

    def find(self, keys: torch.Tensor) -> torch.Tensor:
        """Which embeddings the words with these keys have; 0 for those that are not known."""
        if _is_exporting():  # ONNX has no search
            number = len(self.keys)
            place = torch.zeros_like(keys)  # how many keys are known not to be greater
            for step in (1 << bit for bit in reversed(range(number.bit_length()))):
                reached = place + step
                is_right = (reached <= number) & (self.keys[(reached - 1).clamp(max=number - 1)] <= keys)
                place = torch.where(is_right, reached, place)
        else:
            place = torch.searchsorted(self.keys, keys, right=True)
        return torch.where((place > 0) & (self.keys[(place - 1).clamp(min=0)] == keys), place, 0)

    def fold(self, tokens: torch.Tensor) -> torch.Tensor:
        """The folded tokens; tokens that were added to the vocabulary later have no other."""
        known = len(self.folded)
        return torch.where(tokens < known, self.folded[tokens.clamp(max=known - 1)], tokens)

    def word_ids(self, tokens: torch.Tensor, words: Words) -> torch.Tensor:
        """Which embedding each word of a row has `[batch, words]`; 0 for unknown ones."""
        found = self.find(self.word_keys(tokens, words))
        folded = self.find(self.word_keys(self.fold(tokens), words))
        return torch.where(found > 0, found, folded)

    def forward(self, tokens: torch.Tensor, words: Words) -> torch.Tensor:
        """Embeddings `[batch, words, embedding_size]` of the words of rows of `tokens` `[batch, seq]`."""
        ids = self.word_ids(tokens, words)
        if self.training and self.word_dropout > 0:
            ids = ids * (torch.rand(ids.shape, device=ids.device) >= self.word_dropout)
        return self.embed_words(ids)


class CharacterConvolution(nn.Module):
    r"""
    A word from its tokens by a convolution over them and the greatest value of each filter: tanh(max_t (W x_(t-k..t+k)
    + b)), with zeros beyond the word ([Kim et al., 2016](https://huggingface.co/papers/1508.06615), with one width of
    filters).

    Args:
        input_size (`int`): Width of the embeddings of tokens.
        output_size (`int`): Number of filters.
        width (`int`): Width of a filter in tokens, an odd number.
    """

    def __init__(self, input_size: int, output_size: int, width: int):
        super().__init__()
        self.width = width
        self.filters = nn.Linear(width * input_size, output_size)

    def forward(self, embeddings: torch.Tensor, words: Words) -> torch.Tensor:
        """
        Args:
            embeddings (`torch.Tensor` of shape `(batch, seq, input_size)`): Those of the tokens.
            words (`Words`): Where the words lie.

        Returns:
            `torch.Tensor` of shape `(batch, words, output_size)`.
        """
        # Here the tokens lie together at the left, whatever padding there was between them.
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        _, _, order = reading_order(words.is_token)
        tokens = embeddings.gather(1, order.unsqueeze(-1).expand_as(embeddings))
        number, valid = words.number.gather(1, order), words.is_token.gather(1, order)
        around = []
        for offset in range(-(self.width // 2), self.width // 2 + 1):
            place = (positions + offset).clamp(min=0).minimum(positions[-1:])
            is_near = valid[:, place] & (number[:, place] == number) & (place == positions + offset)
            around.append(tokens[:, place] * is_near.unsqueeze(-1))
        values = apply_linear(self.filters, torch.cat(around, dim=-1))
        values = values.masked_fill(~valid.unsqueeze(-1), torch.finfo(values.dtype).min)
        index = number.unsqueeze(-1).expand_as(values)
        greatest = values.new_zeros(*words.first.shape, values.shape[-1])
        return torch.tanh(greatest.scatter_reduce(1, index, values, "amax", include_self=False))


class CharacterRecurrence(nn.Module):
    r"""
    A word from its tokens by a recurrent layer that reads them in both directions: its two final hidden states
    ([Lample et al., 2016](https://huggingface.co/papers/1603.01360)).

    Args:
        input_size (`int`): Width of the embeddings of tokens.
        output_size (`int`): Width of both hidden states together.
        cell_type (`str`): A key of `RECURRENT_CELLS`.
    """

    def __init__(self, input_size: int, output_size: int, cell_type: str):
        super().__init__()
        self.cell_type = cell_type
        layer = {"hidden_size": output_size // 2, "hidden_dropout": 0.0, "recurrent_dropout": 0.0, "residual": False}
        self.layer = RecurrentLayer(SimpleNamespace(cell_type=cell_type, **layer), input_size, 0, bidirectional=True)
        self.layer.recorded = nn.Identity()  # not one of the hidden states of the model

    def forward(self, embeddings: torch.Tensor, words: Words) -> torch.Tensor:
        """As [`CharacterConvolution.forward`]."""
        if 0 in embeddings.shape[:2]:
            return embeddings.new_empty(*words.first.shape, self.layer.output_size)
        begins_behind = words.starts & (words.number > 0)
        if _is_exporting():  # ONNX knows no texts within a row
            state = self.layer.initial_state(embeddings)
            weights = [weight for cell in self.layer.cells for weight in (*cell.parameters(), *cell.buffers())]
            outputs = in_scan(embeddings, state, weights, [], words.is_token, self.cell_type, begins_behind)[0]
        else:
            padding = PackedPadding(begins_behind, words.is_token)
            outputs = self.layer(embeddings, None, padding, needs_state=False)[0]
        forwards, backwards = outputs.chunk(2, dim=-1)
        return torch.cat([words.gather(forwards, words.last), words.gather(backwards, words.first)], dim=-1)


class WordEncoder(nn.Module):
    r"""
    The vector of each word: what its tokens make, with the embedding of the word beside it where there is a table of
    words.

    Args:
        config (`RNNConfig`): A configuration with a `word_encoder`.
    """

    def __init__(self, config):
        super().__init__()
        if config.word_encoder == "cnn":
            self.characters = CharacterConvolution(
                config.embedding_size, config.word_encoder_size, config.word_encoder_width
            )
        else:
            self.characters = CharacterRecurrence(config.embedding_size, config.word_encoder_size, config.word_encoder)
        self.table = None
        if config.word_vocab_size > 0:
            self.table = WordTable(
                config.vocab_size, config.word_vocab_size, config.word_embedding_size, config.word_dropout
            )

    def forward(self, input_ids: torch.Tensor, embeddings: torch.Tensor, words: Words) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch, seq)`): The tokens.
            embeddings (`torch.Tensor` of shape `(batch, seq, embedding_size)`): Their embeddings.
            words (`Words`): Where the words lie.

        Returns:
            `torch.Tensor` of shape `(batch, words, size)`.
        """
        features = self.characters(embeddings, words)
        if self.table is None:
            return features
        return torch.cat([features, self.table(input_ids, words).to(features.dtype)], dim=-1)
