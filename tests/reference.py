"""NumPy float64 references, written from the published equations: one function per cell and per score.

Models are computed row by row from the tokens alone, so that padding cannot take part by construction. Weights come as
a dictionary of arrays under the names of the state dict.
"""

import itertools

import numpy as np


Weights = dict[str, np.ndarray]
State = tuple[np.ndarray, ...]

CELL_STEPS = {}
CELL_GATES = {}
NUM_STATES = {}
SCORES = {}
POOLINGS = {}
SPAN_HEADS = {}


def to_numpy(module) -> Weights:
    """The state dict of a torch module as float64 arrays."""
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def part(weights: Weights, prefix: str) -> Weights:
    """The weights under `prefix.`, without the prefix."""
    return {name[len(prefix) + 1 :]: value for name, value in weights.items() if name.startswith(f"{prefix}.")}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """W x, and + b where the layer `name` has a bias."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


# Cells: (weights, input [..., input_size], state) -> gates in the order of torch, in which they are stacked, behind
# their activation; and -> state.


def cell(name: str, gates, num_states: int = 1):
    def register(step):
        CELL_STEPS[name], CELL_GATES[name], NUM_STATES[name] = step, gates, num_states
        return step

    return register


def gates_of(weights: Weights, source: str, x: np.ndarray, number: int) -> list[np.ndarray]:
    return np.split(x @ weights[f"weight_{source}"].T + weights[f"bias_{source}"], number, axis=-1)


def rnn_tanh_gates(weights: Weights, x: np.ndarray, state: State) -> State:
    (wx,), (wh,) = gates_of(weights, "ih", x, 1), gates_of(weights, "hh", state[0], 1)
    return (np.tanh(wx + wh),)


@cell("rnn_tanh", rnn_tanh_gates)
def rnn_tanh_step(weights: Weights, x: np.ndarray, state: State) -> State:
    """Elman (1990)."""
    return rnn_tanh_gates(weights, x, state)


def rnn_relu_gates(weights: Weights, x: np.ndarray, state: State) -> State:
    (wx,), (wh,) = gates_of(weights, "ih", x, 1), gates_of(weights, "hh", state[0], 1)
    return (np.maximum(wx + wh, 0),)


@cell("rnn_relu", rnn_relu_gates)
def rnn_relu_step(weights: Weights, x: np.ndarray, state: State) -> State:
    """The same, rectified."""
    return rnn_relu_gates(weights, x, state)


def gru_gates(weights: Weights, x: np.ndarray, state: State) -> State:
    (rx, zx, nx), (rh, zh, nh) = gates_of(weights, "ih", x, 3), gates_of(weights, "hh", state[0], 3)
    r = sigmoid(rx + rh)
    return r, sigmoid(zx + zh), np.tanh(nx + r * nh)


@cell("gru", gru_gates)
def gru_step(weights: Weights, x: np.ndarray, state: State) -> State:
    """Cho et al. (2014) with the reset gate behind the product, as in torch: reset, update, new."""
    _, z, n = gru_gates(weights, x, state)
    return ((1 - z) * n + z * state[0],)


def lstm_gates(weights: Weights, x: np.ndarray, state: State) -> State:
    (ix, fx, gx, ox), (ih, fh, gh, oh) = gates_of(weights, "ih", x, 4), gates_of(weights, "hh", state[0], 4)
    return sigmoid(ix + ih), sigmoid(fx + fh), np.tanh(gx + gh), sigmoid(ox + oh)


@cell("lstm", lstm_gates, num_states=2)
def lstm_step(weights: Weights, x: np.ndarray, state: State) -> State:
    """Hochreiter and Schmidhuber (1997), Gers et al. (2000): input, forget, cell, output."""
    i, f, g, o = lstm_gates(weights, x, state)
    c = f * state[1] + i * g
    return o * np.tanh(c), c


def run_cell(cell_type: str, weights: Weights, inputs: np.ndarray, state: State, mask: np.ndarray, reverse: bool):
    """
    A whole sequence in one direction: a token changes the state, at padding it stays. `inputs` `[batch, seq, size]`,
    `state` arrays `[batch, hidden]`, `mask` `[batch, seq]`. Returns the states after reading each position, arrays
    `[batch, seq, hidden]`, and the final ones.
    """
    passed = [np.zeros((*inputs.shape[:2], states.shape[-1])) for states in state]
    final = [states.copy() for states in state]
    for row in range(inputs.shape[0]):
        now = tuple(states[row] for states in state)
        positions = range(inputs.shape[1])
        for position in reversed(positions) if reverse else positions:
            if mask[row, position]:
                now = CELL_STEPS[cell_type](weights, inputs[row, position], now)
            for index, states in enumerate(now):
                passed[index][row, position] = states
        for index, states in enumerate(now):
            final[index][row] = states
    return tuple(passed), tuple(final)


def run_layer(
    cell_type: str, weights: Weights, inputs: np.ndarray, state: State | None = None, mask: np.ndarray | None = None
):
    """
    A layer in as many directions as there are weights. Returns the outputs, the final states of all directions, and
    the states after each position.
    """
    mask = np.ones(inputs.shape[:2], bool) if mask is None else mask.astype(bool)
    directions = [name for name in ("cell", "cell_reverse") if f"{name}.weight_ih" in weights]
    number, hidden_size = NUM_STATES[cell_type], weights["cell.weight_hh"].shape[1]
    if state is None:
        state = tuple(np.zeros((inputs.shape[0], hidden_size)) for _ in range(number * len(directions)))
    passed, final = (), ()
    for index, name in enumerate(directions):
        first = state[index * number : (index + 1) * number]
        more_passed, more_final = run_cell(cell_type, part(weights, name), inputs, first, mask, name == "cell_reverse")
        passed, final = passed + more_passed, final + more_final
    return np.concatenate(passed[::number], axis=-1), final, passed


def run_stack(config, weights: Weights, hidden: np.ndarray, mask: np.ndarray | None = None):
    """
    Layers one above the other, with residual connections from the second on where the configuration says so. Returns
    the outputs of all layers and the final states of all layers.
    """
    outputs, finals = [], []
    while f"layers.{len(finals)}.cell.weight_ih" in weights:
        output, final, _ = run_layer(config.cell_type, part(weights, f"layers.{len(finals)}"), hidden, mask=mask)
        hidden = output + hidden if config.residual and finals else output
        outputs.append(hidden)
        finals.append(final)
    return outputs, finals


def language_model(config, weights: Weights, input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits `[batch, seq, vocab]` of a causal or masked language model."""
    outputs, _ = run_stack(config, part(weights, "model"), weights["model.embed_tokens.weight"][input_ids], mask)
    return project_to_vocabulary(weights, outputs[-1])


