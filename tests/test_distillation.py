"""Learning from teachers: what they expect, what is trained on it, and the script from beginning to end."""

import json

import numpy as np
import pytest
import torch


pytest.importorskip("datasets")
pytest.importorskip("rapidfuzz")

from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, T5Config, T5ForConditionalGeneration

import pair_training
from distillation import (
    DistillationArguments,
    DistillationTrainer,
    SoftTargetCollator,
    Teachers,
    read_sources,
    soft_cross_entropy,
    with_soft_targets,
)
from hf_rnn import RNNSeq2SeqConfig
from subword_tokenizer import train_symbol_tokenizer
from test_examples import TINY_TRANSLATOR, TORCHRUN, run
from training_helpers import UsageError


SMOOTHING = 0.1  # the default of the scripts
PAIRS = [("abc", "x y z"), ("ca", "z x"), ("bb", "y y"), ("cabba", "z x y y x"), ("a", "x")]


@pytest.fixture(scope="module")
def tokenizer():
    sources, targets = zip(*PAIRS, strict=True)
    return train_symbol_tokenizer(sources, targets, "characters", "words")


@pytest.fixture(scope="module")
def names(tokenizer, tmp_path_factory):
    """Folders of two teachers, of different shapes."""
    folders = []
    for seed, shape in enumerate(({"hidden_size": 8}, {"hidden_size": 12, "encoder_layers": 2, "cell_type": "gru"})):
        torch.manual_seed(seed)
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        special |= {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.bos_token_id}
        model = AutoModelForSeq2SeqLM.from_config(RNNSeq2SeqConfig(vocab_size=len(tokenizer), **shape, **special))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        encoded = pair_training.encode_pairs(PAIRS, tokenizer).select_columns(["input_ids", "labels"]).to_list()
        batch = pair_training.PairCollator(tokenizer, model=model)(encoded)
        for _ in range(40):  # so that some of what they write has an end
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folders.append(tmp_path_factory.mktemp("teacher"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


def training_args(output_dir=".", **options):
    options = {"output_dir": str(output_dir), "bf16": False, "use_cpu": True, "report_to": "none"} | options
    return pair_training.PairTrainingArguments(**options)


def teachers_of(names, tokenizer, **options):
    return Teachers(DistillationArguments(teachers=names, **options), tokenizer, training_args())


def mean_probabilities(names, source_ids, labels):
    """After each label, one row at a time `[target, vocabulary]`."""
    total = 0
    for name in names:
        model = AutoModelForSeq2SeqLM.from_pretrained(name).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source_ids]), labels=torch.tensor([labels])).logits[0]
        total = total + logits.double().softmax(-1)
    return (total / len(names)).numpy()


def spread(ids, probabilities, vocabulary):
    """Candidates `[target, candidates]` as probabilities of all tokens `[target, vocabulary]`."""
    dense = np.zeros((len(ids), vocabulary))
    for row, candidates in enumerate(ids):
        np.add.at(dense[row], candidates, probabilities[row])
    return dense


def soft_rows(dataset):
    for row in dataset:
        shape = (len(row["labels"]), -1)
        yield row, np.reshape(row["target_ids"], shape), np.reshape(row["target_probabilities"], shape)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_pairs_get_the_mean_of_probabilities(weight, names, tokenizer):
    """Padding of others in the batch plays no role, and the label has the rest of the weight."""
    encoded = pair_training.encode_pairs(PAIRS, tokenizer)
    teachers = teachers_of(names, tokenizer, teacher_weight=weight, teacher_top_k=1000)
    for row, ids, probabilities in soft_rows(teachers.read_pairs(encoded)):
        expected = weight * mean_probabilities(names, row["input_ids"], row["labels"])
        expected += (1 - weight) * (1 - SMOOTHING) * np.eye(len(tokenizer))[row["labels"]]
        np.testing.assert_allclose(spread(ids, probabilities, len(tokenizer)), expected, atol=1e-6)
        assert ids[:, 0].tolist() == row["labels"]


def test_few_candidates_are_the_likeliest(names, tokenizer):
    encoded = pair_training.encode_pairs(PAIRS, tokenizer)
    soft = teachers_of(names, tokenizer, teacher_weight=0.5, teacher_top_k=3).read_pairs(encoded)
    for row, ids, probabilities in soft_rows(soft):
        expected = mean_probabilities(names, row["input_ids"], row["labels"])
        likeliest = np.sort(expected, axis=1)[:, :-4:-1]
        assert ids.shape == (len(row["labels"]), 4)
        np.testing.assert_allclose(probabilities[:, 0], 0.5 * (1 - SMOOTHING), rtol=1e-6)
        np.testing.assert_allclose(probabilities[:, 1:], 0.5 * likeliest, rtol=1e-4, atol=1e-7)


