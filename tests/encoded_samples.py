"""Encoded samples on disk, as the encode stage leaves them."""

from crab.samples.shards import write_shard


def store_samples(root, slot, split, samples, texts, per_shard=100):
    """Write encoded samples with their texts (id, instruction, answers by form) in shards."""
    rows = [{**s, "text": text, "tokens": len(s["input_ids"])} for s, text in zip(samples, texts, strict=True)]
    for number, first in enumerate(range(0, len(rows), per_shard)):
        path = root / slot / split / f"{number:05d}.safetensors"
        write_shard(path, rows[first : first + per_shard], [], {"compatibility": "none"})
