"""From text to text with any encoder-decoder: translation and summarization."""

import torch
from transformers import Pipeline
from transformers.utils import logging


logger = logging.get_logger(__name__)


class TextToTextPipeline(Pipeline):
    r"""
    Base class: texts are tokenized, `generate` writes the results, and these are decoded.

    Subclasses name the result in `return_name`.
    """

    return_name: str
    # What `generate` is told where neither the caller nor the model's generation configuration limits the length.
    default_max_new_tokens = 256

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __call__(self, inputs, **kwargs):
        r"""
        Args:
            inputs (`str`, `list[str]`, or a generator or dataset of `str`): The texts.
            prefix (`str`, *optional*):
                What is put before each text, such as the task for a T5 model. By default `prefix` of the model's
                configuration, if it has one.
            truncation (`bool`, *optional*, defaults to `True`):
                Whether a text of more than `max_source_length` tokens is cut there, with a warning, or read in full.
                Not every model can do the latter; a recurrent one can.
            max_source_length (`int`, *optional*): By default `model_max_length` of the tokenizer.
            clean_up_tokenization_spaces (`bool`, *optional*): As in `decode` of the tokenizer.
            return_tensors (`bool`, *optional*, defaults to `False`): Whether to return token ids in place of texts.
            batch_size, num_workers (`int`, *optional*): As in all pipelines.
            generate_kwargs:
                Everything else goes to `generate`: `num_beams`, `max_new_tokens`, `min_length`, `max_length` and so on.

        Returns:
            For a text a list of one `dict` for each returned sequence, with the key `{return_name}_text` (or
            `{return_name}_token_ids`); for a list of texts the list of these lists or, where `generate` returns one
            sequence for each text, simply of the dicts; for a generator or dataset an iterator of lists.

        Raises:
            `ValueError`: A text that is no `str`.
        """
        results = super().__call__(inputs, **kwargs)
        if isinstance(inputs, list) and all(len(result) == 1 for result in results):
            return [result[0] for result in results]
        return results

    def _sanitize_parameters(
        self,
        prefix=None,
        truncation=None,
        max_source_length=None,
        clean_up_tokenization_spaces=None,
        return_tensors=None,
        **generate_kwargs,
    ):
        preprocess = {"prefix": prefix, "truncation": truncation, "max_source_length": max_source_length}
        postprocess = {
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
            "return_tensors": return_tensors,
        }
        preprocess, postprocess = (
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (preprocess, postprocess)
        )
        return preprocess, generate_kwargs, postprocess

    def preprocess(self, text, prefix=None, truncation=True, max_source_length=None):
        if not isinstance(text, str):
            raise ValueError(f"Each text must be a `str`, got {type(text).__name__}.")
        if prefix is None:
            prefix = getattr(self.model.config, "prefix", None) or ""
        limit = self.tokenizer.model_max_length if max_source_length is None else max_source_length
        text = prefix + text
        inputs = self.tokenizer(text, verbose=False)
        length = len(inputs["input_ids"])
        if length > limit and truncation:
            logger.warning(
                f"A text of {length} tokens is cut to {limit}, `model_max_length` of the tokenizer or "
                "`max_source_length`. Split the text, raise the limit or give `truncation=False`."
            )
            inputs = self.tokenizer(text, truncation=True, max_length=limit)
        inputs.pop("token_type_ids", None)
        return {name: torch.tensor([values], dtype=torch.long) for name, values in inputs.items()}

    def _forward(self, model_inputs, **generate_kwargs):
        if not self._limits_length(generate_kwargs):
            generate_kwargs["max_new_tokens"] = self.default_max_new_tokens
        output_ids = self.model.generate(**model_inputs, **generate_kwargs)
        if not isinstance(output_ids, torch.Tensor):  # `return_dict_in_generate`
            output_ids = output_ids.sequences
        batch = model_inputs["input_ids"].shape[0]
        return {"output_ids": output_ids.unflatten(0, (batch, -1))}  # [batch, returned sequences, length]

    def _limits_length(self, generate_kwargs) -> bool:
        if generate_kwargs.get("generation_config") is not None:
            return True
        given = self.model.generation_config.to_diff_dict() | generate_kwargs
        return any(given.get(name) is not None for name in ("max_length", "max_new_tokens"))

    def postprocess(self, model_outputs, clean_up_tokenization_spaces=None, return_tensors=False):
        sequences = model_outputs["output_ids"][0]
        if return_tensors:
            return [{f"{self.return_name}_token_ids": sequence} for sequence in sequences]
        texts = self.tokenizer.batch_decode(
            sequences, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up_tokenization_spaces
        )
        return [{f"{self.return_name}_text": text} for text in texts]


class TranslationPipeline(TextToTextPipeline):
    r"""
    Translates texts with any encoder-decoder; its task is `"text-translation"`. Arguments and results:
    [`TextToTextPipeline.__call__`].

    Where a model knows several languages, its tokenizer's `src_lang` and the `forced_bos_token_id` of `generate` say
    which; or the `prefix`.

    Example:

    ```python
    >>> import hf_rnn
    >>> from transformers import pipeline

    >>> translator = pipeline("text-translation", model="outputs/translator")
    >>> translator("un homme dort .", num_beams=5)
    [{'translation_text': 'a man is sleeping .'}]
    ```"""

    return_name = "translation"


class SummarizationPipeline(TextToTextPipeline):
    r"""
    Summarizes texts with any encoder-decoder; its task is `"text-summarization"`. Arguments and results:
    [`TextToTextPipeline.__call__`].

    Example:

    ```python
    >>> import hf_rnn
    >>> from transformers import pipeline

    >>> summarizer = pipeline("text-summarization", model="my-name/my-summarizer")
    >>> summarizer(["A long text.", "Another one."], batch_size=2, min_length=5, max_length=40)
    [{'summary_text': 'One.'}, {'summary_text': 'Two.'}]
    ```"""

    return_name = "summary"
