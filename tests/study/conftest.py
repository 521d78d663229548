"""A real, tiny model with random weights, and encoded samples without media to go with it."""

import pytest
import torch

from crab.models import omni
from crab.study.dataset import write_slot

SIZE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    rope_theta=10000.0, encoder_size=32, vision_layers=1, audio_layers=1, patch_size=28, merge_size=2, image_size=224, mel_bins=16, hop_length=400, n_fft=400,
)  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow")
SLOTS = ("ks", "cremad")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a saved base."""
    folder = tmp_path_factory.mktemp("base")
    words = [*COLOURS, "which", "action", "emotion", "i", "see", "?", "."]
    processor = omni.build_processor(words, ["<answer>", "</answer>"], SIZE)
    model = omni.build_model(processor, SIZE, seed=0)
    model.lm_head.weight.data *= 30  # a frozen head of small random weights could prefer no word to another
    omni.save(folder, model, processor)
    return folder


def make_samples(processor, count, seed):
    """Text, two video and one audio placeholder; the features carry the answer's number."""
    draw = torch.Generator().manual_seed(seed)
    token = processor.tokenizer.convert_tokens_to_ids
    samples, answers = [], []
    for i in range(count):
        k = i % len(COLOURS)
        ids = [token("<|VIDEO|>")] * 2 + [token("<|AUDIO|>")] + [token("which")] * (1 + i % 3) + [token("?")]
        features = 0.1 * torch.randn(3, SIZE["hidden_size"], generator=draw)
        features[:, k] += 2
        samples.append(
            {"input_ids": torch.tensor(ids), "position_ids": torch.arange(len(ids)).expand(3, -1), "features": features}
        )
        answers.append(COLOURS[k])
    return samples, answers


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, base):
    """Folder of encoded samples of two slots: 16 to train and 8 to test on."""
    root = tmp_path_factory.mktemp("encoded")
    _, processor = omni.load(base)
    for number, slot in enumerate(SLOTS):
        for split, count in (("train", 16), ("test", 8)):
            samples, answers = make_samples(processor, count, number)
            bare = [f"<answer>{a}</answer>" for a in answers]
            write_slot(
                root, slot, split, samples, [f"{slot}/{split}/{i:05d}" for i in range(count)], ["which ?"] * count,
                {"bare": bare, "explicit": [f"i see {a} . {b}" for a, b in zip(answers, bare)]},
            )  # fmt: skip
    return root
