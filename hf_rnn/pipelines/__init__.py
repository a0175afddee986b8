"""Pipelines for tasks that transformers has none for. No checkpoint needs them; `import hf_rnn` registers them."""
