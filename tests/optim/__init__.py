"""Tests of fastopt.optim."""
