"""The evaluators of `evaluate`, with metrics from local scripts, as its own would come from the Hub."""

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import pipeline

from clients import SENTENCES, make_client_model, make_tokenizer


evaluate = pytest.importorskip("evaluate", reason="needs the extra `clients`")

METRIC = '''
import datasets
import evaluate


class SameShare(evaluate.Metric):
    """The share of predictions that are equal to their references."""

    def _info(self):
        features = datasets.Features({"predictions": FEATURE, "references": FEATURE})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"same": sum(p == r for p, r in zip(predictions, references)) / len(references)}
'''


def make_metric(folder, name: str, feature: str):
    """The metric above for values of a kind, loaded as `evaluate.load` loads a script."""
    script = folder / name / f"{name}.py"
    script.parent.mkdir()
    script.write_text(METRIC.replace("FEATURE", feature))
    return evaluate.load(str(script))


def test_text_classification(tmp_path):
    names = {0: "one", 1: "two", 2: "three"}
    numbers = {name: index for index, name in names.items()}
    tokenizer = make_tokenizer()
    model = make_client_model(
        "RNNForSequenceClassification", tokenizer, bidirectional=True, id2label=names, label2id=numbers
    )
    logits = model(**tokenizer(SENTENCES, return_tensors="pt", padding=True)).logits
    labels = logits.argmax(-1).tolist()
    labels[0] = (labels[0] + 1) % 3
    result = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=Dataset.from_dict({"text": SENTENCES, "label": labels}),
        metric=make_metric(tmp_path, "same_class", 'datasets.Value("int32")'),
        label_mapping=numbers,
        device=-1,
    )
    assert result["same"] == pytest.approx(5 / 6)


def test_token_classification(tmp_path):
    names = ["O", "B-PLACE", "B-NAME"]
    tokenizer = make_tokenizer()
    model = make_client_model(
        "RNNForTokenClassification",
        tokenizer,
        bidirectional=True,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    words = [sentence.split() for sentence in SENTENCES]
    tags = [model(**tokenizer(s, return_tensors="pt")).logits[0, 1:-1].argmax(-1).tolist() for s in SENTENCES]
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=names))})
    result = evaluate.evaluator("token-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=Dataset.from_dict({"tokens": words, "ner_tags": tags}, features=features),
        metric=make_metric(tmp_path, "same_tags", 'datasets.Sequence(datasets.Value("string"))'),
        device=-1,
    )
    assert result["same"] == 1


def test_translation(tmp_path):
    """`evaluate.evaluator("translation")` asks transformers for a task that it has dropped; the class takes ours."""
    tokenizer = make_tokenizer()
    model = make_client_model("RNNSeq2SeqForConditionalGeneration", tokenizer, eos_token_id=None)
    model.generation_config.max_new_tokens = 5
    pipe = pipeline("text-translation", model=model, tokenizer=tokenizer, device="cpu")
    references = [result["translation_text"] for result in pipe(SENTENCES)]
    references[-1] = "something else"
    result = evaluate.TranslationEvaluator(task="text-translation").compute(
        model_or_pipeline=model,  # with a pipeline, evaluate 0.4.6 asks transformers for a class of TensorFlow
        tokenizer=tokenizer,
        data=Dataset.from_dict({"text": SENTENCES, "label": references}),
        device=-1,
        metric=make_metric(tmp_path, "same_text", 'datasets.Value("string")'),
    )
    assert result["same"] == pytest.approx(5 / 6)


def test_question_answering(tmp_path):
    tokenizer = make_tokenizer()
    model = make_client_model("RNNForQuestionAnswering", tokenizer, bidirectional=True)
    pipe = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer, device="cpu")
    questions, contexts = ["who ?", "where is the cat ?"], [SENTENCES[4], SENTENCES[1]]
    answers = [
        {"text": [found["answer"]], "answer_start": [found["start"]]}
        for found in pipe(question=questions, context=contexts)
    ]
    data = Dataset.from_dict({"id": ["a", "b"], "question": questions, "context": contexts, "answers": answers})
    result = evaluate.QuestionAnsweringEvaluator(task="extractive-question-answering").compute(
        model_or_pipeline=model, tokenizer=tokenizer, data=data, metric=make_answer_metric(tmp_path), device=-1
    )
    assert result["same"] == 1


def make_answer_metric(folder):
    answer = '{"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}'
    answers = '{"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}'
    script = folder / "same_answer" / "same_answer.py"
    script.parent.mkdir()
    script.write_text(
        METRIC.replace('"predictions": FEATURE', f'"predictions": {answer}')
        .replace("FEATURE", f'{{"id": datasets.Value("string"), "answers": datasets.Sequence({answers})}}')
        .replace("p == r", 'p["prediction_text"] in r["answers"]["text"]')
    )
    return evaluate.load(str(script))
