"""Samples in shards: safetensors files of limited size, written as a stream and read from memory maps.

A shard holds N samples of one slot and split, end to end:
    features   float16 [media, hidden]  outputs of the frozen encoders, one row per placeholder, in order
    ids        int32 [tokens]           the prompt's tokens, media placeholders expanded
    positions  int32 [tokens, 3]        time, height and width positions
    texts      uint8 [bytes]            one JSON object per sample: id, instruction and answers by form
    lengths    int32 [N, 4]             media rows, tokens, bytes of text of each sample, and tokens to expect
    skipped    uint8 [bytes]            JSON list: what was left out of these records, and why

A shard without cached features has neither features, ids nor positions. Its texts hold the record as well.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from crab.core.files import atomic_file

_HEADER = 4096  # bytes at the start of a shard, filled in once the sizes are known
_TYPES = {"float16": "F16", "int32": "I32", "uint8": "U8"}


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]], skipped: list, metadata: Mapping[str, str]) -> None:
    """Write samples as they come, so that memory holds only their texts and token ids.

    Args:
        samples: each has ``text`` (a JSON object), ``tokens`` (how many to expect) and, if its features are cached,
            ``input_ids`` [L], ``position_ids`` [3, L] and ``features`` [media, hidden].
        skipped: filled while the samples are made.
        metadata: what the shard follows from. Added: numbers of samples and of skipped ones, and a digest of texts.
    """
    digest = hashlib.sha256()
    ids, positions, texts, lengths, width = [], [], [], [], 0
    with atomic_file(path) as part, open(part, "wb") as file:
        file.write(bytes(_HEADER))
        for sample in samples:
            text = json.dumps(sample["text"], ensure_ascii=False).encode()
            digest.update(text)
            texts.append(text)
            rows = 0
            if "features" in sample:
                rows, width = sample["features"].shape
                file.write(sample["features"].to(torch.float16).contiguous().numpy().data)
                ids.append(sample["input_ids"].to(torch.int32).numpy())
                positions.append(sample["position_ids"].T.to(torch.int32).numpy())
            lengths.append([rows, len(ids[-1]) if "features" in sample else 0, len(text), sample["tokens"]])
        tensors = {"ids": np.concatenate(ids), "positions": np.concatenate(positions)} if width else {}
        tensors["lengths"] = np.array(lengths, np.int32).reshape(-1, 4)
        tensors["texts"] = np.frombuffer(b"".join(texts), np.uint8)
        tensors["skipped"] = np.frombuffer(json.dumps(skipped, ensure_ascii=False).encode(), np.uint8)
        header: dict[str, Any] = {"__metadata__": {**metadata, "texts": digest.hexdigest()}}
        header["__metadata__"] |= {"samples": str(len(lengths)), "skipped": str(len(skipped))}
        end = file.tell() - _HEADER
        if width:
            header["features"] = _entry("float16", (end // 2 // width, width), 0, end)
        for name, tensor in tensors.items():
            file.write(np.ascontiguousarray(tensor).data)
            begin, end = end, file.tell() - _HEADER
            header[name] = _entry(str(tensor.dtype), tensor.shape, begin, end)
        text = json.dumps(header).encode()
        file.seek(0)
        file.write(struct.pack("<Q", _HEADER - 8) + text.ljust(_HEADER - 8))  # the format allows spaces at the end


def _entry(kind: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": _TYPES[kind], "shape": list(shape), "data_offsets": [begin, end]}


def about(path: Path) -> dict[str, str]:
    """What `write_shard` noted of a whole shard; empty if there is none, or if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


class Shards(Sequence):
    """The samples in the shards of a folder, in order. A sample is read from its file when it is asked for.

    ``lengths`` is int64 [N, 4], see the top of this module. ValueError if there is no shard, or if one is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.paths = sorted(Path(folder).glob("[0-9]*.safetensors"))
        if not self.paths:
            raise ValueError(f"{folder}: no encoded samples; run the encode stage")
        self._files: dict[int, Any] = {}
        parts = [self._read(number, "lengths") for number in range(len(self.paths))]
        self.lengths = np.concatenate(parts).astype(np.int64)
        self._first = np.cumsum([0, *map(len, parts)])
        # where each sample begins in its own shard
        self._begins = np.concatenate([np.cumsum(part, 0, dtype=np.int64) - part for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # every process opens its own

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def cached(self) -> bool:
        """Whether features are stored."""
        return bool(self.lengths[:, 1].any())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``text``, and from a shard with features ``input_ids`` [L], ``position_ids`` [3, L] and ``features``."""
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        (row, token, byte, _), (rows, tokens, size, _) = self._begins[index], self.lengths[index]
        sample = {"text": json.loads(bytes(self._read(shard, "texts", byte, size)))}
        if rows:
            sample["input_ids"] = torch.from_numpy(self._read(shard, "ids", token, tokens)).long()
            sample["position_ids"] = torch.from_numpy(self._read(shard, "positions", token, tokens)).T.long()
            sample["features"] = torch.from_numpy(self._read(shard, "features", row, rows))
        return sample

    def texts(self) -> Iterator[dict[str, Any]]:
        for shard in range(len(self.paths)):
            texts = bytes(self._read(shard, "texts"))
            for index in range(self._first[shard], self._first[shard + 1]):
                begin = self._begins[index, 2]
                yield json.loads(texts[begin : begin + self.lengths[index, 2]])

    def skipped(self) -> list[dict[str, str]]:
        """What was left out, with ``id`` and ``problem``."""
        return [entry for shard in range(len(self.paths)) for entry in json.loads(bytes(self._read(shard, "skipped")))]

    def _read(self, shard: int, name: str, begin: int = 0, count: int | None = None) -> np.ndarray:
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(self.paths[shard], "np")
            part = self._files[shard].get_slice(name)
            return part[int(begin) : part.get_shape()[0] if count is None else int(begin + count)]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.paths[shard]}: missing or damaged ({error}); run the encode stage again") from None
