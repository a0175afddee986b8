"""Pipelines of transformers, and the three of this library, on saved checkpoints."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    pipeline,
)

from clients import CHAT_TEMPLATE, SENTENCES, make_client_model, make_tokenizer, save_checkpoint
from hf_rnn.pipelines.question_answering import QuestionAnsweringPipeline


def assert_equal(first, second):
    """Equal nested results, numbers up to rounding."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_equal(one, other)
    elif isinstance(first, float | np.floating):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    else:
        assert first == second


def in_both_ways(task: str, folder: str, inputs: list, **options):
    """The results of a pipeline one by one, after a look whether batches and a stream of batches give the same."""
    pipe = pipeline(task, model=folder, device="cpu")
    results = pipe(inputs, **options)
    assert_equal(results, pipe(inputs, batch_size=4, **options))
    return results


def test_text_generation(tmp_path):
    tokenizer = make_tokenizer(special_tokens=False)
    folder = save_checkpoint(tmp_path, "RNNForCausalLM", tokenizer, eos_token_id=None)
    options = {"max_new_tokens": 6, "do_sample": False}
    results = in_both_ways("text-generation", folder, SENTENCES, return_full_text=False, **options)
    model = make_client_model("RNNForCausalLM", tokenizer, eos_token_id=None)
    for sentence, [result] in zip(SENTENCES, results):
        prompt = tokenizer(sentence, return_tensors="pt")
        assert "token_type_ids" in prompt
        new = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
        assert result["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert len({result["generated_text"] for [result] in results}) > 1


def test_chat_template(tmp_path):
    tokenizer = make_tokenizer(special_tokens=False, chat_template=CHAT_TEMPLATE)
    folder = save_checkpoint(tmp_path, "RNNForCausalLM", tokenizer, eos_token_id=None)
    chats = [[{"role": "user", "content": sentence}] for sentence in SENTENCES]
    results = in_both_ways("text-generation", folder, chats, max_new_tokens=4, do_sample=False)
    for chat, [result] in zip(chats, results):
        *asked, answer = result["generated_text"]
        assert asked == chat
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        written = pipeline("text-generation", model=folder, device="cpu")(
            prompt, max_new_tokens=4, do_sample=False, return_full_text=False
        )
        assert answer == {"role": "assistant", "content": written[0]["generated_text"]}


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "concat", "attention"])
def test_text_classification(tmp_path, pooling):
    names = {index: f"class {index}" for index in range(3)}
    folder = save_checkpoint(
        tmp_path, "RNNForSequenceClassification", bidirectional=True, pooling=pooling, id2label=names
    )
    results = in_both_ways("text-classification", folder, SENTENCES, top_k=None)
    assert {result[0]["label"] for result in results} <= set(names.values())
    assert len({result[0]["score"] for result in results}) == len(SENTENCES)


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(tmp_path, strategy):
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    folder = save_checkpoint(tmp_path, "RNNForTokenClassification", bidirectional=True, id2label=names)
    results = in_both_ways("token-classification", folder, SENTENCES, aggregation_strategy=strategy)
    assert any(results)
    for sentence, entities in zip(SENTENCES, results):
        for entity in entities:
            assert sentence[entity["start"] : entity["end"]] == entity["word"]


def test_fill_mask(tmp_path):
    folder = save_checkpoint(tmp_path, "RNNForMaskedLM", bidirectional=True)
    masked = [sentence + " [MASK]" for sentence in SENTENCES]
    results = in_both_ways("fill-mask", folder, masked, top_k=3)
    assert all(len(result) == 3 for result in results)


def test_feature_extraction(tmp_path):
    folder = save_checkpoint(tmp_path, "RNNModel", bidirectional=True)
    pipe = pipeline("feature-extraction", model=folder, device="cpu")
    alone = pipe(SENTENCES, return_tensors=True)
    batched = pipe(SENTENCES, return_tensors=True, batch_size=4)
    for one, other in zip(alone, batched):  # the pipeline leaves the padding in
        torch.testing.assert_close(one, other[:, : one.shape[1]])


def test_zero_shot_classification(tmp_path):
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    numbers = {name: index for index, name in names.items()}
    options = {"bidirectional": True, "id2label": names, "label2id": numbers}
    folder = save_checkpoint(tmp_path, "RNNForSequenceClassification", **options)
    labels = ["cat", "dog", "house"]
    results = in_both_ways("zero-shot-classification", folder, SENTENCES, candidate_labels=labels)
    for result in results:
        assert sorted(result["labels"]) == labels
        assert sum(result["scores"]) == pytest.approx(1)


