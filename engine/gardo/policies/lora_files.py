"""LoRA files of diffusers and PEFT, read and written.

Inside, a LoRA is a mapping from PEFT's parameter names (`Policy.trainable`) to fp32 tensors:

    transformer_blocks.0.attn.to_q.lora_A.default.weight   [rank, in]
    transformer_blocks.0.attn.to_q.lora_B.default.weight   [out, rank]

and alpha / rank B A is added to the weight [out, in] of the module. kohya.py has ComfyUI's layout.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from gardo.policies.folders import write_tensors
from gardo.policies.weights import shapes_in

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
METADATA = "lora_adapter_metadata"  # where diffusers keeps the adapter's configuration
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.\w+)?\.weight")

# what PEFT may say of an adapter that is more than B A on frozen weights
MORE_THAN_LORA = {
    "use_dora": (False, "DoRA also trains magnitudes"),
    "bias": ("none", "biases were trained too"),
    "lora_bias": (False, "biases were trained too"),
    "modules_to_save": (None, "whole modules were trained too"),
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # others change the base model's weights


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on the disk, known from its headers: nothing of its size is in memory."""

    path: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str]  # parameter name -> tensor in the file

    def read(self) -> dict[str, Tensor]:
        """The values by parameter name, fp32."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(key).float() for name, key in self.keys.items()}

    @property
    def digest(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check(self, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
        """ValueError (field, both values, mend) where a recipe trains another LoRA than this."""
        for field, wanted, found in (("rank", rank, self.rank), ("alpha", alpha, self.alpha)):
            if wanted != found:
                raise ValueError(f"{field}: {wanted:g}, but {self.path} has {found:g}; "
                                 f"set {field}: {found:g}")  # fmt: skip
        missing = [t for t in targets if not any(_hits(t, m) for m in _modules(self.keys))]
        extra = [m for m in _modules(self.keys) if not any(_hits(t, m) for t in targets)]
        if missing or extra:
            wrong = f"{extra[0]} is not among them" if extra else f"{missing[0]} is not in it"
            raise ValueError(
                f"targets: {', '.join(targets)}, but {self.path} has {', '.join(self.targets)} "
                f"({wrong}); set targets: [{', '.join(self.targets)}]"
            )


def _hits(target: str, module: str) -> bool:
    """Whether PEFT puts an adapter on a module for a target that is a name or the end of one."""
    return module == target or module.endswith(f".{target}")


def _modules(names: Mapping[str, Any]) -> Iterator[str]:
    return (name.partition(".lora_A.")[0] for name in names if ".lora_A." in name)


def halves(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of every module."""
    a, b = ".lora_A.default.weight", ".lora_B.default.weight"
    return {module: (weights[module + a], weights[module + b]) for module in _modules(weights)}


# ---- reading -------------------------------------------------------------------------------------


def open_lora(path: str | Path) -> LoraFile:
    """A PEFT folder, or a LoRA file of diffusers, or its folder.

    PEFT's scaling for rank-stabilised LoRA (alpha / sqrt(rank)) becomes another alpha; a diffusers
    file without metadata has alpha = rank, as diffusers itself takes it. ValueError says what is
    not there, or is not a LoRA of one rank and one alpha.
    """
    path = Path(path).expanduser()
    file = _file_of(path)
    config = _peft_config(file.parent) if file.name == PEFT_FILE else _diffusers_config(file)
    prefix = PEFT_PREFIX if file.name == PEFT_FILE else DIFFUSERS_PREFIX
    _check_plain(config, file)
    stored = shapes_in(file)
    keys = {_parameter_name(key, prefix, file): key for key in stored}
    shapes = {name: stored[key] for name, key in keys.items()}
    rank = _common_rank(shapes, file)
    alpha = float(config.get("lora_alpha", rank))
    if any(value != alpha for value in (config.get("alpha_pattern") or {}).values()):
        raise ValueError(f"{file}: alpha_pattern: modules differ in alpha; this trains one alpha")
    alpha *= math.sqrt(rank) if config.get("use_rslora") else 1
    targets = config.get("target_modules")
    if not isinstance(targets, list):  # a pattern, or nothing
        targets = {re.sub(r"^\w+\.\d+\.", "", module) for module in _modules(keys)}
    return LoraFile(file, rank, alpha, tuple(sorted(targets)), shapes, keys)


