"""The `fastopt` command: one module a subcommand, imported only when it is the one that runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastopt.cli import bench, demo, doctor, profile
from fastopt.cli.shared.names import did_you_mean, unknown_option

COMMANDS = {
    "demo": demo,
    "bench": bench,
    "doctor": doctor,
    "profile": profile,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv's by default) and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(_unknown(arguments[0]))
    if (command := commands.get(arguments[0])) and (
        message := unknown_option(command, arguments[1:])
    ):
        command.error(message)
    options = parser.parse_args(arguments)
    try:
        status: int = COMMANDS[options.command].run(options)
        return status
    except KeyboardInterrupt:
        print("\nfastopt: interrupted", file=sys.stderr)
        return 130


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of the commands by name."""
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
    return parser, commands.choices


def _unknown(command: str) -> str:
    hint = did_you_mean(command, COMMANDS)
    return f"unknown command '{command}'{hint} (commands: {', '.join(COMMANDS)})"


def _version() -> str:
    import fastopt

    return fastopt.__version__
