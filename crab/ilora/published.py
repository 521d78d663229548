"""The published Crab+ adapter, `finetune_weights.bin`, to a PEFT adapter folder and back.

The published run (arXiv 2603.04128) adapted the thinker of Qwen2.5-Omni by name ending, which also reached the two
encoders. Its file is a torch-saved dict; for each adapted module it holds `lora_A.weight` [r, in], `lora_route.weight`
[N, in] and `lora_B0.weight` ... `lora_B{N-1}.weight`, each [out, r]. Alpha is not in it. Module names, there and here:

============================================================  ===================================  =================
published                                                     current transformers                 projections
============================================================  ===================================  =================
`base_model.model.model.layers.{i}.{self_attn,mlp}`           `model.language_model.layers.{i}`    q k v o, gate up down
`base_model.model.audio_tower.layers.{i}.self_attn`           `model.audio_tower.layers.{i}`       q k v
`base_model.model.visual.blocks.{i}.mlp`                      `model.visual.blocks.{i}`            gate up down
============================================================  ===================================  =================

All of these are single linear modules in current transformers. The encoders' other projections have other endings
(audio `out_proj`, `fc1`, `fc2`; visual `attn.q`, `.k`, `.v`, `.proj`), so the published run left them alone.

Usage::

    from crab.ilora.published import import_published, published_state_dict

    import_published("finetune_weights.bin", thinker, "adapter", lora_alpha=256)
    model = PeftModel.from_pretrained(thinker, "adapter")
    torch.save(published_state_dict(model), "finetune_weights.bin")
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import uuid
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .adapters import WRAPPER, adapted_layers  # the fork of PEFT that wrote the file has the same WRAPPER
from .config import ILoraConfig
from .layer import ILoraLayer

__all__ = ["PUBLISHED_TARGETS", "import_published", "published_state_dict", "read_published"]

#: `target_modules` of the published run in current transformers' names: the language model's q, k, v, o, gate, up and
#: down projections, the audio encoder's q, k, v and the visual encoder's gate, up, down.
PUBLISHED_TARGETS = (
    r"model\.(language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|audio_tower\.layers\.\d+\.self_attn\.[qkv]_proj"
    r"|visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj)"
)

PARTS = (  # current -> published beginning of a module's name in the base
    ("model.language_model.", "model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.visual.", "visual."),
)

# Fields of ILoraConfig that do not change what the tensors mean; the published layer is the default of every other one.
FREE_FIELDS = {
    "r", "lora_alpha", "num_heads", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "init_weights", "router_init_std", "router_noise", "balance_weight",
    "orthogonality_weight",
}  # fmt: skip


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """Read `finetune_weights.bin` without running any code it may hold.

    Args:
        path: a file written by `torch.save` (either of torch's formats): a dict, name -> floating-point tensor. A
            beginning that every name shares before `base_model.model.` is dropped (`module.` of a wrapped model,
            `thinker.` of the whole Qwen2.5-Omni).

    Returns:
        Published name -> tensor, on the CPU, in the file's dtype. Whether the names and shapes are those of a
        particular base is checked by `import_published`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut short, is no torch-saved file, holds anything but named finite floating-point
            tensors, or its names are not of the published form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of the published finetune_weights.bin.")
    loaded = _load_tensors_only(path)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds {'an empty dict' if loaded == {} else f'a {type(loaded).__name__}'}, not a dict "
                         "of named tensors; give the file the published training wrote.")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            hint = "; its tensors sit one level down, save that inner dict" if isinstance(value, dict) else ""
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}, but every entry must be a named "
                             f"tensor{hint}.")
    first = next(iter(loaded))
    before = first.partition(WRAPPER)[0]
    for name in loaded:
        if not name.startswith(before + WRAPPER):
            raise ValueError(f"{path}: the name {name!r} is not of the published form '{WRAPPER}<module>.lora_A.weight'"
                             + (f" behind {before!r}, as {first!r} is" if name != first and before else "")
                             + ". Rename its tensors, or give the file the published training wrote.")
    tensors = {name.removeprefix(before): value.detach() for name, value in loaded.items()}
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"{path}: {name} is {value.dtype}, not a floating-point tensor; save it unquantized.")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; fetch the file again, or take an earlier "
                             "checkpoint of the training that wrote it.")
    return tensors


