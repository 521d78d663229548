"""The published Crab+ adapter, `finetune_weights.bin`, to a PEFT adapter folder and back.

The published run (arXiv 2603.04128) adapted the thinker of Qwen2.5-Omni by endings of names, and so both encoders too.
Its file is a dict saved by torch. For each adapted module it has `lora_A.weight` [r, in], `lora_route.weight` [N, in]
and `lora_B0.weight` ... `lora_B{N-1}.weight`, each [out, r]. It does not have alpha.
"""

import os
import pickle
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .adapters import WRAPPER, adapted_layers, base_name, require_fit, unwrapped
from .config import ILoraConfig

__all__ = ["PUBLISHED_TARGETS", "import_published", "published_state_dict", "read_published"]

#: `target_modules` of the published run, in the names of current transformers.
PUBLISHED_TARGETS = (
    r"model\.(language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|audio_tower\.layers\.\d+\.self_attn\.[qkv]_proj"
    r"|visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj)"
)

PARTS = (  # beginning of a module's name in the base: current, published
    ("model.language_model.", "model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.visual.", "visual."),
)
TENSORS = ("ilora_A", "ilora_B", "ilora_router")
WRITTEN = {"r", "lora_alpha", "num_heads"}  # options that the published format can say, or that go beside it


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """Read `finetune_weights.bin`, a file of `torch.save` in either of its formats. Code in it is refused and not run.

    Text that all names have before `base_model.model.`, such as `module.` or `thinker.`, is dropped.

    Returns published name -> tensor on the CPU, in the dtype of the file. Raises FileNotFoundError, or ValueError if
    the file is damaged or has anything but finite floating-point tensors with published names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of the published finetune_weights.bin.")
    content = _load_tensors_only(path)
    if not isinstance(content, dict) or not content:
        kind = "an empty dict" if content == {} else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {kind}, not named tensors; give the file of the published training.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            hint = "save that inner dict" if isinstance(value, dict) else "save named tensors only"
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}, not a named tensor; {hint}.")
    prefix = next(iter(content)).partition(WRAPPER)[0]
    for name, value in content.items():
        if not name.startswith(prefix + WRAPPER):
            form = f"{prefix}{WRAPPER}<module>.lora_A.weight"
            raise ValueError(f"{path}: the name {name!r} does not have the published form '{form}'; rename the tensor.")
        if not value.is_floating_point():
            raise ValueError(f"{path}: {name} is {value.dtype}, not a floating-point tensor; save it unquantized.")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; fetch the file again, or an earlier one.")
    return {name.removeprefix(prefix): value.detach() for name, value in content.items()}


def import_published(
    path: str | Path, model: nn.Module, folder: str | Path, *, lora_alpha: float, lora_dropout: float = 0.1
) -> ILoraConfig:
    """Turn the published file into an adapter folder for `PeftModel.from_pretrained(model, folder)`.

    The heads are put side by side, and no value changes. r and the number of heads come from the shapes. The folder
    appears only when it is complete.

    Args:
        path: the published file, see `read_published`.
        model: the base, a `Qwen2_5OmniThinkerForConditionalGeneration` without an adapter, also on the meta device.
        folder: must not exist, or be empty (otherwise FileExistsError).
        lora_alpha: numerator of the scaling, which the file does not have. Published run: 256 (with r = 128).
        lora_dropout: dropout for further training. Published run: 0.1.

    Raises the errors of `read_published`, and ValueError if the tensors do not fit the base.
    """
    path, folder = Path(path), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or give another folder.")
    modules = {name: module for name, module in model.named_modules() if re.fullmatch(PUBLISHED_TARGETS, name)}
    for current, _ in PARTS:
        if not any(name.startswith(current) for name in modules):
            fix = "give the thinker of a Qwen2.5-Omni without an adapter"
            raise ValueError(f"import_published: {type(model).__name__} has no layers under '{current}'; {fix}.")
    tensors = read_published(path)
    r, heads = _most_common_rows(tensors, "lora_A", path), _most_common_rows(tensors, "lora_route", path)
    expected = {}
    for name, module in modules.items():
        wanted = [(r, module.in_features), (heads, module.in_features)] + [(module.out_features, r)] * heads
        expected.update(zip(_tensor_names(name, heads), wanted, strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    action = f"{path} (r = {r}, {heads} heads by its shapes) does not fit this base"
    require_fit(expected, shapes, action, "Fetch the whole file, or give the base model that it was trained on.")
    sizes = {"r": r, "num_heads": heads, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    base = getattr(model, "name_or_path", None) or None
    config = ILoraConfig(**sizes, target_modules=PUBLISHED_TARGETS, inference_mode=True, base_model_name_or_path=base)
    state = {}
    for module in modules:
        # popped one by one, so that memory never holds all tensors twice
        a, route, *bs = (tensors.pop(name) for name in _tensor_names(module, heads))
        for part, value in zip(TENSORS, (_copy(a), torch.cat(bs, dim=1), _copy(route)), strict=True):
            state[f"{WRAPPER}{module}.{part}.weight"] = value
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        unfinished = Path(scratch) / "adapter"
        config.save_pretrained(unfinished)
        save_file(state, unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if folder.exists():
            folder.rmdir()  # empty; not every system can rename onto a folder
        os.replace(unfinished, folder)
    return config


def published_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an I-LoRA adapter under the published names, for `torch.save`.

    They are copies on the CPU in the dtype of the adapter (PEFT holds bf16 adapters in float32). An adapter on fewer
    modules gives fewer names, which `import_published` refuses. Note alpha elsewhere: the format does not have it.
    Raises ValueError for anything else that it does not have, and for a tensor that is not whole.
    """
    caller = "published_state_dict"
    adapter_name, layers = adapted_layers(model, adapter_name, caller)
    model = unwrapped(model)
    config = model.peft_config[adapter_name]
    for name, (value, usual) in config.differences(ILoraConfig(lora_alpha=1)).items():
        if name not in WRITTEN:
            always = f"but the published format cannot say it and means {usual!r}"
            raise ValueError(f"{caller}: `{name}` is {value!r}, {always}. Use save_pretrained.")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    state = {base_name(key): value for key, value in state.items()}
    tensors = {}
    for module in layers:
        if not re.fullmatch(PUBLISHED_TARGETS, module):
            raise ValueError(f"{caller}: the published format has no name for {module}; adapt PUBLISHED_TARGETS only.")
        a, b, route = (state[f"{module}.{part}.weight"].detach().cpu() for part in TENSORS)
        names = _tensor_names(module, config.num_heads)
        tensors.update(zip(names, map(_copy, (a, route, *b.split(config.r, dim=1))), strict=True))
    return tensors


