"""What a sample costs before the model sees it: decoded and prepared, beside PyAV decoding the same files alone.

Generated clips have few small frames; a clip as cameras make them, drawn here, has many, of which as few are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import cv2
import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from crab import tasks
from crab.data import media, records
from crab.models import omni
from crab.study.benchmark import RATIO, estimate, interleaved, quartiles, quotient
from crab.study.dataset import load_base
from crab.study.encode import load_media, prepared

PYAV, DECODE, PREPARE, BOTH = "PyAV, every frame", "decode", "prepare", "decode and prepare"


def decode_alone(record: Mapping) -> int:
    """Decode every frame and every packet of sound of the record's media by PyAV, in one thread; returns their number."""
    count = 0
    for item in record["media"]:
        with av.open(item.path) as container:
            stream = (container.streams.audio if item.kind == "audio" else container.streams.video)[0]
            stream.codec_context.thread_count = 1
            count += sum(1 for _ in container.decode(stream))
    return count


def prepare_alone(slot: str, processor, record: Mapping) -> int:
    """Decode and prepare a record: patches, mel features and tokens; returns the number of tokens."""
    return prepared(processor, record, tasks.get_slot(slot).frames, tasks.instruction(slot, record))["input_ids"].shape[-1]


def filmed(folder: str | Path, like: Mapping, fps: int, width: int, height: int, seconds: int = 10) -> dict:
    """The record `like` with other media: a panned and grainy clip of that size and rate, and noise at 16 kHz."""
    draw = np.random.default_rng(0)
    scene = cv2.resize(draw.integers(256, size=(12, 20, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    grain = draw.integers(12, size=(height, width, 3), dtype=np.uint8)
    frames = (cv2.add(np.roll(scene, 2 * i, 1), np.roll(grain, (7 * i, 11 * i), (0, 1))) for i in range(fps * seconds))
    paths = {"video": Path(folder) / "clip.mp4", "audio": Path(folder) / "clip.wav"}
    media.write_video(paths["video"], frames, fps)
    media.write_audio(paths["audio"], draw.uniform(-0.5, 0.5, media.RATE * seconds))
    return {**like, "media": [item._replace(path=str(paths[item.kind])) for item in like["media"]]}


def data_costs(
    base: str | Path, root: str | Path, slot: str, samples: int, clip: Mapping[str, int], workers: Sequence[int], seconds: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time the first training samples of a slot of one video and one sound, one by one, and then through DataLoader workers.

    Args:
        base: folder whose processor prepares. root: holds ``AVUIE_2``.
        samples: at least 2, repeated for as long as there is time.
        clip: fps, width and height of the clip as cameras make them.
        workers: numbers of worker processes to compare.
        seconds: of repetitions, for each of the generated clips, the filmed one and the workers.

    Returns:
        Costs, a row a part of one sample, alone or in so many workers; and ratios. The roofline of what more workers gain is
        what PyAV alone gains: where the cores share something, no one else's work is faster for it either.

    Raises:
        ValueError: when the slot has fewer samples.
    """
    found = records.read(root, slot, "train")[:samples]
    if len(found) < max(samples, 2):
        raise ValueError(f"benchmark: {slot}/train has {len(found)} records, {max(samples, 2)} are wanted; lower `samples`")
    _, processor = load_base(base)
    frames = tasks.get_slot(slot).frames
    costs, ratios = [], []
    with TemporaryDirectory() as folder:
        kinds = {
            f"{slot}, as in the data": found,
            f"{clip['width']} x {clip['height']}, {clip['fps']} frames/s": [filmed(folder, found[0], **clip)],
        }
        for where, chosen in kinds.items():
            one = _parts(chosen, slot, frames, processor, seconds)
            costs += [{"clips": where, "part": name, "workers": 0, **quartiles(t)} for name, t in one.items()]
            pairs = {"prepare_over_decode": (PREPARE, DECODE), "decode_over_pyav": (DECODE, PYAV), "both_over_pyav": (BOTH, PYAV)}
            ratios += [{"where": where, "ratio": name, **estimate(quotient(*pair), one)} for name, pair in pairs.items()]
    where = next(iter(kinds))
    of_work = {PYAV: decode_alone, BOTH: partial(prepare_alone, slot, processor)}
    times = _through_workers(found, of_work, workers, seconds)
    costs += [{"clips": where, "part": name, "workers": count, **quartiles(t)} for (name, count), t in times.items()]
    few, *more = sorted(set(workers))
    for many in more:
        gain = {name: estimate(quotient((name, few), (name, many)), times) for name in of_work}
        ratios.append({"where": where, "ratio": f"workers_{many}_over_{few}", **gain[BOTH], "roofline": gain[PYAV]["value"]})
    return pd.DataFrame(costs), pd.DataFrame(ratios).assign(part="data", device="cpu", dtype="").reindex(columns=RATIO)


def _parts(chosen: Sequence[Mapping], slot: str, frames: int, processor, seconds: float) -> dict[str, np.ndarray]:
    """Seconds [repetitions] by part, over the records in turn."""

    def alone(n: int):
        decode_alone(chosen[n % len(chosen)])
        yield

    def ours(n: int):
        record = chosen[n % len(chosen)]
        items = load_media(record, frames)
        yield
        omni.prepare(processor, items, tasks.instruction(slot, record))
        yield

    times = interleaved({PYAV: alone, "ours": ours}, seconds, least=max(5, len(chosen)))
    decode, prepare = times["ours"]
    return {PYAV: times[PYAV][0], DECODE: decode, PREPARE: prepare, BOTH: decode + prepare}


def _through_workers(
    found: Sequence[Mapping], of_work: Mapping[str, Callable[[Mapping], int]], workers: Sequence[int], seconds: float
) -> dict[tuple[str, int], np.ndarray]:
    """Seconds a sample [repetitions] by work and number of workers, which run from the warm-up on: starting is not counted.

    A worker keeps what it makes of a record, as those of the encode stage do, and hands over a number.
    """

    def epoch(work: Callable[[Mapping], int], count: int):
        loader = DataLoader(found, batch_size=None, collate_fn=work, num_workers=count, persistent_workers=True)

        def step(_: int):
            for _ in loader:
                pass
            yield

        return step

    steps = {(name, count): epoch(work, count) for name, work in of_work.items() for count in workers}
    return {which: t[0] / len(found) for which, t in interleaved(steps, seconds, least=3, by_wall=True).items()}


def data_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a sample, with quartiles, and samples a second."""
    table = costs.copy()
    table[["ms", "q1", "q3"]] = 1000 * table[["seconds", "q1", "q3"]]
    table["samples/s"] = 1 / table["seconds"]
    table["workers"] = np.where(table["workers"] > 0, table["workers"].astype(str), "none")
    return table[["clips", "part", "workers", "ms", "q1", "q3", "samples/s", "repetitions"]]