def import_published(
    path: str | Path, model: nn.Module, folder: str | Path, *, lora_alpha: float, lora_dropout: float = 0.1
) -> ILoraConfig:
    """Turn the published file into an adapter folder that `PeftModel.from_pretrained(model, folder)` loads.

    The heads B_0 ... B_{N-1} are put side by side; no value changes. The folder is written aside and then renamed, so
    it is never there in part.

    Args:
        path: the published file, see `read_published`.
        model: the base it belongs to, a `Qwen2_5OmniThinkerForConditionalGeneration` without an adapter. Only module
            names and sizes are read, so it may be on the meta device; it is left as it is.
        folder: where to write `adapter_model.safetensors` and `adapter_config.json`; must not exist, or be empty.
        lora_alpha: numerator of the scaling alpha / r. It is not stored in the file and has no default: with a wrong
            one the adapter is silently wrong. Published run: 256 (at r = 128).
        lora_dropout: dropout for further training; without effect in evaluation. Published run: 0.1.

    Returns:
        The configuration written: r and the number of heads come from the shapes.

    Raises:
        FileExistsError: `folder` is in use.
        FileNotFoundError, ValueError: as `read_published`; or `model` is not such a base; or a tensor is missing,
            spare or of another shape than this base needs (the message names it); or alpha is not above 0.
    """
    path, folder = Path(path), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is already there and not empty; remove it or give another folder.")
    modules = _published_modules(model)
    tensors = read_published(path)
    r, num_heads = _infer_sizes(tensors, path)
    _require_fit(tensors, modules, r, num_heads, path)
    config = ILoraConfig(
        r=r, lora_alpha=lora_alpha, num_heads=num_heads, lora_dropout=lora_dropout, router="token",
        router_temperature=1.0, target_modules=PUBLISHED_TARGETS, inference_mode=True,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )  # fmt: skip
    ours = {}
    for module in modules:
        # Taken out one by one, so that the file's tensors and the joined ones are not all in memory at once.
        a, route, *heads = (tensors.pop(name) for name in _tensor_names(module, num_heads))
        ours[f"{WRAPPER}{module}.ilora_A.weight"] = _own(a)
        ours[f"{WRAPPER}{module}.ilora_B.weight"] = torch.cat(heads, dim=1)
        ours[f"{WRAPPER}{module}.ilora_router.weight"] = _own(route)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        config.save_pretrained(aside)
        save_file(ours, aside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if folder.exists():
            folder.rmdir()  # empty; not every system renames onto a folder
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return config


def published_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """The way back: an I-LoRA adapter's tensors under the published names.

    An adapter on fewer modules than the published run's gives fewer names; `import_published` would miss the others.
    Alpha has no place in the published format: pass it on beside the file.

    Args:
        model: a PEFT model of the thinker with an I-LoRA adapter.
        adapter_name: which one; may be left out while one adapter is active.

    Returns:
        Published name -> copy on the CPU in the adapter's dtype (PEFT holds bf16 adapters in float32), ready for
        `torch.save`.

    Raises:
        ValueError: no such adapter, a module the published run cannot adapt, a choice the published layer does not
            have (its layer is the default of `ILoraConfig`, with one r, alpha and number of heads for all modules),
            or a tensor that is not whole.
    """
    adapter_name, layers = adapted_layers(model, adapter_name, "published_state_dict")
    _require_published_layer(model.peft_config[adapter_name])
    return _split(layers, adapter_name)


def _split(layers: dict[str, ILoraLayer], adapter_name: str) -> dict[str, torch.Tensor]:
    first = next(iter(layers))
    sizes = {name: tuple(getattr(layer, field)[adapter_name] for field in ("r", "num_heads", "lora_alpha"))
             for name, layer in layers.items()}
    r, num_heads, alpha = sizes[first]
    tensors = {}
    for module, layer in layers.items():
        if not re.fullmatch(PUBLISHED_TARGETS, module):
            raise ValueError(f"published_state_dict: {module} is adapted, but the published format has no name for it. "
                             "Adapt modules of crab.ilora.published.PUBLISHED_TARGETS only.")
        if sizes[module] != sizes[first]:
            raise ValueError(f"published_state_dict: {module} has (r, heads, alpha) = {sizes[module]} and {first} "
                             f"{sizes[first]}, but the published format has one of each for all modules. Train without "
                             "`rank_pattern` and `alpha_pattern`.")
        a, b, route = (getattr(layer, part)[adapter_name].weight.detach().cpu()
                       for part in ("ilora_A", "ilora_B", "ilora_router"))
        wanted = ((r, layer.in_features), (layer.out_features, num_heads * r), (num_heads, layer.in_features))
        for part, tensor, shape in zip(("ilora_A", "ilora_B", "ilora_router"), (a, b, route), wanted, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"published_state_dict: {module}.{part} has shape {list(tensor.shape)} instead of "
                                 f"{list(shape)}; if the model is sharded, gather its parameters first.")
        names = _tensor_names(module, num_heads)
        tensors.update(zip(names, map(_own, (a, route, *b.split(r, dim=1))), strict=True))
    return tensors


def _load_tensors_only(path: Path):
    """What `path` holds, if it is tensors and plain containers; a ValueError that says what it is otherwise."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] != b"PK\x03\x04" and head[:1] != b"\x80":  # torch's zip format, and its older pickle
        raise ValueError(f"{path} is not a torch-saved file: it {f'starts with {head!r}' if head else 'is empty'}. Was a "
                         "web page or a Git LFS pointer stored in its place? Fetch the file itself.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than plain tensors, which could be code; none of it was run. If you trust "
                         "its source, have it saved again there as a dict of tensors. "
                         f"(torch: {_reason(error)})") from None  # torch's own message explains how to run the code
    except Exception as error:  # many kinds, depending on where the file ends
        raise ValueError(f"{path} is cut short or damaged: compare its size with the publisher's and fetch it again. "
                         f"(torch: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error


def _reason(error: Exception) -> str:
    """The line of torch's long refusal that names what was refused."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1] if found else str(error).partition("\n")[0]


def _published_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name in the base -> (in, out) features of each module the published run adapts."""
    modules = {name: (module.in_features, module.out_features) for name, module in model.named_modules()
               if re.fullmatch(PUBLISHED_TARGETS, name)}
    for ours, _ in PARTS:
        if not any(name.startswith(ours) for name in modules):
            raise ValueError(f"import_published: {type(model).__name__} has no linear modules under '{ours}'. Give a "
                             "Qwen2_5OmniThinkerForConditionalGeneration without an adapter (of the whole "
                             "Qwen2_5OmniForConditionalGeneration, its `thinker`).")
    return modules


def _tensor_names(module: str, num_heads: int) -> list[str]:
    """Published names of a module's tensors: A, the router, then the heads."""
    ours, theirs = next(part for part in PARTS if module.startswith(part[0]))
    parts = ("lora_A", "lora_route", *(f"lora_B{i}" for i in range(num_heads)))
    return [f"{WRAPPER}{theirs}{module.removeprefix(ours)}.{part}.weight" for part in parts]


def _infer_sizes(tensors: dict[str, torch.Tensor], path: Path) -> tuple[int, int]:
    """(r, number of heads): those most modules agree on, so that a single odd tensor is the one to be named."""
    sizes = []
    for part in ("lora_A", "lora_route"):
        seen = Counter(t.shape[0] for name, t in tensors.items() if name.endswith(f".{part}.weight") and t.ndim == 2)
        if not seen:
            raise ValueError(f"{path} has no matrix named '....{part}.weight' (but, for example, "
                             f"{next(iter(tensors))}): it is not a published I-LoRA adapter. A plain LoRA is loaded by "
                             "PEFT itself.")
        sizes.append(seen.most_common(1)[0][0])
    return sizes[0], sizes[1]


def _require_fit(tensors: dict[str, torch.Tensor], modules: dict[str, tuple[int, int]], r: int, num_heads: int,
                 path: Path) -> None:
    """Refuse tensors that are not, one to one, those of these modules."""
    shapes = {}
    for module, (inside, outside) in modules.items():
        wanted = [(r, inside), (num_heads, inside)] + [(outside, r)] * num_heads
        shapes.update(zip(_tensor_names(module, num_heads), wanted, strict=True))
    missing = [name for name in shapes if name not in tensors]
    spare = [name for name in tensors if name not in shapes]
    bent = [f"{name} has shape {list(tensors[name].shape)}, needs {list(shape)}" for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape]
    mends = ((missing, "missing", "fetch the whole file, or give the base model it was trained on"),
             (spare, "spare", "give the base model it was trained on, or take them out if they are no part of it"),
             (bent, "misshapen", "give the base model it was trained on"))
    faults = [f"{kind}: {'; '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''} ({mend})"
              for found, kind, mend in mends if found]
    if faults:
        raise ValueError(f"{path} (r = {r}, {num_heads} heads by its shapes) does not fit this base. {'. '.join(faults)}.")


def _require_published_layer(config: PeftConfig) -> None:
    plain = ILoraConfig(lora_alpha=1)
    for name in (field.name for field in fields(ILoraConfig)):
        if name in FREE_FIELDS or name in PeftConfig.__dataclass_fields__:
            continue
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f"published_state_dict: `{name}` is {getattr(config, name)!r}, which the published format "
                             f"cannot say; it means {getattr(plain, name)!r}. Save with save_pretrained instead.")


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that shares no memory."""
    return tensor.clone(memory_format=torch.contiguous_format)
