"""What the study asks of a model, and which module serves which base.

The study names no model. It gives a base, a model or a processor to `model_of` and gets the module that serves it. That
module has the names of `AudioVisualModel`. To add a model, write such a module and add its entry to `MODELS`.

The module is imported by its name, so `crab.core.code.code_digest` does not see it. Whoever makes a key adds
`module_name`. So only results of a model itself become stale when its code changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from crab.models.checkpoint import resolve

if TYPE_CHECKING:
    import torch

IGNORE = -100  # label of a token that is not learned

#: A clip with its sound.
CLIP = ("video", "audio")
#: The linear layers of language models such as Qwen, Llama, Mistral and SmolLM. A plain list of names would also match
#: encoders.
LANGUAGE_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Media:
    """One item of a prompt: a ``video``, uint8 [T, 224, 224, 3] at ``fps`` frames per second, an ``image``, uint8
    [224, 224, 3], or ``audio``, float32 [samples] at 16 kHz.
    """

    kind: str
    data: np.ndarray
    fps: float = 1.0


class Marks(NamedTuple):
    """Token numbers that open media in a prompt, that close media, and that end a turn."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    end: int


class AudioVisualModel(Protocol):
    """The names of a model module. A *model* is a `transformers.PreTrainedModel`; functions also take it inside PEFT.

    It has ``language_model``, ``visual`` and ``audio_tower``, at any depth. Its configuration has ``image_token_id``,
    ``video_token_id`` and ``audio_token_id``, the placeholders of media, ``vision_config``, ``audio_config`` and
    ``get_text_config()``. Its processor has ``tokenizer``, and ``feature_extractor`` with ``n_samples`` and
    ``hop_length``. Its forward pass takes ``input_ids`` or ``inputs_embeds``, ``attention_mask``, and ``position_ids``
    [3, B, L].
    """

    #: Where adapters go, by the value of the option ``targets``: regular expressions over names of modules.
    #: ``language`` is the language model alone; ``published``, if there is one, what a published run adapted.
    TARGETS: Mapping[str, str]

    def read_config(self, path: str) -> tuple[Any, str]:
        """The configuration of a base, and a note if it is assumed. OSError if it cannot be read."""

    def load_processor(self, path: str | Path) -> Any:
        """The processor of a base. No weights are read."""

    def load_model(self, path: str | Path, dtype: torch.dtype) -> Any:
        """The model of a base, in evaluation mode."""

    def save(self, path: str | Path, model, processor, dtype: torch.dtype) -> None:
        """Write a base that was trained here to a folder, its weights in ``dtype``."""

    def build(self, config: Any) -> Any:
        """A model of this configuration without trained weights, also on the meta device."""

    def prepare(
        self, processor, media: Sequence[Media], instruction: str, turns: bool = True, system: str = "", lead: str = ""
    ) -> Any:
        """A prompt, one sample: ``input_ids`` [1, L] with all placeholders, and what the encoders read.

        Args:
            turns: the sound of a `CLIP` may stand between its frames; False puts it after them.
            system: the system turn, if there is one. lead: stands before the media.
        """

    def encode(self, model, prompts: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
        """Run the encoders on prompts, with gradients only if they are adapted.

        Returns for each ``input_ids`` [L], ``position_ids`` [3, L] and ``features`` [media, hidden], one row per
        placeholder in prompt order.
        """

    def last_hidden(self, model, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states of the last layer [B, L, hidden], of a batch with ``inputs_embeds``."""

    def generate(self, model, tokenizer, batch: Mapping[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        """Greedy answers to a left-padded batch with ``inputs_embeds``."""

    def marks(self, tokenizer) -> Marks:
        """What opens and closes media and ends a turn in a prompt."""

    def media_tokens(
        self, config, side: int, kinds: Sequence[str], frames: int, seconds: float
    ) -> tuple[int, int]:  # fmt: skip
        """Placeholders of the pictures and of the sounds of a prompt.

        Args:
            side: of pictures, pixels. kinds: of its media. frames: of each video. seconds: of each sound.
        """

    def encoder_tokens(
        self, config, side: int, kinds: Sequence[str], frames: int, seconds: float
    ) -> tuple[int, int]:  # fmt: skip
        """Tokens that the layers of both encoders read for such a prompt. Arguments are those of `media_tokens`."""


class Entry(NamedTuple):
    """A model module: its name, model types in ``config.json``, class of its processor, and well-known checkpoints,
    whose type is known without a look at them.
    """

    module: str
    types: tuple[str, ...]
    processor: str
    checkpoints: tuple[str, ...] = ()


MODELS = (
    Entry(
        "crab.models.omni",  # the whole Omni model, of which the thinker is taken, or a thinker alone
        ("qwen2_5_omni", "qwen2_5_omni_thinker"),
        "Qwen2_5OmniProcessor",
        ("Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B"),
    ),
    Entry("crab.models.bridge", ("crab_bridge",), "BridgeProcessor"),
)
#: Model types that a base may have.
MODEL_TYPES = tuple(kind for entry in MODELS for kind in entry.types)


def model_of(thing: Any) -> AudioVisualModel:
    """The module that serves a base (its folder or name), a configuration, a model or a processor.

    ValueError if there is none. OSError if the base cannot be read.
    """
    return importlib.import_module(module_name(thing))


def module_name(thing: Any) -> str:
    """The dotted name of the module. Arguments and errors are those of `model_of`."""
    if isinstance(thing, str | Path):
        name = str(resolve(thing) or thing)
        for entry in MODELS:
            if name in entry.checkpoints and not Path(name).is_dir():
                return entry.module
        kind = model_type(name)
    else:
        kind = getattr(getattr(thing, "config", thing), "model_type", None)
    classes = {each.__name__ for each in type(thing).__mro__}
    for entry in MODELS:
        if kind in entry.types or entry.processor in classes:
            return entry.module
    what = f"{thing}: a {kind} model" if kind else f"a {type(thing).__name__}"
    raise ValueError(f"{what} is not one of {', '.join(MODEL_TYPES)}; set base.checkpoint to a model of such a type")


def model_type(name: str) -> str | None:
    """``model_type`` in ``config.json`` of a folder, or of a name on the hub. OSError if there is none."""
    from transformers import PreTrainedConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}/config.json is missing: this is not a model; run `dvc repro base`")
    return PreTrainedConfig.get_config_dict(name)[0].get("model_type")
