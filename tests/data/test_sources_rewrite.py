"""A chat model's chain is taken only if it says no more than the labels do."""

import json
import shutil

import pytest
from raw_sets import write

from crab import tasks
from crab.data.sources import Draft, convert, finished
from crab.data.sources.rewrite import SYSTEM, Rewriter, judge, messages, names

FIELDS = {"video_path": "x.mp4", "audio_path": "x.wav"}
EVENT = {"vid": "x", "event": "Bark", "start_time": 2, "end_time": 6}
QUESTION = {"question_text": "what is it ?", "multi_choice": ["car", "sail boat"], "answer": 0}
BARK = Draft("line 1", FIELDS | EVENT, ("Bark", 2, 6), "Bark from 2 to 6 is both heard and seen .", ("Bark",))
JOY = Draft("line 2", FIELDS | {"Emotion": "joy"}, "joy", 'i hear " we won " .', ("joy",))
CAR = Draft("line 3", FIELDS | QUESTION, "car", "to answer , i look .", ("car",), ("sail boat",))
LABELS = ("Bark", "Train horn", "Male speech, man speaking", "joy", "sadness", "car", "sail boat")
VOCABULARY = {name for label in LABELS for name in names(label)}
RANGE = "<event>Bark</event> <range>2,6</range>"


def reply(chain, answer=RANGE):
    return json.dumps({"chain": chain, "answer": answer})


CHAINS = [
    ("ave", BARK, "A bark is heard and seen from second 2 to second 6.", ""),
    ("ave", BARK, "", "an empty or too long chain"),
    ("ave", BARK, "bark " * 300, "an empty or too long chain"),
    ("ave", BARK, f"A bark {RANGE}.", "tags or brackets in the chain"),
    ("ave", BARK, "A bark [2, 6].", "tags or brackets in the chain"),
    ("ave", BARK, "A bark and two train horns.", "another label"),
    ("ave", BARK, "A bark while there is male speech.", "another label"),
    ("ave", BARK, "A bark from 2 to 7.", "another number"),
    ("ave", BARK, "Two dogs bark.", "another number"),
    ("ave", BARK, "A bark and nothing else.", "a denial"),
    ("ave", BARK, "A bark, it isn’t seen.", "a denial"),
    ("ave", BARK, "Something is heard and seen from 2 to 6.", "no label"),
    ("meld", JOY, "The voice that says we won expresses joy.", ""),
    ("meld", JOY, "The voice has joy throughout.", "a time"),
    ("meld", JOY, "At the second word there is joy.", "another number"),
    ("meld", JOY, "From 2 on there is joy.", "another number"),
    ("meld", JOY, "The voice goes from sadness to joy.", "another label"),
    ("avqa_thu", CAR, "I look and see a car.", ""),
    ("avqa_thu", CAR, "I look and see a car on a sail boat.", "another label"),
]
REPLIES = [
    (f"Sure!\n```json\n{reply('Barks go on from 2 to 6.', '<range>2,6</range> <event>bark</event>')}\n```", ""),
    ("<think>{maybe}</think> " + reply("A bark is heard and seen."), ""),
    ("A bark from 2 to 6.", "not the JSON asked for"),
    (reply("A bark.")[:-3], "not the JSON asked for"),
    ('{"chain": "A bark."}', "not the JSON asked for"),
    ('{"chain": "A bark.", "answer": 3}', "not the JSON asked for"),
    ('{"chain": "A bark.", "answer": "x", "more": 1}', "not the JSON asked for"),
    ('{"chain": ' + "[" * 100_000, "not the JSON asked for"),
    (reply("A bark.", "<event>Bark</event> <range>2,7</range>"), "another answer"),
    (reply("A bark.", "Bark 2,6"), "another answer"),
]


