"""The tiny pipelines' training data, and the first stage of their training: the autoencoder."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cocodiff.tiny import pictures


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning rate at `step` over the highest one: linear warm-up, then a half cosine down to 2 %."""
    ramp = min(1.0, (step + 1) / warmup)
    return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def draw_pictures(count: int, folder: Path) -> tuple[Tensor, Tensor]:
    """(N, 3, 64, 64) uint8 pictures of training scenes and (N,) indices into `training_scenes()`."""
    path = folder / f"pictures-{count}.safetensors"
    if not path.exists():
        scenes = pictures.training_scenes()
        rng = random.Random(1)
        # Every caption equally often, in random order.
        order = [i % len(scenes) for i in range(count)]
        rng.shuffle(order)
        drawn = np.stack([np.asarray(pictures.draw_scene(scenes[i], rng)) for i in order])
        tensors = {"pictures": torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()}
        save_file({**tensors, "scenes": torch.tensor(order)}, path)
        log(f"drew {count} pictures")
    tensors = load_file(path)
    return tensors["pictures"], tensors["scenes"]


def as_input(batch: Tensor) -> Tensor:
    """uint8 pictures -> float in [-1, 1], what the autoencoder takes."""
    return batch.float() / 127.5 - 1


def train_vae(vae: nn.Module, images: Tensor, steps: int, batch: int = 32) -> None:
    """Reconstruction plus a light pull of the latents towards a normal distribution, in place."""
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        set_rate([optimizer], 2e-3 * cosine(step, steps))
        x = as_input(images[torch.randint(len(images), (batch,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - x).pow(2).mean()
        divergence = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (error + 1e-4 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            psnr = 10 * math.log10(4 / error.item())
            log(f"autoencoder {step}/{steps}: {psnr:.1f} dB, KL {divergence:.2f}")
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(vae: nn.Module, images: Tensor) -> Tensor:
    """(N, 4, 32, 32) latents, not yet shifted and scaled, in float16."""
    means = [vae.encode(as_input(part)).latent_dist.mean.half() for part in images.split(64)]
    return torch.cat(means)
