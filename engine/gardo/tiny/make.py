"""Train the tiny models from scratch and write them to `weights/`.

    python -m gardo.tiny.make [STAGE ...]

Stages, in order: vae, flux, dinov3, judges, sd3. Each is seeded and stands alone once
those before it have run. About half an hour on 2 CPU cores; the results ship with the
package, so nobody needs to run this.

The weights are stored in bf16 (under 8 MB in all) and used in fp32, so what is stored is exactly
what is used.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from gardo.tiny import judges, models, world

FLUX = models.WEIGHTS / "flux"
SD3 = models.WEIGHTS / "sd3"
DINOV3 = models.WEIGHTS / "dinov3"
PICTURES = 40_000
GUIDANCE = 3.5


def pictures(count: int, seed: int) -> tuple[world.Scene, Tensor]:
    scene = world.sample_scenes(count, torch.Generator().manual_seed(seed))
    return scene, world.draw(scene)


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    name: str,
    after: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with a short warm-up and cosine decay on `loss(step)`."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * s / steps)))
        ),
    )
    start, running = time.monotonic(), 0.0
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
        after()
        running = 0.98 * running + 0.02 * float(value.detach()) if step else float(value.detach())
        if (step + 1) % 250 == 0:
            print(
                f"{name} {step + 1}/{steps} loss {running:.4f} {time.monotonic() - start:.0f} s",
                flush=True,
            )


def batch_index(step: int, size: int, count: int, seed: int) -> Tensor:
    return torch.randint(
        count, (size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step)
    )


def publish(model: Any, folder: Path) -> None:
    """Saves in bf16, without the path that the model was loaded from."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.rglob("*.json"):
        text = json.loads(path.read_text(encoding="utf-8"))
        if text.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def make_vae(steps: int = 2000) -> None:
    torch.manual_seed(1)
    vae = models.autoencoder().train()
    _, images = pictures(20_000, seed=1)
    images = images * 2 - 1

    def loss(step: int) -> Tensor:
        x = images[batch_index(step, 48, len(images), 1)]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * posterior.kl().mean() / 1024

    fit(vae.parameters(), loss, steps=steps, lr=3e-3, name="vae")
    vae.eval()
    with torch.no_grad():
        z = vae.encode(images[:2000]).latent_dist.mode()
        error = F.mse_loss(vae.decode(z[:500]).sample, images[:500])
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    print(f"vae: reconstruction MSE {float(error):.5f}, latent std {float(z.std()):.3f}")
    pipeline = models.flux_pipeline(vae)
    publish(pipeline, FLUX)


def latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """[B, 3, 32, 32] in [0, 1] -> normalised packed latents [B, 64, 16]."""
    with torch.no_grad():
        z = torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(500)])
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, len(z), 4, 16, 16)


def make_flux(steps: int = 2400, batch: int = 48) -> None:
    torch.manual_seed(2)
    pipeline = FluxPipeline.from_pretrained(FLUX, torch_dtype=torch.float32)
    transformer = models.flux_pipeline().transformer.train()
    average = copy.deepcopy(transformer).requires_grad_(False)
    scene, images = pictures(PICTURES, seed=2)
    x0_BLD = latents(pipeline.vae, images)
    prompts = world.prompts()
    which_B = torch.tensor([prompts.index(c) for c in world.captions(scene)])
    with torch.no_grad():
        text_PLD, pooled_PD, text_ids = pipeline.encode_prompt(
            prompts, None, max_sequence_length=models.TEXT_TOKENS
        )
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    guidance = torch.full((batch,), GUIDANCE)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(2_000_003 + step)
        rows = batch_index(step, batch, PICTURES, 2)
        x0, which = x0_BLD[rows], which_B[rows]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(0.3 + 1.2 * torch.randn(batch, generator=generator))
        x = torch.lerp(x0, noise, sigma[:, None, None])
        velocity = transformer(
            hidden_states=x,
            encoder_hidden_states=text_PLD[which],
            pooled_projections=pooled_PD[which],
            timestep=sigma,
            guidance=guidance,
            img_ids=image_ids,
            txt_ids=text_ids,
        ).sample
        return F.mse_loss(velocity, noise - x0)

    def follow() -> None:
        for a, p in zip(average.parameters(), transformer.parameters(), strict=True):
            a.lerp_(p.detach(), 0.004)

    fit(transformer.parameters(), loss, steps=steps, lr=2e-3, name="flux", after=follow)
    pipeline.transformer = average.eval()
    publish(pipeline, FLUX)


