"""
One sentence through the attention of a trained translator, step by step:

    1. query        q_t = s_t                                   the state of the decoder before it writes a word
    2. keys         k_j = v_j = [left-to-right; right-to-left]  what the encoder knows around source word j
    3. scores       e_tj = q_t W k_j
    4. weights      alpha_t = softmax_j(e_tj)
    5. context      c_t = sum_j alpha_tj v_j
    6. combination  a_t = tanh(W_c [c_t; s_t]),  p(y_t) = softmax(W_o a_t + b)

Each is computed here from the weights of the checkpoint and compared with what the model itself returns. `--model`
names a checkpoint of `examples/translate.py` (decoder `luong`, one head); without one a small translator is trained
first on short sentence pairs of `examples/data`.

Pass marks: weights, attentional vectors and probabilities agree with the model's to 1e-6; a translator trained here
writes the right first word of at least half of 500 unseen sentences.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rnn import RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration
from hf_rnn.plots import plot_attention
from tutorial_helpers import finish, parse_arguments, train


EXAMPLES = Path(__file__).parents[1]
sys.path.append(str(EXAMPLES))
from subword_tokenizer import token_pieces, train_subword_tokenizer  # noqa: E402
from text_pairs import read_pairs  # noqa: E402


TOLERANCE, FIRST_WORDS = 1e-6, 0.5


def short_pairs(split: str, most_words: int = 5) -> list[tuple[str, str]]:
    """French and English sentences of few words."""
    name = f"tatoeba-eng-fra.{split}.tsv" + (".gz" if split == "train" else "")
    pairs = read_pairs(EXAMPLES / "data" / name, "fra", "eng")
    return [pair for pair in pairs if max(len(text.split()) for text in pair) <= most_words]


def train_translator(folder: Path, steps: int) -> None:
    """Trains a small translator from French to English and saves it."""
    pairs = short_pairs("train")
    tokenizer = train_subword_tokenizer([text for pair in pairs for text in pair], vocab_size=1500)
    config = RNNSeq2SeqConfig(
        vocab_size=len(tokenizer),
        embedding_size=96,
        hidden_size=128,
        encoder_layers=1,
        decoder_layers=1,
        decoder_type="luong",
        attention_score="general",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    model = RNNSeq2SeqForConditionalGeneration(config)

    def loss_of_batch():
        chosen = [pairs[index] for index in torch.randint(len(pairs), (48,)).tolist()]
        sources, targets = ([pair[side] for pair in chosen] for side in (0, 1))
        inputs = tokenizer(sources, text_target=targets, padding=True, return_tensors="pt")
        inputs["labels"][inputs["labels"] == config.pad_token_id] = -100  # nothing is to be predicted there
        return model(**inputs).loss

    train(model, loss_of_batch, steps, 5e-3, "translator")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def share_of_first_words(model, tokenizer) -> float:
    """How often the translation of an unseen sentence begins with the right word."""
    pairs = short_pairs("test")[:500]
    sources = tokenizer([source for source, _ in pairs], padding=True, return_tensors="pt")
    written = tokenizer.batch_decode(model.generate(**sources, max_new_tokens=16), skip_special_tokens=True)
    same = [text.split()[:1] == target.split()[:1] for text, (_, target) in zip(written, pairs)]
    return sum(same) / len(same)


def scores_of(query: torch.Tensor, keys: torch.Tensor, score, name: str) -> torch.Tensor:
    """e_j `[source]` for one query `[query_size]` and all keys `[source, key_size]`, from the weights of the score."""
    if name == "additive":  # v . tanh(W_q q + W_k k)
        return torch.tanh(score.query.weight @ query + keys @ score.key.weight.T) @ score.vector
    if name == "general":  # q W k
        return keys @ (score.query.weight @ query)
    if getattr(score, "key", None) is not None:  # q . k, with keys of the query's width
        keys = keys @ score.key.weight.T
    return keys @ query / (query.shape[0] ** 0.5 if name == "scaled_dot" else 1)


def show(label: str, values: torch.Tensor, count: int = 5) -> None:
    """The shape and the first numbers of a vector."""
    numbers = " ".join(f"{value:+.4f}" for value in values[:count].tolist())
    print(f"  {label:<28} [{values.shape[0]}]  {numbers}{' ...' if len(values) > count else ''}")


def main() -> None:
    default = "outputs/translator"
    arguments = parse_arguments(__doc__.strip().splitlines()[0], model=default, sentence="Où est ma voiture ?")
    folder, trained_here = Path(arguments.model), False
    if not (folder / "config.json").exists():
        if arguments.model != default:
            sys.exit(f"error: there is no checkpoint in {folder}")
        folder, trained_here = arguments.output_dir / "translator", True
        train_translator(folder, arguments.steps or 900)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    config, attention = model.config, model.model.decoder.attention
    if (config.decoder_type, config.num_attention_heads) != ("luong", 1):
        sys.exit(f"error: {folder} has the decoder {config.decoder_type}: these are the steps of `luong` with one head")

    inputs = tokenizer(arguments.sentence, return_tensors="pt")
    written = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=30)
    with torch.no_grad():
        outputs = model(
            **inputs,
            decoder_input_ids=written[:, :-1],
            output_attentions=True,
            output_hidden_states=True,
        )
        vectors = model.model(**inputs, decoder_input_ids=written[:, :-1]).last_hidden_state[0]
    columns = token_pieces(tokenizer, inputs["input_ids"][0].tolist())
    rows = token_pieces(tokenizer, written[0, 1:].tolist())
    print(f"\n{arguments.sentence}  ->  {tokenizer.decode(written[0], skip_special_tokens=True).strip()}")

    differences = {"weights": 0.0, "attentional vectors": 0.0, "probabilities": 0.0}
    all_weights = []
    with torch.no_grad():
        for t, word in enumerate(rows):
            print(f"\nstep {t + 1}: {word!r}")
            query = outputs.decoder_hidden_states[-1][0, t]  # q_t = s_t
            keys = values = outputs.encoder_last_hidden_state[0]  # k_j = v_j
            scores = scores_of(query, keys, attention.score, config.attention_score)  # e_tj = q_t W k_j
            weights = scores.exp() / scores.exp().sum()  # alpha_tj = exp(e_tj) / sum_i exp(e_ti)
            context = (weights[:, None] * values).sum(0)  # c_t = sum_j alpha_tj v_j
            combine = model.model.decoder.combine.weight
            vector = torch.tanh(combine @ torch.cat([context, query]))  # a_t = tanh(W_c [c_t; s_t])
            projected = vector if isinstance(model.projection, torch.nn.Identity) else model.projection(vector)
            logits = model.lm_head.weight @ projected + model.lm_head.bias
            probabilities = torch.softmax(logits, -1)

            show("1. query", query)
            show("2. key of the first word", keys[0])
            print("  3. scores, 4. weights")
            for label, score, weight in zip(columns, scores.tolist(), weights.tolist()):
                print(f"     {label:<14} {score:+8.3f}   {weight:.4f}  {'#' * round(40 * weight)}")
            show("5. context", context)
            show("6. combination", vector)
            best = probabilities.topk(3)
            likeliest = token_pieces(tokenizer, best.indices.tolist())
            print("     next:", ", ".join(f"{piece!r} {p:.3f}" for piece, p in zip(likeliest, best.values.tolist())))

            all_weights.append(weights)
            for name, ours, theirs in (
                ("weights", weights, outputs.cross_attentions[-1][0, 0, t]),
                ("attentional vectors", vector, vectors[t]),
                ("probabilities", probabilities, outputs.logits[0, t].softmax(-1)),
            ):
                differences[name] = max(differences[name], (ours - theirs).abs().max().item())

    picture = arguments.output_dir / "translation_steps.png"
    plot_attention(torch.stack(all_weights), columns, rows, title=arguments.sentence).savefig(picture, dpi=110)
    print()
    marks = {f"{name}: {value:.1e} from the model's": value <= TOLERANCE for name, value in differences.items()}
    if trained_here:
        share = share_of_first_words(model, tokenizer)
        marks[f"first words right: {share:.1%}, at least {FIRST_WORDS:.0%}"] = share >= FIRST_WORDS
    finish(picture, marks)


if __name__ == "__main__":
    main()
