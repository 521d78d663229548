"""A clip of your own and a question: what a trained model answers, and a picture of the answer and of the routing.

`generated` or `own` gives the clip, `load` the model, `ask` the reply and `draw` the picture. The notebook `ask` shows
how they go together.
"""

import mimetypes
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from crab import tasks
from crab.analyses import gallery
from crab.data import media, records
from crab.data.probe import probe
from crab.ilora import ILoraLayer, record_routing
from crab.models.batches import SEGMENTS, batch, encoded, last_hidden, segments
from crab.models.checkpoint import load_base
from crab.models.protocol import CLIP
from crab.models.segment import segmenter
from crab.samples.inputs import prepared, prompt_of
from crab.study import figures
from crab.study.answer import answer, load_adapter
from crab.tasks.registry import MEDIA
from crab.world import verify
from crab.world.generate import build

SEED = 2026  # of clips that are rendered on the spot; no profile builds with it, so nothing was trained on them
#: Slots whose grammar reads the answer to a free question, tried in this order. The last one takes any text.
READERS = ("ave", "unav", "avvp", "arig", "s4", "avqa", "avcap")
COLOURS = dict(zip(SEGMENTS, ("0.45", gallery.MARK, gallery.TIME, "#00805c"), strict=True))


@dataclass(frozen=True)
class Reply:
    """What a model says about a clip.

    Attributes:
        instruction: the question. unknown: its words that the tokenizer does not know.
        text: the whole answer. chain: the reasoning before the answer proper, "" if there is none.
        slot: whose grammar read the answer. parsed: what the answer says, None if it cannot be read.
        media: each item of the prompt as it was decoded (`crab.data.records.load`).
        routing: one row per token and head (``token``, ``segment``, ``head``, ``weight``, the mean over the adapted
            modules of all layers); None without I-LoRA.
    """

    instruction: str
    unknown: list[str]
    text: str
    chain: str
    slot: tasks.Slot
    parsed: Any
    media: list[tuple[tasks.MediaItem, Any]]
    routing: pd.DataFrame | None


