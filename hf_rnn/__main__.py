"""
The command line: `python -m hf_rnn export MODEL OUT`, and `serve` and `chat` as the command `transformers` has them,
with this library's models in reach.
"""

import argparse
import signal
import sys


def _export(arguments: argparse.Namespace) -> None:
    from .export import export_model
    from .export.package import TOLERANCE

    report = export_model(
        arguments.model, arguments.out, format=arguments.format, int8=arguments.int8, overwrite=arguments.overwrite
    )
    sizes = ", ".join(f"{batch} x {length}" for batch, length in report["checked_sizes"])
    print(f"{report['folder']}: {', '.join(report['files'])}")
    print(f"checked against the model on random inputs of {sizes} tokens, padded rows and an empty one among them;")
    for name, difference in report["differences"].items():
        print(f"  {name}: largest difference {difference:.1e} of the largest output (allowed {TOLERANCE:.0e})")
    for name, difference in report["int8_differences"].items():
        print(f"  {name} with eight-bit weights: {difference:.1e}")


# Commands of `transformers` that find the class of a model by its name in that package, and not through an Auto class.
BORROWED = ("chat", "serve")


def _run_borrowed() -> None:
    import transformers
    from transformers.cli.transformers import main

    from . import REGISTRATION

    for model_classes in REGISTRATION.values():
        for model_class in model_classes:
            setattr(transformers, model_class.__name__, model_class)
    main()


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    if arguments is None and len(sys.argv) > 1 and sys.argv[1] in BORROWED:
        _run_borrowed()
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m hf_rnn",
        description="Recurrent models of hf_rnn.",
        epilog=f"As in transformers, with this library's models in reach: {', '.join(BORROWED)}.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a model as ONNX or torch.export files, and check them")
    export.add_argument("model", metavar="MODEL", help="folder of the model, or its name on the Hub")
    export.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    export.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="onnx (default) or torch (.pt2, read after import hf_rnn)",
    )
    export.add_argument("--int8", action="store_true", help="give the weights eight bits (onnx)")
    export.add_argument("--overwrite", action="store_true", help="replace OUT where it exists, unless MODEL lies in it")
    export.set_defaults(run=_export)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{parser.prog} {parsed.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # A program that is told to end cleans up what it began to write.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
