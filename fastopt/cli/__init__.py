"""The `fastopt` command: one module a subcommand, imported only when it is the one that runs."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from . import demo, profile

COMMANDS = {"demo": demo, "profile": profile}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv's by default) and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(_unknown(arguments[0]))
    options = parser.parse_args(arguments)
    try:
        status: int = COMMANDS[options.command].run(options)
        return status
    except KeyboardInterrupt:
        print("\nfastopt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastopt",
        description="Fused optimizers for PyTorch: one launch for the whole model.",
        epilog="fastopt COMMAND --help tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"fastopt {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary, _, description = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=f"{summary}\n{description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    hint = f", did you mean '{near[0]}'?" if near else ""
    return f"unknown command '{command}'{hint} (commands: {', '.join(COMMANDS)})"


def _version() -> str:
    import fastopt

    return fastopt.__version__
