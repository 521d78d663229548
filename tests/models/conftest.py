import pytest

from crab.models import small
from crab.models.base import probes

SIZE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    rope_theta=1e4, encoder_size=32, vision_layers=1, audio_layers=1, image_size=112, patch_size=14, merge_size=4,
    mel_bins=16, hop_length=2000, n_fft=2048,
)  # fmt: skip


@pytest.fixture(scope="session")
def size():
    return SIZE


@pytest.fixture(scope="session")
def processor():
    words = sorted({*probes.words(), ","})  # the comma belongs to the answers of the tasks
    return small.build_processor(words, ("<answer>", "</answer>", "<range>", "</range>"), SIZE)


@pytest.fixture(scope="session")
def model(processor):
    return small.build_model(processor, SIZE, seed=0).eval()
