"""
Where cards are written without being asked for: when a model goes to the Hub, and by `Trainer`.

`PreTrainedModel` asks the model before it uploads a folder. `Trainer` asks nobody: its card is the text of a
`TrainingSummary`, which it makes from itself, so the text of the summary of a recurrent model is what is replaced here.
"""

import functools
from importlib import metadata
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers.modelcard import TrainingSummary, infer_metric_tags_from_eval_results
from transformers.modeling_utils import unwrap_model

from .model_card import PIPELINE_TAGS, create_model_card, is_finite, is_repository, write_text
from .recurrent_model import RecurrentPreTrainedModel


# A sentence of the card that transformers writes for a repository without one.
STOCK_CARD = "🤗 transformers model that has been pushed on the Hub. This model card has been automatically generated."


def write_cards() -> None:
    """From now on recurrent models are pushed with their card, and `Trainer` writes it too."""
    RecurrentPreTrainedModel._write_card = write_hub_card
    if not hasattr(TrainingSummary.from_trainer, "__wrapped__"):
        TrainingSummary.from_trainer = classmethod(with_recurrent_card(TrainingSummary.from_trainer.__func__))


def write_hub_card(model: RecurrentPreTrainedModel, folder: str, repo_id: str) -> None:
    """Puts the model's card into a folder that is about to go to the Hub, unless the repository has one already."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    if STOCK_CARD not in card.text:
        return
    details = {"model_id": repo_id} | (model.card_details or {})
    write_text(path, str(create_model_card(model, **with_tags(details, card.data.tags))))


def with_recurrent_card(from_trainer):
    """The constructor of a summary, after which the card of a recurrent model is this library's."""

    @functools.wraps(from_trainer)
    def wrapped(cls, trainer, *args, **kwargs):
        summary = from_trainer(cls, trainer, *args, **kwargs)
        model = unwrap_model(trainer.model)
        if isinstance(model, RecurrentPreTrainedModel):
            given = {name for name, value in kwargs.items() if value is not None}
            summary.to_model_card = lambda: str(trainer_card(trainer, model, summary, given))
        return summary

    return wrapped


def trainer_card(trainer, model: RecurrentPreTrainedModel, summary: TrainingSummary, given: set[str]) -> ModelCard:
    """
    The card of a model with what `Trainer` knows of it. What was given to `create_model_card` of `Trainer` by name
    comes before what was said with `set_card_details`, and that before what `Trainer` found out.
    """
    model_id = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id or trainer.args.output_dir
    tasks = [summary.tasks] if isinstance(summary.tasks, str) else summary.tasks or []
    of_trainer = {
        "language": summary.language,
        "license": summary.license,
        "base_model": base_model(summary.finetuned_from, model_id),
        "datasets": [tag for tag in listed(summary.dataset_tags) if tag is not None],
        "pipeline_tag": tasks[0] if tasks else None,
    }
    names = {"base_model": "finetuned_from", "datasets": "dataset_tags", "pipeline_tag": "tasks"}
    said = model.card_details or {}
    details = {
        "model_id": model_id,
        "model_name": summary.model_name,
        "evaluation": evaluation(summary.eval_results),
        "hyperparameters": summary.hyperparameters,
        "training_log": same_keys(summary.eval_lines or []),
        "versions": versions("transformers", "torch", "datasets", "tokenizers"),
        **of_trainer,
        **said,
        **{name: value for name, value in of_trainer.items() if names.get(name, name) in given},
    }
    if details.get("results") is None:
        details["results"] = results(summary, details.get("pipeline_tag") or PIPELINE_TAGS.get(model._auto_class))
    return create_model_card(model, **with_tags(details, summary.tags))


def with_tags(details: dict, tags: str | list[str] | None) -> dict:
    """The details with further tags."""
    said = details.get("tags")
    return details | {"tags": [*listed(said), *listed(tags)]}


def listed(value) -> list:
    """None, one or several as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def base_model(finetuned_from: str | None, model_id: str) -> str | None:
    """The repository that training started from; not a folder that is gone, and not the model itself."""
    if not finetuned_from or finetuned_from == model_id or not is_repository(finetuned_from):
        return None
    return finetuned_from


def evaluation(eval_results: dict | None) -> dict:
    """The results of an evaluation, without how long it took."""
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "step")
    names = {name: name.removeprefix("eval_") for name in eval_results or {}}
    return {short: eval_results[name] for name, short in names.items() if short not in timing}


def results(summary: TrainingSummary, pipeline_tag: str | None) -> list[EvalResult]:
    """The metrics that the Hub knows, for each data set that has a name there."""
    measured = evaluation(summary.eval_results)
    metrics = {
        kind: name
        for kind, name in infer_metric_tags_from_eval_results(measured).items()
        if isinstance(measured[name], int | float) and is_finite(measured[name])
    }
    names, about = listed(summary.dataset), listed(summary.dataset_metadata)
    found = []
    for index, tag in enumerate(listed(summary.dataset_tags)):
        if tag is None or pipeline_tag is None:
            continue
        described = about[index] if index < len(about) else {}
        split = described.get("split")
        found += [
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=tag,
                dataset_name=names[index] if index < len(names) else tag,
                dataset_config=described.get("config"),
                dataset_split=None if split == "None" else split,
                metric_type=kind,
                metric_name=name,
                metric_value=float(measured[name]),
            )
            for kind, name in metrics.items()
        ]
    return found


def same_keys(rows: list[dict]) -> list[dict]:
    """Rows of one table; evaluations need not all measure the same."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in keys} for row in rows]


def versions(*names: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
