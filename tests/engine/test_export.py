"""What is exported of a run, in every format, live and averaged, by the command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from gardo import cli
from gardo.config import check, read_yaml
from gardo.distributed.saved import committed
from gardo.export import export_run
from gardo.phases import publish
from gardo.policies.lora_files import open_lora
from gardo.recipe_errors import RecipeError
from gardo.session import Session, open_session
from gardo.settings import model_path
from gardo.train import train
from tests.integration.cases import Case
from tests.integration.probes import velocity
from tests.integration.recipes import recipe

LORA = Case("flow_grpo", "lora", "local", ("ema",), steps=1)
FULL = Case("flow_grpo", "full", "local", steps=1)
WEIGHTS = {False: "train", True: "average"}  # what --ema takes


@dataclass
class Run:
    folder: Path
    session: Session
    velocity: dict[bool, Tensor]  # of the live weights, and of their average

    @property
    def trained(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.session.policy.trainable().items()}

    def with_transformer(self, transformer: torch.nn.Module) -> Tensor:
        """The velocity of another transformer in the run's pipeline."""
        pipeline = self.session.policy.pipeline
        own, pipeline.transformer = pipeline.transformer, transformer.eval()
        try:
            return velocity(self.session)
        finally:
            pipeline.transformer = own


def run(case: Case, root: Path) -> Run:
    with open_session(check(recipe(case, root), case.name), quiet=True) as session:
        train(session)
    publish(session)
    said = {}
    for average, name in WEIGHTS.items():
        if not average or case.has("ema"):
            with session.engine.reading(name):
                said[average] = velocity(session)
    return Run(root / case.run, session, said)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield run(LORA, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield run(FULL, tmp_path_factory.mktemp("full"))


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `gardo ...` prints where it ends well."""
    with pytest.raises(SystemExit) as raised:
        cli.app(list(arguments))
    out, err = capsys.readouterr()
    assert raised.value.code == 0, err
    return out.strip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as raised:
        cli.app(list(arguments))
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip()


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", WEIGHTS)
def test_a_run_ends_with_its_weights_and_their_average(lora, average):
    pipeline = FluxPipeline.from_pretrained(model_path("builtin:flux"))
    pipeline.load_lora_weights(lora.folder / ("export-ema" if average else "export"))
    assert torch.equal(lora.with_transformer(pipeline.transformer), lora.velocity[average])
    assert not torch.equal(lora.velocity[False], lora.velocity[True])


def test_its_evaluations_draw_with_the_average(lora):
    images = torch.arange(4)
    with lora.session.engine.reading("average"):
        averaged, _ = lora.session.evaluator.batch(images)
    live, _ = lora.session.evaluator.batch(images)
    assert lora.session.recipe.evaluated == "average"
    assert not torch.equal(averaged, live)
    alone = read_yaml((lora.folder / "recipe.yaml").read_text(), "recipe")
    alone["train"]["ema"]["evaluate"] = False
    assert check(alone, "recipe").evaluated == "train"


@pytest.mark.parametrize("average", WEIGHTS)
def test_peft_folder_by_command(lora, capsys, average):
    path = command(capsys, "export", str(lora.folder), "--format", "peft",
                   *(["--ema"] if average else []))  # fmt: skip
    assert path == str(lora.folder / ("export-peft-ema" if average else "export-peft"))
    engine, read = lora.session.engine, open_lora(path).read()
    pieces = [piece.name for piece in engine.shards.pieces]
    averages = dict(zip(pieces, engine.slots.pieces("average"), strict=True))
    assert read.keys() == lora.trained.keys()
    for name, tensor in read.items():
        wanted = averages[name].view(tensor.shape) if average else lora.trained[name]
        assert torch.equal(tensor, wanted), name


def test_kohya_file_by_command(lora, capsys, tmp_path):
    path = command(capsys, "export", str(lora.folder), "--format", "kohya", "--out", str(tmp_path))
    tensors = load_file(path)
    assert Path(path).parent == tmp_path
    name, module = "lora_unet_double_blocks_1_img_mlp_2", "transformer_blocks.1.ff.net.2"
    for theirs, ours in (("down", "A"), ("up", "B")):
        trained = lora.trained[f"{module}.lora_{ours}.default.weight"]
        assert torch.equal(tensors[f"{name}.lora_{theirs}.weight"], trained)
    assert tensors[f"{name}.alpha"] == 8
    assert tensors["lora_unet_double_blocks_1_img_attn_qkv.alpha"] == 3 * 8


# ---- all weights ---------------------------------------------------------------------------------


def test_a_transformer_in_shards_by_command(full, capsys, tmp_path):
    path = command(capsys, "export", str(full.folder), "--shard-size", "0.002GB",
                   "--out", str(tmp_path))  # fmt: skip
    assert path == str(tmp_path)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(full.with_transformer(transformer), full.velocity[False])
    whole = full.folder / "export" / "diffusion_pytorch_model.safetensors"  # the run's own
    assert load_file(whole).keys() == full.trained.keys()


def test_a_pipeline_by_command(full, capsys):
    path = command(capsys, "export", str(full.folder), "--format", "pipeline")
    assert path == str(full.folder / "export-pipeline")
    pipeline = FluxPipeline.from_pretrained(path)
    assert torch.equal(full.with_transformer(pipeline.transformer), full.velocity[False])


def test_the_base_model_is_not_written_over(full):
    base = Path(model_path("builtin:flux"))
    before = (base / "transformer/diffusion_pytorch_model.safetensors").stat()
    for format, out in (("transformer", base / "transformer"), ("pipeline", base)):
        with pytest.raises(RecipeError, match="the base model itself; give another --out"):
            export_run(full.folder, format=format, out=out)
    assert (base / "transformer/diffusion_pytorch_model.safetensors").stat() == before


# ---- refusals ------------------------------------------------------------------------------------


def test_formats_that_do_not_fit_are_refused(lora, full, capsys):
    for name in ("transformer", "pipeline"):
        message = refused(capsys, "export", str(lora.folder), "--format", name)
        assert message == (
            f"{lora.folder}: --format {name}: this run trained a LoRA; use diffusers, peft, kohya "
            "(fused, a LoRA would be rounded to the weights' precision: load the base model, then "
            "the LoRA)"
        )
    message = refused(capsys, "export", str(full.folder), "--format", "kohya")
    assert message.endswith(
        "--format kohya: this run trained all weights; use transformer, pipeline"
    )
    message = refused(capsys, "export", str(full.folder), "--ema")
    assert message == (
        f"{full.folder}: --ema: the run kept no average of its weights (train.ema); leave out --ema"
    )
    message = refused(capsys, "export", str(full.folder), "--universal", "--format", "pipeline")
    assert message.startswith("--universal: a format of its own")
    message = refused(capsys, "export", str(full.folder), "--shard-size", "many")
    assert message.startswith("'many' is no memory size")


# ---- a LoRA to start from ------------------------------------------------------------------------


def test_import_makes_a_lora_that_training_goes_on_from(lora, capsys, tmp_path):
    """PEFT's folder in, a diffusers file and the section of a recipe out; nothing is changed."""
    folder = export_run(lora.folder, format="peft", out=tmp_path / "peft")
    said = command(capsys, "import", str(folder), "--out", str(tmp_path / "imported"))
    section = read_yaml(said, "said")
    file = tmp_path / "imported" / "pytorch_lora_weights.safetensors"
    assert section["train"]["weights"] == {
        "kind": "lora", "path": str(file), "rank": 4, "alpha": 8.0,
        "targets": sorted(lora.session.policy.lora_targets),
    }  # fmt: skip
    pipeline = FluxPipeline.from_pretrained(model_path("builtin:flux"))
    pipeline.load_lora_weights(file)
    assert torch.equal(lora.with_transformer(pipeline.transformer), lora.velocity[False])

    raw = recipe(Case("flow_grpo", "lora", "local"), tmp_path)
    raw["train"] |= section["train"]
    with open_session(check(raw, "recipe"), quiet=True) as session:
        assert torch.equal(velocity(session), lora.velocity[False])
        with session.engine.reading("reference"):
            assert torch.equal(velocity(session), lora.velocity[False])

    message = refused(capsys, "import", str(tmp_path / "no"), "--out", str(tmp_path / "out"))
    assert message.startswith(f"{tmp_path / 'no'}: no such file")
    assert not (tmp_path / "out").exists()
    message = refused(capsys, "import", str(file), "--out", str(file.parent))
    assert message == f"--out {file.parent}: {file} is read from there; give another folder"


def test_a_resume_from_another_lora_is_refused(lora, tmp_path):
    start = tmp_path / "start"
    export_run(lora.folder, out=start)
    raw = recipe(Case("refl", "lora", "local", ("start",), steps=1), tmp_path)
    with open_session(check(raw, "recipe"), quiet=True) as session:
        train(session)
    (kept,) = committed(session.recipe.checkpoint_folder)
    digest = open_lora(start).digest
    export_run(lora.folder, average=True, out=start)
    raw["run"]["steps"] = 2
    with pytest.raises(RecipeError) as raised:
        open_session(check(raw, "recipe"), quiet=True, resume=True)
    assert str(raised.value).startswith(f"{kept}: it trained")
    assert digest in str(raised.value) and open_lora(start).digest in str(raised.value)


def test_a_resume_cannot_begin_an_average(full):
    raw = recipe(FULL.plus("ema"), full.folder.parent)
    raw["run"] |= {"name": full.folder.name, "steps": 2}
    with pytest.raises(RecipeError, match=r"train\.ema\.decay: None -> 0\.5: the checkpoints in"):
        open_session(check(raw, "recipe"), quiet=True, resume=True)
