"""
What all benchmarks share: the list of them, interleaved timing, peak memory, floors, and the lines of the table.

A benchmark is a function of [`Settings`] that returns a [`Measurement`], with a line of the table above it:

    @benchmark("lm-step", "training step / bare nn.LSTM script", {"cpu": 0.90})
    def training_step(settings):
        return measure(settings, baseline=..., ours=..., floor=...)
"""

import cProfile
import gc
import io
import math
import os
import pstats
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from hf_rnn.large_products import onednn_pays
from hf_rnn.weight_layouts import by_onednn, in_fastest_layout, multiply


class Settings(NamedTuple):
    """
    How to run the benchmarks. With `quick` sizes are tiny: it shows that they work, and nothing else. To the file
    `profile`, if there is one, [`write_profile`] writes where the time goes.
    """

    threads: int = 1
    rounds: int = 9
    device: str = "cpu"
    quick: bool = False
    profile: str | None = None

    def size(self, full, quick):
        """A size, a number of steps or a tuple of them."""
        return quick if self.quick else full

    def clock(self) -> float:
        """Seconds. With one thread on a CPU those of the processor, which other programs change little."""
        return time.process_time() if self.device == "cpu" and self.threads == 1 else time.perf_counter()


class Measurement(NamedTuple):
    """What a line of the table shows: a ratio, or a number of `unit`; in either case less is better."""

    value: float
    low: float | None = None  # quartiles over the rounds
    high: float | None = None
    floor: float | None = None
    note: str = ""

    def divided_by(self, divisor: float) -> "Measurement":
        """The same in units of `divisor`."""
        numbers = (None if number is None else number / divisor for number in self[:4])
        return Measurement(*numbers, self.note)


class Skipped(Exception):
    """A benchmark cannot run here; the message says why."""


class Failed(Exception):
    """A benchmark raised an error, which the message repeats; the others go on."""


class Benchmark(NamedTuple):
    name: str
    compared: str
    goals: dict[str, float | None]  # by device, on which alone it runs; None where a line has no goal
    unit: str
    run: Callable[[Settings], Measurement]

    @property
    def group(self) -> str:
        """The file that it is in."""
        return self.run.func.__module__.split(".")[-1]


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str, compared: str, goals: dict[str, float | None], unit: str = "", **arguments):
    """
    Adds a function to the table; several times with different `arguments` for several lines.

    Args:
        name (`str`): By which to ask for the line.
        compared (`str`): What is compared with what.
        goals (`dict`): For each device on which the benchmark runs what is to be reached, or None.
        unit (`str`): The unit of the value, where it is no ratio.
        arguments: What the function is called with beside the settings.
    """

    def register(function):
        # Python calls the lowest of several decorators first; the table begins with the highest.
        below = [line for line in BENCHMARKS.values() if line.run.func is function]
        for line in below:
            del BENCHMARKS[line.name]
        for line in [Benchmark(name, compared, goals, unit, partial(function, **arguments)), *below]:
            BENCHMARKS[line.name] = line
        return function

    return register


# Time ---------------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], settings: Settings, calls: int = 1) -> float:
    """The time of one of several calls."""
    synchronize = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    synchronize()
    start = settings.clock()
    for _ in range(calls):
        function()
    synchronize()
    return (settings.clock() - start) / calls


SHORTEST = 0.02  # seconds: what is faster is called several times in each round


def interleave(
    variants: dict[str, Callable[[], object]],
    settings: Settings,
    rounds: int | None = None,
) -> dict[str, list[float]]:
    """
    The seconds that each variant takes in each round, in which all of them run, in random order.

    Args:
        variants (`dict`): Functions by name. Each is called at least twice before.
        settings (`Settings`): The settings.
        rounds (`int`, *optional*): At most so many rounds, for what takes long.
    """
    calls = {}
    for name, function in variants.items():
        seconds(function, settings)
        once = seconds(function, settings)
        calls[name] = 1 if settings.quick else min(1000, math.ceil(SHORTEST / once))
    times = {name: [] for name in variants}
    for _ in range(settings.rounds if rounds is None else min(rounds, settings.rounds)):
        if not settings.quick:
            gc.collect()
        for name in random.sample(list(variants), len(variants)):
            times[name].append(seconds(variants[name], settings, calls[name]))
    return times


