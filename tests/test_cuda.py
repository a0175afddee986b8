"""What only a GPU can show: in training and decoding nobody waits for it in between."""

import contextlib
import warnings

import pytest
import torch

from hf_rnn import RECURRENT_CELLS
from matrix import GENERATIVE, MODEL_CLASSES, case_id, cases, make_inputs, make_mask, make_model, make_tokens


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
