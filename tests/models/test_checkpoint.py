"""A folder may stand for a published checkpoint, and several profiles may point to one base."""

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig

from crab.core.files import read_json
from crab.models import checkpoint, omni
from crab.models.base import train


def test_a_folder_that_names_a_checkpoint_loads_it(model, processor, tmp_path):
    name = str(tmp_path / "downloaded")
    omni.save(name, model, processor)
    parts = train.make_base(tmp_path / "base", {}, {}, name, code=str)
    train.keep(tmp_path / "base", *parts, name)
    assert parts[2]["gates"] == {} and [p.name for p in (tmp_path / "base").iterdir()] == [checkpoint.POINTER]
    loaded, reader = checkpoint.load_base(tmp_path / "base")
    pairs = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b.cpu()) for a, b in pairs)
    assert reader.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, problem in (
        (tmp_path / "bert", "is a bert model, not one of qwen2_5_omni.*; set base.checkpoint in params.yaml"),
        (tmp_path / "empty", r"empty' cannot be read \(.*the absolute path of a downloaded copy"),
        ("bert", "'bert' is a relative path, which depends on the working folder"),
    ):
        with pytest.raises(ValueError, match=problem):
            checkpoint.point_to(tmp_path / "base", str(name))
    assert not (tmp_path / "base").exists()


@pytest.fixture
def models(model, processor, tmp_path):
    """Two profiles that share a base, as models/base is shared."""
    omni.save(tmp_path / "base", model, processor, torch.float16)
    for profile in ("tiny", "study"):
        checkpoint.write_pointer(tmp_path / profile / "base.json", tmp_path / "base")
    return tmp_path


def test_profiles_share_a_base_by_pointers_that_do_not_depend_on_where_they_lie(models, tmp_path_factory):
    assert read_json(models / "tiny/base.json")["folder"] == "../base"
    moved = tmp_path_factory.mktemp("moved") / "models"
    shutil.move(models, moved)
    (moved / "base" / checkpoint.RECORD).touch()  # how it was trained decides nothing later
    assert checkpoint.read_pointer(moved / "tiny/base.json") == checkpoint.read_pointer(moved / "study/base.json")
    loaded, _ = checkpoint.load_base(checkpoint.read_pointer(moved / "tiny/base.json"))
    assert loaded.dtype == torch.float32 and not any(p.requires_grad for p in loaded.parameters())


def test_a_pointer_to_no_base_or_to_another_one_is_refused(models):
    def refused(problem):
        with pytest.raises(ValueError, match=problem):
            checkpoint.read_pointer(models / "tiny/base.json")

    (models / "base/config.json").write_text("{}", encoding="utf-8")
    refused("tiny/base.json: digest is .*, but the base in .* has .*; run `dvc repro base`")
    shutil.rmtree(models / "base")
    refused("base: there is no base in this folder; run `dvc repro base`")
    with pytest.raises(ValueError, match="there is no base in this folder"):
        checkpoint.write_pointer(models / "new.json", models / "base")
    (models / "tiny/base.json").write_text('{"folder": "../base"}', encoding="utf-8")
    refused("base.json: must hold the fields folder and digest")


def test_pointers_are_read_without_torch():
    code = "import sys, crab.models.checkpoint; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
