"""Pre-trains the models of the world of words, in stages; started again it goes on.

    vae       an AutoencoderKL of the pictures
    flux      the transformer and its two text encoders, on flow matching; an average of the weights
    dinov3    features that know word and looks, for diversity
    letters   the auxiliary judge, on clean pictures
    genuine   the held-out judge, on roughened and corrupted pictures

FOLDER then has flux/ and dinov3/ in the layout of the published models, the judges' weights, the
prompts, samples.png, and in checkpoints/ what a stage needs to go on and made.json, which says what
is made and what was measured. Pictures are drawn for each step: masks of all texts wait on the
device, texts and looks are a function of (stage, step).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gardo.files import write_atomically
from gardo.report.pictures import save_grid
from gardo.rewards._dino import preprocess
from gardo.rewards.ocr import Ocr, OcrSettings
from gardo.tiny.make import publish, roughened
from gardo.types import Prompt
from words import judges, models, world
from words.fit import fit

GUIDANCE = 3.5
CHECKPOINTS = "checkpoints"  # a folder that the archive of ./run gpu leaves out, as it does weights
STEPS = 16  # denoise steps of the samples
OCR_SIDE = 128  # pixels to which OCR enlarges a picture: clean ones are read whole, and quickly
RATE = 60e12  # FLOP/s of an H100 that `estimate` assumes: a sixteenth of its dense bf16 peak


@dataclass(frozen=True)
class Task:
    """What a stage trains, and what becomes of it."""

    model: nn.Module
    loss: Callable[[int], Tensor]  # of a step
    publish: Callable[[], dict[str, float] | None]  # what was measured
    average: nn.Module | None = None


@dataclass(frozen=True)
class Making:
    size: models.Size
    folder: Path
    device: torch.device

    @cached_property
    def masks(self) -> Tensor:
        return world.masks(self.size.world).to(self.device)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """As the first stage left it; untrained before."""
        folder = self.folder / "vae"
        if not folder.is_dir():
            return models.autoencoder(self.size).to(self.device)
        return AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()

    def generator(self, stage: str, step: int) -> torch.Generator:
        """Of a step's noise, on the device."""
        return torch.Generator(self.device).manual_seed(_seed(stage, step, 0))

    def pictures(self, stage: str, step: int) -> tuple[list[str], Tensor]:
        """Captions and pictures of a step. Scenes are the host's, which need not wait then."""
        generator = torch.Generator().manual_seed(_seed(stage, step, 1))
        of, batch = self.size.world, self.size.budgets[stage].batch
        scene = world.sample_scenes(of, batch, generator)
        return world.captions(of, scene), world.draw(of, scene, self.masks)

    def half(self) -> torch.autocast:
        """bf16 where it is quick."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def _seed(stage: str, step: int, stream: int) -> int:
    return (2 * list(STAGES).index(stage) + stream) * 1_000_003 + step


# ---- the stages ----------------------------------------------------------------------------------


def vae_task(m: Making) -> Task:
    vae = models.autoencoder(m.size).train().to(m.device)

    def loss(step: int) -> Tensor:
        x = m.pictures("vae", step)[1] * 2 - 1
        with m.half():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(m.generator("vae", step))).sample.float()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * kl

    @torch.no_grad()
    def done() -> dict[str, float]:
        vae.eval()
        x = m.pictures("vae", m.size.budgets["vae"].steps)[1] * 2 - 1
        z = vae.encode(x).latent_dist.mode()
        error = float(F.mse_loss(vae.decode(z).sample, x))
        vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
        publish(vae, m.folder / "vae")
        return {"vae_mse": error}

    return Task(vae, loss, done)


def latents(vae: AutoencoderKL, images_B3HW: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised packed latents [B, 64, 4 channels]."""
    z = vae.encode(images_B3HW * 2 - 1).latent_dist.mode().float()
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, *z.shape)