def make_dinov3(steps: int = 1000, batch: int = 64) -> None:
    """Features that know layout, size, hue, shape and count.

    Linear heads on the mean patch token learn to tell them.
    """
    torch.manual_seed(3)
    model = models.dinov3().train()
    scene, images = pictures(20_000, seed=3)
    # as rewards/_dino.py shows it pictures
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    images_in = (images - mean) / std
    cover_BC = (
        F.adaptive_avg_pool2d((images.amax(1, keepdim=True) > 0.35).float(), 4).flatten(1) * 4
    )
    used_BK = torch.arange(3) < scene.count_B[:, None]
    size_B = (scene.radius_BK * used_BK).sum(1) / scene.count_B
    rgb_BC = scene.rgb_BK3[:, 0] * 2 - 1
    target_BC = torch.cat([cover_BC, (size_B[:, None] - 4.75), rgb_BC], 1)
    heads = nn.ModuleDict(
        {
            "regress": nn.Linear(48, target_BC.shape[1]),
            "shape": nn.Linear(48, 3),
            "count": nn.Linear(48, 3),
        }
    )

    def loss(step: int) -> Tensor:
        rows = batch_index(step, batch, len(images), 3)
        hidden = model(images_in[rows]).last_hidden_state[:, 2:].mean(1)
        return (
            F.mse_loss(heads["regress"](hidden), target_BC[rows])
            + 0.2 * F.cross_entropy(heads["shape"](hidden), scene.shape_BK[rows, 0])
            + 0.2 * F.cross_entropy(heads["count"](hidden), scene.count_B[rows] - 1)
        )

    fit([*model.parameters(), *heads.parameters()], loss, steps=steps, lr=2e-3, name="dinov3")
    publish(model.eval(), DINOV3)


def corrupted(count: int, seed: int) -> Tensor:
    """Pictures that no caption fits, count / 6 of each kind, in this order.

    Mixed objects, torn, smeared and bled ones, combs of dots, blobs and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    part = count // 6
    mixed = world.sample_scenes(part, generator, mixed=True)
    mixed = replace(mixed, count_B=mixed.count_B.clamp(min=2))
    scene, plain = pictures(4 * part, seed + 1)
    whole, smeared, bled, combed = plain.split(part)
    shift = (uniform(part, 1, 1, 1) * 4 + 3).long()
    smeared = torch.stack(
        [
            torch.stack([s.roll(int(k) * step, -1) for step in range(3)]).amax(0)
            for s, k in zip(smeared, shift.flatten(), strict=True)
        ]
    )
    far = F.avg_pool2d(F.pad(bled, (4, 4, 4, 4), mode="replicate"), 9, 1)
    bled = torch.maximum(bled * uniform(part, 1, 1, 1), far * (1.5 + uniform(part, 1, 1, 1)))
    pitch_B1 = (uniform(part, 1) * 3 + 3).long()
    on_BW = torch.arange(world.SIZE) % pitch_B1 < 2
    dots = on_BW[:, None, :, None] & on_BW[:, None, None, :]
    combed = combed.amax((2, 3), keepdim=True) * dots + 0.1 * ~dots
    coarse = F.interpolate(uniform(part, 3, 5, 5), size=world.SIZE, mode="bicubic").clamp(0, 1)
    blobs = torch.where(uniform(part, 1, 1, 1) < 0.5, coarse, uniform(part, 3, 32, 32))
    holed = torn(whole, scene.ground_B[:part], generator)
    return torch.cat([world.draw(mixed), holed, smeared, bled.clamp(0, 1), combed, blobs])


def torn(images: Tensor, ground_B: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures with holes of 2 to 6 pixels that take at least 15 % of the objects."""
    objects = (images.amax(1, keepdim=True) > 0.35).float()
    left = objects.sum((1, 2, 3))
    images = images.clone()
    pending = torch.ones(len(images), dtype=torch.bool)
    while pending.any():
        size = int(torch.randint(2, 7, (1,), generator=generator))
        cells = world.SIZE // size + 2
        share = 0.15 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)
        hole = (torch.rand(len(images), 1, cells, cells, generator=generator) < share).float()
        y, x = torch.randint(size, (2,), generator=generator).tolist()
        hole = F.interpolate(hole, scale_factor=size)[..., y : y + world.SIZE, x : x + world.SIZE]
        lost = (objects * hole).sum((1, 2, 3)) / left
        take = pending & (lost > 0.15) & (torch.rand(len(images), generator=generator) < 0.4)
        images[take] = torch.lerp(images, ground_B[:, None, None, None], hole)[take]
        pending &= ~take
    return images


