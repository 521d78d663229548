"""Sizes of small models, as ``base.size`` of params.yaml gives them."""

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_theta": 10000.0, "encoder_size": 32, "vision_layers": 1, "audio_layers": 1,
    "patch_size": 28, "merge_size": 2, "image_size": 224, "mel_bins": 16, "hop_length": 400, "n_fft": 400,
}  # fmt: skip
#: Sees pictures of half the side, and hears two tokens a second.
COARSE = SMALL | {"image_size": 112, "patch_size": 14, "merge_size": 4, "hop_length": 2000, "n_fft": 2048}