def _file_of(path: Path) -> Path:
    """The safetensors file that is meant."""
    if path.is_dir():
        named = [path / name for name in (PEFT_FILE, DIFFUSERS_FILE) if (path / name).is_file()]
        found = named or sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        if found or not pickles:
            have = ", ".join(p.name for p in found) or "none"
            raise ValueError(f"{path}: needs one {PEFT_FILE} or {DIFFUSERS_FILE}; it has {have}")
        path = pickles[0]
    if path.suffix in PICKLES:
        raise ValueError(f"{path}: a pickle, which can run code; save it again as safetensors")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a LoRA file of diffusers or a PEFT folder")
    return path


def _peft_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / PEFT_CONFIG} cannot be read: {error}") from error


def _diffusers_config(file: Path) -> dict[str, Any]:
    shapes_in(file)  # says if it cannot be read
    with safe_open(file, "pt") as opened:
        packed = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in packed.items()}


def _check_plain(config: Mapping[str, Any], file: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type: {kind}: this trains LORA only")
    for field, (plain, why) in MORE_THAN_LORA.items():
        if config.get(field, plain) not in (plain, None):
            raise ValueError(f"{file}: {field}: {config[field]}: {why}, which this does not")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{file}: init_lora_weights: {start}: it changed the base model's weights; convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _parameter_name(key: str, prefix: str, file: Path) -> str:
    if "lora_magnitude_vector" in key or "dora_scale" in key:
        raise ValueError(f"{file}: {key}: DoRA also trains magnitudes, which this does not")
    if ".lora_down." in key or ".lora_up." in key:
        raise ValueError(
            f"{file}: {key}: kohya's layout; load it with diffusers' load_lora_weights and save it "
            "with save_lora_weights"
        )
    match = HALF.fullmatch(key.removeprefix(prefix))
    if match is None or not (key.startswith(prefix) or prefix == PEFT_PREFIX):
        raise ValueError(f"{file}: {key}: not a LoRA tensor of the transformer")
    return f"{match['module']}.lora_{match['half']}.default.weight"


def _common_rank(shapes: Mapping[str, tuple[int, ...]], file: Path) -> int:
    """The rank of all modules, each of which has both halves."""
    ranks: dict[int, str] = {}
    for module in {name.partition(".lora_")[0]: None for name in shapes}:
        a, b = (shapes.get(f"{module}.lora_{half}.default.weight", ()) for half in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"{file}: {module}: lora_A {list(a)} and lora_B {list(b)} do not make a LoRA"
            )
        ranks.setdefault(a[0], module)
    if len(ranks) != 1:
        found = ", ".join(f"{rank} ({module})" for rank, module in ranks.items()) or "none"
        raise ValueError(f"{file}: rank_pattern: ranks {found}; this trains one rank")
    return next(iter(ranks))


# ---- writing -------------------------------------------------------------------------------------


def lora_config(*, rank: int, alpha: float, targets: Sequence[str]) -> Any:
    """PEFT's configuration of such an adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=sorted(targets)
    )


def _as_json(config: Any) -> dict[str, Any]:
    """A configuration; sets sorted, so that a file is reproducible."""
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


def _stored(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        prefix + name.replace(".default.weight", ".weight"): tensor.contiguous()
        for name, tensor in weights.items()
    }


def save_diffusers(weights: Mapping[str, Tensor], config: Any, folder: Path) -> Path:
    """The file of `load_lora_weights`, with its configuration as metadata; returns the file."""
    file = folder / DIFFUSERS_FILE
    packed = {DIFFUSERS_PREFIX + key: value for key, value in _as_json(config).items()}
    metadata = {"format": "pt", METADATA: json.dumps(packed, indent=2, sort_keys=True)}
    stored = _stored(weights, DIFFUSERS_PREFIX)
    shapes = {name: tuple(stored[name].shape) for name in sorted(stored)}
    write_tensors(file, shapes, stored.__getitem__, next(iter(stored.values())).dtype, metadata)
    return file


def save_peft(weights: Mapping[str, Tensor], config: Any, folder: Path) -> Path:
    """The folder of `PeftModel.from_pretrained(transformer, folder)`; returns the folder."""

    from safetensors.torch import save_file

    text = json.dumps({**_as_json(config), "inference_mode": True}, indent=2, sort_keys=True)
    (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")
    save_file(_stored(weights, PEFT_PREFIX), folder / PEFT_FILE, {"format": "pt"})
    return folder