def roughened(images: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures as a sampler might leave them: some noise, some blur, another brightness."""
    rough = torch.rand(len(images), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = torch.lerp(images, blurred, 0.6 * torch.rand(rough.shape, generator=generator))
    noise = 0.06 * rough * torch.randn(images.shape, generator=generator)
    gain = 0.9 + 0.2 * torch.rand(rough.shape, generator=generator)
    return (mixed * gain + noise).clamp(0, 1)


def make_judges(steps: int = 1000, batch: int = 64) -> None:
    judges.FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(4)
    scene, images = pictures(12_000, seed=4)
    net = judges.ShapeNet()

    def shape_loss(step: int) -> Tensor:
        rows = batch_index(step, batch, len(images), 4)
        return F.cross_entropy(net(images[rows]), scene.shape_BK[rows, 0])

    fit(net.parameters(), shape_loss, steps=steps, lr=3e-3, name="shape")
    save_file({k: v.to(torch.bfloat16) for k, v in net.state_dict().items()}, judges.SHAPE)

    torch.manual_seed(5)
    scene, images = pictures(32_000, seed=5)
    images = torch.cat([images, corrupted(24_000, seed=6)])
    label_B = torch.full((len(images),), judges.REJECTED)
    label_B[:32_000] = scene.colour_B * len(world.SHAPES) + scene.shape_BK[:, 0]
    judge = judges.FidelityNet()

    def fidelity_loss(step: int) -> Tensor:
        rows = batch_index(step, batch, len(images), 5)
        rough = roughened(images[rows], torch.Generator().manual_seed(5_000_011 + step))
        return F.cross_entropy(judge(rough), label_B[rows])

    fit(judge.parameters(), fidelity_loss, steps=4 * steps, lr=2e-3, name="fidelity")
    save_file({k: v.to(torch.bfloat16) for k, v in judge.state_dict().items()}, judges.FIDELITY)


def make_sd3() -> None:
    """Random weights: the layout of SD3.5 for tests and recipes, not pictures."""
    torch.manual_seed(7)
    vae = FluxPipeline.from_pretrained(FLUX, torch_dtype=torch.float32).vae
    publish(models.sd3_pipeline(vae), SD3)


STAGES: dict[str, Callable[[], None]] = {
    "vae": make_vae,
    "flux": make_flux,
    "dinov3": make_dinov3,
    "judges": make_judges,
    "sd3": make_sd3,
}


def main(names: list[str]) -> None:
    for name in names or list(STAGES):
        if name not in STAGES:
            raise SystemExit(f"{name}: not a stage; the stages are {', '.join(STAGES)}")
        STAGES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
