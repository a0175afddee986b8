"""inseq attributes what a saved encoder-decoder writes to what it read, by gradients."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from clients import save_checkpoint
from matrix import DECODERS, case_id


inseq = pytest.importorskip("inseq")
SOURCE, TARGET = "the cat sat on the mat", "a dog ate the fish"


@pytest.mark.parametrize("decoder", DECODERS, ids=case_id)
def test_saliency_is_the_gradient(decoder, tmp_path):
    """Of a given target, for each of its tokens: the gradient of its probability by the source embeddings."""
    folder = save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration", **decoder)
    output = inseq.load_model(folder, "saliency").attribute(SOURCE, TARGET, show_progress=False)
    (attribution,) = output.sequence_attributions
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    source = torch.tensor([[token.id for token in attribution.source]])
    target = torch.tensor([[token.id for token in attribution.target]])
    embeddings = model.get_input_embeddings()(source).detach().requires_grad_()
    probabilities = model(inputs_embeds=embeddings, decoder_input_ids=target[:, :-1]).logits.softmax(-1)
    chosen = probabilities[0].gather(1, target[0, 1:, None])[:, 0]
    assert attribution.source_attributions.shape[:2] == (source.shape[1], len(chosen))
    for index, probability in enumerate(chosen):
        (gradient,) = torch.autograd.grad(probability, embeddings, retain_graph=True)
        torch.testing.assert_close(attribution.source_attributions[:, index], gradient[0].abs(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["integrated_gradients", "input_x_gradient"])
def test_generated_texts(method, tmp_path):
    """What the model writes itself; each token gets a finite number for each of the source."""
    folder = save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration")
    output = inseq.load_model(folder, method).attribute(
        [SOURCE, "no"], generation_args={"max_new_tokens": 4}, attribute_target=True, show_progress=False
    )
    for attribution in output.sequence_attributions:
        scores = attribution.aggregate().source_attributions
        assert scores.shape[0] == len(attribution.source)
        assert scores.nan_to_num().abs().sum() > 0
        assert not scores.isinf().any()


def test_attention_wants_self_attention(tmp_path):
    """Its attention method reads the self-attention of both sides, which a recurrent network does not have."""
    model = inseq.load_model(save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration"), "attention")
    with pytest.raises(ValueError, match="does not support attribution relying on attention outputs"):
        model.attribute(SOURCE, TARGET, show_progress=False)
