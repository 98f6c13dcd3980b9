"""Train the tiny FLUX pipelines again from nothing, score them, and write weights and contact sheets.

    python scripts/train_tiny.py               # 80 minutes and more on two cores; resumes if interrupted
    python scripts/train_tiny.py --evaluate    # only score the weights that come with the package

Three stages, each kept in --work-dir: an autoencoder on drawn pictures, its latents, and the transformer as a
rectified flow from those latents to noise. The text encoders stay random and frozen: their outputs tell all
captions apart, which is all the transformer needs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_score  # noqa: E402
from tiny_muon import Muon  # noqa: E402
from tiny_vae import cosine, draw_pictures, encode_pictures, log, set_rate, train_vae  # noqa: E402

from cocodiff.tiny import models, pictures  # noqa: E402

LEARNING_RATE = 1e-3
EMA_DECAY = 0.998
EMPTY_CAPTIONS = 0.1
"""Share of the captions replaced by "" in training, so that classifier-free guidance works."""


@torch.no_grad()
def encode_captions(pipe: Any) -> tuple[Tensor, Tensor]:
    """(captions + 1, 16, 96) text tokens and (captions + 1, 96) pooled vectors; the last row is for ""."""
    captions = [scene.caption for scene in pictures.training_scenes()] + [""]
    tokens, pooled, _ = pipe.encode_prompt(captions, None)
    return tokens, pooled


def schedule(step: int, steps: int) -> tuple[float, float]:
    """Learning rate, and how far `timesteps` leans towards noise, at `step`: two thirds as one cosine, then another.

    The second starts at half the rate and leans further: what lies where, and in which colour, is decided there.
    """
    first = 2 * steps // 3
    if step < first:
        return LEARNING_RATE * cosine(step, first, warmup=100), 0.5
    return 0.5 * LEARNING_RATE * cosine(step - first, steps - first), 1.5


def timesteps(batch: int, lean: float, generator: torch.Generator) -> Tensor:
    """(batch,) noise levels: half spread evenly over [0, 1], half logit-normal around `lean`."""
    half = batch // 2
    even = (torch.arange(half) + torch.rand(half, generator=generator)) / half
    return torch.cat([even, torch.sigmoid(torch.randn(batch - half, generator=generator) + lean)])


class Trainer:
    """The transformer, its optimizers and its moving average; saved and restored as safetensors."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer.train().requires_grad_(True)
        named = dict(transformer.named_parameters())
        # The matrices inside the blocks learn much faster with Muon. Modulation starts at zero and, like
        # embeddings, biases and norms, is AdamW's.
        blocks = {n for n, p in named.items() if "blocks" in n and "norm" not in n and p.ndim == 2}
        rest = [p for n, p in named.items() if n not in blocks]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon([p for n, p in named.items() if n in blocks], lr=LEARNING_RATE),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01),
        ]
        self.average = {name: p.detach().clone() for name, p in named.items()}
        self.step = 0

    def update(self, loss: Tensor, rate: float) -> None:
        set_rate(self.optimizers, rate)
        loss.backward()
        nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, parameter in self.transformer.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def save(self, path: Path, seconds: float) -> None:
        tensors = {f"model.{n}": p.detach() for n, p in self.transformer.named_parameters()}
        tensors |= {f"average.{n}": p for n, p in self.average.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{n}": value for n, value in state.items()}
        new = path.with_suffix(".new")
        save_file(tensors, new, metadata={"step": str(self.step), "seconds": str(seconds)})
        new.replace(path)  # an interruption never leaves half a checkpoint

    def restore(self, path: Path) -> float:
        """Continue from `path`; returns the seconds trained before."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        self.step = int(metadata["step"])
        self.transformer.load_state_dict({n: tensors[f"model.{n}"] for n in self.average})
        self.average = {n: tensors[f"average.{n}"] for n in self.average}
        for i, optimizer in enumerate(self.optimizers):
            saved: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{i}."):
                    _, _, j, name = key.split(".", 3)
                    saved.setdefault(int(j), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved, "param_groups": groups})
        return float(metadata["seconds"])


def train_transformer(pipe: Any, latents: Tensor, scenes: Tensor, args: argparse.Namespace) -> float:
    """Rectified flow: predict noise - latents from their mixture. Leaves the moving average in `pipe`.

    Returns the seconds it took, those before an interruption included.
    """
    side = models.LATENT_SIZE
    config = pipe.vae.config
    latents = (latents.float() - config.shift_factor) * config.scaling_factor
    latents = pipe._pack_latents(latents, len(latents), 4, side, side)
    tokens, pooled = encode_captions(pipe)
    text_ids = torch.zeros(models.TEXT_TOKENS, 3)
    image_ids = pipe._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32)
    trainer = Trainer(pipe.transformer)
    path = args.work_dir / "checkpoint.safetensors"
    before = trainer.restore(path) if path.exists() else 0.0
    if args.compile:
        trainer.transformer.compile()
    start, losses = time.monotonic(), []
    while trainer.step < args.steps:
        generator = torch.Generator().manual_seed(1000 + trainer.step)  # resuming changes nothing
        rows = torch.randint(len(latents), (args.batch,), generator=generator)
        caption = scenes[rows].clone()
        caption[torch.rand(args.batch, generator=generator) < EMPTY_CAPTIONS] = len(tokens) - 1
        rate, lean = schedule(trainer.step, args.steps)
        x, t = latents[rows], timesteps(args.batch, lean, generator)
        noise = torch.randn(x.shape, generator=generator)
        mixture = x + t[:, None, None] * (noise - x)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            velocity = trainer.transformer(
                hidden_states=mixture,
                encoder_hidden_states=tokens[caption],
                pooled_projections=pooled[caption],
                timestep=t,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - x)).pow(2).mean()
        trainer.update(loss, rate)
        losses.append(loss.item())
        seconds = before + time.monotonic() - start
        if trainer.step % 50 == 0:
            log(f"transformer {trainer.step}/{args.steps}: loss {np.mean(losses[-50:]):.4f}, {seconds:.0f} s")
        if trainer.step % args.save_every == 0 or trainer.step == args.steps:
            trainer.save(path, seconds)
    pipe.transformer.load_state_dict(trainer.average)
    pipe.transformer.eval().requires_grad_(False)
    return before + time.monotonic() - start


def train(args: argparse.Namespace) -> dict[str, float]:
    """All stages; returns how many seconds each took. The weights end in args.weights."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    images, scenes = draw_pictures(args.pictures, args.work_dir)
    components = models.build_components()
    cached = args.work_dir / "vae.safetensors"
    if cached.exists():
        components["vae"].load_state_dict(load_file(cached))
    else:
        train_vae(components["vae"], images, args.vae_steps)
        save_file(components["vae"].state_dict(), cached)
    encoded = args.work_dir / "latents.safetensors"
    if not encoded.exists():
        save_file({"latents": encode_pictures(components["vae"], images)}, encoded)
    latents = load_file(encoded)["latents"]
    shift, scale = latents.float().mean().item(), 1 / latents.float().std().item()
    components["vae"].register_to_config(shift_factor=shift, scaling_factor=scale)
    log(f"latents: shift_factor {shift:.4f}, scaling_factor {scale:.4f}")
    vae_seconds = time.monotonic() - start
    seconds = train_transformer(FluxPipeline(**components), latents, scenes, args)
    models.save_components(components, args.weights)
    return {"autoencoder_seconds": round(vae_seconds), "transformer_seconds": round(seconds)}


def evaluate(weights: Path, images: Path) -> dict[str, int]:
    """How many of the 64 held-out captions come out wholly right in both tasks; draws the contact sheets."""
    components = models.load_components(weights)
    drawn = tiny_score.score_text2image(components)
    painted = tiny_score.score_inpaint(components)
    tiny_score.draw_contact_sheet(drawn, images / "tiny_contact_sheet.png")
    tiny_score.draw_inpaint_sheet(painted[:12], images / "tiny_inpaint_sheet.png")
    for name, results in (("text2image", drawn), ("inpaint", painted)):
        for what, _, verdict in results:
            if not verdict:
                log(f"{name}: {getattr(what, 'scene', what).caption}: {'; '.join(verdict.mistakes)}")
    parts = models.model_parts(components).values()
    return {
        "held_out": len(drawn),
        "text2image_right": sum(map(bool, (verdict for *_, verdict in drawn))),
        "inpaint_right": sum(map(bool, (verdict for *_, verdict in painted))),
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "weights_bytes": sum(file.stat().st_size for file in weights.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build/tiny", help="caches and checkpoints")
    parser.add_argument("--weights", type=Path, default=models.WEIGHTS, help="where the weights go")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images", help="where the sheets go")
    parser.add_argument("--steps", type=int, default=3600, help="transformer steps")
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer: needs a C++ compiler")
    parser.add_argument("--bfloat16", action="store_true", help="bfloat16 autocast, for CPUs that have it")
    parser.add_argument("--evaluate", action="store_true", help="score the weights, train nothing")
    args = parser.parse_args()
    if not args.evaluate:
        log(json.dumps(train(args)))
    log(json.dumps(evaluate(args.weights, args.images)))


if __name__ == "__main__":
    main()