@pytest.mark.parametrize(("task", "key"), [("text-translation", "translation"), ("text-summarization", "summary")])
def test_text_to_text(tmp_path, task, key):
    tokenizer = make_tokenizer()
    folder = save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration", eos_token_id=None)
    options = {"num_beams": 3, "max_new_tokens": 7}
    results = in_both_ways(task, folder, SENTENCES, **options)
    model = make_client_model("RNNSeq2SeqForConditionalGeneration", tokenizer, eos_token_id=None)
    for sentence, result in zip(SENTENCES, results):
        ids = model.generate(**tokenizer(sentence, return_tensors="pt"), **options)
        assert result == {f"{key}_text": tokenizer.decode(ids[0], skip_special_tokens=True)}
    assert len({str(result) for result in results}) > 2

    pipe = pipeline(task, model=folder, device="cpu", **options)
    assert pipe(SENTENCES[0]) == [results[0]]
    assert list(pipe(sentence for sentence in SENTENCES)) == [[result] for result in results]
    several = pipe(SENTENCES, num_return_sequences=2, batch_size=3)
    assert [len(result) for result in several] == [2] * len(SENTENCES)
    assert [result[0] for result in several] == results
    tokens = pipe(SENTENCES[0], return_tensors=True, min_length=7, max_length=8, max_new_tokens=None)
    assert tokens[0][f"{key}_token_ids"].shape == (8,)


def test_text_to_text_length_without_limits(tmp_path):
    folder = save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration", eos_token_id=None)
    pipe = pipeline("text-translation", model=folder, device="cpu")
    assert pipe("no", return_tensors=True)[0]["translation_token_ids"].shape == (257,)
    pipe.model.generation_config.max_length = 9
    assert pipe("no", return_tensors=True)[0]["translation_token_ids"].shape == (9,)


def test_text_to_text_long_source(tmp_path, caplog):
    tokenizer = make_tokenizer(model_max_length=6)
    folder = save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration", tokenizer)
    pipe = pipeline("text-translation", model=folder, device="cpu", max_new_tokens=5)
    text = SENTENCES[4]
    start = " ".join(text.split()[:4])  # beside two special tokens
    read, _ = watch_lengths(pipe.model.model.encoder)
    assert pipe(text) == pipe(start)
    assert pipe(start) == pipe(text, max_source_length=6)
    pipe(text, truncation=False)
    pipe("no", prefix="the cat sat on : ", truncation=False)
    assert read == [6, 6, 6, 6, len(text.split()) + 2, 8]
    with pytest.raises(ValueError, match="must be a `str`, got int"):
        pipe([3])


def watch_lengths(module):
    """The list of lengths of the inputs of all calls of a module to come, and how to stop this."""
    lengths = []

    def hook(_, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    return lengths, module.register_forward_pre_hook(hook, with_kwargs=True)


def test_text_to_text_with_other_models():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=2,
        init_std=1.0,
    )
    model = BartForConditionalGeneration(config).eval()
    pipe = pipeline("text-summarization", model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=5)
    results = pipe(SENTENCES)
    assert len({result["summary_text"] for result in results}) > 1
    assert pipe(SENTENCES, batch_size=3) == results


class Reader(torch.nn.Module):
    """What a perfect reader of `answer` (a list of token ids) would say, wherever it stands."""

    def __init__(self, model, answer: list[int], no_answer: int):
        super().__init__()
        self.model, self.answer, self.no_answer = model, answer, no_answer

    def forward(self, input_ids, attention_mask):
        scores = torch.zeros(2, *input_ids.shape)
        scores[:, input_ids == self.no_answer] = 4.0
        width = len(self.answer)
        for row, ids in enumerate(input_ids.tolist()):
            for start in range(len(ids)):
                if ids[start : start + width] == self.answer:
                    scores[0, row, start] = scores[1, row, start + width - 1] = 9.0
        return {"start_logits": scores[0], "end_logits": scores[1]}


def reading_pipeline(answer: str | None = None, **options):
    """The pipeline over a random model, or over one that finds `answer`."""
    tokenizer = make_tokenizer(**options)
    model = make_client_model("RNNForQuestionAnswering", tokenizer, bidirectional=True)
    pipe = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer, device="cpu")
    if answer is not None:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        pipe.model.forward = Reader(None, ids, tokenizer.cls_token_id).forward
    return pipe


