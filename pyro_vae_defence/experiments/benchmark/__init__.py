"""Benchmark of the sampler engine: what an image costs, against what the machine and other
libraries can do.

:mod:`~pyro_vae_defence.experiments.benchmark.run` puts the sections together; each lies in a file
of its own, and ``docs/benchmark.md`` says what is measured and how.
"""