@contextmanager
def message_only() -> Iterator[None]:
    """Inside, bad input stops a notebook with its message alone, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        error._render_traceback_ = [f"{type(error).__name__}: {error}"].copy  # IPython calls it for a traceback
        raise


# ---------------------------------------------------------------- the clip


def generated(dataset: str | Path, slot: str, folder: str | Path, number: int = 0) -> dict[str, Any]:
    """Test record ``number`` of a data root. If the slot has none there, one is rendered into ``folder``.

    ValueError: the data root has no record of this number.
    """
    split = "test" if (entry := tasks.get_slot(slot)).test else "train"
    if split == "train" or not (Path(dataset) / tasks.json_path(slot, split)).is_file():
        dataset, counts = Path(folder) / "dataset", {"train": 1, split: number + 1, "caption": number + 1}
        build(dataset, SEED, **counts, workers=1, slots=[entry.name], progress=False)
    rows = records.read(dataset, slot, split)
    if not 0 <= number < len(rows):
        raise ValueError(f"number is {number}; slot {slot} has the {split} records 0 to {len(rows) - 1}")
    return rows[number]


def own(paths: str | PathLike | Sequence[str], slot: str | None = None, second: int | None = None) -> dict[str, Any]:
    """A record about files of your own, each of which can be read.

    Args:
        paths: one clip with sound, or the files in the order of the prompt of ``slot``. For a free question, any
            files; the sound of a clip is heard if no file of sound is among them.
        second: for a picture, the second of the sound that is heard; None for all of it.

    Raises:
        ValueError: too few or too many files.
        crab.data.media.MediaError: naming the file that is missing, cannot be read, or is of another kind.
    """
    paths = [str(Path(path).expanduser()) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]
    if slot is None:
        streams = [(kind, path) for path in paths for kind in _streams(path)]
        seen = {path for kind, path in streams if kind != "audio"}
        if any(path not in seen for path in paths):
            streams = [(kind, path) for kind, path in streams if kind != "audio" or path not in seen]
    else:
        kinds = [kind for kind, _ in MEDIA[tasks.get_slot(slot).media]]
        paths *= 2 if tuple(kinds) == CLIP and len(paths) == 1 else 1
        if len(paths) != len(kinds):
            one = ", or one video with sound" if tuple(kinds) == CLIP else ""
            raise ValueError(f"media: {len(paths)} files; slot {slot} takes {', '.join(kinds)}, in this order{one}")
        streams = list(zip(kinds, paths, strict=True))
    second = second if "image" in dict(streams) else None
    record = {"media": [tasks.MediaItem(k, path, "media", second if k == "audio" else None) for k, path in streams]}
    records.load(record, 1)  # a file that cannot be read is told before the model is loaded
    return record


def _streams(path: str) -> list[str]:
    """What a file shows and plays: image, video, audio, or video and audio. MediaError if nothing."""
    if not probe(path, "image").problem:
        return ["image"]
    if kinds := [kind for kind in CLIP if not probe(path, kind).problem]:
        return kinds
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    read = {"image": media.read_image, "audio": media.read_audio}.get(kind, lambda path: media.read_video(path, 1))
    read(path)  # which says what is wrong
    raise media.MediaError(path, f"is no whole {kind or 'clip'}", media.AGAIN)


# ---------------------------------------------------------------- the reply


def load(paths, base: str | None = None, adapter: str | None = None):
    """(model, processor): a base with an adapter on it.

    Args:
        paths: of the profile, `crab.pipeline.paths.Paths`.
        base: folder or name of a base; None for that of the profile.
        adapter: a name among the profile's adapters, or a folder; None for the base alone.

    Raises:
        ValueError: the adapter is not there, is damaged, or does not fit the base.
    """
    folder = next((f for f in (paths.adapters / adapter, Path(adapter)) if f.is_dir()), None) if adapter else None
    if adapter and folder is None:
        known = ", ".join(sorted(path.name for path in paths.adapters.glob("*"))) or "none"
        raise ValueError(f"adapter is {adapter!r}; give a folder, or one of this profile's adapters ({known})")
    model, processor = load_base(paths.base if base is None else base)
    return (load_adapter(model, folder) if adapter else model), processor


@torch.no_grad()
def ask(
    model, processor, record: Mapping[str, Any], slot: str | None, question: str | None = None, frames: int = 10,
    compatibility: str = "none", max_new_tokens: int = 96, prompts: str | PathLike | None = None,
) -> Reply:  # fmt: skip
    """Ask about the media of a record, by greedy generation.

    Args:
        record: of `generated` or `own`, with the fields that the slot's instruction quotes.
        slot: the task; None for a free question.
        question: in place of the slot's own instruction.
        frames: of each video, for a free question. compatibility: with a slot, how media are shown, see
            `crab.samples.inputs.COMPATIBILITY`.
        prompts: with a slot, a file with the words of its prompt, see `tasks.read_prompts`; None for our own.

    Raises:
        ValueError: a field or the question is missing, or a sound is longer than the base hears.
    """
    if not question and slot is None:
        raise ValueError("question and slot are both empty; give a question, a slot, or both")
    templates = tasks.read_prompts(prompts, [slot]) if prompts and slot else tasks.PROMPTS
    words = tasks.Prompt(question or "")
    if slot:
        entry = tasks.get_slot(slot)
        try:
            around = replace(templates[slot], question="").filled(entry, record)
            words = replace(around, question=question or templates[slot].filled(entry, record).question)
        except ValueError as error:
            raise ValueError(f"{error}; set it in `fields`") from error
    instruction = words.question
    if slot is None:
        prompt = prepared(processor, record, frames, instruction)
    else:
        frames, prompt = tasks.get_slot(slot).frames, prompt_of(processor, slot, record, words, compatibility)
    (sample,) = encoded(model, [{"prompt": prompt}])
    (text,) = answer(model, processor.tokenizer, [sample], 1, max_new_tokens)
    entry = tasks.get_slot(slot or next((name for name in READERS if tasks.parse(name, text) is not None), "avcap"))
    return Reply(
        instruction,
        _unknown(processor.tokenizer, instruction),
        text,
        chain="" if entry.kind == "captioning" else verify.chain(entry, text).strip(),
        slot=entry,
        parsed=tasks.parse(entry, text, record),
        media=list(zip(record["media"], records.load(record, frames), strict=True)),
        routing=_routing(model, processor.tokenizer, sample, text),
    )


def _unknown(tokenizer, text: str) -> list[str]:
    """Words that a small tokenizer reads as unknown. The published one knows all."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
    return list(dict.fromkeys(text[a:b] for token, (a, b) in pairs if token == tokenizer.unk_token_id))


