"""A stock FLUX pipeline on however many ranks this was started with: one, or as many as the launcher gives.

python examples/flux.py --model tiny
torchrun --nproc-per-node 4 examples/flux.py --model tiny
mpiexec -n 4 python examples/flux.py --model black-forest-labs/FLUX.1-dev --prompt "a lighthouse at dusk"
"""

import argparse

import torch
from diffusers import FluxPipeline

import cocodiff

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="tiny", help="a checkpoint, or tiny (built in)")
parser.add_argument("--prompt", default="a red circle above a blue square on a white background")
parser.add_argument("--steps", type=int, default=28)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="flux.png")
arguments = parser.parse_args()

if arguments.model == "tiny":
    pipe = cocodiff.tiny_pipeline()
else:
    pipe = FluxPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)

pipe = cocodiff.wrap(pipe)  # the only line that is not plain diffusers

image = pipe(
    arguments.prompt,
    num_inference_steps=arguments.steps,
    generator=torch.Generator("cpu").manual_seed(arguments.seed),
).images[0]

if pipe.cocodiff.is_main:  # every rank has the same picture
    image.save(arguments.out)
    print(f"wrote {arguments.out} (ranks: {pipe.cocodiff.world_size}, device: {pipe.cocodiff.device.type})")