def flux_task(m: Making) -> Task:
    pipeline = models.flux_pipeline(m.size, m.vae)
    trained = nn.ModuleDict(
        {
            name: getattr(pipeline, name).train().to(m.device)
            for name in ("transformer", "text_encoder", "text_encoder_2")
        }
    )
    average = copy.deepcopy(trained).requires_grad_(False)
    side = world.SIZE // 2 ** len(m.size.levels)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, m.device, torch.float32)
    text_ids = torch.zeros(models.TEXT_TOKENS, 3, device=m.device)

    def tokens(tokenizer: Any, texts: list[str]) -> Tensor:
        found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return found.input_ids.to(m.device)

    def loss(step: int) -> Tensor:
        generator = m.generator("flux", step)
        texts, images = m.pictures("flux", step)
        with torch.no_grad(), m.half():
            x0 = latents(pipeline.vae, images)
        noise = torch.randn(x0.shape, generator=generator, device=m.device)
        level = torch.randn(len(x0), generator=generator, device=m.device)
        sigma = torch.sigmoid(0.3 + 1.2 * level)
        with m.half():
            pooled = trained["text_encoder"](tokens(pipeline.tokenizer, texts)).pooler_output
            velocity = trained["transformer"](
                hidden_states=torch.lerp(x0, noise, sigma[:, None, None]),
                encoder_hidden_states=trained["text_encoder_2"](
                    tokens(pipeline.tokenizer_2, texts)
                )[0],
                pooled_projections=pooled,
                timestep=sigma,
                guidance=torch.full_like(sigma, GUIDANCE),
                img_ids=image_ids,
                txt_ids=text_ids,
            ).sample
        return F.mse_loss(velocity.float(), noise - x0)

    def done() -> dict[str, float]:
        for name, part in average.items():
            setattr(pipeline, name, part.eval())
        publish(pipeline, m.folder / "flux")
        return {}

    return Task(trained, loss, done, average)


def reading(logits_BKC: Tensor, captions: list[str]) -> Tensor:
    """Cross-entropy of the first places of the captions' labels."""
    label_BK = world.labels(captions, logits_BKC.device)[:, : logits_BKC.shape[1]]
    return F.cross_entropy(logits_BKC.flatten(0, 1).float(), label_BK.flatten())


def dinov3_task(m: Making) -> Task:
    """A linear head on the mean of the patch tokens learns to tell what the caption says."""
    model = models.dinov3(m.size)
    head = nn.Linear(m.size.features[0], world.PLACES * len(world.CLASSES))
    trained = nn.ModuleList([model, head]).train().to(m.device)

    def loss(step: int) -> Tensor:
        texts, images = m.pictures("dinov3", step)
        with m.half():
            first = 1 + model.config.num_register_tokens
            hidden = model(preprocess(images, world.SIZE)).last_hidden_state[:, first:].mean(1)
            logits = head(hidden).unflatten(1, (world.PLACES, -1))
        return reading(logits, texts)

    return Task(trained, loss, lambda: publish(model.eval(), m.folder / "dinov3"))


def keep(net: nn.Module, file: Path) -> None:
    state = {name: value.to("cpu", torch.bfloat16) for name, value in net.state_dict().items()}
    save_file(state, file)


def letters_task(m: Making) -> Task:
    net = judges.LettersNet().train().to(m.device)

    def loss(step: int) -> Tensor:
        texts, images = m.pictures("letters", step)
        with m.half():
            return reading(net(images), texts)

    return Task(net, loss, lambda: keep(net, m.folder / "letters.safetensors"))


def genuine_task(m: Making) -> Task:
    net = judges.GenuineNet(m.size.judge).train().to(m.device)

    def loss(step: int) -> Tensor:
        generator = m.generator("genuine", step)
        texts, images = m.pictures("genuine", step)
        with m.device:  # where its noise is drawn
            rough = roughened(images, generator)
        good, bad = rough.tensor_split(2)
        bad = judges.corrupted(bad, generator)
        with m.half():
            logits_BKC = net(torch.cat([good, bad])).float()
        rejected = logits_BKC[len(good) :].log_softmax(-1)[..., judges.REJECTED]
        return reading(logits_BKC[: len(good)], texts[: len(good)]) - rejected.mean()

    return Task(net, loss, lambda: keep(net, m.folder / "genuine.safetensors"))


STAGES: dict[str, Callable[[Making], Task]] = {
    "vae": vae_task,
    "flux": flux_task,
    "dinov3": dinov3_task,
    "letters": letters_task,
    "genuine": genuine_task,
}


def task_of(m: Making, stage: str) -> Task:
    torch.manual_seed(list(STAGES).index(stage))  # the weights at the start
    return STAGES[stage](m)


# ---- all of it -----------------------------------------------------------------------------------