QUESTION = "where is the fish ?"
LONG = "  the cat\n sat on the mat " * 30 + "and \t Anna   lives in London ." + " a dog ate the fish" * 25


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("max_seq_len", [16, 40, 384])
def test_question_answering_finds_the_place(max_seq_len, batch_size, padding_side):
    pipe = reading_pipeline("lives in London", padding_side=padding_side)
    lengths, _ = watch_lengths_of_forward(pipe)
    result = pipe(question=QUESTION, context=LONG, max_seq_len=max_seq_len, batch_size=batch_size)
    assert result["answer"] == LONG[result["start"] : result["end"]] == "lives in London"
    assert 0.5 < result["score"] <= 1
    assert max(lengths) <= max_seq_len
    assert (len(lengths) > 1) == (max_seq_len < 384)


def watch_lengths_of_forward(pipe):
    lengths, forward = [], pipe.model.forward

    def watching(input_ids, attention_mask):
        lengths.append(input_ids.shape[1])
        return forward(input_ids, attention_mask)

    pipe.model.forward = watching
    return lengths, forward


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_question_answering_is_blind_to_batches(padding_side):
    pipe = reading_pipeline(padding_side=padding_side)
    inputs = [{"question": QUESTION, "context": context} for context in [LONG, *SENTENCES, LONG[:100]]]
    options = {"max_seq_len": 20, "doc_stride": 3, "top_k": 4}
    results = [pipe(item, **options) for item in inputs]
    assert all(len(result) == 4 for result in results[:-2])
    for batch_size in (1, 2, 5):
        assert_equal(pipe(inputs, batch_size=batch_size, **options), results)
        assert_equal(list(pipe((item for item in inputs), batch_size=batch_size, **options)), results)
        assert_equal(list(pipe(Dataset.from_list(inputs), batch_size=batch_size, **options)), results)
    contexts = [item["context"] for item in inputs]
    assert_equal(pipe(question=[QUESTION] * len(inputs), context=contexts, **options), results)
    assert_equal(pipe(question=[QUESTION], context=LONG, **options), results[:1])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_question_answering_is_a_product_of_probabilities(padding_side):
    """Against an exhaustive search in one window."""
    pipe = reading_pipeline(padding_side=padding_side)
    context = SENTENCES[4]
    result = pipe(question=QUESTION, context=context, top_k=200, max_answer_len=3)
    pair = (QUESTION, context) if padding_side == "right" else (context, QUESTION)
    encoded = pipe.tokenizer(*pair, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    places = [i for i, part in enumerate(encoded.sequence_ids(0)) if part == int(padding_side == "right")]
    allowed = [encoded["input_ids"].index(pipe.tokenizer.cls_token_id), *places]
    outputs = pipe.model(**pipe.tokenizer(*pair, return_tensors="pt"))
    starts, ends = outputs.start_logits[0, allowed].softmax(-1)[1:], outputs.end_logits[0, allowed].softmax(-1)[1:]
    expected = {
        (offsets[places[i]][0], offsets[places[j]][1]): (starts[i] * ends[j]).item()
        for i in range(len(places))
        for j in range(i, min(i + 3, len(places)))
    }
    assert {(answer["start"], answer["end"]) for answer in result} == set(expected)
    for answer in result:
        assert answer["score"] == pytest.approx(expected[answer["start"], answer["end"]], rel=1e-4)
    assert [answer["score"] for answer in result] == sorted((answer["score"] for answer in result), reverse=True)


def test_question_answering_counts_a_span_of_two_windows_once():
    pipe = reading_pipeline("lives in London")
    results = pipe(question=QUESTION, context=LONG, max_seq_len=30, doc_stride=20, top_k=3)
    assert len({(result["start"], result["end"]) for result in results}) == 3
    assert [result["answer"] for result in results].count("lives in London") == 1


def test_question_answering_without_an_answer():
    pipe = reading_pipeline("Anna lives")
    context = SENTENCES[0]
    found = pipe(question=QUESTION, context=context, handle_impossible_answer=True)
    assert found["answer"] == ""
    assert found["start"] == found["end"] == 0
    assert found["score"] > 0.5
    assert pipe(question=QUESTION, context=context)["answer"] != ""
    # One window with an answer is enough.
    found = pipe(question=QUESTION, context=LONG, max_seq_len=20, handle_impossible_answer=True)
    assert found["answer"] == "Anna   lives"


def test_question_answering_aligns_to_words():
    """The mark at the end of a word is a token of its own, but for the tokenizer the word's."""
    from tokenizers import Regex, pre_tokenizers

    pipe = reading_pipeline("London")
    pipe.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[a-zA-Z]+|[.]"), "isolated")]
    )
    context = "Anna lives in London. no"
    found = pipe(question=QUESTION, context=context, align_to_words=False)
    assert found["answer"] == "London"
    assert context[found["start"] : found["end"]] == "London"