def _routing(model, tokenizer, sample, text: str) -> pd.DataFrame | None:
    """The weights at each token of the prompt and of the answer, which is read once more."""
    if not any(isinstance(module, ILoraLayer) for module in model.modules()):
        return None
    inputs = batch(model, tokenizer, [sample], [text])
    with record_routing(model) as recorded:
        last_hidden(model, inputs)
    weights = torch.stack([passes[0][0] for passes in recorded.values() if passes]).mean(0)  # not of adapted encoders
    kinds = [SEGMENTS[kind] for kind in segments(model.config, inputs)[0].tolist()]
    table = pd.DataFrame(weights.double().numpy()).assign(token=range(len(kinds)), segment=kinds)
    return table.melt(["token", "segment"], var_name="head", value_name="weight")


# ---------------------------------------------------------------- the picture


def draw(reply: Reply, cut: str = "grabcut") -> Figure:
    """Frames and sound with what the answer says about them, and each head's routing weight at each token.

    ``cut`` makes a mask of the answered box and points, see `crab.models.segment.segmenter`.
    """
    heads = [] if reply.routing is None else list(reply.routing.groupby("head"))
    ratios = [2.8, 1.4, *[1.0] * len(heads)]
    size = {"figsize": (11, 1.2 + sum(ratios)), "height_ratios": ratios}
    figure, grid = figures.subplots(len(ratios), gallery.SHOWN, squeeze=False, **size)
    for axes in grid[1:].flat:
        axes.remove()
    sound, *rows = (figure.add_subplot(grid[0, 0].get_gridspec()[row, :]) for row in range(1, len(ratios)))
    slot = reply.slot if reply.parsed is not None else tasks.get_slot("avcap")  # of which the gallery draws no answer
    answered = {slot.answer_field: reply.text}  # a record whose truth is the answer, as the gallery draws it
    if slot.kind == "temporal":
        answered |= dict(zip(slot.truth_fields, reply.parsed, strict=True))
    gallery.draw_pictures(grid[0], tasks.get_slot("avcap"), {}, reply.media)
    placed = slot.kind in gallery.PLACED and reply.parsed != tasks.NULL
    for axes in [axes for axes in grid[0] if axes.images and axes.get_title() != "frame"]:
        if placed:
            gallery.draw_place(axes, slot, answered)
            if slot.masks:
                mask = segmenter(cut)(np.asarray(axes.images[0].get_array()), *reply.parsed)
                axes.contourf(mask, levels=[0.5, 1.5], colors=[gallery.MARK], alpha=0.4)
        elif axes.get_title() == "answer drawn":
            axes.set_visible(False)
    if any(item.kind == "audio" for item, _ in reply.media):
        gallery.draw_sounds(sound, slot, answered, reply.media)
        sound.set_title("sound" + ", with what the answer says" * bool(sound.texts), fontsize=10, pad=3)
    else:
        sound.axis("off")
        sound.set_title("no sound", fontsize=10)
    for axes, (head, part) in zip(rows, heads, strict=True):
        style = {"palette": COLOURS, "hue_order": SEGMENTS, "s": 14, "linewidth": 0, "legend": False}
        sns.scatterplot(part, x="token", y="weight", hue="segment", ax=axes, **style)
        axes.axhline(1 / len(heads), color="0.3", linewidth=0.8, linestyle="--")
        limits = reply.routing["weight"].min() - 0.03, reply.routing["weight"].max() + 0.03
        last = axes is rows[-1]
        axes.set(ylabel=f"head {head + 1}", xlabel="token, coloured by kind" * last, ylim=limits, xlim=(-1, len(part)))
        axes.tick_params(labelsize=9, labelbottom=last)
    if rows:
        rows[0].set_title("routing weight at each token, mean over layers (dashed: even)", fontsize=10, pad=3)
        dots = [Line2D([], [], linestyle="", marker="o", color=colour) for colour in COLOURS.values()]
        figure.legend(dots, COLOURS, loc="outside lower center", ncols=len(dots), fontsize=9)
    lines = (reply.instruction, reply.text.strip().removeprefix(reply.chain))
    lines = [textwrap.fill(textwrap.shorten(line, 240), 110) for line in lines]
    figure.suptitle("\n".join(lines), fontsize=12, parse_math=False)  # a question may hold two signs of dollar
    return figure