def make(m: Making, until: float) -> dict[str, Any]:
    """What made.json says when all is made. Raises Cut at `until`, monotonic seconds."""
    facts = made(m.folder) or {"size": m.size.name, "stages": []}
    if facts["size"] != m.size.name:
        raise SystemExit(
            f"--out {m.folder}: holds models of size {facts['size']}; "
            f"give another folder for {m.size.name}"
        )
    (m.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    _write(m.folder, facts)
    write_prompts(m)
    for stage in STAGES:
        if stage in facts["stages"]:
            continue
        task, file = task_of(m, stage), m.folder / CHECKPOINTS / f"{stage}.safetensors"
        budget = m.size.budgets[stage]
        fit(stage, task.model, task.loss, budget, file=file, until=until, average=task.average)
        facts |= task.publish() or {}
        facts["stages"].append(stage)
        _write(m.folder, facts)
        file.unlink()
    if "ocr" not in facts:
        facts["ocr"] = read_back(m)
        _write(m.folder, facts)
    return facts


def made(folder: Path) -> dict[str, Any] | None:
    """What is known of the models in a folder; None where none were begun."""
    file = folder / CHECKPOINTS / "made.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _write(folder: Path, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=1)
    write_atomically(folder / CHECKPOINTS / "made.json", f"{text}\n".encode())


def write_prompts(m: Making) -> None:
    """prompts.txt: a caption of each trained word. evaluate.txt: of as many trained words as
    are held out, then of the held-out ones."""
    of = m.size.world
    halves = of.captions(of.trained[: len(of.held_out)], 1) + of.captions(of.held_out, 2)
    for name, prompts in (("prompts", of.captions(of.trained, 0)), ("evaluate", halves)):
        write_atomically(m.folder / f"{name}.txt", ("\n".join(prompts) + "\n").encode())


@torch.no_grad()
def read_back(m: Making) -> dict[str, dict[str, float]]:
    """What the OCR engine reads of samples of trained and of held-out words; also samples.png.

    `strict` is the ocr reward's mean, `whole` the share of samples read without an error.
    """
    pipeline = FluxPipeline.from_pretrained(m.folder / "flux", dtype=torch.float32).to(m.device)
    pipeline.set_progress_bar_config(disable=True)
    of, count = m.size.world, m.size.samples
    reader = Ocr(OcrSettings(role="proxy", limit_side_len=OCR_SIDE), m.device)
    found, shown = {}, []
    for seed, (half, words) in enumerate((("trained", of.trained), ("held_out", of.held_out))):
        prompts = of.captions([words[i % len(words)] for i in range(count)], seed)
        channels = pipeline.transformer.config.in_channels
        noise = torch.randn(count, 64, channels, generator=torch.Generator().manual_seed(seed))
        images = pipeline(
            prompts, latents=noise.to(m.device), height=world.SIZE, width=world.SIZE,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
            max_sequence_length=models.TEXT_TOKENS,
        ).images  # fmt: skip
        score_B = reader.score(images, [Prompt(prompt) for prompt in prompts])
        found[half] = {
            "strict": float(score_B.mean()),
            "whole": float((score_B == 1).float().mean()),
        }
        shown.append(images)
    save_grid(torch.cat(shown), m.folder / "samples.png", columns=16)
    return found


def estimate(size: models.Size) -> str:
    """How long the stages take on an H100: FLOPs counted on two pictures, at RATE. A model.

    Drawing, tokenising and launches are not in it, nor what OCR takes at the end.
    """
    few = {stage: replace(budget, batch=2) for stage, budget in size.budgets.items()}
    of = replace(size.world, others=size.world.others[:10])
    m = Making(replace(size, world=of, budgets=few), Path("nowhere"), torch.device("cpu"))
    lines, total = ["stage    M parameters  GFLOP a picture  M pictures  minutes"], 0.0
    for stage, budget in size.budgets.items():
        task = task_of(m, stage)
        with FlopCounterMode(display=False) as counter:
            task.loss(0).backward()
        flops, count = counter.get_total_flops() / 2, budget.steps * budget.batch
        minutes = flops * count / RATE / 60
        total += minutes
        parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
        lines.append(
            f"{stage:8} {parameters:12.2f} {flops / 1e9:16.3f} {count / 1e6:11.2f} {minutes:8.2f}"
        )
    return "\n".join(
        [*lines, f"{total:.1f} minutes in all at an assumed {RATE / 1e12:.0f} TFLOP/s"]
    )