def project_to_vocabulary(weights: Weights, hidden: np.ndarray) -> np.ndarray:
    """Logits; tied embeddings of another size have a projection before them."""
    if "projection.weight" in weights:
        hidden = linear(weights, "projection", hidden)
    return linear(weights, "lm_head", hidden)


# Words: (weights, embeddings of the tokens of a word [tokens, size]) -> [output_size].


def convolve_word(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Kim et al. (2016): tanh of the greatest value of each filter, zeros beyond the word."""
    width = weights["filters.weight"].shape[1] // x.shape[1]
    padded = np.pad(x, ((width // 2, width // 2), (0, 0)))
    windows = [padded[start : start + width].reshape(-1) for start in range(len(x))]
    return np.tanh(np.max([linear(weights, "filters", window) for window in windows], axis=0))


def spell_word(cell_type: str, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Lample et al. (2016): the final hidden states of both directions."""
    _, final, _ = run_layer(cell_type, part(weights, "layer"), x[None])
    return np.concatenate([states[0] for states in final[:: NUM_STATES[cell_type]]])


def split_words(tokens: list[int], first_continuation_id: int) -> list[tuple[int, ...]]:
    """The words of a row without padding, as tuples of tokens."""
    words = []
    for token in tokens:
        if words and token >= first_continuation_id:
            words[-1] += (token,)
        else:
            words.append((token,))
    return words


def read_words(config, weights: Weights, tokens: list[int], known: dict[tuple[int, ...], int]) -> np.ndarray:
    """
    The outputs `[tokens, output_size]` of a model of words on a row without padding: that of its word at each token.
    `known` says which embedding a word has.
    """
    words = split_words(tokens, config.first_continuation_id)
    vectors = []
    for word in words:
        x = weights["embed_tokens.weight"][list(word)]
        of_tokens = part(weights, "word_encoder.characters")
        if config.word_encoder == "cnn":
            vector = convolve_word(of_tokens, x)
        else:
            vector = spell_word(config.word_encoder, of_tokens, x)
        if config.word_vocab_size:
            table = weights["word_encoder.table.embed_words.weight"]
            vector = np.concatenate([vector, table[known.get(word, 0)]])
        vectors.append(vector)
    outputs, _ = run_stack(config, weights, np.stack(vectors)[None])
    return np.repeat(outputs[-1][0], [len(word) for word in words], axis=0)


# Scores: (weights, query [query_size], keys [source, key_size], heads, added) -> [heads, source]. `added` are features
# [source, heads, size] of the weights of earlier positions, which go to the projected keys; 0 where there are none.


def score(name: str):
    def register(function):
        SCORES[name] = function
        return function

    return register


def heads_of(features: np.ndarray, heads: int) -> np.ndarray:
    """`[..., size]` to `[..., heads, size / heads]`."""
    return features.reshape(*features.shape[:-1], heads, -1)


@score("dot")
def dot_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """Luong et al. (2015): q . k, the keys brought to the width of the query where it is another."""
    if keys.shape[-1] != query.shape[-1]:
        keys = linear(weights, "key", keys)
    return np.stack([(heads_of(query, heads) * key).sum(-1) for key in heads_of(keys, heads) + added], axis=-1)


@score("scaled_dot")
def scaled_dot_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """Vaswani et al. (2017): q . k / sqrt(d)."""
    return dot_score(weights, query, keys, heads, added) / np.sqrt(query.shape[-1] / heads)


@score("general")
def general_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """Luong et al. (2015): q W k."""
    return dot_score({}, weights["query.weight"] @ query, keys, heads, added)


@score("local")
def local_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """Luong et al. (2015), local-p: a Gaussian around S sigmoid(v . tanh(W q)) in a window of `window`."""
    scores = general_score(weights, query, keys, heads, added)
    predicted = heads_of(weights["vector"] * np.tanh(weights["position.weight"] @ query), heads).sum(-1)
    distance = np.arange(len(keys)) - len(keys) * sigmoid(predicted)[:, None]
    window = weights.get("window", 10)
    sigma = window / 2
    return np.where(abs(distance) <= window, scores - distance**2 / (2 * sigma**2), np.finfo(float).min)


def additive(vector: np.ndarray, query: np.ndarray, keys: np.ndarray, heads: int, added) -> np.ndarray:
    """v . tanh(q + k) for each head."""
    features = np.tanh(heads_of(query + keys, heads) + added)
    return (heads_of(vector, heads) * features).sum(-1).T


@score("additive")
def additive_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """Bahdanau et al. (2015): v . tanh(W_q q + W_k k)."""
    keys = linear(weights, "key", keys)
    return additive(weights["vector"], linear(weights, "query", query), keys, heads, added)


@score("normalized_additive")
def normalized_additive_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """The same with g v / ||v|| for v (Salimans and Kingma, 2016), and a bias."""
    vector = heads_of(weights["vector"], heads)
    vector = weights["gain"][:, None] * vector / np.sqrt((vector**2).sum(-1, keepdims=True))
    return additive_score(weights | {"vector": vector.flatten()}, query, keys, heads, added)


@score("location")
def location_score(weights: Weights, query: np.ndarray, keys: np.ndarray, heads: int, added=0) -> np.ndarray:
    """Chorowski et al. (2015): v . tanh(W_q q + W_k k + U f + b); `added` holds U f."""
    return additive_score(weights, query, keys, heads, added)


def location_features(weights: Weights, alphas: np.ndarray) -> np.ndarray:
    """U f `[source, heads, size]` of weights `[heads, source]`: every filter of a head at every position."""
    heads, source = alphas.shape
    filters = heads_of(weights["location.weight"].swapaxes(0, -1), heads)[:, 0]  # [width, heads, filters]
    half = len(filters) // 2
    features = np.zeros((source, *filters.shape[1:]))
    for position in range(source):
        for offset in range(-half, half + 1):
            if 0 <= position + offset < source:
                features[position] += alphas[:, position + offset, None] * filters[offset + half]
    to_keys = weights["feature.weight"][..., 0].reshape(heads, -1, filters.shape[-1])
    return np.stack([features[:, head] @ to_keys[head].T for head in range(heads)], axis=1)


def added_to_keys(attention_score: str, weights: Weights, alphas: list[np.ndarray], heads: int):
    """
    What the attention adds to its projected keys after positions with the weights `alphas`, each `[heads, source]`: the
    features of the last ones where the score is "location", and w times their sum where there is a w.
    """
    added = 0
    if attention_score == "location" and alphas:
        added = added + location_features(part(weights, "score"), alphas[-1])
    if "coverage.weight" in weights and alphas:
        added = added + sum(alphas).T[..., None] * heads_of(weights["coverage.weight"], heads)
    return added


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(
    attention_score: str,
    weights: Weights,
    query: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    heads: int = 1,
    before: list[np.ndarray] = (),
):
    """
    The context `[value_size]` and the weights `[heads, source]` of one query; zero where there is no token. `before`
    are the weights of the positions before it.
    """
    alphas = np.zeros((heads, len(values)))
    mask = mask.astype(bool)
    if mask.any():
        added = added_to_keys(attention_score, weights, [alpha[:, mask] for alpha in before], heads)
        scores = SCORES[attention_score](part(weights, "score"), query, values[mask], heads, added)
        alphas[:, mask] = softmax(scores)
    context = [alpha @ value for alpha, value in zip(alphas, heads_of(values, heads).swapaxes(0, 1))]
    return np.concatenate(context), alphas


def bridge(config, weights: Weights, finals: list[State]) -> list[State]:
    """
    From the final states of the encoder to the initial ones of the decoder, the top layers side by side: a linear map
    of both directions, and for the hidden state a tanh.
    """
    number = NUM_STATES[config.cell_type]
    states = []
    for index in range(config.decoder_layers):
        below_top = config.decoder_layers - 1 - index
        source = finals[max(0, config.encoder_layers - 1 - below_top)]
        mapped = [
            linear(weights, f"projections.{index}.{kind}", np.concatenate(source[kind::number], axis=-1))
            for kind in range(number)
        ]
        states.append((np.tanh(mapped[0]), *mapped[1:]))
    return states


def step_layers(config, weights: Weights, x: np.ndarray, states: list[State], context: np.ndarray | None = None):
    """One position through all layers; those above the first also read `context`, if there is one."""
    new_states = []
    for index, state in enumerate(states):
        inputs = x if context is None or index == 0 else np.concatenate([x, context])
        cell_weights = part(weights, f"layers.{index}.cell")
        new_states.append(CELL_STEPS[config.cell_type](cell_weights, inputs, state))
        x = new_states[-1][0] + x if config.residual and index > 0 else new_states[-1][0]
    return x, new_states


def decode(config, weights: Weights, embeddings: np.ndarray, values: np.ndarray, mask: np.ndarray, states: list[State]):
    """
    The decoder on one row without padding: `embeddings` `[target, size]`, `values` `[source, size]`, `mask`
    `[source]`. Returns the attentional vectors `[target, hidden]` and the weights `[heads, target, source]`.
    """

    def attend_to(query):
        heads = config.num_attention_heads
        of_attention = part(weights, "attention") | {"score.window": config.attention_window}
        return attend(config.attention_score, of_attention, query, values, mask, heads, alphas)

    fed = np.zeros(config.hidden_size)
    vectors, alphas = [], []
    for x in embeddings:
        if config.decoder_type == "luong":
            top, states = step_layers(config, weights, np.concatenate([x, fed]) if config.input_feeding else x, states)
            context, alpha = attend_to(top)
            vector = fed = np.tanh(linear(weights, "combine", np.concatenate([context, top])))
        elif config.decoder_type == "bahdanau":
            context, alpha = attend_to(states[-1][0])
            top, states = step_layers(config, weights, np.concatenate([x, context]), states)
            vector = np.tanh(linear(weights, "combine", np.concatenate([context, top, x])))
        else:
            (first,) = CELL_STEPS[config.cell_type](part(weights, "layers.0.cell"), x, states[0])[:1]
            context, alpha = attend_to(first)
            vector, states = step_layers(config, weights, x, states, context)
        vectors.append(vector)
        alphas.append(alpha)
    return np.stack(vectors), np.stack(alphas, axis=1)


def seq2seq(
    config, weights: Weights, input_ids: np.ndarray, mask: np.ndarray, targets: np.ndarray, target_mask: np.ndarray
):
    """
    Encoder, bridge and decoder, `weights` being those of the base model. Returns the outputs of the encoder, the
    attentional vectors `[batch, target, hidden]` and the weights `[batch, heads, target, source]`, both zero at
    padding of the target.
    """
    embeddings = weights["shared.weight"]
    encoder_outputs, finals = run_stack(config, part(weights, "encoder"), embeddings[input_ids], mask)
    decoder = part(weights, "decoder")
    states = bridge(config, part(decoder, "bridge"), finals)
    batch, length = targets.shape
    vectors = np.zeros((batch, length, config.hidden_size))
    alphas = np.zeros((batch, config.num_attention_heads, length, input_ids.shape[1]))
    for row, tokens in enumerate(target_mask.astype(bool)):
        if tokens.any():
            first = [tuple(values[row] for values in state) for state in states]
            values = encoder_outputs[-1][row]
            output, alpha = decode(config, decoder, embeddings[targets[row, tokens]], values, mask[row], first)
            vectors[row, tokens], alphas[row][:, tokens] = output, alpha
    return encoder_outputs[-1], vectors, alphas


# Pooling: (weights, outputs of the tokens of one row [tokens, size], bidirectional) -> [output_size]; there is a token.


def pooling(name: str):
    def register(function):
        POOLINGS[name] = function
        return function

    return register


@pooling("last")
def pool_last(weights: Weights, outputs: np.ndarray, bidirectional: bool) -> np.ndarray:
    """The output of the last token read, in each direction."""
    if not bidirectional:
        return outputs[-1]
    half = outputs.shape[-1] // 2
    return np.concatenate([outputs[-1, :half], outputs[0, half:]])


@pooling("mean")
def pool_mean(weights: Weights, outputs: np.ndarray, bidirectional: bool) -> np.ndarray:
    return outputs.sum(0) / len(outputs)


@pooling("max")
def pool_max(weights: Weights, outputs: np.ndarray, bidirectional: bool) -> np.ndarray:
    return outputs.max(0)


@pooling("concat")
def pool_concat(weights: Weights, outputs: np.ndarray, bidirectional: bool) -> np.ndarray:
    return np.concatenate([POOLINGS[name](weights, outputs, bidirectional) for name in ("last", "mean", "max")])


def pooling_weights(weights: Weights, outputs: np.ndarray) -> np.ndarray:
    """`[heads, tokens]`: softmax(w . h), or softmax(w . tanh(W h + b)) as Yang et al. (2016) do, for each head."""
    if "projection.weight" in weights:
        outputs = np.tanh(linear(weights, "projection", outputs))
    return np.stack([softmax(scores) for scores in linear(weights, "score", outputs).T])


@pooling("attention")
def pool_attention(weights: Weights, outputs: np.ndarray, bidirectional: bool) -> np.ndarray:
    """Lin et al. (2017): a weighted mean for each head, side by side."""
    return np.concatenate([head @ outputs for head in pooling_weights(weights, outputs)])


def pool(name: str, weights: Weights, outputs: np.ndarray, mask: np.ndarray, bidirectional: bool) -> np.ndarray:
    """Pools `[batch, seq, size]` row by row over the tokens; a row without any gives zeros."""
    heads = len(weights["score.weight"]) if name == "attention" else 1
    size = outputs.shape[-1] * (3 if name == "concat" else heads)
    pooled = np.zeros((len(outputs), size))
    for row, tokens in enumerate(mask.astype(bool)):
        if tokens.any():
            pooled[row] = POOLINGS[name](weights, outputs[row, tokens], bidirectional)
    return pooled


# Readers: what the first layer is told, and the span heads, (config, weights, outputs [tokens, size], number of tokens
# of the question, positions [places] where an answer may stand, the first of them for none) -> scores [places, 2].


def span_head(name: str):
    def register(function):
        SPAN_HEADS[name] = function
        return function

    return register


def tell_the_question(weights: Weights, embeddings: np.ndarray, ids: np.ndarray, asked: int, texts: np.ndarray):
    """Chen et al. (2017): at tokens `texts` a map of the aligned question and the exact match is added."""
    told = embeddings.copy()
    compared = np.maximum(linear(weights, "alignment", embeddings), 0)
    for i in texts:
        aligned = np.zeros(embeddings.shape[1])
        if asked:
            aligned = softmax(compared[:asked] @ compared[i]) @ embeddings[:asked]
        features = np.concatenate([aligned, [float(ids[i] in ids[:asked])]])
        told[i] += linear(weights, "projection", features)
    return told


@span_head("aligned")
def aligned_spans(config, weights: Weights, outputs: np.ndarray, asked: int, places: np.ndarray, texts: np.ndarray):
    """Chen et al. (2017): q = sum b_j u_j, h (W q + b)."""
    question = np.zeros(outputs.shape[1])
    if asked:
        question = softmax(linear(weights, "score", outputs[:asked])[:, 0]) @ outputs[:asked]
    return np.stack([outputs[places] @ linear(weights, name, question) for name in ("start", "end")], axis=-1)


@span_head("flow")
def flow_spans(config, weights: Weights, outputs: np.ndarray, asked: int, places: np.ndarray, texts: np.ndarray):
    """Seo et al. (2017), with the fusion of Clark and Gardner (2018)."""
    w = np.concatenate([weights[f"{name}_score.weight"][0] for name in ("context", "question", "product")])
    question, size = outputs[:asked], outputs.shape[1]
    scores = np.array([[w @ np.concatenate([h, u, h * u]) for u in question] for h in outputs]).reshape(
        len(outputs), asked
    )
    to_context = np.zeros(size)
    if asked and len(texts):
        to_context = softmax(scores[texts].max(1)) @ outputs[texts]
    fused = []
    for t in places:
        to_question = softmax(scores[t]) @ question if asked else np.zeros(size)
        parts = [outputs[t], to_question, outputs[t] * to_question, outputs[t] * to_context]
        fused.append(np.maximum(linear(weights, "fusion", np.concatenate(parts)), 0))
    layers, hidden = [], np.stack(fused)
    for name in ("modeling", "end_modeling"):
        output, _, _ = run_layer(config.cell_type, part(weights, name), hidden[None])
        hidden = output[0] + hidden if config.residual else output[0]
        layers.append(hidden)
    logits = [
        linear(weights, name, np.concatenate([fused, layer], axis=-1)) for name, layer in zip(("start", "end"), layers)
    ]
    return np.concatenate(logits, axis=-1)


def read(config, weights: Weights, input_ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None):
    """Logits of start and end `[batch, seq, 2]` row by row; minus infinity where no answer may stand."""
    logits = np.full((*input_ids.shape, 2), -np.inf)
    separator = config.eos_token_id if config.sep_token_id is None else config.sep_token_id
    for row, tokens in enumerate(mask.astype(bool)):
        ids, (positions,) = input_ids[row, tokens], np.nonzero(tokens)
        if not len(ids):
            continue
        if types is not None and types[row, tokens].any():
            question = types[row, tokens] == 0
        else:
            ends = np.nonzero(ids == separator)[0]
            question = np.arange(len(ids)) <= (ends[0] if len(ends) else -1)
        asked = int(question.sum())
        assert question[:asked].all(), "the reference reads questions that stand first"
        texts = np.nonzero(~question & (ids != separator))[0]
        places = np.union1d([0], texts)
        embeddings = weights["model.embed_tokens.weight"][ids]
        told = tell_the_question(part(weights, "question_features"), embeddings, ids, asked, texts)
        outputs = run_stack(config, part(weights, "model"), told[None])[0][-1][0]
        head = SPAN_HEADS[config.question_attention]
        scores = head(config, part(weights, "qa_outputs"), outputs, asked, places, texts)
        logits[row, positions[places]] = scores
    return logits


def all_paths(weights: Weights, emissions: np.ndarray) -> dict[tuple[int, ...], float]:
    """
    The score of every path of labels over the tokens of one row `[tokens, labels]`, Lample et al. (2016): that of the
    first label, of each label at its token, of each label behind the one before, and of the last label.
    """
    tokens, num_labels = emissions.shape
    scores = {}
    for path in np.ndindex(*[num_labels] * tokens):
        score = sum(emissions[token, label] for token, label in enumerate(path))
        score += sum(weights["transitions"][before, label] for before, label in itertools.pairwise(path))
        if path:
            score += weights["start_transitions"][path[0]] + weights["end_transitions"][path[-1]]
        scores[path] = float(score)
    return scores