def _load_tensors_only(path: Path):
    """The content of the file, if it is tensors and plain containers. Otherwise a ValueError that says what it is."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] != b"PK\x03\x04" and head[:1] != b"\x80":  # the zip format of torch, and its older pickle
        start = f"starts with {head!r}" if head else "is empty"
        raise ValueError(f"{path} is not a torch-saved file: it {start}. Is it a web page or a Git LFS pointer?")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message explains how to run the code; show one line of it
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error)) or re.match(r"(.*)", str(error))
        fix = f"Ask for the file as a dict of tensors. (torch: {reason[1]})"
        raise ValueError(f"{path} holds more than plain tensors: perhaps code, none of it was run. {fix}") from None
    except Exception as error:  # of many kinds: it depends on where the file ends
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path} is cut short or damaged; fetch it again. (torch: {reason})") from error


def _tensor_names(module: str, heads: int) -> list[str]:
    """The published names of the tensors of a module: A, the router, then the heads."""
    current, published = next(part for part in PARTS if module.startswith(part[0]))
    parts = ("lora_A", "lora_route", *(f"lora_B{i}" for i in range(heads)))
    return [f"{WRAPPER}{published}{module.removeprefix(current)}.{part}.weight" for part in parts]


def _most_common_rows(tensors: dict[str, torch.Tensor], part: str, path: Path) -> int:
    """The rows of most matrices of this name, so that an error names the one that differs."""
    rows = Counter(t.shape[0] for name, t in tensors.items() if name.endswith(f".{part}.weight") and t.ndim == 2)
    if not rows:
        raise ValueError(f"{path} has no matrix '....{part}.weight', so it is no I-LoRA; PEFT itself loads plain LoRA.")
    return rows.most_common(1)[0][0]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that shares no memory."""
    return tensor.clone(memory_format=torch.contiguous_format)
