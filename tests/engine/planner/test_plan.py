"""`gardo plan`: memory by part and phase, the advice, the page, the exit code."""

import pytest
from typer.testing import CliRunner

from gardo.cli import app
from gardo.config import load
from gardo.planner import geometry
from gardo.planner.advice import Change, advise, changed, variants
from gardo.planner.memory import CONTEXT, Counted
from gardo.planner.shadow import Shadow
from gardo.planner.sizes import bytes_of
from gardo.planner.time import SHARE, seconds
from gardo.planner.verdict import verdict
from gardo.recipe import reward_settings
from gardo.recipe_errors import RecipeError
from gardo.rewards.serving.workers import WorkerSettings
from tests import ROOT

FLUX = ROOT / "recipes/flux_gardo_hpsv2.yaml"
GPUS = 8


@pytest.fixture(scope="module")
def flux():
    """With ZeRO-3, and a micro-batch that is too large for 80 GB."""
    recipe = load(FLUX, ["distributed.stage=3", "train.micro_batch=12"], prompts=False)
    return recipe, Counted(Shadow(recipe))


@pytest.fixture(scope="module")
def tiny():
    recipe = load(ROOT / "recipes/tiny_flux_gardo.yaml")
    return recipe, Counted(Shadow(recipe))


def memory_of(counted, recipe, world=GPUS):
    return counted.memory(recipe, geometry(recipe, rank=0, world=world), world)


def part(parts, name):
    (found,) = (p.bytes for p in parts if p.name == name)
    return found


