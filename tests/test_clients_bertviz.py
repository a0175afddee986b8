"""bertviz shows the cross-attention of a saved encoder-decoder."""

import json
import re

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from clients import save_checkpoint


bertviz = pytest.importorskip("bertviz")


@pytest.mark.parametrize("view", [bertviz.head_view, bertviz.model_view], ids=["head_view", "model_view"])
@pytest.mark.parametrize("heads", [1, 2])
def test_views(view, heads, tmp_path):
    """The page holds the weights of every head and both rows of tokens."""
    folder = save_checkpoint(tmp_path, "RNNSeq2SeqForConditionalGeneration", num_attention_heads=heads)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    source = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
    target = tokenizer("a dog ate the fish", return_tensors="pt")["input_ids"]
    attention = model(source, decoder_input_ids=target, output_attentions=True).cross_attentions
    tokens = [tokenizer.convert_ids_to_tokens(ids[0]) for ids in (source, target)]
    page = view(
        cross_attention=attention, encoder_tokens=tokens[0], decoder_tokens=tokens[1], html_action="return"
    ).data
    shown = json.loads(re.search(r"params = (\{.*?\});", page, re.DOTALL).group(1))["attention"][0]
    weights = torch.tensor(shown["attn"])  # [layers, heads, target, source]
    torch.testing.assert_close(weights, attention[0].detach())
    assert weights.shape[:2] == (1, heads)
    words = [[token for token in shown[side] if token.strip()] for side in ("right_text", "left_text")]
    assert [list(map(str.strip, row)) for row in words] == tokens
