"""The encode stage: list the samples of every slot in shards, with the features of the frozen encoders or without.

With cached features, media are decoded and encoded once. Without, the shards hold the texts and where the media lie.
A sample is then decoded when it is read, and encoded in the step by the model that trains or answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from crab import tasks
from crab.core.code import code_digest
from crab.core.files import digest_of, write_json
from crab.core.pool import run_pool
from crab.data import records
from crab.data.media import RATE, MediaError
from crab.data.probe import Files
from crab.models import published
from crab.models.checkpoint import base_digest, load_model, resolve
from crab.models.protocol import model_of, module_name
from crab.samples.inputs import check_compatibility, processor_of, prompt_of
from crab.samples.reading import MANIFEST
from crab.samples.shards import about, write_shard

#: Samples that go through the encoders together. Their decoded media are in memory at once.
BATCH = 16
#: Records of a shard without features.
LISTED = 4096
ON_PROBLEM = ("error", "skip")
#: The module that, with all it imports and with the model's own, decides how media become features.
ENCODING = ("crab.samples.encode",)


def encode_all(
    root: str | Path,
    slots: Sequence[str] | None,
    base: str | Path,
    out: str | Path,
    workers: int = 2,
    compatibility: str = "none",
    cache: bool = True,
    on_problem: str = "error",
    shard_mib: float = 256,
    probes: str | Path | None = None,
    prompts: str | Path | None = None,
) -> dict[str, dict]:
    """Write the shards of all splits of every slot, and the manifest. Whole shards of an earlier run are kept.

    A digest in the manifest covers what the samples follow from: records and media, base, code and settings, and the
    texts that are asked and learned. It does not cover the features, which are rounded differently on other processors.

    Args:
        root: holds ``AVUIE_2`` and its manifest. slots: None for all that were built.
        workers: processes. Each has a GPU of its own, if there are any.
        compatibility: one of `crab.samples.inputs.COMPATIBILITY`. cache: store features.
        on_problem: ``skip`` leaves out and counts a record whose media break off inside or are too long for the base.
        shard_mib: size of a shard with features.
        probes: the file in which the build stage keeps what it knows of media files. Without features, the lengths of
            sounds are taken from there, since nothing is decoded.
        prompts: a file with the words of the prompts of these slots, see `tasks.read_prompts`. None for our own words.

    Returns:
        By ``slot/split``: ``samples``, ``skipped`` and ``digest``.

    Raises:
        ValueError: no records, a wrong setting, or records that cannot be used.
        RuntimeError: naming the shard that failed.
    """
    check_compatibility(compatibility)
    if on_problem not in ON_PROBLEM:
        raise ValueError(f"shared.on_problem is {on_problem!r}; choose one of {', '.join(ON_PROBLEM)}")
    built = records.read_manifest(root)
    slots = list(dict.fromkeys(key.partition("/")[0] for key in built)) if slots is None else list(slots)
    parts = [(slot, split) for slot in slots for split in tasks.get_slot(slot).splits]
    words = tasks.read_prompts(prompts, slots) if prompts else tasks.PROMPTS
    if absent := [f"{slot}/{split}" for slot, split in parts if f"{slot}/{split}" not in built]:
        fix = "take its slot out of encode.slots, or run the build stage"
        raise ValueError(f"{root}: {absent[0]} was not built; {fix}")
    version = digest_of([built, base_digest(base)])
    refused = {} if cache or not probes else _too_long(root, parts, base, probes, workers, version)
    if refused and on_problem == "error":
        (_, name), problem = next(iter(refused.items()))
        raise ValueError(f"encode: {len(refused)} records cannot be used; the first is {name}: {problem}")
    encoder = Encoder(root, base, compatibility, cache, on_problem == "skip", refused, words, version)
    settings = [base_digest(base), code_digest(*ENCODING, module_name(base)), compatibility, cache]
    settings += [{slot: vars(words[slot]) for slot in slots}] if prompts else []
    jobs, paths = {}, {}
    for slot, split in sorted(parts, key=lambda part: tasks.SPLITS.index(part[1])):
        name, size = f"{slot}/{split}", encoder.shard_size(slot, split, shard_mib)
        total, key = built[name]["records"], digest_of([built[name]["digest"], *settings])
        paths[name] = [Path(out) / name / f"{number:05d}.safetensors" for number in range(-(-total // size))]
        for path in (Path(out) / name).glob("*.safetensors"):
            known = about(path)
            other = path not in paths[name] or known.get("key") != key  # it follows from something else
            if other or (on_problem == "error" and int(known.get("skipped", 0))):
                path.unlink()
        for number, path in enumerate(paths[name]):
            if not path.is_file():
                part = range(number * size, min((number + 1) * size, total))
                jobs[f"{name}, shard {number}"] = partial(encoder.write, slot, split, path, part, key)
    run_pool(list(jobs.items()), workers, "encode")
    manifest = {}
    for name in (f"{slot}/{split}" for slot, split in parts):
        entries = [about(path) for path in paths[name]]
        counts = {count: sum(int(entry[count]) for entry in entries) for count in ("samples", "skipped")}
        if not counts["samples"]:
            raise ValueError(f"{Path(out) / name}: all {counts['skipped']} records were skipped; repair their media")
        texts = [entry["texts"] for entry in entries]
        manifest[name] = {**counts, "digest": digest_of([built[name]["digest"], texts, *settings])}
    write_json(Path(out) / MANIFEST, manifest)
    return manifest


@dataclass(frozen=True)
class Encoder:
    """Writes shards. The arguments are those of `encode_all`; ``refused`` has the problem of records by their
    ``slot/split`` and id, ``words`` the templates of prompts by slot. ``version`` is a digest of records and base: a
    worker keeps both in memory from one call to the next, while they are the same.
    """

    root: str | Path
    base: str | Path
    compatibility: str = "none"
    cache: bool = True
    skip: bool = False
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    words: Mapping[str, tasks.Prompt] = field(default_factory=lambda: tasks.PROMPTS)
    version: str = ""

    def write(self, slot: str, split: str, path: Path, chosen: range, key: str = "") -> None:
        """Write the shard of the records with these indices. Errors are those of `prompt_of`, and of the encoders."""
        rows = [_records(self.root, slot, split, self.version)[i] for i in chosen]
        problems = {row["id"]: self.refused.get((f"{slot}/{split}", row["id"])) for row in rows}
        skipped = [{"id": name, "problem": problem} for name, problem in problems.items() if problem]
        rows = [row for row in rows if not problems[row["id"]]]
        samples = self._encoded(slot, split, rows, skipped) if self.cache else self._listed(slot, split, rows)
        metadata = {"key": key, "compatibility": self.compatibility, "base": base_digest(self.base)}
        write_shard(path, samples, skipped, metadata)

    def shard_size(self, slot: str, split: str, mib: float) -> int:
        """Records of a shard, if all prompts are as long as that of the first one that can be read."""
        if not self.cache:
            return LISTED
        rows = _records(self.root, slot, split, self.version)
        if not rows:
            raise ValueError(f"{Path(self.root) / tasks.json_path(slot, split)}: no records to encode")
        config, _ = model_of(self.base).read_config(resolve(self.base) or self.base)
        wide = 2 * config.get_text_config().hidden_size
        return max(1, int(mib * 2**20 / (self._tokens(slot, rows) * wide) / BATCH)) * BATCH

    def _prompt(self, slot: str, row: Mapping):
        processor, words = processor_of(self.base, self.version), tasks.prompt(slot, row, self.words)
        return prompt_of(processor, slot, row, words, self.compatibility)

    def _text(self, slot: str, split: str, row: Mapping) -> dict[str, str]:
        # Test records may hold their truth outside the answer, which then is not there to be learned.
        answers = {form: tasks.target(slot, row, form) for form in tasks.FORMS} if split == "train" else {}
        return {"id": row["id"], "instruction": tasks.prompt(slot, row, self.words).question, **answers}

    def _tokens(self, slot: str, rows: Sequence[Mapping]) -> int:
        """Length of the first prompt whose media can be read; 1 if there is none."""
        for row in rows:
            try:
                return self._prompt(slot, row)["input_ids"].shape[1]
            except (MediaError, ValueError):
                continue  # said when its turn comes
        return 1

    def _encoded(self, slot: str, split: str, rows: Sequence[Mapping], skipped: list) -> Iterator[dict[str, Any]]:
        model, module = _loaded(self.base, self.version), model_of(self.base)
        for first in range(0, len(rows), BATCH):
            part, prompts = [], []
            for row in rows[first : first + BATCH]:
                try:
                    prompts.append(self._prompt(slot, row))
                    part.append(row)
                except (MediaError, ValueError) as error:
                    if not self.skip:
                        raise
                    skipped.append({"id": row["id"], "problem": str(error)})
            if not part:
                continue
            try:
                encoded = module.encode(model, prompts)
            except RuntimeError as error:
                place = f"encode: {slot}/{split}, records {part[0]['id']} to {part[-1]['id']}"
                raise RuntimeError(f"{place}: {error}") from error
            for row, sample in zip(part, encoded, strict=True):
                yield {**sample, "text": self._text(slot, split, row), "tokens": len(sample["input_ids"])}

    def _listed(self, slot: str, split: str, rows: Sequence[Mapping]) -> Iterator[dict[str, Any]]:
        tokens = self._tokens(slot, rows)
        for row in rows:
            words = vars(tasks.prompt(slot, row, self.words))
            around = {name: text for name, text in words.items() if name != "question" and text}
            around = {"around": around} if around else {}
            yield {"text": {**self._text(slot, split, row), "record": row, **around}, "tokens": tokens}


@lru_cache(maxsize=2)  # the shards of a list follow each other
def _records(root: str | Path, slot: str, split: str, version: str) -> list[dict]:
    return records.read(root, slot, split)


@lru_cache(maxsize=1)
def _loaded(base: str | Path, version: str):
    return load_model(base)


def _too_long(
    root: str | Path, parts: Sequence, base: str | Path, probes: str | Path, workers: int, version: str
) -> dict[tuple[str, str], str]:
    """By ``slot/split`` and id of a record: the file with a sound longer than the base hears, and how to fix it."""
    folder, problems = records.media_root(root), {}
    files = Files(folder, probes)
    for slot, split in parts:
        sounds = [(row["id"], item) for row in records.read(root, slot, split) for item in row["media"]]
        sounds = [(name, item) for name, item in sounds if item.kind == "audio" and item.second is None]
        paths = {item.path: Path(item.path).relative_to(folder).as_posix() for _, item in sounds}
        files.probe([(path, "audio") for path in paths.values()], False, 60, workers, progress=False)
        for name, item in sounds:
            seconds = files.probes[paths[item.path], "audio"].seconds or 0
            if problem := published.cut_off(processor_of(base, version), range(round(seconds * RATE))):
                problems[f"{slot}/{split}", name] = f"{item.path} {problem}"
    return problems