def test_what_stays_follows_from_numbers_and_precisions(flux):
    recipe, counted = flux
    model, trained = counted.shadow.parameters, counted.shadow.trainable
    stays = memory_of(counted, recipe).stays
    assert part(stays, "weights") == -(-model * 2 // GPUS)
    assert part(stays, "optimizer state") == -(-trained // GPUS) * (4 + 8)
    assert part(stays, "gradient sums") == part(stays, "slots") == -(-trained // GPUS) * 4
    assert part(stays, "CUDA, NCCL") == CONTEXT
    assert part(stays, "reward hpsv2") == 986_109_441 * 4
    assert not {"text encoders", "gathered weights"} & {p.name for p in stays}


@pytest.mark.parametrize(
    ("field", "value", "name", "factor"),
    [
        ("distributed.stage", 2, "weights", GPUS),
        ("distributed.stage", 1, "gradient sums", GPUS),
        ("distributed.masters", "bfloat16", "optimizer state", 6 / 12),
        ("train.optimizer.name", "adamw_8bit", "optimizer state", (4 + 2 + 8 / 256) / 12),
    ],
)
def test_what_a_setting_saves(flux, field, value, name, factor):
    recipe, counted = flux
    before = part(memory_of(counted, recipe).stays, name)
    after = part(memory_of(counted, changed(recipe, Change(field, value))).stays, name)
    assert after == pytest.approx(factor * before, rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("distributed.slots", "host", "slots"),
        ("distributed.offload", "parameters", "weights"),
        ("distributed.offload", "optimizer", "optimizer state"),
    ],
)
def test_what_waits_in_host_memory(flux, field, value, name):
    recipe, counted = flux
    before = memory_of(counted, recipe)
    after = memory_of(counted, changed(recipe, Change(field, value)))
    assert name not in {p.name for p in after.stays}
    assert part(after.host, name) == part(before.stays, name) > 0


def phase(memory, name):
    (found,) = (p for p in memory.phases if p.name == name)
    return found


def test_where_the_text_encoders_wait(flux):
    recipe, counted = flux
    offload, resident, free = (
        memory_of(counted, changed(recipe, Change("model.encoders", where)))
        for where in ("offload", "resident", "free")
    )
    bytes_ = 2 * sum(count for count, _ in counted.shadow.encoders.values())
    assert part(resident.stays, "text encoders") == bytes_
    assert part(offload.host, "text encoders (ranks share them)") == bytes_
    assert part(phase(offload, "encode").parts, "text encoders") == bytes_
    assert resident.resident - offload.resident == bytes_
    alone = phase(free, "encode")
    assert free.resident == offload.resident and not free.host
    assert free.peak_of(alone) == alone.bytes < 1.2 * (bytes_ + CONTEXT)


@pytest.mark.parametrize(("base", "least", "most"), [("nf4", 0.26, 0.29), ("int8", 0.50, 0.53)])
def test_a_quantised_base_is_smaller_and_needs_a_layer_whole(flux, base, least, most):
    original, counted = flux
    recipe = changed(original, Change("distributed.stage", 1))
    whole = memory_of(counted, recipe)
    small = memory_of(counted, changed(recipe, Change("model.base", base)))
    assert least < part(small.stays, "weights") / part(whole.stays, "weights") < most
    layer = 2 * 3072 * 6 * 3072  # bf16, the modulation of a double block
    for name in ("sample", "train"):
        assert part(phase(small, name).parts, "dequantised weights") == layer
        assert part(phase(whole, name).parts, "dequantised weights") == 0


def test_what_is_sampled_and_decoded_at_once_is_bounded_without_being_asked(flux):
    recipe, counted = flux
    plan = geometry(recipe, rank=0, world=GPUS)
    assert (plan.samples, plan.sampled, plan.micro_batch) == (144, 12, 12)
    decode = phase(memory_of(counted, recipe), "decode")
    assert part(decode.parts, "activations") == counted.cost("decoding", 8)
    each = changed(recipe, Change("rollout.decode_batch", 1))
    least = part(phase(memory_of(counted, each), "decode").parts, "activations")
    assert least == counted.cost("decoding", 1)


def test_rewards_activations_are_counted_a_batch_at_a_time(flux):
    recipe, counted = flux
    now = part(phase(memory_of(counted, recipe), "reward").parts, "activations")
    sizes = {n: getattr(s, "batch", None) for n, s in reward_settings(recipe).items()}
    fewer = recipe
    for name, batch in sizes.items():
        if batch:
            fewer = changed(fewer, Change(f"rewards.{name}.batch", 1))
    less = part(phase(memory_of(counted, fewer), "reward").parts, "activations")
    assert 0 < less < now / 2
    # an evaluation scores with its weights whole
    evaluated = part(phase(memory_of(counted, recipe), "evaluate").parts, "activations")
    assert evaluated == max(now, counted.cost("sampling", recipe.evaluate.batch))


def test_rewards_of_a_worker_are_counted_where_it_is(flux):
    recipe, counted = flux
    here = memory_of(counted, recipe)
    worker = recipe.rewards["hpsv2"].model_copy(update={"where": "worker:judges"})
    scoring = recipe.scoring.model_copy(
        update={"workers": {"judges": WorkerSettings(device="cuda:7")}}
    )
    rewards = {**recipe.rewards, "hpsv2": worker}
    away = recipe.model_copy(update={"rewards": rewards, "scoring": scoring})
    there = memory_of(counted, away)
    assert here.resident - there.resident == sum(
        p.bytes for p in here.stays if p.name == "reward hpsv2"
    )
    assert not here.workers
    assert [*there.workers] == ["worker:judges on cuda:7"]
    parts = there.workers["worker:judges on cuda:7"]
    assert part(parts, "reward hpsv2") == 986_109_441 * 4 and part(parts, "activations") > 0


def test_gathering_at_every_forward_keeps_three_blocks_and_one_on_its_way(flux):
    recipe, counted = flux
    shadow = counted.shadow
    sample = phase(memory_of(counted, recipe), "sample")
    assert part(sample.parts, "gathered weights") == 2 * shadow.parameters
    each = changed(recipe, Change("rollout.gather", "step"))
    sample = phase(memory_of(counted, each), "sample")
    blocks = [count for count, _ in shadow.block_parameters]
    outside = shadow.parameters - sum(blocks)
    assert part(sample.parts, "gathered weights") == 2 * (outside + 4 * max(blocks))


def test_where_gathering_once_does_not_fit_a_run_does_without(flux):
    """`rollout.gather: auto`, whatever the plan said of it, must not keep a recipe from running."""
    recipe, counted = flux
    recipe = changed(recipe, Change("train.micro_batch", 1))
    plan = geometry(recipe, rank=0, world=GPUS)
    once = memory_of(counted, recipe).peak
    each = memory_of(counted, changed(recipe, Change("rollout.gather", "step"))).peak
    assert each < once - 1
    for room, taken in ((once, "auto"), (once - 1, "step"), (each, "step"), (each - 1, "auto")):
        assert counted.settled(recipe, plan, GPUS, room).rollout.gather == taken
    wanted = changed(recipe, Change("rollout.gather", "iteration"))
    assert counted.settled(wanted, plan, GPUS, once - 1) is wanted


@pytest.mark.parametrize(
    ("kind", "count", "how"),
    [("training", 12, ["none"]), ("sampling", 9, []), ("decoding", 9, [])],
)
def test_other_counts_lie_on_the_line(flux, kind, count, how):
    _, counted = flux
    exact = getattr(counted.shadow, f"{kind}_bytes")(count, *how)
    assert counted.cost(kind, count, *how) == pytest.approx(exact, rel=5e-3)


def test_advice_makes_it_fit(flux):
    recipe, counted = flux
    assert memory_of(counted, recipe).peak > 80e9
    changes, memory = advise(counted, recipe, GPUS, int(80e9))
    assert memory.peak <= 80e9
    for change in changes:
        recipe = changed(recipe, change)
    assert memory_of(counted, recipe).peak == memory.peak
    assert [change.field for change in changes] == ["train.activation_checkpointing"]
    assert advise(counted, recipe, GPUS, int(80e9)) == ([], memory)  # nothing more to do


def test_sharing_out_a_loras_whole_base_is_advised(flux):
    original, _ = flux
    recipe = changed(original, Change("distributed.stage", 1))
    assert Change("distributed.stage", 3) in variants(recipe, GPUS, "train")
    assert Change("distributed.stage", 3) not in variants(recipe, 1, "train")


def test_where_nothing_helps_it_says_so(tiny):
    recipe, counted = tiny
    assert advise(counted, recipe, 2, CONTEXT) is None


def test_a_verdict_is_a_line_or_what_would_make_it_fit(tiny):
    recipe, counted = tiny
    peak = memory_of(counted, recipe, 2).peak
    said = verdict(recipe, world=2, room=peak, source="mine.yaml")
    assert said == f"peak {peak / 1e9:.1f} GB of {peak / 1e9:.1f}, in phase train: fits"
    with pytest.raises(RecipeError) as raised:
        verdict(recipe, world=2, room=peak - 1, source="mine.yaml")
    first, second, last = str(raised.value).splitlines()
    assert first.startswith("mine.yaml: peak ") and first.endswith("in phase train: does not fit")
    assert second.startswith("fits with  --set train.activation_checkpointing=matmuls")
    assert "--ignore-plan" in last


def test_fewer_prompts_are_advised_where_only_they_help(tiny):
    """Too many images of a step: their record stays in memory from sampling to training."""
    recipe, counted = tiny
    many = changed(recipe, Change("data.prompts_per_step", 8192))
    record = part(phase(memory_of(counted, many, 2), "train").parts, "rollout")
    changes, memory = advise(counted, many, 2, CONTEXT + record)
    fewer = [change.value for change in changes if change.field == "data.prompts_per_step"]
    assert fewer and fewer[-1] < 8192 and memory.peak <= CONTEXT + record


def test_time_is_flops_over_the_assumed_rate(flux):
    recipe, counted = flux
    plan = geometry(recipe, rank=0, world=GPUS)
    took = seconds(recipe, counted.shadow, plan, GPUS, nodes=1)
    forward = counted.shadow.flops(backward=False)
    assert took.phases["sample"] == pytest.approx(144 * 6 * forward / (SHARE["sample"] * 790e12))
    # GARDO asks the reference at a tenth of the rows
    assert recipe.teachers_per_row == 0.1
    assert took.phases["teachers"] == pytest.approx(
        0.1 * 144 * 4 * forward / (SHARE["teachers"] * 790e12)
    )
    once = 2 * counted.shadow.parameters * 7 / 8 / 400e9
    assert took.gathering == pytest.approx(once * (2 * 2 * 24 + 2))


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("79GiB", 79 * 2**30), ("24g", 24e9), ("141", 141e9)]
)
def test_memory_sizes(text, size):
    assert bytes_of(text) == size


def test_the_command(tmp_path):
    tiny = str(ROOT / "recipes/tiny_flux_gardo.yaml")
    good = CliRunner().invoke(app, ["plan", tiny, "--gpus", "2", "--gpu-memory", "8GB"])
    assert good.exit_code == 0, good.output
    assert "2 GPUs of 8.0 GB" in good.output and ": fits" in good.output
    assert "not measured" in good.output and "iterations: 0.0 minutes, " in good.output
    small = CliRunner().invoke(app, ["plan", tiny, "--gpus", "2", "--gpu-memory", "0.5GB"])
    assert small.exit_code == 1
    assert "does not fit" in small.output and "nothing that was tried" in small.output
    for wrong, said in (
        (["--gpu-memory", "much"], "'much' is no memory size; write 80GB or 79GiB"),
        (["--gpus", "5"], "do not split evenly over 5 ranks"),
    ):
        refused = CliRunner().invoke(app, ["plan", tiny, *wrong])
        assert refused.exit_code == 2 and said in refused.stderr
