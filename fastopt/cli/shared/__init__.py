"""Of several commands: files, shapes, the machine and its limits, text for a terminal."""
