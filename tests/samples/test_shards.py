"""Shards: what is written comes back, whole shards are real safetensors files, damaged ones are named."""

import json
import pickle

import pytest
import torch
from encoded_samples import store_samples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from crab.samples.reading import read_slot
from crab.samples.shards import Shards, about, write_shard


def sample(index, tokens, rows, width=4):
    return {
        "input_ids": torch.arange(tokens) + index,
        "position_ids": torch.arange(3 * tokens).view(3, tokens) - index,
        "features": torch.full((rows, width), index, dtype=torch.float16),
    }


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=12), per=st.integers(1, 5))
def test_samples_come_back_in_order(tmp_path_factory, sizes, per):
    root = tmp_path_factory.mktemp("shards")
    samples = [sample(i, tokens, rows) for i, (tokens, rows) in enumerate(sizes)]
    texts = [{"id": f"é{i}", "instruction": "?", "bare": "x" * i} for i in range(len(sizes))]
    store_samples(root, "ks", "train", samples, texts, per_shard=per)
    data = read_slot(root, "ks", "train")
    assert data.ids == [text["id"] for text in texts] and list(data.tokens) == [tokens for tokens, _ in sizes]
    for one, other, text in zip(samples, data, texts, strict=True):
        assert other["text"] == text and all(torch.equal(one[name], other[name]) for name in one)
    assert [s["text"] for s in data[1:]] == texts[1:] and [s["text"] for s in data[:-1][-2:]] == texts[:-1][-2:]
    assert [answer for _, answer in data.answered("bare")[2:4]] == ["x" * i for i in range(len(sizes))][2:4]


def test_a_shard_is_a_safetensors_file_that_keeps_what_was_left_out(tmp_path):
    path = tmp_path / "00000.safetensors"
    rows = [{**sample(i, 3, 2), "text": {"id": str(i)}, "tokens": 3} for i in range(2)]
    write_shard(path, rows, [{"id": "x", "problem": "too long"}], {"key": "k"})
    tensors = load_file(path)
    assert tensors["features"].tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
    assert tensors["ids"].tolist() == [0, 1, 2, 1, 2, 3] and tensors["lengths"].tolist() == [[2, 3, 11, 3]] * 2
    assert (about(path)["key"], about(path)["samples"], about(path)["skipped"]) == ("k", "2", "1")
    assert Shards(tmp_path).skipped() == [{"id": "x", "problem": "too long"}]
    assert json.loads(bytes(tensors["texts"].numpy())[:11]) == {"id": "0"}


def test_readers_can_be_sent_to_other_processes(tmp_path):
    store_samples(tmp_path, "ks", "train", [sample(0, 3, 2)], [{"id": "a", "instruction": "?"}])
    data = read_slot(tmp_path, "ks", "train")
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]["features"], data[0]["features"])


def test_damaged_and_missing_shards_are_named(tmp_path):
    store_samples(tmp_path, "ks", "train", [sample(0, 3, 2)], [{"id": "a", "instruction": "?"}])
    path = tmp_path / "ks" / "train" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="00000.safetensors: missing or damaged .*; run the encode stage again"):
        read_slot(tmp_path, "ks", "train")
    assert about(path) == {}
    with pytest.raises(ValueError, match="ave/train: no encoded samples; run the encode stage"):
        read_slot(tmp_path, "ave", "train")
