"""Pictures of what a model does, as figures of matplotlib (extra `plots`) that nobody has shown or saved yet.

[`plot_attention`] draws where a translator looks, [`plot_pooling`] which words a classifier goes by, [`plot_confusion`]
which classes it takes for which, [`plot_states`] what a unit does over a text, and [`plot_gates`] what the gates of a
layer do. None of them touches pyplot, its current figure or any other global setting: save a figure with
`figure.savefig(path)`, or let a notebook show it.
"""

from .attention import plot_attention
from .confusion import plot_confusion
from .gates import plot_gates
from .pooling import plot_pooling
from .states import plot_states


__all__ = ["plot_attention", "plot_confusion", "plot_gates", "plot_pooling", "plot_states"]