def test_question_answering_cuts_the_question():
    pipe = reading_pipeline("lives in London")
    lengths, _ = watch_lengths_of_forward(pipe)
    found = pipe(question="the cat " * 100, context=LONG, max_question_len=8, max_seq_len=40)
    assert found["answer"] == "lives in London"
    assert max(lengths) == 40


def test_question_answering_refuses():
    pipe = reading_pipeline()
    for wrong, message in [
        ({"question": "", "context": "the cat"}, "`question` must be a `str` that is not empty, got ''"),
        ({"question": "who ?", "context": None}, "`context` must be a `str` that is not empty, got None"),
        ("the cat", "Each input must be a `dict` .* got str"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(wrong)
    with pytest.raises(ValueError, match="`context` must be a `str` or a list of 2"):
        pipe(question=["who ?", "where ?"], context=["the cat"])
    with pytest.raises(ValueError, match="`question` must be a `str` or a list"):
        pipe()
    with pytest.raises(ValueError, match="either `inputs` or"):
        pipe({"question": "who ?", "context": "the cat"}, question="who ?")
    with pytest.raises(ValueError, match="`max_seq_len` must leave room beside the 5 tokens"):
        pipe(question=QUESTION, context=LONG, max_seq_len=8)
    with pytest.raises(ValueError, match="`doc_stride` must be from 0 to less than 12"):
        pipe(question=QUESTION, context=LONG, max_seq_len=20, doc_stride=12)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        pipe(question=QUESTION, context=LONG, top_k=0)
    assert pipe(question=QUESTION, context=LONG, max_seq_len=9)["answer"]


def test_question_answering_with_other_models():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
    )
    pipe = pipeline("extractive-question-answering", model=BertForQuestionAnswering(config).eval(), tokenizer=tokenizer)
    read = []
    pipe.model.bert.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs), with_kwargs=True)
    options = {"question": [QUESTION] * 2, "context": [LONG, SENTENCES[4]], "max_seq_len": 20, "top_k": 3}
    results = pipe(**options)
    assert read[0]["token_type_ids"].unique().tolist() == [0, 1]
    assert_equal(pipe(batch_size=4, **options), results)


def test_names_of_the_tasks():
    """The old names would be refused by transformers; these are not."""
    tokenizer = make_tokenizer()
    model = make_client_model("RNNForQuestionAnswering", tokenizer)
    with pytest.raises(KeyError, match="question-answering"):
        pipeline("question-answering", model=model, tokenizer=tokenizer)
    pipe = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer)
    assert isinstance(pipe, QuestionAnsweringPipeline)


WITHOUT_THE_LIBRARY = """
import json, sys
sys.modules["hf_rnn"] = None
from transformers import pipeline
pipe = pipeline(sys.argv[1], model=sys.argv[2], trust_remote_code=True, device="cpu")
print(json.dumps(pipe(json.loads(sys.argv[3]))))
"""


@pytest.mark.parametrize(
    ("task", "name", "inputs"),
    [
        ("text-translation", "RNNSeq2SeqForConditionalGeneration", [SENTENCES[0], SENTENCES[1]]),
        ("extractive-question-answering", "RNNForQuestionAnswering", {"question": QUESTION, "context": LONG}),
    ],
)
def test_a_saved_pipeline_brings_its_code(tmp_path, task, name, inputs):
    tokenizer = make_tokenizer()
    pipe = pipeline(task, model=make_client_model(name, tokenizer), tokenizer=tokenizer, device="cpu")
    pipe.save_pretrained(tmp_path)
    expected = pipe(inputs)
    assert_equal(pipeline(task, model=str(tmp_path), trust_remote_code=True, device="cpu")(inputs), expected)
    command = [sys.executable, "-c", WITHOUT_THE_LIBRARY, task, str(tmp_path), json.dumps(inputs)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert_equal(json.loads(finished.stdout), expected)
