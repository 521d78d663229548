"""The module of a model is chosen by what the model is, and only its own results depend on its code."""

import inspect
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from bridges import write_parts
from sizes import COARSE, SMALL
from transformers import BertConfig

from crab.core.code import modules_of
from crab.models import bridge, checkpoint, omni, protocol, small
from crab.samples.encode import ENCODING
from crab.study.footprint import read_base
from crab.study.store import ANSWERING, SCORING, TRAINING

NAMES = {name for name in vars(protocol.AudioVisualModel) if not name.startswith("_")}


def test_a_folder_a_model_its_configuration_and_its_processor_name_the_same_module(model, processor, tmp_path):
    omni.save(tmp_path / "base", model, processor)
    (tmp_path / "pointer").mkdir()
    checkpoint.point_to(tmp_path / "pointer", str(tmp_path / "base"))
    things = (model, model.config, processor, tmp_path / "base", str(tmp_path / "pointer"), "Qwen/Qwen2.5-Omni-7B")
    assert {protocol.model_of(thing) for thing in things} == {omni}


def test_what_no_module_serves_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    for thing, problem in (
        (tmp_path, f"{tmp_path}: a bert model is not one of qwen2_5_omni"),
        (object(), "a object is"),
    ):
        with pytest.raises(ValueError, match=problem):
            protocol.module_name(thing)


@pytest.mark.parametrize("entry", protocol.MODELS)
def test_a_model_module_has_all_names_of_the_protocol(entry):
    module = __import__(entry.module, fromlist=["_"])
    for name in NAMES:
        wanted, own = (
            inspect.signature(getattr(part, name)).parameters for part in (protocol.AudioVisualModel, module)
        )
        assert list(own)[: len(wanted) - 1] == list(wanted)[1:], name
    assert "language" in module.TARGETS


@pytest.mark.parametrize("size", [SMALL, COARSE])
@pytest.mark.parametrize("kind", ["omni", "bridge", "bridge with the encoders of an omni"])
def test_the_plan_counts_the_tokens_that_go_into_the_encoders(kind, size, tmp_path):
    words = ["what", "is", "seen", "?"]
    processor = small.build_processor(words, [], size)
    omni.save(tmp_path / "omni", small.build_model(processor, size, seed=0), processor)
    if kind != "omni":
        parts = write_parts(tmp_path, words)
        parts |= dict.fromkeys(("vision", "audio"), str(tmp_path / "omni")) if "omni" in kind else {}
        bridge.save(tmp_path / "bridge", *bridge.assemble(**parts))
    base = read_base(tmp_path / kind.split()[0])
    model, processor = checkpoint.load_base(tmp_path / kind.split()[0])
    module, read = protocol.model_of(model), dict.fromkeys(("visual", "audio_tower"), 0)

    def count(tower, block, args, options):
        tokens = args[0] if args else options["hidden_states"]
        read[tower] += tokens.numel() // tokens.shape[-1]

    for name, part in model.named_modules():
        for tower in set(read) & set(name.split(".")):
            if name.endswith(("layers.0", "blocks.0")) and "projector" not in name:
                part.register_forward_pre_hook(partial(count, tower), with_kwargs=True)
    frames, wave = np.zeros((3, 224, 224, 3), np.uint8), np.zeros(2 * 16_000, np.float32)
    media = [protocol.Media("video", frames), protocol.Media("image", frames[0]), protocol.Media("audio", wave)]
    module.encode(model, [module.prepare(processor, media, "what is seen ?")])
    kinds = [each.kind for each in media]
    assert module.encoder_tokens(base.config, base.side, kinds, 3, 2.0) == tuple(read.values())


@pytest.mark.parametrize("names", [TRAINING, ANSWERING, SCORING, ENCODING])
def test_results_depend_on_no_model_but_their_own(names):
    files = {f"{entry.module.replace('.', '/')}.py" for entry in protocol.MODELS}
    assert not files & set(modules_of(names))
    for entry in protocol.MODELS:  # and the key of a result has that one alone
        assert files & set(modules_of([*names, entry.module])) == {f"{entry.module.replace('.', '/')}.py"}


def test_the_study_names_no_model():
    root = Path(protocol.__file__).parents[1]
    for path in [*(root / "study").glob("*.py"), *(root / "samples").glob("*.py"), *(root / "analyses").glob("*.py")]:
        for name in (entry.module.rpartition(".")[2] for entry in protocol.MODELS):
            assert not re.search(rf"models(\.| import ){name}\b", path.read_text(encoding="utf-8")), path


def test_one_processor_is_read_for_a_base(model, processor, tmp_path, monkeypatch):
    omni.save(tmp_path, model, processor)
    read = []
    monkeypatch.setattr(omni, "load_processor", lambda path: read.append(path) or processor)
    checkpoint.load_base(tmp_path)
    checkpoint.load_model(tmp_path)
    assert len(read) == 1


def test_logits_at_a_few_places_are_those_of_all(model):
    from crab.models.batches import logits_at

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with logits_at(model, torch.tensor([[False, True, False, True]])):
            torch.testing.assert_close(model(input_ids=ids).logits, whole[0, [1, 3]])
