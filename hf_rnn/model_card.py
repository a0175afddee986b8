"""
The model card: `README.md` beside the weights, written from what the configuration says and from what is given.

No modeling file imports this one, so that a checkpoint does not carry it. The metadata name `transformers` as the
library, not `hf_rnn`: the Hub knows the former, reads from `config.json` which Auto class loads the model, and with the
tag `custom_code` shows how to load it with `trust_remote_code=True`; of a library it does not know it shows nothing.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .recurrent_model import RecurrentPreTrainedModel


# A card with this line may be written anew.
GENERATED_CARD = (
    "<!-- Written by hf_rnn. Remove this line after a change by hand: a card without it is not written anew. -->"
)

# What the Hub calls the task of each Auto class. What a sequence-to-sequence model is for its class does not say.
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
}

PURPOSES = {
    "AutoModel": "gives a vector for each token of a text",
    "AutoModelForCausalLM": "predicts each token of a text from those before it",
    "AutoModelForMaskedLM": "predicts the tokens behind a mask",
    "AutoModelForSequenceClassification": "gives a text one of {num_labels} labels",
    "AutoModelForTokenClassification": "gives each token of a text one of {num_labels} labels",
    "AutoModelForQuestionAnswering": "marks the answer to a question in a text",
    "AutoModelForMultipleChoice": "picks the best of several texts",
    "AutoModelForSeq2SeqLM": "writes one text from another",
}
CLASSIFIER_PURPOSES = {
    "regression": "gives a text {num_labels} number(s)",
    "multi_label_classification": "gives a text any of {num_labels} labels",
}

CELL_NAMES = {"rnn_tanh": "plain RNN (tanh)", "rnn_relu": "plain RNN (ReLU)", "gru": "GRU", "lstm": "LSTM"}

GENERATION = """\
inputs = tokenizer({example}, return_tensors="pt")
output = model.generate(**inputs{length})
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
# How to use a model, after `tokenizer` and `model` are loaded, by Auto class; with an example for those who give none.
USES = {
    "AutoModel": (
        """\
inputs = tokenizer({example}, return_tensors="pt")
features = model(**inputs).last_hidden_state
print(features.shape)  # [batch, tokens, size]""",
        "A text to read.",
    ),
    "AutoModelForCausalLM": (GENERATION, "Once upon a time"),
    "AutoModelForSeq2SeqLM": (GENERATION, "A text to start from."),
    "AutoModelForMaskedLM": (
        """\
text = {example}.replace("[MASK]", tokenizer.mask_token)
inputs = tokenizer(text, return_tensors="pt")
logits = model(**inputs).logits
masked = inputs["input_ids"] == tokenizer.mask_token_id
print(tokenizer.decode(logits[masked].argmax(-1)))""",
        "A text with a [MASK] in it.",
    ),
    "AutoModelForSequenceClassification": (
        """\
inputs = tokenizer({example}, return_tensors="pt")
logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])""",
        "A text to judge.",
    ),
    "AutoModelForTokenClassification": (
        """\
inputs = tokenizer({example}, return_tensors="pt")
labels = model(**inputs).logits.argmax(-1)[0].tolist()
tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
print([(token, model.config.id2label[label]) for token, label in zip(tokens, labels)])""",
        "A text to tag.",
    ),
    "AutoModelForQuestionAnswering": (
        """\
question, text = {example}
inputs = tokenizer(question, text, return_tensors="pt")
outputs = model(**inputs)
start, end = outputs.start_logits.argmax(-1).item(), outputs.end_logits.argmax(-1).item()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))""",
        ("Where is the cat?", "The cat sits on the mat."),
    ),
    "AutoModelForMultipleChoice": (
        """\
prompt, *choices = {example}
inputs = tokenizer([prompt] * len(choices), choices, padding=True, return_tensors="pt")
logits = model(**{{key: value.unsqueeze(0) for key, value in inputs.items()}}).logits
print(choices[logits.argmax(-1).item()])""",
        ("The cat is hungry.", "It eats.", "It flies."),
    ),
}
CLASSIFIER_USES = {
    "regression": "print(logits[0].tolist())",
    "multi_label_classification": (
        "print([model.config.id2label[label] for label in (logits[0] > 0).nonzero().flatten().tolist()])"
    ),
}


