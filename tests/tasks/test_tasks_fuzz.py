"""Any text gets a definite verdict: no exception, no slow pattern, a score between 0 and 1."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_records import make_records, options

from crab import tasks
from crab.tasks.answers import Partly

# One slot for each kind of answer and, of the scored ones, for each list of metrics.
KINDS = sorted({entry.kind: slot for slot, entry in tasks.SLOTS.items()}.values())
SCORED = sorted({(entry.kind, entry.metrics): slot for slot, entry in tasks.SLOTS.items() if entry.test}.values())
WORDS = "0 2 2.5 6 10 11 224 225 bell true FALSE no колокол 鐘 \0 \ud800 [40,48] (0,0)(80,80) [16,24,80,88]".split(" ")
GROUPS = ["9" * 5000, "(2 6)", "[16,24,80,88] [40,48] [48,56] [56,64]", "<event>drum</event> <range>0,4</range>"]
pieces = st.lists(st.sampled_from(tasks.tags() + list("[](),<>/ \n-.٣四") + WORDS + GROUPS), max_size=14)
texts = st.one_of(st.text(max_size=60), pieces.map("".join), pieces.map(" ".join))


@pytest.mark.parametrize("slot", SCORED)
@settings(max_examples=60, deadline=None)
@given(answers=st.lists(texts, min_size=3, max_size=3))
def test_every_text_is_scored(slot, answers):
    result = tasks.score(slot, make_records(slot), answers, **options(slot))
    kind = tasks.KINDS[tasks.get_slot(slot).kind]
    read = [kind.scored(text, None) for text in answers]
    unread = [answer is None or isinstance(answer, Partly) for answer in read]
    assert result["n_scored"] == result["n_expected"] == 3 and result["n_unparsable"] == sum(unread)
    assert result["primary"] == pytest.approx(sum(result["per_sample"]) / 3)
    for score, failed in zip(result["per_sample"], unread, strict=True):
        assert score == 0 if failed else 0 <= score <= 1 or slot == "meld" and score < 2
    counts = ("no_mask", "partly_read")
    assert all(0 <= value <= 1 for name, value in result["metrics"].items() if name not in counts)


@pytest.mark.parametrize("slot", KINDS)
@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_what_is_read_reads_back(slot, text):
    answer = tasks.parse(slot, text)
    assert answer is None or tasks.parse(slot, tasks.answer(slot, answer)) == answer


BLOCKS = ["<answer>", "</answer>", "<event><range>", "<audio>", "<visual>bell,(", "<obj>(", "(", ")", "[", "]", "[1,"]
BLOCKS += ["[ ", " ", "\t \n", "<", "0", "1,", ", ", "<audio>a,(0 1)</audio>", "[1,2]", "a", "鐘", "<range>0."]
BLOCKS += ["<event>a</event><range>0,1</range>", "<answer>true</answer>"]


@pytest.mark.parametrize("slot", KINDS)
@pytest.mark.parametrize("size", [99_000, 10_000_000])
def test_long_texts_are_read_in_linear_time(slot, size):
    start = time.process_time()
    for block in BLOCKS if size < 100_000 else BLOCKS[:1]:
        body = block * (size // len(block))
        for text in (body, f"<obj>({body}</obj>", f"<range>{body}</range>", f"<audio>a,({body})</audio>", f"[{body}]"):
            assert tasks.parse(slot, text) is None or size < 100_000
    assert time.process_time() - start < 10


def test_a_clip_of_thousands_of_events_is_scored_quickly():
    text = "".join(f"<audio>a{i},(0 {1 + i % 10})</audio>" for i in range(3000))
    start = time.process_time()
    result = tasks.score("avvp", make_records("avvp"), [text] * 3)
    assert result["n_unparsable"] == 0 and result["primary"] < 0.4
    assert time.process_time() - start < 10
