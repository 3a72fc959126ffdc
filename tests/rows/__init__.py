"""Tests of fastopt.functional and fastopt.nn: softmax, losses, norms."""
