"""What only a GPU can show: that nobody waits for it in training and decoding, and graphs that are compiled for it."""

import contextlib
import warnings

import pytest
import torch

from hf_rnn import RECURRENT_CELLS
from matrix import GENERATIVE, MODEL_CLASSES, case_id, cases, make_inputs, make_mask, make_model, make_tokens
from test_compile import compare, fresh_compiler, random_mask  # noqa: F401


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Random fields and attention between question and text look at lengths.
TRAINED = [name for name in MODEL_CLASSES if name not in ("RNNForTokenClassification", "RNNForQuestionAnswering")]


@contextlib.contextmanager
def no_waiting():
    """Raises an error where the CPU waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_for_words(options: dict) -> bool:
    """Words are found, and source words outside the vocabulary counted, by a look at the tokens."""
    return "word_encoder" in options


@pytest.mark.parametrize(
    ("name", "options"), [case for case in cases(*TRAINED) if not waits_for_words(case[1])], ids=case_id
)
def test_training_does_not_wait(name, options):
    """Forward and backward of a padded batch only start work, so that the next step can be prepared meanwhile."""
    model = make_model(name, torch.float32, **options).to("cuda").train()
    inputs = {key: value.to("cuda") for key, value in make_inputs(name, 6, 7).items()}
    if name != "RNNForMultipleChoice":
        inputs["attention_mask"] = make_mask().to("cuda")

    def step():
        outputs = model(**inputs)
        (outputs.loss if "labels" in inputs else outputs[0].sum()).backward()

    step()  # once before, as libraries set themselves up
    with no_waiting():
        step()


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_step_of_decoding_does_not_wait(name):
    for options in ({"cell_type": "lstm"}, {"cell_type": "gru"}):
        model = make_model(name, torch.float32, **options).to("cuda")
        key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        inputs = {key: make_tokens(6, 1).to("cuda")}
        if model.config.is_encoder_decoder:
            inputs["encoder_outputs"] = model.get_encoder()(make_tokens(6, 7).to("cuda"))
            inputs["attention_mask"] = make_mask().to("cuda")
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            with no_waiting():
                model(**inputs, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mask", [None, make_mask()], ids=["no_mask", "mask"])
def test_weights_lie_in_one_piece(cell_type, bidirectional, mask):
    """Otherwise torch copies them one by one at each call, and warns of it."""
    model = make_model("RNNModel", torch.float32, cell_type=cell_type, bidirectional=bidirectional).to("cuda").train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RNN module weights")
        mask = None if mask is None else mask.to("cuda")
        outputs = model(inputs_embeds=torch.ones(6, 7, model.config.input_size, device="cuda"), attention_mask=mask)
    outputs.last_hidden_state.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if "layers" in name)


@pytest.mark.parametrize("cell_type", RECURRENT_CELLS)
def test_gradients_of_each_text(cell_type):
    """By `torch.func.vmap` of the gradient, of which cuDNN knows nothing."""
    model = make_model("RNNModel", cell_type=cell_type).to("cuda")
    parameters, tokens = dict(model.named_parameters()), make_tokens(3, 7).to("cuda")

    def objective(parameters, tokens):
        return torch.func.functional_call(model, parameters, (tokens[None],)).last_hidden_state.square().sum()

    found = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0))(parameters, tokens)
    for row, text in enumerate(tokens):
        expected = torch.autograd.grad(objective(parameters, text), parameters.values())
        for name, gradient in zip(parameters, expected):
            torch.testing.assert_close(found[name][row], gradient)


# Compiled and exported.

COMPILED = [
    *[("RNNForCausalLM", {"cell_type": cell_type}) for cell_type in RECURRENT_CELLS],
    ("RNNForTokenClassification", {"bidirectional": True}),
    ("RNNForQuestionAnswering", {"bidirectional": True}),
    ("RNNSeq2SeqForConditionalGeneration", {}),
    ("RNNSeq2SeqForConditionalGeneration", {"input_feeding": True}),
    ("RNNSeq2SeqForConditionalGeneration", {"decoder_type": "gnmt", "attention_score": "location"}),
]


def ragged_inputs(name: str, batch: int, seq: int) -> dict:
    inputs = make_inputs(name, batch, seq) | {"attention_mask": random_mask(batch, seq)}
    return {key: value.to("cuda") for key, value in inputs.items()}


@pytest.mark.parametrize(("name", "options"), COMPILED, ids=case_id)
def test_graphs_of_training(name, options):
    """Whole graphs, forward and backward, at other sizes than the first ones too."""
    model = make_model(name, **options).to("cuda").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, seq in [(6, 7), (5, 8), (4, 12), (7, 31)]:
        compare(model, compiled, ragged_inputs(name, batch, seq))


@pytest.mark.parametrize(
    ("name", "options"),
    [("RNNForCausalLM", {}), ("RNNSeq2SeqForConditionalGeneration", {"input_feeding": True})],
    ids=case_id,
)
def test_compiled_training(name, options):
    """Down to the kernels."""
    model = make_model(name, torch.float32, **options).to("cuda").train()
    compiled = torch.compile(model, fullgraph=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch, seq in [(6, 7), (5, 8), (4, 12)]:
            compare(model, compiled, ragged_inputs(name, batch, seq), 1e-4)


@pytest.mark.parametrize("name", ["RNNForCausalLM", "RNNForTokenClassification", "RNNSeq2SeqForConditionalGeneration"])
def test_exported_program(name):
    """By torch itself, which leaves the model where it is; at sizes that were not traced."""
    model, example = make_model(name, use_cache=False).to("cuda"), ragged_inputs(name, 3, 4)
    sizes = {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for key in example}
    program = torch.export.export(model, (), example, dynamic_shapes=sizes, strict=False).module()
    for batch, seq in [(2, 6), (5, 9), (7, 31)]:
        inputs = ragged_inputs(name, batch, seq)
        torch.testing.assert_close(program(**inputs).loss, model(**inputs).loss)