def create_model_card(
    model: RecurrentPreTrainedModel,
    *,
    model_id: str | None = None,
    model_name: str | None = None,
    description: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    base_model: str | list[str] | None = None,
    metrics: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    pipeline_tag: str | None = None,
    results: EvalResult | list[EvalResult] | None = None,
    evaluation: Mapping[str, object] | None = None,
    example: str | Sequence[str] | None = None,
    training_command: str | None = None,
    hyperparameters: Mapping[str, object] | None = None,
    training_log: Sequence[Mapping[str, object]] | None = None,
    versions: Mapping[str, str] | None = None,
    limits: str | list[str] | None = None,
) -> ModelCard:
    r"""
    The card of a model: metadata for the Hub, what the model is, how to use it with and without this library, results,
    training and limits. What the configuration does not say and nobody gives, the card does not claim.

    Args:
        model ([`RecurrentPreTrainedModel`]): The model.
        model_id (`str`, *optional*):
            What the examples load: a repository of the Hub or a folder. By default where the model was loaded from, or
            else the current folder.
        model_name (`str`, *optional*): The title; by default the last part of `model_id`.
        description (`str`, *optional*): What the model is for, in Markdown.
        language (`str` or `list[str]`, *optional*): ISO codes, as `"de"`.
        license (`str`, *optional*): The Hub's name of the licence, as `"apache-2.0"`.
        datasets (`str` or `list[str]`, *optional*): Names of the data sets of the Hub that the model was trained on.
        base_model (`str` or `list[str]`, *optional*): The repository of the model that training started from.
        metrics (`str` or `list[str]`, *optional*): Names of metrics; those of `results` are added.
        tags (`str` or `list[str]`, *optional*): Further tags.
        pipeline_tag (`str`, *optional*):
            The Hub's name of the task, as `"translation"`; by default what the head's class says.
        results (`EvalResult` or `list[EvalResult]`, *optional*):
            Measured results, for the table and for `model-index` in the metadata.
        evaluation (`dict[str, float]`, *optional*):
            Results on the evaluation set by name, where there is no name of a data set to put into `model-index`.
        example (`str` or `list[str]`, *optional*):
            The text in the examples (with `[MASK]` in it for a masked language model); question and text for question
            answering; prompt and choices for multiple choice.
        training_command (`str`, *optional*): The command that trained the model.
        hyperparameters (`dict`, *optional*): Names and values.
        training_log (`list[dict]`, *optional*): Rows of a table with the course of training, all with the same keys.
        versions (`dict[str, str]`, *optional*): The packages with which it was trained.
        limits (`str` or `list[str]`, *optional*): What the model cannot do, beside what follows from its kind.

    Returns:
        `huggingface_hub.ModelCard`: `card.data` holds the metadata, `str(card)` is the text of `README.md`.

    Raises:
        `ValueError`: An argument of a wrong type or value; the message names it and says what is allowed.

    Example:

    ```python
    >>> from hf_rnn import RNNConfig, RNNForCausalLM, create_model_card

    >>> model = RNNForCausalLM(RNNConfig(vocab_size=1000, hidden_size=128))
    >>> card = create_model_card(model, model_id="my-name/my-model", language="en", license="apache-2.0")
    ```"""
    if not isinstance(model, RecurrentPreTrainedModel):
        raise ValueError(f"`model` must be a model of hf_rnn, got {type(model).__name__}.")
    for field, value in {
        "model_id": model_id,
        "model_name": model_name,
        "license": license,
        "pipeline_tag": pipeline_tag,
    }.items():
        check_line(field, value)
    for field, value in {"description": description, "training_command": training_command}.items():
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"`{field}` must be a text, got {value!r}.")
    for field, value in {"evaluation": evaluation, "hyperparameters": hyperparameters, "versions": versions}.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"`{field}` must be a dictionary of names and values, got {value!r}.")
    language = check_languages(language)
    base_model = check_base_models(base_model)
    results = check_results(results)
    check_training_log(training_log)
    metrics = [*as_list("metrics", metrics), *(result.metric_type for result in results)]

    model_id = model_id or model.name_or_path or "."
    model_name = model_name or Path(model_id).name or type(model).__name__
    pipeline_tag = pipeline_tag or PIPELINE_TAGS.get(model._auto_class)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        language=language or None,
        license=license,
        base_model=base_model or None,
        tags=[*(model.model_tags or []), *as_list("tags", tags)],
        datasets=as_list("datasets", datasets) or None,
        metrics=list(dict.fromkeys(metrics)) or None,
        model_name=model_name if results else None,
        eval_results=results or None,
    )
    sections = [
        GENERATED_CARD,
        f"# {model_name}",
        *([description.strip()] if description else []),
        describe(model),
        "## Use",
        "With the library `hf_rnn` installed:",
        snippet(model, model_id, example, has_library=True),
        "Without it, with the code that lies beside the weights (read it before you trust it):",
        snippet(model, model_id, example, has_library=False),
        *result_sections(results, evaluation),
        *training_sections(base_model, data.datasets, training_command, hyperparameters, training_log, versions),
        "## Limits",
        bullets([*as_list("limits", limits), *limits_of(model, bool(results or evaluation))]),
    ]
    body = "\n\n".join(sections)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def save_model_card(
    model: RecurrentPreTrainedModel, folder: str | os.PathLike, *, overwrite: bool = False, **details
) -> Path:
    r"""
    Writes the card of a model into a folder, as `README.md`, at once or not at all.

    Args:
        model ([`RecurrentPreTrainedModel`]): The model.
        folder (`str` or `os.PathLike`): Where its weights lie; made where it does not exist.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a `README.md` that this library did not write.
        details: As in [`create_model_card`]; `model_id` is the folder by default.

    Returns:
        `Path`: The file.

    Raises:
        `FileExistsError`: There is a `README.md` written by hand, and `overwrite` is not set.
        `ValueError`: As in [`create_model_card`].
    """
    path = Path(folder) / "README.md"
    card = create_model_card(model, **({"model_id": os.fspath(folder)} | details))
    if path.exists() and not overwrite and GENERATED_CARD not in path.read_text(encoding="utf-8"):
        raise FileExistsError(f"{path} was not written by hf_rnn: give `overwrite=True` to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, str(card))
    return path


def set_card_details(model: RecurrentPreTrainedModel, **details) -> None:
    r"""
    What every card of this model says from now on: those written by `push_to_hub`, by `save_pretrained` with
    `push_to_hub=True`, and by `create_model_card` and `push_to_hub` of `Trainer`.

    Args:
        model ([`RecurrentPreTrainedModel`]): The model, which carries them until it is deleted. They are not saved.
        details: As in [`create_model_card`].

    Raises:
        `ValueError`: As in [`create_model_card`].
        `TypeError`: An argument that [`create_model_card`] does not know.
    """
    create_model_card(model, **details)
    model.card_details = details


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole: nobody sees half of it, and if something fails the old one stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_line(field: str, value: object) -> None:
    """Raises `ValueError` where a value is given that is not one line of text."""
    if value is not None and not (isinstance(value, str) and value.strip() and value.isprintable()):
        raise ValueError(f"`{field}` must be a line of text, got {value!r}.")


def as_list(field: str, value: str | list[str] | None) -> list[str]:
    """The strings given for `field`: none, one or several."""
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        raise ValueError(f"`{field}` must be a string or a list of strings, got {value!r}.")
    for one in values:
        if one is None:
            raise ValueError(f"`{field}` must hold strings, got {value!r}.")
        check_line(field, one)
    return list(values)


def check_languages(language: str | list[str] | None) -> list[str]:
    """The languages, all of them codes that the Hub takes."""
    languages = as_list("language", language)
    for one in languages:
        if not re.fullmatch(r"[a-z]{2,3}(-[a-z0-9]+)*|code|multilingual", one):
            raise ValueError(f"`language` must be an ISO code such as 'de', or 'code' or 'multilingual', got {one!r}.")
    return languages


def check_base_models(base_model: str | list[str] | None) -> list[str]:
    """The base models, all of them names of repositories."""
    base_models = as_list("base_model", base_model)
    for one in base_models:
        if not is_repository(one):
            raise ValueError(f"`base_model` must name a repository of the Hub such as 'name/model', got {one!r}.")
    return base_models


def is_repository(name: str) -> bool:
    """Whether a string could be the name of a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_results(results: EvalResult | list[EvalResult] | None) -> list[EvalResult]:
    """The results, all of them measured."""
    listed = [] if results is None else [results] if isinstance(results, EvalResult) else results
    if not isinstance(listed, list | tuple) or not all(isinstance(result, EvalResult) for result in listed):
        raise ValueError(f"`results` must be an `EvalResult` or a list of them, got {results!r}.")
    for result in listed:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, Number | str) or not is_finite(value):
            raise ValueError(f"`metric_value` in `results` must be a finite number or a text, got {value!r}.")
        if type(value) not in (int, float, str):
            raise ValueError(
                f"`metric_value` in `results` must be a number of Python, got a {type(value).__name__}: use `float`."
            )
    return list(listed)


def is_finite(value: object) -> bool:
    """Whether a value is not a number that is infinite or none."""
    return not isinstance(value, Number) or math.isfinite(value)


def check_training_log(training_log: Sequence[Mapping[str, object]] | None) -> None:
    """Raises `ValueError` where the rows are not those of one table."""
    rows = [] if training_log is None else training_log
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"`training_log` must be a list of dictionaries, got {training_log!r}.")
    if any(list(row) != list(rows[0]) for row in rows):
        raise ValueError(f"`training_log` must have the same keys in all rows, got {[list(row) for row in rows]}.")


def describe(model: RecurrentPreTrainedModel) -> str:
    """What the configuration says of a model: one sentence and a list."""
    purpose = PURPOSES.get(model._auto_class)
    if model._auto_class == "AutoModelForSequenceClassification":
        purpose = CLASSIFIER_PURPOSES.get(problem_type(model.config), purpose)
    sentence = f"A recurrent network (`{type(model).__name__}`)"
    sentence += f" that {purpose.format(num_labels=model.config.num_labels)}." if purpose else "."
    return f"{sentence}\n\n{bullets(facts_of(model))}"


def problem_type(config) -> str | None:
    """What kind of labels a classifier of texts has, as far as the configuration says."""
    return config.problem_type or ("regression" if config.num_labels == 1 else None)


def facts_of(model: RecurrentPreTrainedModel) -> list[str]:
    """Cell, layers, sizes, attention, labels and number of parameters, as far as a model has them."""
    config = model.config
    fields = config.to_dict()
    facts = [f"{model.num_parameters():,} parameters"]
    cell = fields.get("cell_type")
    if cell is not None:
        facts.append(f"cell: {CELL_NAMES.get(cell, cell)} (`{cell}`)")
    if "encoder_layers" in fields:
        facts.append(f"encoder: {layers(config.encoder_layers, fields.get('encoder_bidirectional'))}")
    if "decoder_layers" in fields:
        kind = f" of the kind `{config.decoder_type}`" if "decoder_type" in fields else ""
        kind += " with input feeding" if fields.get("input_feeding") else ""
        facts.append(f"decoder{kind}: {layers(config.decoder_layers, False)}")
    if "encoder_layers" not in fields and "num_hidden_layers" in fields:
        facts.append(layers(config.num_hidden_layers, fields.get("bidirectional")))
    if fields.get("residual"):
        facts.append("residual connections between the layers")
    facts.append(f"hidden state of {config.hidden_size} numbers per layer and direction")
    if "attention_score" in fields:
        facts.append(f"attention: score `{config.attention_score}`, heads: {fields.get('num_attention_heads', 1)}")
    if "vocab_size" in fields and "embedding_size" in fields:
        tied = model.get_output_embeddings() is not None and config.tie_word_embeddings
        facts.append(
            f"{config.vocab_size:,} tokens with embeddings of {config.embedding_size} numbers"
            + (", tied to the output" if tied else "")
        )
    if fields.get("word_encoder"):
        facts.append(f"words: {config.word_encoder_size} numbers made of their tokens by `{config.word_encoder}`")
        if config.word_vocab_size:
            number, size = config.word_vocab_size, config.word_embedding_size
            facts[-1] += f", and embeddings of {size} numbers for {number:,} of them, the unknown one included"
    if getattr(model, "crf", None) is not None:
        facts.append("labels are a chain: a conditional random field")
    if model._auto_class == "AutoModelForQuestionAnswering" and fields.get("question_attention"):
        facts.append(f"attention between question and text: `{config.question_attention}`")
    if getattr(model, "pooling", None) is not None:
        facts.append(f"a text becomes one vector by `{config.pooling}`")
    labels = list(config.id2label.values())
    if "Classification" in type(model).__name__ and labels != [f"LABEL_{index}" for index in range(len(labels))]:
        shown = ", ".join(f"`{label}`" for label in labels[:20])
        facts.append(f"labels: {shown}{', ...' if len(labels) > 20 else ''}")
    if getattr(model, "intent_classifier", None) is not None:
        shown = ", ".join(f"`{name}`" for name in list(config.id2intent.values())[:20])
        facts.append(f"intents: {shown}{', ...' if config.num_intents > 20 else ''}")
    return facts


def layers(number: int, bidirectional: bool | None) -> str:
    """A number of layers in words."""
    return f"{number} layer{'s' if number > 1 else ''}{', read in both directions' if bidirectional else ''}"


def snippet(model: RecurrentPreTrainedModel, model_id: str, example: object, has_library: bool) -> str:
    """A program that loads the model, with this library or with the code beside the weights, and uses it."""
    auto_class = model._auto_class or "AutoModel"
    known = auto_class in USES
    use, default = USES[auto_class] if known else ("print(model)", "")
    if auto_class == "AutoModelForSequenceClassification" and problem_type(model.config) in CLASSIFIER_USES:
        use = "\n".join([*use.split("\n")[:-1], CLASSIFIER_USES[problem_type(model.config)]])
    example = default if example is None else check_example(example, default)
    names = ", ".join([auto_class] + (["AutoTokenizer"] if known else []))
    imports = f"from transformers import {names}\n"
    if has_library:
        imports = f"import hf_rnn  # makes the model known to transformers\n{imports}"
    source = json.dumps(model_id, ensure_ascii=False) + ("" if has_library else ", trust_remote_code=True")
    loading = f"model = {auto_class}.from_pretrained({source})"
    if known:
        loading = f"tokenizer = AutoTokenizer.from_pretrained({source})\n{loading}"
        literal = json.dumps(example, ensure_ascii=False)
        use = use.format(
            example=literal if isinstance(example, str) else literal[1:-1],
            length="" if has_length(model) else ", max_new_tokens=40",
        )
    return f"```python\n{imports}\n{loading}\n{use}\n```"


def has_length(model: RecurrentPreTrainedModel) -> bool:
    """Whether the settings of generation say how long a text may get; 20 is what transformers means by nothing."""
    settings = getattr(model, "generation_config", None)
    return settings is not None and (settings.max_new_tokens is not None or settings.max_length not in (None, 20))


def check_example(example: object, default: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The example, of the kind that the head takes."""
    if isinstance(default, str):
        if not isinstance(example, str) or not example:
            raise ValueError(f"`example` must be a text for this model, such as {default!r}, got {example!r}.")
        if "[MASK]" in default and "[MASK]" not in example:
            raise ValueError(f"`example` must have '[MASK]' in it for this model, got {example!r}.")
        return example
    least = len(default)
    if (
        not isinstance(example, list | tuple)
        or not all(isinstance(text, str) and text for text in example)
        or len(example) < least
        or (least == 2 and len(example) > 2)
    ):
        raise ValueError(f"`example` must hold texts as {default!r} does for this model, got {example!r}.")
    return tuple(example)


def result_sections(results: list[EvalResult], evaluation: Mapping[str, object] | None) -> list[str]:
    """The tables of results, where there are any."""
    sections = []
    if results:
        rows = [
            {
                "task": result.task_name or result.task_type,
                "data": " ".join(
                    str(part) for part in (result.dataset_name, result.dataset_config, result.dataset_split) if part
                ),
                "metric": result.metric_name or result.metric_type,
                "value": result.metric_value,
            }
            for result in results
        ]
        sections.append(table(rows))
    if evaluation:
        rows = [{"metric": name, "value": value} for name, value in evaluation.items()]
        sections += ["On the evaluation set:", table(rows)]
    return ["## Results", *sections] if sections else []


def training_sections(base_model, datasets, training_command, hyperparameters, training_log, versions) -> list[str]:
    """How the model was trained, as far as that is known."""
    sections = []
    if base_model:
        sections.append(
            "Started from " + ", ".join(f"[{name}](https://huggingface.co/{name})" for name in base_model) + "."
        )
    if datasets:
        sections.append("Data: " + ", ".join(f"`{name}`" for name in datasets) + ".")
    if training_command:
        sections.append(f"```bash\n{training_command.strip()}\n```")
    if hyperparameters:
        sections.append(bullets([f"{name}: {' '.join(str(value).split())}" for name, value in hyperparameters.items()]))
    if training_log:
        sections.append(table(training_log))
    if versions:
        sections.append("Trained with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return ["## Training", *sections] if sections else []


def limits_of(model: RecurrentPreTrainedModel, has_results: bool) -> list[str]:
    """What follows from the kind of a model, and no more."""
    config = model.config
    limits = []
    if model.can_generate():
        kept = "What it keeps of the tokens before is a state of fixed size, however many they are"
        if config.is_encoder_decoder:
            limits.append(f"{kept}; the source it sees through its attention.")
        else:
            limits.append(f"{kept}: details from far back get lost.")
        limits.append("What it writes follows the texts that it was trained on. It can be wrong.")
    elif getattr(config, "bidirectional", False):
        limits.append("It reads from both ends, so it needs the whole text before it gives anything out.")
    elif model._auto_class == "AutoModelForMaskedLM":
        limits.append("It reads in one direction only, so it does not see what stands behind a mask.")
    if model._auto_class == "AutoModelForQuestionAnswering":
        limits.append("It always marks some span, also where the text has no answer.")
    if not has_results:
        limits.append("No results are given here: how well it does is to be measured.")
    else:
        limits.append("How well it does on other data than those of the results is to be measured.")
    return limits


def bullets(items: list[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {item}" for item in items)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table in Markdown, of rows with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: object) -> str:
    """A value in a table: floats with six digits at most, and nothing that would end the cell."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
