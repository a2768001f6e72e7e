"""A policy that is a linear layer: its rollouts, what a loss may call, and its twin in fp64."""

import torch
from torch import nn

from gardo.algorithms.base import SamplerSettings, World
from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import OptimizerSettings
from gardo.flow import sd3_sigmas
from gardo.rollout import LossContext, Part, batch_of, parts, rows_of, sample
from gardo.types import Scores

PROMPTS = ("a red circle", "two squares")
GROUP, COUNT, SEED, STEP = 4, 8, 11, 3
CPU = torch.device("cpu")


class LinearPolicy(nn.Module):
    """A linear velocity of latent, sigma and prompt, a linear decoder; weights without a generator.

    `calls` has the rows of each call.
    """

    latent_shape = (3, 2)
    cfg_scale = 1.0

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.calls = []
        self.net, self.decoder = nn.Linear(6 + 1 + 2, 6), nn.Linear(6, 12)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.arange(p.numel()).mul(1.7).sin().view_as(p) / 2)

    def encode(self, prompts):
        return {"text": torch.tensor([[len(p) / 20, sum(map(ord, p)) % 7 / 7] for p in prompts])}

    def velocity(self, x, sigma, conditioning):
        self.calls.append(len(x))
        inputs = torch.cat([x.flatten(1), sigma[:, None], conditioning["text"]], 1)
        return self.net(inputs.to(self.net.weight.dtype)).tanh().view_as(x)

    def branches(self, x, sigma, conditioning):
        return self.velocity(x, sigma, conditioning), None

    def decode(self, latents):
        return self.decoder(latents.flatten(1)).sigmoid().view(-1, 3, 2, 2)


def redness(images, prompts):
    """A differentiable reward, in units that ReFL standardises; longer prompts want more."""
    length = torch.tensor([len(prompt) for prompt in prompts])
    return (images[:, 0] - images[:, 2]).mean((1, 2)) * length


def context(policy):
    """What a loss may call."""
    return LossContext(policy, redness)


def build(plugin, settings, *, steps=5, train_steps=3, seed=SEED, **more):
    sampler = SamplerSettings(steps=steps, train_steps=train_steps, **more)
    plugin.check(settings, sampler)
    return plugin(settings, World(sampler=sampler, sigmas=sampler.sigmas(sd3_sigmas), seed=seed))


def roll(policy, algorithm, *, step=STEP, first=0, count=COUNT):
    return sample(
        policy, PROMPTS, algorithm.plan(step), images_per_prompt=GROUP, first=first, count=count,
        seed=SEED, step=step, device=CPU,
    )  # fmt: skip


def scores_of(rollout, valid=None):
    reward_B = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.5, 0.2, 0.8, 0.3])
    valid_B = torch.ones(COUNT, dtype=torch.bool) if valid is None else valid
    return Scores(
        sample_B=rollout.sample_B, group_B=rollout.group_B, proxy_B=reward_B, valid_B=valid_B
    )


def whole(points, credit, rollout):
    return batch_of(points, credit, Part(torch.arange(len(points.sample_R))), rollout)


def minibatches(points, credit, rollout, *, micro_batch, updates=1, **how):
    """All micro-batches of the iteration STEP."""
    cut = parts(
        points, sample_B=rollout.sample_B, updates=updates, micro_batch=micro_batch, seed=SEED,
        step=STEP, **how,
    )  # fmt: skip
    return [batch_of(points, credit, part, rollout) for part in cut]


def nudge(policy, size):
    with torch.no_grad():
        policy.net.weight += size * torch.arange(policy.net.weight.numel()).cos().view(6, 9)


def engine_for(model):
    return LocalEngine(
        dict(model.named_parameters()),
        optimizer=OptimizerSettings(),
        accumulation=1,
        max_grad_norm=1.0,
        device=CPU,
    )


def log_prob(rollout, velocity_BTX):
    """log p(x' | x) of the recorded steps up to a constant, fp64, straight from its formula."""
    table = {
        n: rollout.transitions.column(n)[rollout.step_T].double()[None, :, None, None]
        for n in ("A", "B", "h")
    }
    x = rollout.state_BTX.double()
    x_next = table["A"] * x + table["B"] * (rollout.velocity_BTX + rollout.u_BTX).double()
    error = (x_next - table["A"] * x - table["B"] * velocity_BTX).square().mean((2, 3))
    return -table["h"][..., 0, 0] * error


def recorded_velocity(policy, rollout):
    """[B, T, X] fp64 with gradients, and the policy in fp64."""
    twin = LinearPolicy().double()
    twin.load_state_dict({n: w.double() for n, w in policy.state_dict().items()})
    conditioning = rows_of(rollout.conditioning, rollout.prompt_B)
    sigma_T = rollout.transitions.column("model_sigma")
    steps = [
        twin.velocity(rollout.state_BTX[:, i].double(), sigma_T[t].expand(COUNT), conditioning)
        for i, t in enumerate(rollout.step_T)
    ]
    return torch.stack(steps, 1), twin


class Stated(nn.Module):
    """A context whose velocities and rewards are parameters."""

    def __init__(self, velocity, reward=None):
        super().__init__()
        self.velocities = nn.Parameter(velocity)
        self.rewards = None if reward is None else nn.Parameter(reward)

    def velocity(self, batch):
        return self.velocities

    def decode(self, latents):
        return latents

    def score(self, images, batch):
        return self.rewards