def summarize(values: list[float], floor: float | None = None, note: str = "") -> Measurement:
    """Median and quartiles of the values of all rounds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Measurement(median, low, high, floor, note)


def measure(
    settings: Settings,
    baseline: Callable[[], object],
    ours: Callable[[], object],
    floor: Callable[[], object] | None = None,
    rounds: int | None = None,
) -> Measurement:
    """The ratios of `ours` to `baseline` in each round, and of `floor` to `baseline`."""
    variants = {"baseline": baseline, "ours": ours} | ({} if floor is None else {"floor": floor})
    times = interleave(variants, settings, rounds)
    if settings.profile is not None:
        for name in ("baseline", "ours"):
            write_profile(name, variants[name], settings)
    ratios = {
        name: [time / of_baseline for time, of_baseline in zip(times[name], times["baseline"])] for name in variants
    }
    milliseconds = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return summarize(
        ratios["ours"],
        None if floor is None else statistics.median(ratios["floor"]),
        f"{milliseconds['ours']:.3g} of {milliseconds['baseline']:.3g} ms",
    )


def write_profile(name: str, function: Callable[[], object], settings: Settings) -> None:
    """
    Where the time of a function goes, behind what is in the file `settings.profile`: the operations of torch and, on a
    GPU, its kernels; and the functions of Python. What looks on takes time itself: that of small operations and
    functions most of all.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if settings.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as operations:
        seconds(function, settings)
    functions, lines = cProfile.Profile(), io.StringIO()
    functions.runcall(seconds, function, settings)
    pstats.Stats(functions, stream=lines).sort_stats("tottime").print_stats(30)
    table = operations.key_averages().table(sort_by=f"self_{settings.device}_time_total", row_limit=30)
    with open(settings.profile, "a") as file:
        file.write(f"{name}: operations\n{table}\n{name}: functions of Python{lines.getvalue()}\n")


# Memory -------------------------------------------------------------------------------------------------------------


def peak_megabytes(prepare: Callable[..., Callable[[], object]], settings: Settings, **arguments) -> float:
    """
    What calling `prepare(settings, **arguments)()` adds to the memory of a fresh process, at most. On a CPU this reads
    what Linux says of the process.

    Args:
        prepare: A function in a file of the benchmarks, which makes what is there before, and returns what to call.
        settings (`Settings`): The settings.
        arguments: Numbers and strings.
    """
    if settings.device == "cpu" and not Path("/proc/self/status").exists():
        raise Skipped("reads /proc/self/status, which is not there")
    if settings.quick:  # in this process, which is quick and shows nothing
        return peak_of(settings, lambda: prepare(settings, **arguments))
    name, tests = prepare.__name__, str(Path(__file__).resolve().parents[1])
    program = (
        f"import sys; sys.path[:0] = {[tests, *sys.path]!r}\n"
        "from benchmarks.harness import Settings, peak_of\n"
        f"from {prepare.__module__} import {name}\n"
        f"settings = Settings(*{tuple(settings)!r})\n"
        f"print(peak_of(settings, lambda: {name}(settings, **{arguments!r})))"
    )
    # Large blocks go back to the system at once: how the C library cuts up its heap differs from process to process.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise RuntimeError(f"The process that measures memory failed:\n{process.stderr}")
    return float(process.stdout.split()[-1])


def peak_of(settings: Settings, prepare: Callable[[], Callable[[], object]]) -> float:
    """The part of [`peak_megabytes`] in the other process, which must be fresh: it knows only one peak."""
    torch.set_num_threads(settings.threads)
    function = prepare()
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _kilobytes("VmRSS")
    function()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


# Floors -------------------------------------------------------------------------------------------------------------


def matrix_products(
    shapes: Iterable[tuple[int, int, int]],
    settings: Settings,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
    times: int = 1,
) -> Callable[[], None]:
    """
    A function that does matrix products alone, by the fastest library that torch has here, each of them reading its
    weight once.

    Args:
        shapes (`Iterable` of `tuple[int, int, int]`): For each product the number of rows, and the widths of its input
            and its output.
        settings (`Settings`): The settings.
        backward (`bool`): Whether the products are done that the gradients of inputs and weights take.
        dtype (`torch.dtype`): The type of the numbers.
        times (`int`): How often all of them are done.
    """
    products = []
    for rows, width_in, width_out in shapes:
        products.append(_product(rows, width_in, width_out, settings, dtype))
        if backward:
            products.append(_product(rows, width_out, width_in, settings, dtype))
            products.append(_product(width_out, rows, width_in, settings, dtype))

    @torch.no_grad()
    def run():
        for _ in range(times):
            for product in products:
                product()

    return run


