"""The trained tiny FLUX that comes with the package: `cocodiff.tiny_pipeline()`.

It draws 64 x 64 pictures of two coloured shapes, fast enough for a CPU. `cocodiff.tiny.models` has its parts,
`cocodiff.tiny.pictures` the captions' grammar, `cocodiff.tiny.check` judges a picture against its caption,
`scripts/train_tiny.py` trains everything from nothing.
"""
