"""Tests mirror fastopt/ file by file; tests.oracle says what a step must give."""
