"""Small random parts of a bridge, on disk: a Llama, a CLIP and a Whisper."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def write_parts(folder, words, hidden=32):
    """Folders of the three parts, by name."""
    torch.manual_seed(0)
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *words, "user", "assistant", "system"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=hidden, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPConfig(
        vision_config=dict(**sizes, image_size=32, patch_size=8),
        text_config=dict(**sizes, vocab_size=10),
        projection_dim=8,
    )
    whisper = WhisperConfig(
        d_model=20, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=16, max_source_positions=500, vocab_size=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    parts = {
        "language": [language, tokenizer],
        "vision": [CLIPModel(clip), CLIPImageProcessorPil(size=size, crop_size=size)],
        "audio": [WhisperModel(whisper), WhisperFeatureExtractor(feature_size=16, chunk_length=10)],
    }
    for name, files in parts.items():
        for file in files:
            file.save_pretrained(folder / name)
    return {name: str(folder / name) for name in parts}