@pytest.mark.parametrize("slot, draft, chain, reason", CHAINS)
def test_a_chain_is_taken_or_refused_for_a_reason(slot, draft, chain, reason):
    taken, refusal = judge(slot, draft, reply(chain, tasks.answer(slot, draft.truth)), VOCABULARY)
    assert refusal == reason and taken == (None if reason else chain)
    if taken:
        record = finished(slot, draft._replace(chain=taken))
        target = tasks.target(slot, record, "explicit")
        assert tasks.truth(slot, record) == tasks.parse(slot, target) and taken in target


@pytest.mark.parametrize("text, reason", REPLIES)
def test_a_reply_is_read_or_refused_for_a_reason(text, reason):
    chain, refusal = judge("ave", BARK, text, VOCABULARY)
    assert refusal == reason and (chain is None) == bool(reason)


def test_the_prompt_holds_question_facts_and_answer():
    system, user = messages("ave", BARK)
    assert system == {"role": "system", "content": SYSTEM} and '"chain"' in SYSTEM and '"answer"' in SYSTEM
    question = tasks.PROMPTS["ave"].question
    facts = {"question": question, "facts": BARK.chain, "labels": ["Bark"], "answer": RANGE}
    assert json.loads(user["content"]) == facts


class Echo:
    """Stands in for a pipeline. It rewords each chain, answers one clip wrongly, and replies in one of two forms."""

    def __init__(self, chat):
        self.calls, self.chat = [], chat

    def __call__(self, prompts, **options):
        self.calls.append((len(prompts), options))
        replies = []
        for prompt in prompts:
            asked = json.loads(prompt[-1]["content"])
            answer = "<event>Bark</event> <range>0,10</range>" if "Church" in asked["answer"] else asked["answer"]
            text = reply("It follows that " + asked["facts"], answer)
            replies.append([{"generated_text": [*prompt, {"content": text}] if self.chat else text}])
        return replies


@pytest.mark.parametrize("chat", [True, False])
def test_only_training_chains_are_rewritten_and_they_are_counted(tmp_path, chat):
    echo = Echo(chat)
    rewriter = Rewriter(echo, batch_size=1, max_new_tokens=50)
    report = convert("ave", write(tmp_path / "raw", "ave"), tmp_path / "data", rewrite=rewriter, progress=False)
    assert report["chains"] == {"another answer": 1, "taken": 1}
    options = {"batch_size": 1, "return_full_text": False, "max_new_tokens": 50, "do_sample": False}
    assert echo.calls == [(1, options)] * 2
    lists = {split: tmp_path / f"data/AVUIE_2/ave/{split}.json" for split in ("train", "test")}
    rows = {split: json.loads(path.read_text(encoding="utf-8")) for split, path in lists.items()}
    assert [row["label_content"] for row in rows["train"]] == [
        "Church bell from 0 to 10 is both heard and seen . <event>Church bell</event> <range>0,10</range>",
        "It follows that Bark from 2 to 6 is both heard and seen . " + RANGE,
    ]
    assert not any("follows" in row["label_content"] for row in rows["test"])


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """Folder of a tiny random model, with transformers' own tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    words = ["<unk>", "<pad>", "{", "}", "bark", "chain", ":", '"']
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}
    folder = tmp_path_factory.mktemp("babbler")
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_babbles_changes_nothing(babbler):
    """It is loaded by name into transformers' own pipeline."""
    rewriter = Rewriter.load(str(babbler))
    rewriter.generation["max_new_tokens"] = 12
    drafts, counts = rewriter("ave", [BARK, BARK])
    assert drafts == [BARK, BARK] and counts == {"not the JSON asked for": 2}


def test_a_model_that_cannot_chat_is_an_error_that_names_the_parameter(babbler, tmp_path):
    with pytest.raises(ValueError, match="build: rewrite is '/no/such', which cannot be loaded"):
        Rewriter.load("/no/such")
    mute = shutil.copytree(babbler, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Rewriter.load(str(mute))


def test_names_are_whole_labels_and_their_parts():
    assert list(names("Male speech, man speaking")) == ["male speech man speaking", "male speech", "man speaking"]
    assert list(names("Frying_(food)")) == ["frying food", "frying", "food"]
