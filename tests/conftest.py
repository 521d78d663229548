"""A real, tiny model with random weights, and encoded samples without media to go with it."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from encoded_samples import store_samples
from sizes import SMALL

from crab import tasks
from crab.core.files import write_json
from crab.data import probe
from crab.models import omni, small
from crab.models.checkpoint import load_base
from crab.samples.reading import MANIFEST
from crab.study.cells import Cell
from crab.study.hardware import Hardware
from crab.study.store import Store
from crab.world import generate

COLOURS = ("red", "green", "blue", "yellow")
SLOTS = ("ks", "cremad")
COUNTS = {"train": 16, "test": 8}
PROBE_ALL = probe.probe_all


def pytest_collection_modifyitems(items):
    """The smoke study first: it takes as long as all other slow tests, which run beside it."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a saved base."""
    folder = tmp_path_factory.mktemp("base")
    words = [*COLOURS, "which", "action", "emotion", "i", "see", "?", "."]
    processor = small.build_processor(words, ["<answer>", "</answer>"], SMALL)
    model = small.build_model(processor, SMALL, seed=0)
    model.lm_head.weight.data *= 30  # a frozen head of small random weights may prefer no word to another
    omni.save(folder, model, processor)
    return folder


def make_samples(processor, count, seed):
    """Text, two video tokens and one of sound; the features carry the number of the answer."""
    draw = torch.Generator().manual_seed(seed)
    token = processor.tokenizer.convert_tokens_to_ids
    samples, answers = [], []
    for i in range(count):
        k = i % len(COLOURS)
        ids = [token("<|VIDEO|>")] * 2 + [token("<|AUDIO|>")] + [token("which")] * (1 + i % 3) + [token("?")]
        features = 0.1 * torch.randn(3, SMALL["hidden_size"], generator=draw)
        features[:, k] += 2
        positions = torch.arange(len(ids)).expand(3, -1)
        samples.append({"input_ids": torch.tensor(ids), "position_ids": positions, "features": features})
        answers.append(COLOURS[k])
    return samples, answers


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, base):
    """Folder of encoded samples of two slots: 16 to train on and 8 to test on."""
    root = tmp_path_factory.mktemp("encoded")
    _, processor = load_base(base)
    for number, slot in enumerate(SLOTS):
        for split, count in COUNTS.items():
            samples, answers = make_samples(processor, count, number)
            bare = [f"<answer>{a}</answer>" for a in answers]
            explicit = [f"i see {a} . {b}" for a, b in zip(answers, bare, strict=True)]
            texts = [
                {"id": f"{slot}/{split}/{i:05d}", "instruction": "which ?", "bare": bare[i], "explicit": explicit[i]}
                for i in range(count)
            ]
            store_samples(root, slot, split, samples, texts)
    parts = {f"{s}/{split}": {"samples": n, "digest": f"{s} {split}"} for s in SLOTS for split, n in COUNTS.items()}
    write_json(root / MANIFEST, parts)
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The records that the encoded samples belong to: the colours, in turn."""
    root = tmp_path_factory.mktemp("dataset")
    for slot, field in zip(SLOTS, ("action", "emotion"), strict=True):
        for split, count in COUNTS.items():
            path = root / tasks.json_path(slot, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            media = {"video_path": "a.mp4", "audio_path": "a.wav"}
            colours = [COLOURS[i % 4] for i in range(count)]
            rows = [{**media, field: c, "label": f"<answer>{c}</answer>"} for c in colours]
            path.write_text(json.dumps(rows), encoding="utf-8")
    return root


@pytest.fixture
def store(encoded, dataset, base, tmp_path):
    """A store that works in this process."""
    answer = {"batch_size": 8, "max_new_tokens": 6, "segmenter": "grabcut"}
    folders = (tmp_path / "cells", tmp_path / "cells.json.xz", tmp_path / "adapters")
    return Store(
        encoded, dataset, base, *folders, batch_size=8, precision="fp32", answer=answer, hardware=Hardware(workers=1)
    )


@pytest.fixture
def cell():
    """Makes cells: joint LoRA of rank 2 on both slots, for one pass, unless told otherwise."""

    def make(family="joint-lora-bare", method="lora", rate=1e-2, slots=SLOTS, passes=1, options=None, **fields):
        extra = {"num_heads": 2} if method == "ilora" else {}
        options = {"r": 2, "lora_alpha": 4, **extra} if options is None else options
        return Cell(family, method, options, rate, tuple(slots), passes, **fields)

    return make


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A tiny generated tree of every slot: its numbers, its summary, and seconds of processor time that it took."""
    root = tmp_path_factory.mktemp("world") / "tree"
    counts = {"seed": 5, "train": 4, "test": 3, "caption": 3}
    began = time.process_time()
    summary = generate.build(root, **counts, workers=1, progress=False)
    return SimpleNamespace(root=root, counts=counts, summary=summary, cost=time.process_time() - began, **counts)


@pytest.fixture(scope="module")
def probed_here():
    """Probe files in this process: no other one must start, but nothing can be killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "probe_all", lambda jobs, *_: ((job, probe.probe(*job)) for job in jobs))
        yield


@pytest.fixture
def probed_apart(probed_here, monkeypatch):
    """Probe files in worker processes again."""
    monkeypatch.setattr(probe, "probe_all", PROBE_ALL)
