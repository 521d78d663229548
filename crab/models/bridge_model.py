"""The classes of a bridge: its configuration, its model and its processor. `crab.models.bridge` uses them."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.generation import GenerationMixin

from crab.models import encoders
from crab.models.language import compile_layers


class BridgeConfig(PreTrainedConfig):
    """Configurations of the parts, and how many tokens a unit becomes (see `crab.models.encoders`).

    ``language`` names the frozen language model (see `crab.models.language.located`); its weights are not stored with
    the bridge.
    """

    model_type = "crab_bridge"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    language: str = ""
    projector: str = "mlp"
    picture_tokens: int = 4
    sound_tokens: int = 2
    words: int = 1
    image_token_id: int = 0
    video_token_id: int = 0
    audio_token_id: int = 0


class Bridge(PreTrainedModel, GenerationMixin):
    """The parts: ``language_model``, ``visual`` and ``audio_tower``."""

    config_class = BridgeConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _keys_to_ignore_on_save = None

    def __init__(self, config: BridgeConfig, language_model=None):
        if language_model is not None:
            config.text_config = language_model.config
        super().__init__(config)
        text = config.get_text_config()
        self.language_model = language_model or AutoModelForCausalLM.from_config(text)
        self._no_split_modules = self.language_model._no_split_modules
        weight = self.get_input_embeddings().weight
        size = 1.0 if weight.is_meta else float(weight.detach().float().pow(2).mean().sqrt())
        shape = config.projector, text.hidden_size
        self.visual = encoders.Eye(config.vision_config, *shape, config.picture_tokens, size, config.words)
        self.audio_tower = encoders.Ear(config.audio_config, *shape, config.sound_tokens, size, config.words)
        self.set_attn_implementation("sdpa")
        self._compiled: bool | None = None  # whether layers are compiled, where that is faster; None until asked

    def _init_weights(self, module) -> None:
        """Each part has drawn its own."""

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, **options):
        """As the language model does. ``position_ids`` are [B, L] or [3, B, L]."""
        if position_ids is not None and position_ids.dim() == 3:
            position_ids = position_ids[0]
        trains = self.training and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        if trains and self._compiled is None:
            self._compiled = compile_layers(self.language_model)
        with torch.compiler.set_stance("default" if trains else "force_eager"):
            return self.language_model(
                input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                position_ids=position_ids, **options,
            )  # fmt: skip


AutoConfig.register(BridgeConfig.model_type, BridgeConfig)


class BridgeProcessor:
    """The tokenizer, what prepares frames (``image_processor``) and sounds (``feature_extractor``), and the sizes."""

    def __init__(self, tokenizer, image_processor, feature_extractor, config: BridgeConfig):
        self.tokenizer, self.image_processor, self.feature_extractor = tokenizer, image_processor, feature_extractor
        self.picture_tokens, self.sound_tokens = config.picture_tokens, config.sound_tokens