def _product(rows: int, width_in: int, width_out: int, settings: Settings, dtype: torch.dtype):
    inputs = torch.randn(rows, width_in, device=settings.device).to(dtype)
    weight = torch.randn(width_out, width_in, device=settings.device).to(dtype)
    if settings.device != "cpu":
        return partial(F.linear, inputs, weight)
    packed = in_fastest_layout(inputs, weight)
    if packed is not weight:
        return partial(multiply, inputs, packed)
    takes_onednn = dtype == torch.float32 and onednn_pays(settings.threads)
    return partial(by_onednn if takes_onednn else F.linear, inputs, weight)


def recurrence_shapes(tokens: int, input_size: int, hidden_size: int, gates: int = 4) -> list[tuple[int, int, int]]:
    """The products of one recurrent layer in one direction."""
    return [(tokens, width, gates * hidden_size) for width in (input_size, hidden_size)]


# Checks -------------------------------------------------------------------------------------------------------------


def check_equal(what: str, actual, expected, tolerance: float = 1e-4) -> None:
    """
    Raises `AssertionError` where two results (tensors, or lists of them) differ by more than a share of the largest
    number: what is not the same is not compared.
    """
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    if actual[0].device.type == "cuda":  # where cuDNN multiplies numbers of float32 with 10 bits of them
        tolerance = max(tolerance, 1e-2)
    for ours, theirs in zip(actual, expected, strict=True):
        difference = (ours.detach().double() - theirs.detach().double()).abs().max().item()
        allowed = tolerance * max(1e-3, theirs.detach().abs().max().item())
        assert difference <= allowed, f"{what} differ by {difference:.2g}, of which {allowed:.2g} may be rounding"


def check_as_exact(what: str, actual, expected, exact) -> None:
    """
    Raises `AssertionError` where results in a narrow type are further from the exact ones, by their norms, than twice
    what others in that type are, and more than one per cent.

    Args:
        what (`str`): What they are.
        actual, expected, exact: Lists of tensors: ours, the others, and both in a wide type.
    """
    for ours, theirs, reference in zip(actual, expected, exact, strict=True):
        errors = [
            (numbers.double() - reference.double()).norm() / reference.double().norm() for numbers in (ours, theirs)
        ]
        allowed = max(0.01, 2 * errors[1].item())
        assert errors[0] <= allowed, f"{what} are off by {errors[0]:.2g}, of which {allowed:.2g} may be rounding"


# The table ----------------------------------------------------------------------------------------------------------

COLUMNS = ("name", "compared", "goal", "measured", "spread", "floor", "remark")


def cells_of(line: Benchmark, settings: Settings, result: Measurement | Exception) -> list[str]:
    """The cells of a line of the table."""
    goal = line.goals[settings.device]
    unit = f" {line.unit}" if line.unit else ""
    start = [line.name, line.compared, "-" if goal is None else f"<= {goal:.4g}{unit}"]
    if isinstance(result, Exception):
        kind = "skipped" if isinstance(result, Skipped) else "failed"
        return [*start, "-", "-", "-", f"{kind}: {result!s}".replace("\n", " ")]
    spread = "-" if result.low is None else f"{result.low:.2f} to {result.high:.2f}"
    # Compared as it is printed, so that the table does not contradict itself.
    missed = goal is not None and round(result.value, 2) > goal
    remark = "; ".join(filter(None, ["falls short" if missed else "", result.note]))
    floor = "-" if result.floor is None else f"{result.floor:.2f}"
    return [*start, f"{result.value:.2f}{unit}", spread, floor, remark]


def markdown_line(cells: Iterable[str]) -> str:
    """One line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def run_all(lines: Iterable[Benchmark], settings: Settings, profiles: Path | None = None) -> Iterable[list[str]]:
    """
    Runs benchmarks, and gives the cells of each line as soon as it is done. Profiles go to the folder `profiles`, where
    it is given.
    """
    for line in lines:
        torch.manual_seed(0)
        random.seed(0)
        if profiles is not None:
            file = profiles / f"{line.name}.txt"
            file.unlink(missing_ok=True)  # of an earlier run
            settings = settings._replace(profile=str(file))
        try:
            result = line.run(settings)
        except Skipped as reason:
            result = reason
        except Exception as error:
            if settings.quick:
                raise
            result = Failed(error)
        yield cells_of(line, settings, result)
