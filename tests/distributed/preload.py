"""Imported once by the server that test ranks fork from: what they would otherwise each import for seconds."""

from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401
from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401