def test_one_teacher_writes_as_generate_does(names, tokenizer):
    teachers = teachers_of(names[:1], tokenizer)
    sources = ["abc", "ccc", "b", "bcbcbc", "aab", "ca", "cab", "acca"]
    source_ids = tokenizer(sources)["input_ids"]
    written = teachers.write_targets(source_ids, limit=4)
    model, done = teachers.models[0], {}
    for ids in source_ids:
        output = model.generate(torch.tensor([ids]), max_new_tokens=4, num_beams=1, do_sample=False)[0, 1:].tolist()
        if output[-1] == tokenizer.eos_token_id:
            done[tuple(ids)] = output
    assert 0 < len(done) < len(sources)  # some have no end, and are left out
    assert {tuple(row["input_ids"]): row["labels"] for row in written} == done
    assert all(row["length"] == len(row["input_ids"]) + len(row["labels"]) for row in written)


def test_what_is_expected_while_writing_and_reading_is_the_same(names, tokenizer):
    """Greedy targets have the likeliest token everywhere, and reading them gives the same probabilities."""
    teachers = teachers_of(names, tokenizer, teacher_weight=1.0)
    written = teachers.write_targets(tokenizer(["ab", "ca", "b", "cab", "bca", "cc"])["input_ids"], limit=30)
    assert len(written) > 1
    read = teachers.read_pairs(written.select_columns(["input_ids", "labels", "length"]))
    for (row, ids, probabilities), (_, *again) in zip(soft_rows(written), soft_rows(read), strict=True):
        assert ids[:, 0].tolist() == ids[:, 1].tolist() == row["labels"]
        assert not probabilities[:, 0].any()
        np.testing.assert_array_equal(ids, again[0])
        np.testing.assert_allclose(probabilities, again[1], rtol=1e-4, atol=1e-6)


