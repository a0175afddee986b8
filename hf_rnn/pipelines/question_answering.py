"""Answers to questions as spans of a text, however long, with any model that has a head for question answering."""

import inspect
from collections.abc import Iterable

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.pipelines.base import ChunkPipeline


# What a token of a window is: a place where an answer may begin or end; nothing of interest, with the value by which
# pipelines pad a tensor of the name `p_mask`; the place whose score says that there is no answer.
CONTEXT, OTHER, NO_ANSWER = 0, 1, 2


class QuestionAnsweringPipeline(ChunkPipeline):
    r"""
    Finds the answer to a question in a text; its task is `"extractive-question-answering"`.

    A text that does not fit beside the question is read in windows that overlap. In each window the scores of first
    and last tokens become probabilities over the text's tokens and the place for "no answer" (the classification
    token, else the beginning of sequence token, else the first token that is not of the text); the score of a span is
    the product of the two. A span that several windows show counts once, with its best score.

    Example:

    ```python
    >>> import hf_rnn
    >>> from transformers import pipeline

    >>> reader = pipeline("extractive-question-answering", model="my-name/my-reader")
    >>> reader(question="Where does she live?", context="Her name is Sarah and she lives in London.")
    {'score': 0.98, 'start': 35, 'end': 41, 'answer': 'London'}
    ```"""

    default_input_names = "question,context"

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.tokenizer.is_fast:
            raise ValueError(
                "`tokenizer` must be a fast one (from the tokenizers library), which knows where in the text a token "
                f"stands, got {type(self.tokenizer).__name__}."
            )

    def __call__(self, inputs=None, *, question=None, context=None, **kwargs):
        r"""
        Args:
            inputs (`dict`, `list[dict]`, or a generator or dataset of `dict`, *optional*):
                Questions and texts, under the keys `question` and `context`.
            question (`str` or `list[str]`, *optional*): One or several questions, in place of `inputs`.
            context (`str` or `list[str]`, *optional*): A text for each question, or one for all.
            top_k (`int`, *optional*, defaults to 1): How many answers to return.
            max_seq_len (`int`, *optional*):
                Number of tokens of a window, question included. By default 384, or `model_max_length` of the tokenizer
                where that is less.
            doc_stride (`int`, *optional*):
                Number of the text's tokens that neighbouring windows share. By default 128, or half of those that
                have a place beside the question where that is less.
            max_question_len (`int`, *optional*, defaults to 64): Number of tokens after which a question is cut.
            max_answer_len (`int`, *optional*, defaults to 15): Number of tokens of the longest answer.
            handle_impossible_answer (`bool`, *optional*, defaults to `False`):
                Whether "no answer" (an empty `answer` from 0 to 0) is an answer, with the lowest score that any window
                gives it.
            align_to_words (`bool`, *optional*, defaults to `True`):
                Whether an answer consists of whole words, as far as the tokenizer tells. To be turned off for
                languages that put no spaces between words.
            batch_size, num_workers (`int`, *optional*): As in all pipelines; a batch is made of windows.

        Returns:
            `dict` with `score`, `answer`, and `start` and `end` such that `answer == context[start:end]`; with `top_k`
            above one the list of up to `top_k` of them, the best first; for several questions the list, for a
            generator or dataset the iterator of these.

        Raises:
            `ValueError`: A question or text that is missing, empty or no `str`, or sizes that leave no room.
        """
        if inputs is None:
            inputs = self._pair(question, context)
        elif question is not None or context is not None:
            raise ValueError("Give either `inputs` or `question` and `context`.")
        elif not isinstance(inputs, dict | str | list | Dataset) and isinstance(inputs, Iterable):
            inputs = (example for example in inputs)  # what else can be iterated, such as a `datasets.Dataset`
        return super().__call__(inputs, **kwargs)

    @staticmethod
    def _pair(question, context):
        if isinstance(question, str):
            return {"question": question, "context": context}
        if not isinstance(question, list | tuple) or not question:
            raise ValueError(f"`question` must be a `str` or a list of them, got {question!r}.")
        contexts = [context] * len(question) if isinstance(context, str) else context
        if not isinstance(contexts, list | tuple) or len(contexts) != len(question):
            raise ValueError(f"`context` must be a `str` or a list of {len(question)}, one for each `question`.")
        return [{"question": q, "context": c} for q, c in zip(question, contexts)]

    def _sanitize_parameters(
        self,
        max_seq_len=None,
        doc_stride=None,
        max_question_len=None,
        align_to_words=None,
        top_k=None,
        max_answer_len=None,
        handle_impossible_answer=None,
    ):
        for name, value in {
            "max_seq_len": max_seq_len,
            "max_question_len": max_question_len,
            "top_k": top_k,
            "max_answer_len": max_answer_len,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        preprocess = {
            "max_seq_len": max_seq_len,
            "doc_stride": doc_stride,
            "max_question_len": max_question_len,
            "align_to_words": align_to_words,
        }
        postprocess = {
            "top_k": top_k,
            "max_answer_len": max_answer_len,
            "handle_impossible_answer": handle_impossible_answer,
        }
        preprocess, postprocess = (
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (preprocess, postprocess)
        )
        return preprocess, {}, postprocess

    def preprocess(self, example, max_seq_len=None, doc_stride=None, max_question_len=64, align_to_words=True):
        question, context = (self._text_of(example, name) for name in ("question", "context"))
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, 384)
        question, question_length = self._cut(question, max_question_len)
        room = max_seq_len - question_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise ValueError(
                f"`max_seq_len` must leave room beside the {question_length} tokens of the question, got {max_seq_len}."
            )
        if doc_stride is None:
            doc_stride = min(128, room // 2)
        if not 0 <= doc_stride < room:
            raise ValueError(
                f"`doc_stride` must be from 0 to less than {room}, the number of the text's tokens that have a place "
                f"beside the question, got {doc_stride}."
            )
        # Tokenizers that pad at the left belong to models that read the text first, unless these look for a question.
        asks_first = getattr(self.model.config, "question_attention", None) is not None
        question_first = asks_first or self.tokenizer.padding_side == "right"
        windows = self.tokenizer(
            question if question_first else context,
            context if question_first else question,
            truncation="only_second" if question_first else "only_first",
            max_length=max_seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        read = inspect.signature(self.model.forward).parameters
        number = len(windows["input_ids"])
        for index in range(number):
            is_context = [part == int(question_first) for part in windows.sequence_ids(index)]
            p_mask = torch.tensor([CONTEXT if inside else OTHER for inside in is_context])
            p_mask[self._no_answer_position(windows["input_ids"][index], is_context)] = NO_ANSWER
            places = (p_mask == CONTEXT).nonzero()[:, 0].tolist()
            words = windows.word_ids(index) if align_to_words else [None] * len(is_context)
            yield {
                "p_mask": p_mask.unsqueeze(0),
                "spans": self._spans([windows["offset_mapping"][index][i] for i in places], [words[i] for i in places]),
                "context": context,
                "is_last": index == number - 1,
                **{
                    name: torch.tensor([values[index]])
                    for name, values in windows.items()
                    if name in read and name in self.tokenizer.model_input_names
                },
            }

    @staticmethod
    def _text_of(example, name: str) -> str:
        if not isinstance(example, dict):
            raise ValueError(
                f"Each input must be a `dict` with `question` and `context`, got {type(example).__name__}."
            )
        text = example.get(name)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{name}` must be a `str` that is not empty, got {text!r}.")
        return text

    def _cut(self, text: str, max_length: int) -> tuple[str, int]:
        """The text up to its token number `max_length`, and how many tokens it has."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= max_length:
            return text, len(offsets)
        return text[: offsets[max_length - 1][1]], max_length

    def _no_answer_position(self, input_ids: list[int], is_context: list[bool]) -> int:
        for token in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id):
            if token is not None and token in input_ids:
                return input_ids.index(token)
        return next((index for index, inside in enumerate(is_context) if not inside), 0)

    @staticmethod
    def _spans(offsets: list[tuple[int, int]], words: list[int | None]) -> list[tuple[int, int]]:
        """For each token where in the text it begins and ends; where its word is known, the word."""
        begins, ends = {}, {}
        for (begin, end), word in zip(offsets, words):
            if word is not None:
                begins.setdefault(word, begin)
                ends[word] = end
        return [(begins.get(word, begin), ends.get(word, end)) for (begin, end), word in zip(offsets, words)]

    def _forward(self, model_inputs):
        window = {name: model_inputs.pop(name) for name in ("p_mask", "spans", "context", "is_last")}
        outputs = self.model(**model_inputs)
        start_logits, end_logits = outputs["start_logits"], outputs["end_logits"]
        return {"start_logits": start_logits.float(), "end_logits": end_logits.float(), **window}

    def postprocess(self, windows, top_k=1, max_answer_len=15, handle_impossible_answer=False):
        context = windows[0]["context"]
        best, no_answer = {}, 1.0
        for window in windows:
            starts, ends, no_answer_score = self._probabilities(window)
            no_answer = min(no_answer, no_answer_score)
            for span, score in self._best_spans(context, window["spans"], starts, ends, top_k, max_answer_len):
                best[span] = max(score, best.get(span, 0.0))
        if handle_impossible_answer or not best:
            best[0, 0] = no_answer
        answers = [
            {"score": score, "start": start, "end": end, "answer": context[start:end]}
            for (start, end), score in sorted(best.items(), key=lambda item: -item[1])
        ]
        return answers[0] if top_k == 1 else answers[:top_k]

    @staticmethod
    def _probabilities(window) -> tuple[torch.Tensor, torch.Tensor, float]:
        """For each token of the text the probabilities that it is the first and the last; the score of no answer."""
        p_mask = window["p_mask"][0]
        starts, ends = (
            torch.softmax(window[name][0].masked_fill(p_mask == OTHER, -torch.inf), dim=-1)
            for name in ("start_logits", "end_logits")
        )
        no_answer = (starts * ends)[p_mask == NO_ANSWER].sum().item()
        return starts[p_mask == CONTEXT], ends[p_mask == CONTEXT], no_answer

    @staticmethod
    def _best_spans(context: str, spans, starts, ends, top_k: int, max_answer_len: int):
        """Up to `top_k` different spans of the text `(start, end)` with their scores, the best first."""
        found = {}
        if len(starts) == 0:
            return found.items()
        width = min(max_answer_len, len(starts))
        scores = starts[:, None] * F.pad(ends, (0, width - 1)).unfold(0, width, 1)  # [first token, length - 1]
        values, indices = scores.flatten().sort(descending=True, stable=True)
        for score, index in zip(values.tolist(), indices.tolist()):
            first, last = index // width, index // width + index % width
            if last >= len(spans):
                continue
            start, end = spans[first][0], spans[last][1]
            text = context[start:end]
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            if start < end:
                found.setdefault((start, end), score)
            if len(found) == top_k:
                break
        return found.items()
