"""
Addition, twice: a running sum of real numbers, and two numbers written in digits.

1. {3, 5} -> {3, 8}. The network reads x_1 ... x_T and says after each number the sum so far:

    y_t = x_1 + ... + x_t
    h_t = cell(x_t, h_{t-1}),  y_t = w h_t + b

   An RNN, a GRU and an LSTM learn it on 2 to 10 numbers between -1 and 1 and are then asked for up to 50. A state that
   only ever saw sums of ten numbers has no reason to hold larger ones: the picture shows how far each of them gets.

2. 7 + 58 -> 65. An encoder-decoder reads two numbers of up to 4 digits and writes their sum. All of them are written
   units first, the order in which a sum is worked out, and with leading zeros: "7000+8500" -> "56000". A tenth of all
   pairs is never trained on.

Pass marks: on unseen sequences of 2 to 10 numbers the root mean square error of every cell is at most 0.1 (always
answering 0 has 1.4), and at least 99 % of 4,000 unseen pairs of numbers are added without a wrong digit.
"""

import torch
from matplotlib.figure import Figure
from torch import nn

from hf_rnn import RNNConfig, RNNModel, RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration
from tutorial_helpers import finish, parse_arguments, train


MAX_ERROR, EXACT = 0.1, 0.99
CELLS = {"RNN": "rnn_tanh", "GRU": "gru", "LSTM": "lstm"}
PAD, BOS, EOS, PLUS, ZERO = range(5)  # the digits follow ZERO


class RunningSum(nn.Module):
    """y_t = w h_t + b on the library's recurrent layer."""

    def __init__(self, cell_type: str):
        super().__init__()
        # One number is one feature, in place of an embedding.
        config = RNNConfig(
            vocab_size=1, embedding_size=1, hidden_size=64, num_hidden_layers=1, cell_type=cell_type, pad_token_id=None
        )
        self.recurrent = RNNModel(config)
        self.output = nn.Linear(64, 1)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers `[batch, T]` to sums so far `[batch, T]`."""
        hidden = self.recurrent(inputs_embeds=numbers.unsqueeze(-1)).last_hidden_state  # [batch, T, 64]
        return self.output(hidden).squeeze(-1)


def running_sums(steps: int) -> dict[str, torch.Tensor]:
    """Trains the three cells; returns for each the root mean square error after 1 to 50 numbers."""
    errors = {}
    for name, cell_type in CELLS.items():
        model = RunningSum(cell_type)

        def loss_of_batch(model=model):
            numbers = torch.rand(128, int(torch.randint(2, 11, ()))) * 2 - 1
            return (model(numbers) - numbers.cumsum(1)).square().mean()

        train(model, loss_of_batch, steps, 5e-3, f"running sum, {name}")
        with torch.no_grad():
            numbers = torch.rand(1000, 50) * 2 - 1
            errors[name] = (model(numbers) - numbers.cumsum(1)).square().mean(0).sqrt()
    return errors


def make_pairs(count: int, unseen: bool) -> torch.Tensor:
    """
    Pairs of numbers `[count, 2]` of 1 to 4 digits. From the tenth of all pairs that is never trained on, each length
    equally often; from the others, long ones more often.
    """
    digits = torch.rand(40 * count if unseen else 4 * count, 2)
    top = 10 ** (1 + (4 * (digits if unseen else digits.sqrt())).long())
    numbers = (torch.rand(top.shape, dtype=torch.float64) * (top - top // 10) + top // 10).long()
    numbers = torch.where(top == 10, torch.randint(0, 10, top.shape), numbers)
    is_unseen = (numbers[:, 0] * 7919 + numbers[:, 1] * 104729) % 1000003 % 10 == 0
    return numbers[is_unseen == unseen][:count]


def write(numbers: torch.Tensor, digits: int) -> torch.Tensor:
    """Numbers `[batch]` as tokens `[batch, digits]`, units first."""
    return ZERO + numbers[:, None] // 10 ** torch.arange(digits) % 10


def tensors_of(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources `[batch, 9]` and targets `[batch, 6]`."""
    plus, end = (torch.full_like(pairs[:, :1], token) for token in (PLUS, EOS))
    source = torch.cat([write(pairs[:, 0], 4), plus, write(pairs[:, 1], 4)], dim=1)
    return source, torch.cat([write(pairs.sum(1), 5), end], dim=1)


