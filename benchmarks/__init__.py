"""Benchmarks of the operators against named rivals."""
