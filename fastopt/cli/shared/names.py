"""Suggestions of the name that was meant by one that does not exist."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'demo'?" after a name; empty where nothing is near."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f", did you mean '{by_lower[near[0]]}'?" if near else ""


def unknown_option(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str | None:
    """A message on the first --option that a command does not have; options may be shortened."""
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    for argument in arguments:
        if argument == "--":
            return None
        option = argument.partition("=")[0]
        if option.startswith("--") and not any(name.startswith(option) for name in known):
            return f"unrecognized arguments: {option}{did_you_mean(option, known)}"
    return None
