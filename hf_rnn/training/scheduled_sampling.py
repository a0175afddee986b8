"""Scheduled sampling: a callback that lets an encoder-decoder read more and more of its own words while it trains."""

import math

from transformers import TrainerCallback


SCHEDULES = ("linear", "exponential", "inverse_sigmoid")


class ScheduledSampling(TrainerCallback):
    r"""
    Advances `scheduled_sampling` of a model's configuration, the chance that the decoder reads what it predicted itself
    in place of the right word ([Bengio et al., 2015](https://huggingface.co/papers/1506.03099), section 2.4). The
    chance of the right word at step i is, for a slope c or a number k,

        linear:           max(1 - final_rate, 1 - c i)      with c such that `steps` steps lead to `final_rate`
        exponential:      k^i                               with k such that half is reached at `steps`
        inverse_sigmoid:  k / (k + exp(i / k))              with k such that half is reached at `steps`

    and never below 1 - `final_rate`. The rate depends on the number of steps alone, so that resumed training goes on as
    it would have; it is saved with the configuration.

    Args:
        steps (`int`): Number of optimizer steps that the schedule stretches over.
        schedule (`str`, *optional*, defaults to `"inverse_sigmoid"`): One of the three.
        final_rate (`float`, *optional*, defaults to 1.0): The highest chance of the model's own word.

    Raises:
        `ValueError`: A value out of range.

    Example:

    ```python
    >>> from hf_rnn.training import ScheduledSampling

    >>> schedule = ScheduledSampling(steps=1000, schedule="linear", final_rate=0.25)
    >>> schedule.rate_at(500)
    0.125
    ```"""

    def __init__(self, steps: int, schedule: str = "inverse_sigmoid", final_rate: float = 1.0):
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        if schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {list(SCHEDULES)}, got {schedule!r}.")
        if not 0 <= final_rate <= 1:
            raise ValueError(f"`final_rate` must be in [0, 1], got {final_rate}.")
        self.steps = steps
        self.schedule = schedule
        self.final_rate = final_rate
        self._scale = _scale_of_sigmoid(steps) if schedule == "inverse_sigmoid" else None

    def rate_at(self, step: int) -> float:
        """The chance of the model's own word after `step` steps of the optimizer."""
        if self.schedule == "linear":
            rate = self.final_rate * step / self.steps
        elif self.schedule == "exponential":
            rate = 1 - 0.5 ** (step / self.steps)
        else:
            # 1 - k / (k + exp(i / k)), without numbers that are too large.
            rate = 1 / (1 + math.exp(min(700.0, math.log(self._scale) - step / self._scale)))
        return min(rate, self.final_rate)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        if not hasattr(model.config, "scheduled_sampling"):
            raise ValueError(
                f"The model must have `scheduled_sampling` in its configuration, got {type(model).__name__}."
            )
        model.config.scheduled_sampling = self.rate_at(state.global_step)


def _scale_of_sigmoid(steps: int) -> float:
    """The k for which k / (k + exp(steps / k)) is a half: k log k = steps, by Newton's method."""
    scale = max(2.0, float(steps))
    for _ in range(100):
        scale = (scale + steps) / (1 + math.log(scale))
    return scale
