"""Runs exported models with NumPy and ONNX Runtime alone: no torch, no transformers, nothing of this package.

`python -m hf_rnn export` puts a copy of this file beside the graphs, so that the folder is all that a program needs:

    from runner import load  # in an exported folder; `from hf_rnn.export import load` where the library is installed

    model = load(".")
    print(model.generate(model.encode(["Once upon a time"]).input_ids, max_new_tokens=20))

The text methods need `tokenizers` besides. What was exported with `--format torch` is for `torch.export.load`, after
`import hf_rnn`, and not for this file. `generate` chooses tokens as `generate()` of transformers does.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


DESCRIPTION_FILE = "graphs.json"
FORMAT_VERSION = 1

State = dict[str, np.ndarray]  # by name, each `[batch, size]`

# What `generate` takes, from the call or from generation_config.json, and what stands where neither says anything.
GENERATION_DEFAULTS: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "renormalize_logits": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "decoder_start_token_id": None,
}
# Fields of generation_config.json that would change the tokens and that the runner does not know, with the values at
# which they change nothing (None never does).
UNSUPPORTED: dict[str, tuple] = {
    "assistant_early_exit": (),
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}
# These look back at tokens that a stream no longer has.
NEEDS_HISTORY = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "num_beams": 1}
DEFAULT_NEW_TOKENS = 20
NEVER = np.float32(-1e9)  # the score of what must not be chosen, as in transformers


class Encoding(NamedTuple):
    """Token ids and attention mask `[batch, seq]` of texts."""

    input_ids: np.ndarray
    attention_mask: np.ndarray


def load(folder: str | Path, **options) -> "OnnxModel":
    """
    The runner for an exported folder.

    Args:
        folder (`str` or `Path`): What `python -m hf_rnn export` wrote.
        options: `threads` and `providers` of [`OnnxModel`].

    Returns:
        [`OnnxLanguageModel`], [`OnnxTranslator`] or [`OnnxEncoder`].

    Raises:
        `FileNotFoundError`: The folder holds no exported model.
        `ValueError`: It was written by a later version, or for `torch.export.load`.
        `ImportError`: ONNX Runtime is not installed.
    """
    kind = _read_description(folder)["kind"]
    return {"language_model": OnnxLanguageModel, "translator": OnnxTranslator, "encoder": OnnxEncoder}[kind](
        folder, **options
    )


def _read_description(folder: str | Path) -> dict:
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no exported model: there is no {DESCRIPTION_FILE} in it.")
    description = json.loads(path.read_text(encoding="utf-8"))
    if description["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"`format_version` of {path} must be at most {FORMAT_VERSION}, got {description['format_version']}: use "
            "the runner that lies in the folder, or a later version of hf_rnn."
        )
    if description["format"] != "onnx":
        files = ", ".join(graph["file"] for graph in description["graphs"].values())
        raise ValueError(
            f"`format` of {path} must be 'onnx', got {description['format']!r}: open {files} with `torch.export.load` "
            "after `import hf_rnn`, or export the model with `format` 'onnx'."
        )
    return description


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class OnnxModel:
    """
    What all runners share: the graphs, the configuration, the tokenizer.

    Args:
        folder (`str` or `Path`): The exported folder.
        threads (`int`, *optional*): How many threads a graph may use; ONNX Runtime decides where not given.
        providers (`Sequence[str]`, *optional*): Execution providers of ONNX Runtime; by default the CPU.
    """

    kind = ""
    padding_side = "right"

    def __init__(self, folder: str | Path, threads: int | None = None, providers: Sequence[str] | None = None):
        self.folder = Path(folder)
        self.description = _read_description(folder)
        if self.description["kind"] != self.kind:
            raise ValueError(f"{folder} holds a {self.description['kind']}, not a {self.kind}: open it with `load`.")
        self.config = _read_json(self.folder / "config.json")
        self.generation_config = _read_json(self.folder / "generation_config.json")
        self.graphs = {
            name: _Graph(self.folder / graph["file"], threads, providers)
            for name, graph in self.description["graphs"].items()
        }
        self._tokenizer = None

    @property
    def tokenizer(self):
        """The `tokenizers.Tokenizer` of the folder."""
        if self._tokenizer is None:
            path = self.folder / "tokenizer.json"
            if not path.is_file():
                raise FileNotFoundError(f"{self.folder} holds no tokenizer.json: work with token ids.")
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise ImportError("Texts need the package tokenizers: pip install tokenizers") from error
            self._tokenizer = Tokenizer.from_file(str(path))
        return self._tokenizer

    def encode(self, texts: Sequence[str]) -> Encoding:
        """Token ids and mask of texts, padded to one length."""
        if isinstance(texts, str):
            raise ValueError("`texts` must be a list of strings, got one string.")
        rows = [self.tokenizer.encode(text).ids for text in texts]
        length = max(1, max(map(len, rows), default=1))
        pad = self.config.get("pad_token_id")
        input_ids = np.full((len(rows), length), 0 if pad is None else pad, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if self.padding_side == "right" else slice(length - len(row), length)
            input_ids[index, place] = row
            mask[index, place] = 1
        return Encoding(input_ids, mask)

    def decode(self, input_ids: np.ndarray) -> list[str]:
        """Texts of token ids `[batch, seq]`, without special tokens."""
        padding = self.config.get("pad_token_id")
        rows = [[int(token) for token in row if token != padding] for row in input_ids]
        return self.tokenizer.decode_batch(rows, skip_special_tokens=True)


class _Graph:
    """One ONNX file, called with arrays by name."""

    def __init__(self, path: Path, threads: int | None, providers: Sequence[str] | None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                "Exported models need ONNX Runtime: pip install onnxruntime, or `hf_rnn[onnx]` with the library."
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers or ["CPUExecutionProvider"])
        )
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The exporter leaves out inputs on which nothing depends.
        feeds = {name: arrays[name] for name in self.inputs}
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds)))


class OnnxEncoder(OnnxModel):
    """A model without a state: classification, tagging, question answering, cloze, features."""

    kind = "encoder"

    def __call__(self, input_ids, attention_mask=None) -> dict[str, np.ndarray]:
        """
        Args:
            input_ids (array of shape `(batch, seq)`; `(batch, choices, seq)` for multiple choice): Token ids.
            attention_mask (array of that shape, *optional*): Non-zero where there is a token.

        Returns:
            The outputs of the model by name: `logits`, `start_logits` and `end_logits`, or `last_hidden_state`.
        """
        dimensions = 3 if len(self.description["graphs"]["model"]["inputs"]["input_ids"]["shape"]) == 3 else 2
        input_ids = _token_ids(input_ids, self.config["vocab_size"], dimensions)
        return self.graphs["model"]({"input_ids": input_ids, "attention_mask": _mask(attention_mask, input_ids.shape)})


class _Generator(OnnxModel):
    """What generates: a state, and the choice of tokens."""

    @property
    def state_sizes(self) -> dict[str, int]:
        """The width of each state by name."""
        return {state["name"]: state["size"] for state in self.description["states"]}

    def _settings(self, options: dict) -> dict[str, Any]:
        return read_settings(self.generation_config, options, self.config["vocab_size"])

    def _past(self, state: State) -> dict[str, np.ndarray]:
        return {f"past.{name}": state[name] for name in self.state_sizes}

    def _present(self, results: dict[str, np.ndarray]) -> State:
        return {name: results[f"present.{name}"] for name in self.state_sizes}

    def _check_state(self, state: State, batch: int) -> None:
        for name, size in self.state_sizes.items():
            if name not in state:
                raise ValueError(f"`state` must hold {sorted(self.state_sizes)}, got {sorted(state)}.")
            if state[name].shape != (batch, size):
                raise ValueError(f"`state[{name!r}]` must have the shape {(batch, size)}, got {state[name].shape}.")


def _token_ids(input_ids, vocab_size: int, dimensions: int = 2) -> np.ndarray:
    input_ids = np.asarray(input_ids)
    if input_ids.ndim != dimensions or 0 in input_ids.shape or input_ids.dtype.kind not in "iu":
        shape = "(batch, seq)" if dimensions == 2 else "(batch, choices, seq)"
        raise ValueError(
            f"`input_ids` must be integers of the shape {shape} with at least one token, got {input_ids.dtype} of the "
            f"shape {input_ids.shape}."
        )
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        raise ValueError(
            f"`input_ids` must lie between 0 and {vocab_size - 1}, got {input_ids.min()} to {input_ids.max()}."
        )
    return input_ids.astype(np.int64)


def _mask(attention_mask, shape: tuple[int, ...]) -> np.ndarray:
    if attention_mask is None:
        return np.ones(shape, dtype=np.int64)
    attention_mask = np.asarray(attention_mask)
    if attention_mask.shape != shape:
        raise ValueError(f"`attention_mask` must have the shape {shape}, got {attention_mask.shape}.")
    return (attention_mask != 0).astype(np.int64)


def _take_rows(state: State, rows: np.ndarray) -> State:
    return {name: values[rows] for name, values in state.items()}


class OnnxLanguageModel(_Generator):
    """
    A language model whose state has a fixed size however long the text.

    Args:
        folder, threads, providers: As in [`OnnxModel`].
    """

    kind = "language_model"
    padding_side = "left"

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token."""
        return {
            state["name"]: np.full((batch, state["size"]), state["initial"], dtype=np.float32)
            for state in self.description["states"]
        }

    def __call__(
        self, input_ids, attention_mask=None, state: State | None = None, positions: Sequence[int] | None = None
    ) -> tuple[np.ndarray, State]:
        """
        Reads tokens.

        Args:
            input_ids (array of shape `(batch, seq)`): The tokens.
            attention_mask (array of shape `(batch, seq)`, *optional*): Non-zero where there is a token.
            state (`dict`, *optional*): The state to go on from.
            positions (`Sequence[int]`, *optional*): For which positions logits are asked; all by default.

        Returns:
            The logits `(batch, positions, vocab_size)` and the state after the last token.

        Raises:
            `ValueError`: Ids, mask or state of a wrong shape or range.
        """
        input_ids = _token_ids(input_ids, self.config["vocab_size"])
        batch, length = input_ids.shape
        if state is None:
            state = self.initial_state(batch)
        self._check_state(state, batch)
        if length == 1 and attention_mask is None:
            return self._step(input_ids, state)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": _mask(attention_mask, input_ids.shape),
            "positions": np.arange(length)[list(range(length) if positions is None else positions)],
            **self._past(state),
        }
        results = self.graphs["model"](arrays)
        return results["logits"], self._present(results)

    def _step(self, input_ids: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        results = self.graphs["step"]({"input_ids": input_ids, **self._past(state)})
        return results["logits"], self._present(results)

    def _next(self, tokens: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        logits, state = self._step(tokens[:, None], state)
        return logits[:, -1], state

    def generate(
        self, input_ids=None, attention_mask=None, state: State | None = None, seed=None, **options
    ) -> np.ndarray:
        """
        Continues prompts, with the tokens that `generate()` of transformers would choose (sampling draws from the same
        distribution with NumPy's generator).

        Args:
            input_ids (array of shape `(batch, seq)`, *optional*): The prompts; `bos_token_id` where not given.
            attention_mask (array of shape `(batch, seq)`, *optional*):
                Zero at padding, which lies at the left. By default nothing is padding.
            state (`dict`, *optional*): The state to go on from.
            seed (`int` or `numpy.random.Generator`, *optional*): For sampling.
            options: The fields of `GENERATION_DEFAULTS`, which take precedence over generation_config.json.

        Returns:
            The tokens `(batch * num_return_sequences, length)`, prompts included.

        Raises:
            `ValueError`: An option that is unknown or out of range, or inputs of a wrong shape.
        """
        settings = self._settings(options)
        if input_ids is None:
            if settings["bos_token_id"] is None:
                raise ValueError("`input_ids` must be given: `bos_token_id` is not set.")
            input_ids = _first_tokens("bos_token_id", settings, 1, self.config["vocab_size"])
        input_ids = _token_ids(input_ids, self.config["vocab_size"])
        attention_mask = _mask(attention_mask, input_ids.shape)
        logits, state = self(input_ids, attention_mask, state, positions=[-1])
        return _generate(input_ids, attention_mask, logits[:, -1], state, lambda rows: self._next, settings, seed)

    def stream(self, input_ids=None, state: State | None = None, seed=None, **options) -> "Stream":
        """
        Continues one prompt token by token, in constant memory.

        Args:
            input_ids (array of shape `(seq,)` or `(1, seq)`, *optional*):
                The prompt. Not needed where `state` is that of a [`Stream`], which knows what comes next.
            state (`dict`, *optional*): The state to go on from.
            seed (`int` or `numpy.random.Generator`, *optional*): For sampling.
            options: As in [`~OnnxLanguageModel.generate`], without those that look back at earlier tokens. Without
                `max_new_tokens` the stream ends at `eos_token_id`, or never.

        Returns:
            [`Stream`]: An iterator of token ids.
        """
        settings = self._settings(options)
        if input_ids is None and state is not None and "logits" in state:
            self._check_state(state, 1)
            return Stream(self._next, state["logits"], state, settings, seed)
        if input_ids is None:
            raise ValueError("`input_ids` must be given where `state` is not that of a stream.")
        input_ids = np.atleast_2d(np.asarray(input_ids))
        if input_ids.shape[0] != 1:
            raise ValueError(f"`input_ids` must be one sequence, got {input_ids.shape[0]}.")
        logits, state = self(input_ids, None, state, positions=[-1])
        return Stream(self._next, logits[:, -1], state, settings, seed, prompt_length=input_ids.shape[1])

    def complete(self, texts: Sequence[str], seed=None, **options) -> list[str]:
        """Texts with their continuations; `options` as in [`~OnnxLanguageModel.generate`]."""
        return self.decode(self.generate(*self.encode(texts), seed=seed, **options))


class Memory(NamedTuple):
    """What the decoder attends to; each begins with the dimension of the batch."""

    keys: np.ndarray
    values: np.ndarray
    mask: np.ndarray

    def repeat(self, times: int) -> "Memory":
        """Every row `times` times in a row."""
        return self if times == 1 else Memory(*(np.repeat(array, times, axis=0) for array in self))


class OnnxTranslator(_Generator):
    """
    An encoder-decoder.

    Args:
        folder, threads, providers: As in [`OnnxModel`].
    """

    kind = "translator"

    def read(self, input_ids, attention_mask=None) -> tuple[Memory, State]:
        """
        Reads sources.

        Args:
            input_ids (array of shape `(batch, source)`): The source tokens.
            attention_mask (array of shape `(batch, source)`, *optional*): Non-zero where there is a token.

        Returns:
            What the decoder attends to, and its state before the first token.
        """
        input_ids = _token_ids(input_ids, self.config["vocab_size"])
        mask = _mask(attention_mask, input_ids.shape)
        results = self.graphs["encoder"]({"input_ids": input_ids, "attention_mask": mask})
        return Memory(results["memory.keys"], results["memory.values"], mask), self._present(results)

    def step(self, tokens, state: State, memory: Memory) -> tuple[np.ndarray, State, np.ndarray]:
        """
        Reads one target token per row.

        Args:
            tokens (array of shape `(rows,)`): The tokens.
            state (`dict`): The state before them.
            memory (`Memory`): What is attended to, with as many rows.

        Returns:
            The output `(rows, vocab_size)` (logits, or features of a model without a head), the new state, and the
            attention weights `(rows, heads, source)`.
        """
        results = self.graphs["decoder"](
            {
                "input_ids": np.asarray(tokens, dtype=np.int64)[:, None],
                "memory.keys": memory.keys,
                "memory.values": memory.values,
                "memory.mask": memory.mask,
                **self._past(state),
            }
        )
        output = results["logits"] if "logits" in results else results["last_hidden_state"]
        return output[:, -1], self._present(results), results["cross_attentions"][:, :, -1]

    def _next(self, memory: Memory):
        def read_tokens(tokens: np.ndarray, state: State) -> tuple[np.ndarray, State]:
            return self.step(tokens, state, memory)[:2]

        return read_tokens

    def _begin(self, input_ids, attention_mask, decoder_input_ids, settings):
        if "logits" not in self.graphs["decoder"].outputs:
            raise ValueError("This model has no projection to the vocabulary and cannot generate.")
        memory, state = self.read(input_ids, attention_mask)
        batch = len(memory.mask)
        name = "bos_token_id" if settings["decoder_start_token_id"] is None else "decoder_start_token_id"
        if settings[name] is None:
            raise ValueError("`decoder_start_token_id` or `bos_token_id` must be set, got None for both.")
        start = _first_tokens(name, settings, batch, self.config["vocab_size"])
        if decoder_input_ids is None:
            decoder_input_ids = start
        decoder_input_ids = _token_ids(decoder_input_ids, self.config["vocab_size"])
        if len(decoder_input_ids) != batch:
            raise ValueError(f"`decoder_input_ids` must have {batch} rows, got {len(decoder_input_ids)}.")
        if (decoder_input_ids[:, :1] != start).all():  # as transformers: where no row begins with it
            decoder_input_ids = np.concatenate([start, decoder_input_ids], axis=1)
        for tokens in decoder_input_ids.T:
            logits, state, _ = self.step(tokens, state, memory)
        return memory, decoder_input_ids, logits, state

    def generate(self, input_ids, attention_mask=None, decoder_input_ids=None, seed=None, **options) -> np.ndarray:
        """
        Translates, with the tokens that `generate()` of transformers would choose.

        Args:
            input_ids (array of shape `(batch, source)`): The source tokens.
            attention_mask (array of shape `(batch, source)`, *optional*): Non-zero where there is a token.
            decoder_input_ids (array of shape `(batch, target)`, *optional*):
                How the targets begin; `decoder_start_token_id` comes before it where no row begins with that.
            seed (`int` or `numpy.random.Generator`, *optional*): For sampling.
            options: The fields of `GENERATION_DEFAULTS`, which take precedence over generation_config.json.

        Returns:
            The tokens `(batch * num_return_sequences, length)`, from the start token on.

        Raises:
            `ValueError`: An option that is unknown or out of range, or inputs of a wrong shape.
        """
        settings = self._settings(options)
        memory, prefix, logits, state = self._begin(input_ids, attention_mask, decoder_input_ids, settings)
        return _generate(
            prefix, None, logits, state, lambda repeats: self._next(memory.repeat(repeats)), settings, seed
        )

    def stream(self, input_ids, attention_mask=None, decoder_input_ids=None, seed=None, **options) -> "Stream":
        """Translates one source token by token; arguments as in [`~OnnxTranslator.generate`]."""
        settings = self._settings(options)
        memory, prefix, logits, state = self._begin(input_ids, attention_mask, decoder_input_ids, settings)
        if len(prefix) != 1:
            raise ValueError(f"`input_ids` must be one source, got {len(prefix)}.")
        return Stream(self._next(memory), logits, state, settings, seed, prompt_length=prefix.shape[1])

    def translate(self, texts: Sequence[str], seed=None, **options) -> list[str]:
        """Translations of texts; `options` as in [`~OnnxTranslator.generate`]."""
        return self.decode(self.generate(*self.encode(texts), seed=seed, **options))


class Stream(Iterator[int]):
    """
    An iterator of token ids that holds one state and nothing of what went before.

    Its `state` may be kept, saved with `numpy.savez`, and given to `stream` again, which then goes on from there.
    """

    def __init__(self, read_tokens, logits, state, settings, seed=None, prompt_length: int = 0):
        changed = sorted(name for name, neutral in NEEDS_HISTORY.items() if settings[name] != neutral)
        if changed:
            raise ValueError(f"A stream cannot look back, which {changed} would have to: leave them at their defaults.")
        self._read_tokens = read_tokens
        self._logits = logits
        self._state = {name: values for name, values in state.items() if name != "logits"}
        self._unread: np.ndarray | None = None
        self._generator = np.random.default_rng(seed)
        self._settings = settings
        self._length, self._first_length = prompt_length, prompt_length
        self._max_length = None
        if settings["max_new_tokens"] is not None:
            self._max_length = prompt_length + settings["max_new_tokens"]
        elif settings["max_length"] is not None:
            self._max_length = settings["max_length"]
        self._is_finished = False

    def _read(self) -> None:
        if self._unread is not None:
            self._logits, self._state = self._read_tokens(self._unread, self._state)
            self._unread = None

    def __next__(self) -> int:
        if self._is_finished or (self._max_length is not None and self._length >= self._max_length):
            raise StopIteration
        self._read()
        scores = _process(
            np.empty((1, self._length), dtype=np.int64),
            np.array(self._logits, dtype=np.float32),
            self._settings,
            self._first_length,
            self._max_length,
        )
        token = _choose(scores, self._settings, self._generator)
        self._unread = token
        self._length += 1
        self._is_finished = int(token[0]) in _end_tokens(self._settings)
        return int(token[0])

    @property
    def state(self) -> State:
        """The state after all tokens so far, with the `logits` of the next."""
        self._read()
        return {**self._state, "logits": self._logits}


def read_settings(generation_config: dict, options: dict, vocab_size: int) -> dict[str, Any]:
    """
    The options of a generation: defaults, then the file, then the call. Fields of the file that do not change the
    tokens are left out.

    Raises:
        `ValueError`: An option is unknown, not supported here, or out of range.
    """
    unknown = sorted(options.keys() - GENERATION_DEFAULTS.keys() - UNSUPPORTED.keys())
    if unknown:
        raise ValueError(f"Options of `generate` must be among {sorted(GENERATION_DEFAULTS)}, got {unknown}.")
    given = {**generation_config, **options}
    for name, neutral in UNSUPPORTED.items():
        if given.get(name) is not None and given[name] not in neutral:
            raise ValueError(f"`{name}` is not supported here: leave it at its default, got {given[name]!r}.")
    settings = dict(GENERATION_DEFAULTS)
    for name in GENERATION_DEFAULTS:
        if given.get(name) is not None:
            settings[name] = given[name]
    if settings["min_new_tokens"] is not None:
        settings["min_length"] = 0
    for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {settings[name]!r}.")
    for name in ("temperature", "repetition_penalty") if settings["do_sample"] else ("repetition_penalty",):
        if not settings[name] > 0:
            raise ValueError(f"`{name}` must be a positive number, got {settings[name]!r}.")
    for name in ("top_p", "min_p") if settings["do_sample"] else ():
        if settings[name] is not None and not 0 <= settings[name] <= 1:
            raise ValueError(f"`{name}` must lie between 0 and 1, got {settings[name]!r}.")
    if settings["do_sample"] and (not isinstance(settings["top_k"], int | np.integer) or settings["top_k"] < 0):
        raise ValueError(f"`top_k` must be an integer of at least 0, which allows all, got {settings['top_k']!r}.")
    if settings["early_stopping"] not in (True, False, "never"):
        raise ValueError(f"`early_stopping` must be True, False or 'never', got {settings['early_stopping']!r}.")
    limit = settings["num_beams"] if settings["num_beams"] > 1 or not settings["do_sample"] else None
    if limit is not None and settings["num_return_sequences"] > limit:
        raise ValueError(
            f"`num_return_sequences` must be at most `num_beams` ({limit}) without sampling, got "
            f"{settings['num_return_sequences']}."
        )
    _read_token_ids(settings, vocab_size)
    return settings


def _read_token_ids(settings: dict, vocab_size: int) -> None:
    """
    Makes lists of the options that are one token or several. What ends or is suppressed may lie outside of the
    vocabulary, where it does nothing, as in transformers.
    """
    for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        if settings[name] is not None:
            settings[name] = _as_ids(name, settings[name])
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if settings[name] is None:
            continue
        settings[name] = _as_ids(name, settings[name], vocab_size)
        if settings["suppress_tokens"] and set(settings[name]) <= set(settings["suppress_tokens"]):
            raise ValueError(f"`{name}` must not be among `suppress_tokens`, got {settings[name]} for it.")
    words = settings["bad_words_ids"]
    if words is not None:
        if not isinstance(words, Sequence) or not words or not all(isinstance(word, Sequence) for word in words):
            raise ValueError(f"`bad_words_ids` must be a list of lists of token ids, got {words!r}.")
        settings["bad_words_ids"] = [_as_ids("bad_words_ids", word, vocab_size) for word in words if word]
    if settings["pad_token_id"] is None and settings["eos_token_id"]:
        settings["pad_token_id"] = settings["eos_token_id"][0]


def _as_ids(name: str, value, vocab_size: int | None = None) -> list[int]:
    """The token ids of an option that is one or several of them; with `vocab_size` they must be in the vocabulary."""
    ids = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(token, int | np.integer) for token in ids):
        raise ValueError(f"`{name}` must be token ids, which are integers, got {value!r}.")
    if vocab_size is not None and not all(0 <= token < vocab_size for token in ids):
        raise ValueError(f"`{name}` must lie between 0 and {vocab_size - 1}, got {value!r}.")
    return ids


def _first_tokens(name: str, settings: dict, rows: int, vocab_size: int) -> np.ndarray:
    """The tokens `[rows, 1]` with which sequences begin by the option `name`: one for all, or a list of them."""
    tokens = _as_ids(name, settings[name], vocab_size)
    if isinstance(settings[name], Iterable) and len(tokens) != rows:
        raise ValueError(
            f"`{name}` must be one token id or a list of {rows}, one for each row, got {settings[name]!r}."
        )
    return np.full((rows, 1), np.array(tokens)[:, None], dtype=np.int64)


def _end_tokens(settings: dict) -> list[int]:
    return settings["eos_token_id"] or []


def _forbid(scores: np.ndarray, tokens: Sequence[int]) -> None:
    """Rules tokens out; those outside of the vocabulary are none."""
    scores[:, [token for token in tokens if 0 <= token < scores.shape[1]]] = -np.inf


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(_log_softmax(scores.astype(np.float64)))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest numbers of each row, the largest first."""
    if count < scores.shape[-1]:
        places = np.argpartition(-scores, count - 1, axis=-1)[..., :count]
    else:
        places = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, places, -1), axis=-1, kind="stable")
    return np.take_along_axis(places, order, -1)


def _process(
    sequences: np.ndarray,
    scores: np.ndarray,
    settings: dict,
    prompt_length: int,
    max_length: int | None,
    padding: np.ndarray | None = None,
) -> np.ndarray:
    """
    What the options make of the scores `[rows, vocab_size]` (changed in place) of the next token after the sequences
    `[rows, length]`. `padding` counts the tokens at the left of each row that are none.
    """
    length = sequences.shape[1]
    end_tokens = _end_tokens(settings)
    if settings["repetition_penalty"] != 1.0:
        for row, tokens in enumerate(sequences):
            tokens = tokens[0 if padding is None else padding[row] :]
            known = scores[row, tokens]
            penalty = np.float32(settings["repetition_penalty"])
            scores[row, tokens] = np.where(known < 0, known * penalty, known / penalty)
    size = settings["no_repeat_ngram_size"]
    if size > 0 and length >= size:
        windows = np.lib.stride_tricks.sliding_window_view(sequences, size, axis=1)
        repeats = (windows[:, :, :-1] == sequences[:, None, length + 1 - size :]).all(-1)
        row, place = np.nonzero(repeats)
        scores[row, windows[row, place, -1]] = -np.inf
    for words in settings["bad_words_ids"] or ():
        *start, last = words
        if not start and last in end_tokens:
            continue
        if len(start) <= length:
            matches = (sequences[:, length - len(start) :] == np.array(start, dtype=np.int64)).all(-1)
            scores[matches, last] = -np.inf
    if length < settings["min_length"]:
        _forbid(scores, end_tokens)
    if settings["min_new_tokens"] is not None and length - prompt_length < settings["min_new_tokens"]:
        _forbid(scores, end_tokens)
    forced = settings["forced_bos_token_id"] if length == 1 else None
    if max_length is not None and length == max_length - 1 and settings["forced_eos_token_id"] is not None:
        forced = settings["forced_eos_token_id"]
    if forced is not None:
        scores[:] = -np.inf
        scores[:, forced] = 0
    if settings["suppress_tokens"] is not None:
        _forbid(scores, settings["suppress_tokens"])
    if settings["begin_suppress_tokens"] is not None:
        begins_later = prompt_length <= 1 and settings["forced_bos_token_id"] is not None
        if length == prompt_length + int(begins_later):
            _forbid(scores, settings["begin_suppress_tokens"])
    if settings["do_sample"]:
        scores = _narrow(scores, settings, 1 if settings["num_beams"] == 1 else max(2, len(end_tokens) + 1))
    return _log_softmax(scores) if settings["renormalize_logits"] else scores


def _narrow(scores: np.ndarray, settings: dict, at_least: int) -> np.ndarray:
    """The options of sampling: temperature, and which tokens may be drawn, of which there are always `at_least`."""
    scores = scores / np.float32(settings["temperature"])
    if settings["top_k"]:
        count = min(max(settings["top_k"], at_least), scores.shape[-1])
        smallest = np.partition(scores, -count, axis=-1)[:, -count, None]
        scores = np.where(scores < smallest, -np.inf, scores)
    if settings["top_p"] < 1.0:
        order = np.argsort(scores, axis=-1, kind="stable")
        rising = _softmax(np.take_along_axis(scores, order, -1)).cumsum(-1)
        removed = rising <= 1 - settings["top_p"]
        removed[:, -at_least:] = False
        is_removed = np.empty_like(removed)
        np.put_along_axis(is_removed, order, removed, -1)
        scores = np.where(is_removed, -np.inf, scores)
    if settings["min_p"] is not None:
        probabilities = _softmax(scores)
        is_removed = probabilities < settings["min_p"] * probabilities.max(-1, keepdims=True)
        np.put_along_axis(is_removed, _largest(scores, min(at_least, scores.shape[-1])), False, -1)
        scores = np.where(is_removed, -np.inf, scores)
    return scores


def _choose(scores: np.ndarray, settings: dict, generator: np.random.Generator) -> np.ndarray:
    """One token for each row of scores: the best one, or one that is drawn."""
    if not settings["do_sample"]:
        return scores.argmax(-1)
    reached = _softmax(scores).cumsum(-1)
    drawn = generator.random((len(scores), 1)) * reached[:, -1:]
    return (reached <= drawn).sum(-1).clip(max=scores.shape[-1] - 1)


def _generate(
    prompts: np.ndarray,
    attention_mask: np.ndarray | None,
    logits: np.ndarray,
    state: State,
    reader: Callable[[int], Callable[[np.ndarray, State], tuple[np.ndarray, State]]],
    settings: dict,
    seed,
) -> np.ndarray:
    """
    Continues `prompts` `[batch, seq]` by search or sampling.

    Args:
        logits (array of shape `(batch, vocab_size)`): For the first new token.
        state (`dict`): The state after the prompts.
        reader: Makes, for a number of rows that stand for each prompt, what reads one token `[rows]` per row.
    """
    prompt_length = prompts.shape[1]
    if settings["max_new_tokens"] is not None:
        max_length = prompt_length + settings["max_new_tokens"]
    elif settings["max_length"] is not None:
        max_length = settings["max_length"]
    else:
        max_length = prompt_length + DEFAULT_NEW_TOKENS
    if prompt_length >= max_length:
        raise ValueError(
            f"`max_length` must be more than the {prompt_length} tokens of the prompt, got {max_length}; "
            "`max_new_tokens` counts without the prompt."
        )
    padding = None if attention_mask is None else attention_mask.argmax(-1)
    generator = np.random.default_rng(seed)
    repeats = settings["num_beams"] if settings["num_beams"] > 1 else settings["num_return_sequences"]
    rows = np.repeat(np.arange(len(prompts)), repeats)
    prompts, logits, state = prompts[rows], logits[rows], _take_rows(state, rows)
    padding = None if padding is None else padding[rows]

    def process(sequences, scores):
        return _process(sequences, scores, settings, prompt_length, max_length, padding)

    search = _beam_search if settings["num_beams"] > 1 else _extend
    return search(prompts, logits, state, reader(repeats), process, settings, max_length, generator)


def _extend(sequences, logits, state, read_tokens, process, settings, max_length, generator) -> np.ndarray:
    """Greedy search and sampling: one token after the other, padding behind the end."""
    end_tokens = _end_tokens(settings)
    is_running = np.ones(len(sequences), dtype=bool)
    while True:
        tokens = _choose(process(sequences, np.array(logits, dtype=np.float32)), settings, generator)
        if end_tokens:
            tokens = np.where(is_running, tokens, settings["pad_token_id"])
        sequences = np.concatenate([sequences, tokens[:, None]], axis=1)
        is_running &= ~np.isin(tokens, end_tokens)
        if sequences.shape[1] >= max_length or not is_running.any():
            return sequences
        if not is_running.all():
            _as_ids("pad_token_id", settings["pad_token_id"], logits.shape[1])  # it is read where a row has ended
        logits, state = read_tokens(tokens, state)


def _beam_search(sequences, logits, state, read_tokens, process, settings, max_length, generator) -> np.ndarray:
    """
    Beam search with the candidates, scores and ends of transformers: of each source the best `num_beams` continuations
    go on, a sequence that ends among the best is kept with its score per length, and the search is over when no
    running sequence could still be better.
    """
    beams, end_tokens = settings["num_beams"], _end_tokens(settings)
    prompt_length, vocab_size = sequences.shape[1], logits.shape[1]
    batch = len(sequences) // beams
    penalty, early_stopping = settings["length_penalty"], settings["early_stopping"]
    candidates = max(2, 1 + len(end_tokens)) * beams  # enough to go on with, should the best ones all end
    fill = -1 if not end_tokens else settings["pad_token_id"] or end_tokens[0]
    running = np.full((batch, beams, max_length), fill, dtype=np.int64)
    running[:, :, :prompt_length] = sequences.reshape(batch, beams, prompt_length)
    finished = running.copy()
    running_scores = np.zeros((batch, beams), dtype=np.float32)
    running_scores[:, 1:] = NEVER  # all beams begin alike: only the first counts
    scores = np.full((batch, beams), NEVER)
    lengths = np.full((batch, beams), prompt_length)
    is_finished = np.zeros((batch, beams), dtype=bool)
    can_improve = np.ones((batch, 1), dtype=bool)
    for length in range(prompt_length, max_length):
        processed = process(running[:, :, :length].reshape(-1, length), _log_softmax(np.array(logits, np.float32)))
        total = (processed.reshape(batch, beams, vocab_size) + running_scores[:, :, None]).reshape(batch, -1)
        if settings["do_sample"]:
            # The largest of log-probabilities with Gumbel noise are a draw without replacement.
            chosen = _largest(total + generator.gumbel(size=total.shape), candidates)
        else:
            chosen = _largest(total, candidates)
        chosen_scores = np.take_along_axis(total, chosen, 1)
        parents, tokens = chosen // vocab_size, chosen % vocab_size
        extended = np.take_along_axis(running, parents[:, :, None], 1)
        extended[:, :, length] = tokens
        ends = np.isin(tokens, end_tokens) | (length + 1 >= max_length)

        best = _largest(chosen_scores + ends * NEVER, beams)
        running = np.take_along_axis(extended, best[:, :, None], 1)
        running_scores = np.take_along_axis(chosen_scores + ends * NEVER, best, 1)
        parents = np.take_along_axis(parents, best, 1)

        just_finished = ends & (np.arange(candidates) < beams)
        end_scores = chosen_scores / np.float32((length + 1 - prompt_length) ** penalty)
        is_full = is_finished.all(1, keepdims=True) & (early_stopping is True)
        end_scores = end_scores + is_full * NEVER + ~can_improve * NEVER + ~just_finished * NEVER
        all_scores = np.concatenate([scores, end_scores], axis=1)
        best = _largest(all_scores, beams)
        finished = np.take_along_axis(np.concatenate([finished, extended], axis=1), best[:, :, None], 1)
        scores = np.take_along_axis(all_scores, best, 1)
        is_finished = np.take_along_axis(np.concatenate([is_finished, just_finished], axis=1), best, 1)
        new_lengths = np.full((batch, candidates), length + 1)
        lengths = np.take_along_axis(np.concatenate([lengths, new_lengths], axis=1), best, 1)

        new_length = length + 1 - prompt_length
        if early_stopping == "never" and penalty > 0.0:
            new_length = max_length - prompt_length
        possible = running_scores[:, :1] / np.float32(new_length**penalty)
        worst = np.where(is_finished, scores.min(1, keepdims=True), NEVER)
        can_improve &= (possible > worst).any(1, keepdims=True)
        if not can_improve.any() or (is_finished.all() and early_stopping is True) or ends.all():
            break
        rows = (parents + np.arange(batch)[:, None] * beams).reshape(-1)
        logits, state = read_tokens(running[:, :, length].reshape(-1), _take_rows(state, rows))
    returned = settings["num_return_sequences"]
    return finished[:, :returned].reshape(batch * returned, -1)[:, : lengths[:, :returned].max()]


def main(arguments: Sequence[str]) -> None:
    """Continues or translates the texts given on the command line, with the model beside this file."""
    if not arguments:
        raise SystemExit(f"usage: python {Path(__file__).name} TEXT ...")
    model = load(Path(__file__).parent)
    if isinstance(model, OnnxTranslator):
        print("\n".join(model.translate(arguments)))
    elif isinstance(model, OnnxLanguageModel):
        print("\n".join(model.complete(arguments)))
    else:
        for name, values in model(*model.encode(arguments)).items():
            print(name, values.tolist())


if __name__ == "__main__":
    main(sys.argv[1:])
