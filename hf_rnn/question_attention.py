"""How a text is read with a question in mind: which tokens are which, what the first layer is told, the span heads.

Imports the layer, the padding and the products.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .linear_modules import apply_linear
from .recurrent_layer import RecurrentLayer
from .recurrent_padding import Padding


class QuestionLayout:
    """
    Which tokens of the rows are the question's, and where an answer may stand.

    Args:
        question (`torch.Tensor` of shape `(batch, seq)`): True at the tokens of the question, separator included.
        passage (`torch.Tensor` of shape `(batch, seq)`): True at the tokens of the text, separators left out.
        mask (`torch.Tensor` of shape `(batch, seq)`): True where there is a token at all.

    Attributes:
        places (`torch.Tensor` of shape `(batch, seq)`):
            True where a span may begin or end: at the tokens of the text, and at the first token of the row, which
            stands for "no answer".
        columns (`slice`): Where the questions of all rows lie; everywhere if that is not known.
    """

    def __init__(self, question: torch.Tensor, passage: torch.Tensor, mask: torch.Tensor):
        self.passage = passage
        self.places = passage | (mask & (mask.cumsum(1) == 1))
        self.columns = slice(None)
        # Looking at the values costs nothing on a CPU; elsewhere it would wait for the device.
        if question.device.type == "cpu" and not torch.compiler.is_compiling():
            found = question.any(0).nonzero().flatten().tolist()
            self.columns = slice(found[0], found[-1] + 1) if found else slice(0, 1)
        self.question = question[:, self.columns]  # [batch, question]

    @classmethod
    def of_rows(
        cls,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        separators: list[int],
        token_type_ids: torch.Tensor | None = None,
    ) -> "QuestionLayout":
        """
        The question is what has the type 0. In rows without another type, or where no types are given, it ends with
        the first separator, and a row without a separator is all text.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, seq)`): The tokens.
            mask (`torch.Tensor` of shape `(batch, seq)`): True where there is a token.
            separators (`list[int]`): The tokens that separate; may be empty where types are given.
            token_type_ids (`torch.Tensor` of shape `(batch, seq)`, *optional*): 0 at the question, 1 at the text.

        Raises:
            `ValueError`: Types of another shape, or neither types nor separators.
        """
        if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
            raise ValueError(
                f"`token_type_ids` must have the shape {tuple(input_ids.shape)}, got {tuple(token_type_ids.shape)}."
            )
        if token_type_ids is None and not separators:
            raise ValueError(
                "`token_type_ids` must be given where the configuration has neither `sep_token_id` nor `eos_token_id`: "
                "nothing else tells the question from the text."
            )
        is_separator = torch.zeros_like(mask)
        for separator in separators:
            is_separator = is_separator | (mask & (input_ids == separator))
        passed = is_separator.long().cumsum(1) - is_separator.long()  # separators before the position
        question = mask & (passed == 0) & is_separator.any(1, keepdim=True)
        if token_type_ids is not None:
            in_text = mask & (token_type_ids != 0)
            question = torch.where(in_text.any(1, keepdim=True), mask & ~in_text, question)
        return cls(question, mask & ~question & ~is_separator, mask)

    def exact_matches(self, input_ids: torch.Tensor) -> torch.Tensor:
        """True at the tokens of the text `[batch, seq]` that stand in the question, too."""
        same = input_ids.unsqueeze(2) == input_ids[:, self.columns].unsqueeze(1)  # [batch, seq, question]
        return (same & self.question.unsqueeze(1)).any(2) & self.passage


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension where `mask` is True, and zero elsewhere, also where it is True nowhere."""
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(scores.dtype) * mask


class QuestionFeatures(nn.Module):
    r"""
    What the first layer is told about the question, after DrQA
    ([Chen et al., 2017](https://aclanthology.org/P17-1171/), section 3.2), with e_i the embedding of a token of the
    text and q_j those of the question:

        a_ij = softmax_j(ReLU(W e_i + b) . ReLU(W q_j + b))
        f_i = [sum_j a_ij q_j; 1 where token i stands in the question, 0 elsewhere]

    DrQA puts f_i beside the embedding. Here a linear map of it is added to the embedding, so that the layers are those
    of any other model; tokens of the question stay as they are.

    Args:
        config ([`RNNConfig`]): The configuration.
    """

    def __init__(self, config):
        super().__init__()
        size = config.embedding_size
        self.alignment = nn.Linear(size, size)
        self.projection = nn.Linear(size + 1, size, bias=False)

    def forward(self, embeddings: torch.Tensor, input_ids: torch.Tensor, layout: QuestionLayout) -> torch.Tensor:
        """
        Args:
            embeddings (`torch.Tensor` of shape `(batch, seq, embedding_size)`): The embeddings of all tokens.
            input_ids (`torch.Tensor` of shape `(batch, seq)`): The tokens themselves.
            layout ([`QuestionLayout`]): Which of them are the question's.

        Returns:
            `torch.Tensor` of shape `(batch, seq, embedding_size)`: What is to be added to the embeddings.
        """
        compared = torch.relu(self.alignment(embeddings))
        scores = compared @ compared[:, layout.columns].transpose(1, 2)  # [batch, seq, question]
        weights = masked_softmax(scores, layout.question.unsqueeze(1))
        aligned = weights @ embeddings[:, layout.columns].to(weights.dtype)
        matches = layout.exact_matches(input_ids).to(aligned.dtype).unsqueeze(-1)
        features = self.projection(torch.cat([aligned, matches], dim=-1))
        return features * layout.passage.unsqueeze(-1)


class AlignedSpans(nn.Module):
    r"""
    The span head of DrQA ([Chen et al., 2017](https://aclanthology.org/P17-1171/)): the outputs u_j at the question
    become one vector, and every output h_i is compared with it, once for the start and once for the end:

        q = sum_j softmax_j(w . u_j) u_j,    start_i = h_i . (W_s q + b_s),    end_i = h_i . (W_e q + b_e)

    DrQA has no b: with it a row without a question still has scores.

    Args:
        config ([`RNNConfig`]): The configuration.
    """

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.output_size, 1, bias=False)
        self.start = nn.Linear(config.output_size, config.output_size)
        self.end = nn.Linear(config.output_size, config.output_size)

    def forward(self, hidden_states: torch.Tensor, layout: QuestionLayout) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, output_size)`): The outputs of the layers.
            layout ([`QuestionLayout`]): Which tokens are the question's.

        Returns:
            `torch.Tensor` of shape `(batch, seq, 2)`: The logits of start and end.
        """
        hidden_states = self.dropout(hidden_states)
        asked = hidden_states[:, layout.columns]
        weights = masked_softmax(self.score(asked).squeeze(-1), layout.question)
        question = weights.unsqueeze(1) @ asked.to(weights.dtype)  # [batch, 1, size]
        compared = torch.cat([self.start(question), self.end(question)], dim=1)
        return hidden_states.to(compared.dtype) @ compared.transpose(1, 2)


class FlowSpans(nn.Module):
    r"""
    Attention flow and the layers above it, from BiDAF ([Seo et al., 2017](https://arxiv.org/abs/1611.01603)), with
    outputs h_t at the places where an answer may stand and u_j at the question:

        S_tj = w . [h_t; u_j; h_t * u_j]
        c_t = sum_j softmax_j(S_tj) u_j                    context to query
        d = sum_t softmax_t(max_j S_tj) h_t                query to context, t over the text
        g_t = ReLU(W_g [h_t; c_t; h_t * c_t; h_t * d] + b)
        m_t = recurrent layer over g,    n_t = recurrent layer over m
        start_t = w_s . [g_t; m_t],    end_t = w_e . [g_t; n_t]

    In BiDAF g_t is the four parts themselves; the map to the width of h_t is that of
    [Clark and Gardner (2018)](https://aclanthology.org/P18-1078/), and halves the time of training. Both layers read
    the places alone, "no answer" first; c and d are zero where there is no question.

    Args:
        config ([`RNNConfig`]): The configuration; the two layers are as its others, of the same width.
    """

    def __init__(self, config):
        super().__init__()
        size, number = config.output_size, config.num_hidden_layers
        self.context_score = nn.Linear(size, 1, bias=False)
        self.question_score = nn.Linear(size, 1, bias=False)
        self.product_score = nn.Linear(size, 1, bias=False)
        self.fusion = nn.Linear(4 * size, size)
        self.modeling = RecurrentLayer(config, size, number, config.bidirectional)
        self.end_modeling = RecurrentLayer(config, size, number + 1, config.bidirectional)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.start = nn.Linear(2 * size, 1, bias=False)
        self.end = nn.Linear(2 * size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor, layout: QuestionLayout) -> torch.Tensor:
        """Arguments and result as in [`AlignedSpans`]."""
        attended = self.attend(hidden_states, layout)
        padding = Padding.from_attention_mask(layout.places, hidden_states)
        modeled, _, _ = self.modeling(attended, padding=padding, needs_state=False)
        end_modeled, _, _ = self.end_modeling(modeled, padding=padding, needs_state=False)
        start = self.start(self.dropout(torch.cat([attended, modeled], dim=-1)))
        end = self.end(self.dropout(torch.cat([attended, end_modeled], dim=-1)))
        return torch.cat([start, end], dim=-1)

    def attend(self, hidden_states: torch.Tensor, layout: QuestionLayout) -> torch.Tensor:
        """The vectors g `(batch, seq, output_size)`."""
        asked = hidden_states[:, layout.columns]  # [batch, question, size]
        scores = (hidden_states * self.product_score.weight) @ asked.transpose(1, 2)
        scores = scores + self.context_score(hidden_states) + self.question_score(asked).transpose(1, 2)
        is_question = layout.question.unsqueeze(1)
        to_question = masked_softmax(scores, is_question) @ asked.to(scores.dtype)
        lowest = torch.finfo(scores.dtype).min
        best = F.pad(scores.masked_fill(~is_question, lowest), (0, 1), value=lowest).amax(2)  # [batch, seq]
        to_context = masked_softmax(best, layout.passage).unsqueeze(1) @ hidden_states.to(scores.dtype)
        to_context = to_context * is_question.any(2, keepdim=True)
        parts = [hidden_states, to_question, hidden_states * to_question, hidden_states * to_context]
        fused = apply_linear(self.fusion, torch.cat([part.to(hidden_states.dtype) for part in parts], dim=-1))
        return torch.relu(fused)


# The span heads by the value of `question_attention`.
SPAN_HEADS = {"aligned": AlignedSpans, "flow": FlowSpans}
