"""Measuring xfast beside other engines; installed as ``xfast.benchmarks`` and run by ``xfast bench``."""
