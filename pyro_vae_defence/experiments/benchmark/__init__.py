"""Benchmarks: one study per file, and a file per section of the one of the sampler engine."""
