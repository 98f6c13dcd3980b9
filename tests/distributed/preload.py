"""Imported once by the server that test ranks fork from: what they would otherwise each import for seconds."""

import gc

import pytest  # noqa: F401
from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401
from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

from tests import families, pipelines  # noqa: F401

# The collector of every rank would go through all that, and so copy its pages.
gc.collect()
gc.freeze()
