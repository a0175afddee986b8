"""
Prints the table of benchmarks, line by line; where a goal is missed, the line says `falls short`.

Usage: python tests/benchmarks/run.py [--only NAME ...] [--threads N] [--rounds N] [--device cpu|cuda]
                                      [--markdown FILE] [--profile FOLDER] [--quick] [--list]
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Sequence
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from benchmarks import cells, classification, decoding, gpu, language_model, loss, memory, padding, translation
from benchmarks.harness import BENCHMARKS, COLUMNS, Benchmark, Settings, markdown_line, run_all


GROUPS = [
    module.__name__.split(".")[-1]
    for module in (language_model, padding, cells, translation, loss, decoding, memory, classification, gpu)
]


def choose(names: Sequence[str] | None, device: str) -> list[Benchmark]:
    """
    The lines of these names or of these groups, or all, that run on a device.

    Raises:
        `ValueError`: There is no such line, nor such a group.
    """
    lines = sorted(BENCHMARKS.values(), key=lambda line: GROUPS.index(line.group))
    unknown = set(names or ()) - BENCHMARKS.keys() - set(GROUPS)
    if unknown:
        raise ValueError(f"`--only` must be of {[*GROUPS, *BENCHMARKS]}, got {sorted(unknown)}.")
    return [line for line in lines if device in line.goals and (not names or line.name in names or line.group in names)]


def heading(settings: Settings) -> str:
    """Where and with what the table was made."""
    machine = torch.cuda.get_device_name() if settings.device == "cuda" else _processor()
    return (
        f"{datetime.date.today()}, {machine}, {settings.threads} threads, median of {settings.rounds} rounds, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="lines or groups, see --list")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to a file")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also write to it where the time of lines goes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which show nothing but that all of it works")
    parser.add_argument("--list", action="store_true", help="print the names of groups and lines")
    options = parser.parse_args(arguments)
    try:
        lines = choose(options.only, options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for line in lines:
            print(f"{line.group}: {line.name}: {line.compared}")
        return 0
    torch.set_num_threads(options.threads)
    settings = Settings(options.threads, options.rounds, options.device, options.quick)
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
    table = [heading(settings), "", markdown_line(COLUMNS), markdown_line(["---"] * len(COLUMNS))]
    print("\n".join(table), flush=True)
    failed = False
    for result in run_all(lines, settings, options.profile):
        table.append(markdown_line(result))
        print(table[-1], flush=True)
        failed = failed or result[-1].startswith("failed")
    if options.markdown:
        options.markdown.write_text("\n".join(table) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
