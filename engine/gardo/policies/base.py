"""The policy: a diffusers pipeline seen by the trainer.

Families differ in `encode`, `velocity`, `latent_shape`, names. diffusers and peft are imported when
a model is made, not with this module: a recipe is checked, and refused, without them.

Shapes: B images, P prompts, R rows, X one latent (`latent_shape`), H x W pixels.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from gardo.hub import download_error
from gardo.lazily import no_grad
from gardo.policies.checkpointing import Checkpointing, checkpoint_blocks, kept_inside
from gardo.policies.compiling import Compiled, compile_blocks
from gardo.policies.embeddings import Embeddings
from gardo.policies.kohya import Layout
from gardo.policies.lora_files import LoraFile, lora_config
from gardo.policies.lora_linear import fold_adapters
from gardo.policies.quantised import BASES, placing, quantise
from gardo.policies.settings import PolicySettings, check_size, files_of
from gardo.policies.targets import check_targets
from gardo.policies.weights import (
    Place,
    WeightFiles,
    build_empty,
    fill,
    set_parameter,
    stored_dtype,
)
from gardo.settings import FieldError, is_hub_id, model_path
from gardo.types import Phase, no_phase

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gardo_kernels import Backend

Wait = Callable[[], None]


DECODED = 2 * 2**20  # pixels; decoding takes about 1.6 kB each in bf16, counted by `gardo plan`


class Policy:
    """A pipeline whose transformer is trained.

    `branches` and `velocity` are the only calls of the training loop into the model.
    """

    Settings: ClassVar[type[Any]]
    transformer_name: ClassVar[str]  # of a class of diffusers, as is `Settings.pipeline_name`
    lora_targets: ClassVar[tuple[str, ...]]
    block_lists: ClassVar[tuple[str, ...]]  # the transformer's lists of alike blocks
    kohya_layout: ClassVar[Layout | None] = None  # its modules in kohya's LoRA files

    def __init__(
        self,
        settings: PolicySettings,
        *,
        dtype: torch.dtype,
        device: torch.device,
        defer: bool = False,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        """`defer` leaves the transformer without weights until `load_transformer`.

        `parts` are the pipeline's components, which are then used as they are and read from nowhere
        """
        self._base = BASES.get(settings.base or "")
        if parts is None:
            self.folder = self._local_folder(settings.path, settings.revision)
            pipeline = self._read(self.folder, dtype, device)
        else:
            names = inspect.signature(self.pipeline_class.__init__).parameters.keys() - {"self"}
            pipeline = self.pipeline_class(**{**dict.fromkeys(names), **parts})
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self.settings = settings
        self.dtype = dtype
        self.device = device
        self.height, self.width = settings.size
        check_size(settings.size, 2 * pipeline.vae_scale_factor)
        self.embeddings = Embeddings(
            pipeline, self.encode_text, residence=settings.encoders, device=device, dtype=dtype
        )
        self.phase: Phase = no_phase  # what measures encoding and decoding
        self.compiled: Compiled | None = None  # what the blocks' compilations took
        self.decode_batch = max(1, DECODED // (self.height * self.width))
        if self.height * self.width > DECODED:
            pipeline.vae.enable_tiling()
        self.lora: Any = None  # the adapter's LoraConfig
        self.start: LoraFile | None = None  # the LoRA that training goes on from
        self._identity: Future[dict[str, str]] | None = None
        if not defer:
            self.load_transformer()

    def _local_folder(self, path: str, revision: str | None) -> Path:
        """Where the model is on this machine, downloaded if it was not."""
        folder = Path(model_path(path))
        if folder.is_dir():
            return folder
        download = self.pipeline_class.download
        try:
            return Path(download(path, revision=revision, use_safetensors=True))
        except Exception as error:  # whatever a hub, a network or a disk can say
            raise download_error(error, "model.path", path, revision, files_of(path)) from error

    def _read(self, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
        """The pipeline, frozen; its transformer on the meta device, the VAE on `device`.

        For a GPU text encoders are read in the type of their files (`stored_dtype`): what happens
        to them there is `embeddings`'.
        """
        self.weight_files = WeightFiles(folder / "transformer")
        transformer = build_empty(self.transformer_class, folder / "transformer", dtype)
        if self._base:
            quantise(transformer, self.block_lists, self._base, dtype)
        dtypes = {"default": dtype}
        if device.type != "cpu":
            dtypes |= {path.name: stored_dtype(path) or dtype for path in _encoder_folders(folder)}
        pipeline = self.pipeline_class.from_pretrained(
            folder, dtype=dtypes, use_safetensors=True, transformer=transformer
        )
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        pipeline.vae.to(device)
        return pipeline

    def identify(self) -> None:
        """Begins to read what `identity` says, in a thread that keeps no process from ending."""
        found = self._identity = Future[dict[str, str]]()

        def read() -> None:
            try:
                found.set_result(self._identify())
            except Exception as error:  # for whoever asks
                found.set_exception(error)

        threading.Thread(target=read, name="identity", daemon=True).start()

    @property
    def identity(self) -> dict[str, str]:
        """What training starts from: the base model's id with its revision or its transformer's
        digest, and the digest of the LoRA that training goes on from."""
        if self._identity is None:
            self.identify()
        assert self._identity is not None
        return self._identity.result()

    def _identify(self) -> dict[str, str]:
        lora = {"lora": self.start.digest} if self.start else {}
        path = self.settings.path
        if is_hub_id(path) and not Path(model_path(path)).is_dir():
            return {"id": path, "revision": self.folder.name, **lora}
        return {"id": path, "sha256": self.weight_files.sha256(), **lora}

    def load_transformer(self, place: Place = set_parameter, *, reads: bool = True) -> None:
        """Reads the transformer's weights, one at a time; `place` says what becomes of each."""
        for buffer in self.transformer.buffers():
            buffer.data = buffer.data.to(self.device)
        fill(
            self.transformer,
            self.weight_files.read,
            device=self.device,
            dtype=self.dtype,
            place=placing(self._base, place) if self._base else place,
            reads=reads,
        )

    @property
    def pipeline_class(self) -> Any:
        return _of_diffusers(self.Settings.pipeline_name)

    @property
    def transformer_class(self) -> Any:
        return _of_diffusers(self.transformer_name)

    # What a family defines ------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, ...]:
        raise NotImplementedError  # pragma: no cover

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the text encoders say of P prompts: tensors [P, ...] of the model's dtype."""
        raise NotImplementedError  # pragma: no cover

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `encode` gives for one prompt, from the model's configuration alone."""
        raise NotImplementedError  # pragma: no cover

    def branches(
        self, x_RX: Tensor, sigma_R: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The model's velocities at x with the prompt, and without it where `cfg_scale` is not 1.

        [R, *latent_shape] each, in the model's dtype; `conditioning` has R rows.
        """
        raise NotImplementedError  # pragma: no cover

    def sigmas(self, steps: int) -> Tensor:
        """The family's schedule: [steps + 1] float64 from 1 to 0."""
        raise NotImplementedError  # pragma: no cover

    def _to_vae(self, latents_BX: Tensor) -> Tensor:
        return latents_BX

    # What all share -------------------------------------------------------------------------------

    cfg_scale: float = 1.0  # of classifier-free guidance; a family's own property where it has it
    own_prompts: tuple[str, ...] = ()  # what `encode` asks the text encoders beside the prompts

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of P prompts: tensors [P, ...] of the model's dtype.

        Every prompt goes through the text encoders once (embeddings.py).
        """
        with self.phase("encode", rows=len(prompts)):
            return self.embeddings(prompts)

    def free_encoders(
        self, prompts: Iterable[str], folder: Path, *, share: tuple[int, int], wait: Wait
    ) -> int:
        """Encodes all that `encode` will be asked, then drops the text encoders.

        `Embeddings.free` says what `share` and `wait` are. Returns how many prompts were new.
        """
        identity = json.dumps([self._encoders_identity, self.settings.text_tokens, str(self.dtype)])
        return self.embeddings.free(
            [*prompts, *self.own_prompts], folder, identity=identity, share=share, wait=wait
        )

    @property
    def _encoders_identity(self) -> list[str]:
        """Which text encoders these are: a revision of a hub id, or files of a folder."""
        if not Path(model_path(self.settings.path)).is_dir():
            return [self.settings.path, self.folder.name]
        files = sorted(self.folder.glob("text_encoder*/*"))
        return [f"{f.relative_to(self.folder)} {f.stat().st_size} {f.stat().st_mtime_ns}"
                for f in files]  # fmt: skip

    def velocity(self, x_RX: Tensor, sigma_R: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The velocity that the sampler takes at x: guided, in the model's dtype.

        The sampler combines the branches in fp32 and rounds; so does this: both see equal numbers.
        """
        prompted, unprompted = self.branches(x_RX, sigma_R, conditioning)
        if unprompted is None:
            return prompted
        low = unprompted.float()
        return (low + self.cfg_scale * (prompted.float() - low)).to(prompted.dtype)

    def decode(self, latents_BX: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32; differentiable where the latents ask for it.

        `decode_batch` of them at a time, pictures of more than DECODED pixels in tiles.
        """
        parts = latents_BX.split(self.decode_batch)
        with self.phase("decode", rows=len(latents_BX)):
            return torch.cat([self._decode(part) for part in parts])

    def _decode(self, latents_BX: Tensor) -> Tensor:
        vae = self.pipeline.vae
        z = self._to_vae(latents_BX) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @no_grad
    def generate(
        self, conditioning: Mapping[str, Tensor], latents_BX: Tensor, *, steps: int
    ) -> Tensor:
        """Images [B, 3, H, W] of the pipeline itself (its scheduler, its defaults) from noise."""
        final_BX = self.pipeline(
            **self._pipeline_text(conditioning),
            latents=latents_BX.to(self.dtype),
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            guidance_scale=self.settings.guidance,
            max_sequence_length=self.settings.text_tokens,
            output_type="latent",
        ).images
        return self.decode(final_BX)

    def _pipeline_text(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "prompt_embeds": conditioning["text"],
            "pooled_prompt_embeds": conditioning["pooled"],
        }

    def train_lora(
        self,
        *,
        rank: int,
        alpha: float,
        targets: tuple[str, ...] | None,
        seed: int,
        initialise: bool = True,
    ) -> None:
        """Adds a LoRA adapter and makes it the only thing that trains.

        A Gaussian, B zero; the same on every rank. Without `initialise` it has no values yet.
        """
        from peft.tuners.lora import LoraLayer

        check_targets(self.transformer, targets or self.lora_targets)
        self.lora = lora_config(rank=rank, alpha=alpha, targets=targets or self.lora_targets)
        with torch.random.fork_rng(devices=[]):
            self.transformer.add_adapter(self.lora)
            torch.manual_seed(seed)
            for layer in self.transformer.modules():
                if initialise and isinstance(layer, LoraLayer):
                    self._initialise(layer)

    def _initialise(self, layer: Any) -> None:
        """PEFT's own initial values in fp32, wherever the wrapped layer's weights are or are not"""
        halves = [layer.lora_A["default"], layer.lora_B["default"]]
        for half in halves:
            half.float().to_empty(device="cpu").reset_parameters()
        layer.reset_lora_parameters("default", "gaussian")
        for half in halves:
            half.to(self.device, self.dtype)

    def fold_lora(self, mode: Checkpointing = "none") -> None:
        """Adds the adapters of the blocks as lora_linear.py says; `mode` is what
        `checkpoint_activations` is told."""
        fold_adapters(self.blocks(), in_place=kept_inside(mode) is None)

    def start_from(self, lora: LoraFile) -> None:
        """Names the LoRA whose values training goes on from; the engine reads them.

        FieldError where it has not just the modules that train, in their sizes.
        """
        shapes = {n: tuple(p.shape) for n, p in self.trainable().items()}
        for name in sorted(shapes.keys() | lora.shapes.keys()):
            if shapes.get(name) != lora.shapes.get(name):
                found, wanted = lora.shapes.get(name, "nothing"), shapes.get(name, "nothing")
                raise FieldError(
                    f"train.weights.path: {lora.path} has {found} for {name}, this model trains "
                    f"{wanted}; use a LoRA of this model and these train.weights.targets"
                )
        self.start = lora

    def train_full(self) -> None:
        self.transformer.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks in the order they run."""
        return [block for name in self.block_lists for block in getattr(self.transformer, name)]

    def checkpoint_activations(self, mode: Checkpointing) -> None:
        """What blocks keep for their backward pass: see checkpointing.py."""
        checkpoint_blocks(self.transformer, mode)

    def use_block_kernels(self, backend: Backend) -> None:
        """Has the blocks take gardo_kernels between their matmuls; before they are compiled."""
        from gardo.policies.block_kernels import use_block_kernels  # a compiler's, a second

        use_block_kernels(self.blocks(), backend)

    def compile_blocks(self, mode: Checkpointing) -> None:
        """Has torch compile the blocks, which `checkpoint_activations` was told `mode` of."""
        compile_blocks(self.transformer, self.blocks(), mode)
        self.compiled = Compiled(lambda: self.phase)


def _encoder_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("text_encoder*") if path.is_dir())


def _of_diffusers(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)
