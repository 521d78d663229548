"""A chat model's chains are taken only where they say what the labels say."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_sources_formats import AVE, put, shelf  # noqa: F401

from crab import tasks
from crab.data.sources import Draft, convert, finished
from crab.data.sources.rewrite import SCHEMA, SYSTEM, Rewriter, judge, messages, names

FIELDS = {"video_path": "x.mp4", "audio_path": "x.wav"}
BARK = Draft("line 1", {**FIELDS, "vid": "x", "event": "Bark", "start_time": 2, "end_time": 6}, ("Bark", 2, 6),
             "Bark from 2 to 6 is both heard and seen .", {"video/x.mp4": Path("x")}, ("Bark",))
JOY = Draft("line 2", {**FIELDS, "Emotion": "joy"}, "joy", 'i hear " we won " .', {}, ("joy",))
CAR = Draft("line 3", {**FIELDS, "question_text": "what is it ?", "multi_choice": ["car", "sail boat"], "answer": 0}, "car",
            "to answer , i look .", {}, ("car",), ("sail boat",))
VOCABULARY = {name for label in ("Bark", "Train horn", "Male speech, man speaking", "joy", "sadness", "car", "sail boat")
              for name in names(label)}
RANGE = "<event>Bark</event> <range>2,6</range>"


def said(chain, answer):
    return json.dumps({"chain": chain, "answer": answer})


@pytest.mark.parametrize("slot, draft, reply, refusal", [
    ("ave", BARK, said("A bark is heard and seen from second 2 to second 6.", RANGE), ""),
    ("ave", BARK, "Sure!\n```json\n" + said("Barks go on from 2 to 6.", "<range>2,6</range> <event>bark</event>") + "\n```", ""),
    ("ave", BARK, "<think>{maybe}</think> " + said("A bark is heard and seen.", RANGE), ""),
    ("ave", BARK, "A bark from 2 to 6.", "not the JSON asked for"),
    ("ave", BARK, said("A bark.", RANGE)[:-3], "not the JSON asked for"),
    ("ave", BARK, '{"chain": "A bark."}', "not the JSON asked for"),
    ("ave", BARK, '{"chain": "A bark.", "answer": 3}', "not the JSON asked for"),
    ("ave", BARK, '{"chain": "A bark.", "answer": "x", "more": 1}', "not the JSON asked for"),
    ("ave", BARK, '{"chain": ' + "[" * 100_000, "not the JSON asked for"),
    ("ave", BARK, said("", RANGE), "an empty or too long chain"),
    ("ave", BARK, said("bark " * 300, RANGE), "an empty or too long chain"),
    ("ave", BARK, said("A bark.", "<event>Bark</event> <range>2,7</range>"), "another answer"),
    ("ave", BARK, said("A bark.", "Bark 2,6"), "another answer"),
    ("ave", BARK, said(f"A bark {RANGE}.", RANGE), "tags or brackets in the chain"),
    ("ave", BARK, said("A bark [2, 6].", RANGE), "tags or brackets in the chain"),
    ("ave", BARK, said("A bark and two train horns.", RANGE), "another label"),
    ("ave", BARK, said("A bark while there is male speech.", RANGE), "another label"),
    ("ave", BARK, said("A bark from 2 to 7.", RANGE), "another number"),
    ("ave", BARK, said("Two dogs bark.", RANGE), "another number"),
    ("ave", BARK, said("A bark and nothing else.", RANGE), "a denial"),
    ("ave", BARK, said("A bark, it isn’t seen.", RANGE), "a denial"),
    ("ave", BARK, said("Something is heard and seen from 2 to 6.", RANGE), "no label"),
    ("meld", JOY, said("The voice that says we won expresses joy.", "<answer>Joy</answer>"), ""),
    ("meld", JOY, said("The voice has joy throughout.", "<answer>joy</answer>"), "a time"),
    ("meld", JOY, said("At the second word there is joy.", "<answer>joy</answer>"), "another number"),
    ("meld", JOY, said("From 2 on there is joy.", "<answer>joy</answer>"), "another number"),
    ("meld", JOY, said("The voice goes from sadness to joy.", "<answer>joy</answer>"), "another label"),
    ("avqa_thu", CAR, said("I look and see a car.", "<answer>car</answer>"), ""),
    ("avqa_thu", CAR, said("I look and see a car on a sail boat.", "<answer>car</answer>"), "another label"),
])
def test_a_reply_is_taken_or_refused_for_a_reason(slot, draft, reply, refusal):
    chain, why = judge(slot, draft, reply, VOCABULARY)
    assert why == refusal and (chain is None) == bool(refusal)
    if chain:
        record = finished(slot, draft._replace(chain=chain))
        assert tasks.truth(slot, record) == tasks.parse(slot, tasks.target(slot, record, "explicit"))
        assert chain in tasks.target(slot, record, "explicit")


def test_the_prompt_holds_question_facts_and_answer_and_names_the_schema():
    system, user = messages("ave", BARK)
    assert system == {"role": "system", "content": SYSTEM} and all(f'"{key}"' in SYSTEM for key in SCHEMA["required"])
    assert json.loads(user["content"]) == {"question": tasks.get_slot("ave").instruction, "facts": BARK.chain, "labels": ["Bark"],
                                           "answer": RANGE}


class Echo:
    """Stands in for a pipeline: words each chain anew, but for one clip, in one of the forms that replies come in."""

    def __init__(self, chat):
        self.calls, self.chat = [], chat

    def __call__(self, prompts, **options):
        self.calls.append((len(prompts), options))
        out = []
        for prompt in prompts:
            asked = json.loads(prompt[-1]["content"])
            answer = asked["answer"] if "Church" not in asked["answer"] else "<event>Bark</event> <range>0,10</range>"
            text = said("It follows that " + asked["facts"], answer)
            out.append([{"generated_text": [*prompt, {"role": "assistant", "content": text}] if self.chat else text}])
        return out


@pytest.mark.parametrize("chat", [True, False])
def test_chains_are_rewritten_for_training_alone_and_counted(put, tmp_path, chat):  # noqa: F811
    echo = Echo(chat)
    report = convert("ave", put(AVE), tmp_path / "data", rewrite=Rewriter(echo, batch_size=1, max_new_tokens=50), progress=False)
    assert report["chains"] == {"another answer": 1, "taken": 1}
    assert echo.calls == [(1, {"batch_size": 1, "return_full_text": False, "max_new_tokens": 50, "do_sample": False})] * 2
    texts = {split: [r["label_content"] for r in json.loads((tmp_path / f"data/AVUIE_2/ave/{split}.json").read_text())]
             for split in ("train", "test")}
    assert texts["train"] == ["Church bell from 0 to 10 is both heard and seen . <event>Church bell</event> <range>0,10</range>",
                              "It follows that Bark from 2 to 6 is both heard and seen . " + RANGE]
    assert not any("follows" in text for text in texts["test"])


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """Folder of a tiny random model, with transformers' own tokenizer and chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "{": 2, "}": 3, "bark": 4, "chain": 5, ":": 6, '"': 7}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         bos_token_id=None, eos_token_id=None, pad_token_id=1))
    folder = tmp_path_factory.mktemp("babbler")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_babbles_changes_nothing(babbler):
    """Loaded by name into transformers' own pipeline."""
    rewriter = Rewriter.load(str(babbler))
    rewriter.generation["max_new_tokens"] = 12
    drafts, counts = rewriter("ave", [BARK, BARK])
    assert drafts == [BARK, BARK] and counts == {"not the JSON asked for": 2}


def test_what_is_no_chat_model_names_the_parameter(babbler, tmp_path):
    with pytest.raises(ValueError, match="build: rewrite is '/no/such', which cannot be loaded"):
        Rewriter.load("/no/such")
    mute = tmp_path / "mute"
    shutil.copytree(babbler, mute)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Rewriter.load(str(mute))


def test_names_are_whole_labels_and_their_parts():
    assert list(names("Male speech, man speaking")) == ["male speech man speaking", "male speech", "man speaking"]
    assert list(names("Frying_(food)")) == ["frying food", "frying", "food"]
    assert re.search("sail boat", " ".join(VOCABULARY))
