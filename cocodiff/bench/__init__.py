"""Benchmarks: one run, several methods in turn, ratios within the run. `cocodiff bench --help` has the options."""