def digit_sums(steps: int) -> tuple[RNNSeq2SeqForConditionalGeneration, torch.Tensor, torch.Tensor]:
    """Trains an encoder-decoder; returns it, 4,000 unseen pairs, and which of them it adds without a wrong digit."""
    config = RNNSeq2SeqConfig(
        vocab_size=ZERO + 10,
        embedding_size=32,
        hidden_size=128,
        encoder_layers=1,
        decoder_layers=1,
        attention_score="general",
        num_attention_heads=2,  # one for each number
        input_feeding=True,  # what was added in the last column says whether there is something to carry
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
    )
    model = RNNSeq2SeqForConditionalGeneration(config)

    def loss_of_batch():
        source, labels = tensors_of(make_pairs(64, unseen=False))
        return model(input_ids=source, labels=labels).loss

    train(model, loss_of_batch, steps, 8e-3, "digits")
    pairs = make_pairs(4000, unseen=True)
    source, labels = tensors_of(pairs)
    written = model.generate(source, max_new_tokens=labels.shape[1])[:, 1:]  # without the start token
    return model, pairs, (written == labels).all(1)


def main() -> None:
    arguments = parse_arguments(__doc__.strip().splitlines()[0])
    errors = running_sums(arguments.steps or 1500)
    _, pairs, is_right = digit_sums(arguments.steps or 1500)
    exact = is_right.float().mean().item()
    lengths = torch.tensor([[len(str(number)) for number in pair] for pair in pairs.tolist()])
    print("\nroot mean square error of the running sum after 2, 10, 20 and 50 numbers")
    for name, error in errors.items():
        print(f"  {name:5}", *(f"{error[t - 1].item():8.3f}" for t in (2, 10, 20, 50)))
    print(f"unseen pairs added exactly: {exact:.2%}; by the digits of the longer number:")
    for digits in range(1, 5):
        print(f"  {digits}: {is_right[lengths.max(1).values == digits].float().mean().item():.2%}")

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, error in errors.items():
        left.plot(range(1, 51), error.numpy(), label=name)
    left.axvspan(2, 10, color="0.9", label="trained on")
    left.set(xlabel="numbers read", ylabel="root mean square error", yscale="log", title="running sum")
    left.legend()
    shares = torch.stack(
        [
            torch.stack([is_right[(lengths == torch.tensor([i, j])).all(1)].float().mean() for j in range(1, 5)])
            for i in range(1, 5)
        ]
    )
    image = right.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i in range(4):
        for j in range(4):
            color = "white" if shares[i, j] > 0.5 else "black"
            right.text(j, i, f"{shares[i, j].item():.1%}", ha="center", va="center", color=color)
    right.set_xticks(range(4), range(1, 5))
    right.set_yticks(range(4), range(1, 5))
    right.set(xlabel="digits of the second number", ylabel="digits of the first", title="unseen pairs added exactly")
    figure.colorbar(image, ax=right)
    picture = arguments.output_dir / "addition.png"
    figure.savefig(picture, dpi=110)

    worst = {name: error[1:10].square().mean().sqrt().item() for name, error in errors.items()}
    marks = {f"{name}: error {error:.3f}, at most {MAX_ERROR}": error <= MAX_ERROR for name, error in worst.items()}
    marks[f"unseen pairs exact: {exact:.2%}, at least {EXACT:.0%}"] = exact >= EXACT
    finish(picture, marks)


if __name__ == "__main__":
    main()
