"""Output files: refused before the work when they cannot be written, and written whole or not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path


def output_file(suffix: str) -> Callable[[str], Path]:
    """An argparse type: a path that ends in `suffix`, in a folder that can be written to."""

    def parse(text: str) -> Path:
        path = Path(text).expanduser()
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {suffix}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"the folder {str(folder)!r} does not exist")
        if not os.access(folder, os.W_OK):
            raise argparse.ArgumentTypeError(f"the folder {str(folder)!r} is not writable")
        return path

    return parse


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames: an interrupt leaves the old file or the new one."""
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
