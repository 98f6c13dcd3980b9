"""One file per question asked of the engine; `benchmarks/sweep` makes all that `results` holds."""
