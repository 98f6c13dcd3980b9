"""How like the exact pictures those of selective transmission are: `python -m benchmarks.quality --out FOLDER`."""
