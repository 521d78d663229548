"""A published checkpoint stands for the base by its name alone."""

import pytest
import torch
from transformers import BertConfig

from crab.models.base import train as base
from crab.models import checkpoint, omni
from crab.study.dataset import load_base


def test_a_folder_that_names_a_checkpoint_loads_it(model, processor, tmp_path):
    omni.save(tmp_path / "downloaded", model, processor)
    made = base.make_base(["bell"], [], checkpoint=str(tmp_path / "downloaded"), scenes=0)
    base.keep(tmp_path / "base", *made[:2], str(tmp_path / "downloaded"))
    assert [p.name for p in (tmp_path / "base").iterdir()] == [checkpoint.POINTER]  # nothing is copied
    loaded, reader = load_base(tmp_path / "base")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert reader.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert "published checkpoint" in base.said(made[2], "x/y") and base.missed(made[2]["gates"], {}) == []


def test_a_folder_with_a_base_stands_for_itself(model, processor, tmp_path):
    base.keep(tmp_path, model, processor, None)
    assert checkpoint.resolve(tmp_path) is None and load_base(tmp_path)[0].dtype == torch.float32


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is a bert model, and must be one of qwen2_5_omni.*`checkpoint` of the base section"):
        checkpoint.point_to(tmp_path / "base", str(tmp_path / "bert"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be read \(.*the absolute path of a downloaded copy"):
        checkpoint.point_to(tmp_path / "base", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'bert', which depends on the folder it is read in"):
        checkpoint.point_to(tmp_path / "base", "bert")
    assert not (tmp_path / "base").exists()