def test_a_transformer_may_be_a_teacher(names, tokenizer, tmp_path):
    """One that starts its targets with another token, too."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.update({"decoder_start_token_id": 3, "pad_token_id": tokenizer.pad_token_id})
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    both = [names[0], str(tmp_path)]
    encoded = pair_training.encode_pairs(PAIRS, tokenizer)
    teachers = teachers_of(both, tokenizer, teacher_weight=1.0, teacher_top_k=1000)
    for row, ids, probabilities in soft_rows(teachers.read_pairs(encoded)):
        expected = mean_probabilities(both, row["input_ids"], row["labels"])
        np.testing.assert_allclose(spread(ids, probabilities, len(tokenizer)), expected, atol=1e-6)
    written = teachers.write_targets(encoded["input_ids"], limit=30)
    assert len(written) > 0
    read = teachers.read_pairs(written.select_columns(["input_ids", "labels", "length"]))
    for (_, ids, probabilities), (_, *again) in zip(soft_rows(written), soft_rows(read), strict=True):
        np.testing.assert_allclose(
            spread(ids, probabilities, len(tokenizer)), spread(*again, len(tokenizer)), rtol=1e-4, atol=1e-6
        )


def test_teachers_need_the_same_tokens(names, tokenizer, tmp_path):
    config = RNNSeq2SeqConfig(vocab_size=len(tokenizer) + 2, hidden_size=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="one size"):
        teachers_of([names[0], str(tmp_path)], tokenizer)
    other = train_symbol_tokenizer(["abcd"], ["x y"], "characters", "words")
    with pytest.raises(UsageError, match="other tokens"):
        teachers_of(names, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_cross_entropy_of_labels_is_cross_entropy(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 9), torch.randint(0, 9, (3, 4))
    labels[1, 2:] = -100
    ids, probabilities = labels.clamp(min=0)[..., None], torch.full((3, 4, 1), 1 - smoothing)
    options = {"ignore_index": -100, "reduction": "sum", "label_smoothing": smoothing}
    hard = cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)
    torch.testing.assert_close(soft_cross_entropy(logits, ids, probabilities, labels != -100), hard)


def test_soft_cross_entropy_of_all_tokens():
    """Against the definition in float64, with candidates that occur twice, as a label among the likeliest does."""
    random = np.random.default_rng(0)
    logits, ids = random.normal(size=(2, 3, 5)), random.integers(0, 5, (2, 3, 4))
    probabilities = random.dirichlet(np.ones(6), (2, 3))[..., :4]
    expected = 0.0
    for row, position in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        target = np.full(5, (1 - probabilities[row, position].sum()) / 5)
        np.add.at(target, ids[row, position], probabilities[row, position])
        expected -= target @ (logits[row, position] - np.log(np.exp(logits[row, position]).sum()))
    is_target = torch.tensor([[True, True, True], [True, False, False]])
    loss = soft_cross_entropy(*map(torch.from_numpy, (logits, ids, probabilities)), is_target)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_weight_training_is_as_ever(accumulation, names, tokenizer, tmp_path):
    """With `teacher_weight=0` the weights after training equal those of `Seq2SeqTrainer`; with 1 they do not."""
    encoded = pair_training.encode_pairs(PAIRS, tokenizer)
    trained = {}
    for weight in (None, 0.0, 1.0):
        model = AutoModelForSeq2SeqLM.from_pretrained(names[0], hidden_dropout=0.0)
        dataset, trainer_class = encoded, Seq2SeqTrainer
        if weight is not None:
            dataset = teachers_of(names, tokenizer, teacher_weight=weight).read_pairs(encoded)
            trainer_class = DistillationTrainer
        args = training_args(
            tmp_path / str(weight),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=3,
            optim="sgd",
            learning_rate=0.5,
            save_strategy="no",
            eval_strategy="no",
            load_best_model_at_end=False,
        )
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=SoftTargetCollator(pair_training.PairCollator(tokenizer, model=model)),
        )
        result = trainer.train()
        trained[weight] = (result.training_loss, model.lm_head.weight.detach())
    torch.testing.assert_close(trained[0.0], trained[None], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained[1.0][1], trained[None][1], atol=1e-3)


def test_targets_are_kept_for_a_resumed_run(names, tokenizer, tmp_path):
    (tmp_path / "words.txt").write_text("ab\nabc\n\nab\nca\nccbb\n" + "ab" * 40 + "\n")
    args = DistillationArguments(teachers=names, unlabelled_file=str(tmp_path / "words.txt"))
    assert read_sources(args.unlabelled_file, ["abc", "ca"]) == ["ab", "ccbb", "ab" * 40]
    with pytest.raises(UsageError, match="no source"):
        read_sources(args.unlabelled_file, ["abc", "ca", "ab", "ccbb", "ab" * 40])
    encoded = pair_training.encode_pairs(PAIRS, tokenizer)
    rest = ([source for source, _ in PAIRS], args, tokenizer, training_args(tmp_path / "out"), (20, 20))
    first = with_soft_targets(encoded, *rest, resuming=False)
    added = [tokenizer.decode(ids, skip_special_tokens=True) for ids in first[len(PAIRS) :]["input_ids"]]
    assert len(added) > 0
    assert {text.replace(" ", "") for text in added} <= {"ab", "ccbb"}
    args.teachers = ["nowhere"]
    again = with_soft_targets(encoded, *rest, resuming=True)
    assert again.to_list() == first.to_list()
    with pytest.raises(UsageError, match="nowhere"):
        with_soft_targets(encoded, *rest, resuming=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["teacher_targets"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"unlabelled_file": "words.txt"}, "--unlabelled_file"),
        ({"teachers": ["a"], "teacher_weight": 1.5}, "--teacher_weight"),
        ({"teachers": ["a"], "teacher_top_k": 0}, "--teacher_top_k"),
    ],
)
def test_options_that_cannot_work(options, name):
    with pytest.raises(ValueError, match=name):
        DistillationArguments(**options)


WORDS = ["blorf", "snarping", "mieliez", "quandove", "tetherow", "zumbach", "kleiders", "oakhaven"]


def distil(tmp_path, launcher=()):
    """A teacher is trained, then a smaller model on what it expects of words with and without pronunciations."""
    small = {name: value for name, value in TINY_TRANSLATOR.items() if name != "vocab_size"} | {"leave_out": "012"}
    run("transduce.py", tmp_path / "teacher", **small)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    options = small | {"hidden_size": 8, "tokenizer_name": tmp_path / "teacher", "max_target_length": 60}
    options |= {"teachers": tmp_path / "teacher", "unlabelled_file": tmp_path / "words.txt"}
    output = run("transduce.py", tmp_path / "out", launcher=launcher, **options)
    assert output.count("The teachers wrote targets for") == 1
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.hidden_size == 8
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["test_samples"] == 16
    return options


def test_script(tmp_path):
    options = distil(tmp_path)
    options |= {"bpe_dropout": 0.1}
    del options["leave_out"]
    refused = run("translate.py", tmp_path / "again", status=2, **options)
    assert refused.count("error:") == 1
    assert "--bpe_dropout" in refused


@pytest.mark.slow
def test_two_processes(tmp_path):
    distil(tmp_path, TORCHRUN)
