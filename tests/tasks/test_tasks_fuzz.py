"""Any text gets a definite verdict: no exception, no slow pattern, a score between 0 and 1."""

import time

import pytest
from conftest import TRUTHS, make_record, options
from hypothesis import given, settings
from hypothesis import strategies as st

from crab import tasks

SCORED = sorted(tasks.BENCHMARKS)
pieces = st.sampled_from(tasks.tags() + list("[](),<>/ \n-.٣四") + [
    "0", "2", "2.5", "6", "10", "11", "224", "225", "9" * 5000, "bell", "true", "FALSE", "no", "колокол", "鐘", "\0", "\ud800",
    "(2 6)", "(0,0)(80,80)", "[16,24,80,88]", "[40,48]", "[16,24,80,88] [40,48] [48,56] [56,64]", "<event>drum</event> <range>0,4</range>",
])
texts = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=14).map("".join), st.lists(pieces, max_size=14).map(" ".join))


@pytest.mark.parametrize("slot", SCORED)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_text_is_scored(slot, data):
    records = [make_record(slot, i, tasks.answer(slot, t), t) for i, t in enumerate(TRUTHS[slot])]
    given_ = data.draw(st.lists(texts, min_size=3, max_size=3))
    got = tasks.score(slot, records, given_, **options(slot))
    assert got["n_scored"] == got["n_expected"] == 3
    assert got["n_unparsable"] == sum(tasks.parse(slot, t) is None for t in given_)
    assert got["primary"] == pytest.approx(sum(got["per_sample"]) / 3)
    for text, value in zip(given_, got["per_sample"]):
        assert 0 <= value <= 1 or slot == "meld" and value < 2
        if tasks.parse(slot, text) is None:
            assert value == 0
    assert all(0 <= v <= 1 for k, v in got["metrics"].items() if k != "no_mask")


@pytest.mark.parametrize("slot", sorted(tasks.SLOTS))
@settings(max_examples=80, deadline=None)
@given(texts)
def test_what_reads_reads_back(slot, text):
    found = tasks.parse(slot, text)
    if found is not None:
        assert tasks.parse(slot, tasks.answer(slot, found)) == found


BLOCKS = ["<answer>", "</answer>", "<event><range>", "<audio>", "<visual>bell,(", "<obj>(", "(", ")", "[", "]", "[1,", "[ ", " ", "\t \n",
          "<", "0", "1,", ", ", "<audio>a,(0 1)</audio>", "[1,2]", "a", "鐘", "<range>0.", "<event>a</event><range>0,1</range>",
          "<answer>true</answer>"]


@pytest.mark.parametrize("slot", sorted(tasks.SLOTS))
@pytest.mark.parametrize("size", [99_000, 10_000_000])
def test_long_texts_are_read_in_linear_time(slot, size):
    start = time.process_time()
    for block in BLOCKS if size < 100_000 else BLOCKS[:1]:
        body = block * (size // len(block))
        for text in (body, f"<obj>({body}</obj>", f"<range>{body}</range>", f"<audio>a,({body})</audio>", f"[{body}]"):
            found = tasks.parse(slot, text)
            assert found is None or size < 100_000
    assert time.process_time() - start < 10


@pytest.mark.parametrize("slot", SCORED)
def test_ten_megabytes_are_wrong(slot, records_of):
    records = records_of(slot)
    answer = tasks.target(slot, records[0], "bare")
    got = tasks.score(slot, records, ["x" * 10_000_000 + answer, answer, answer], **options(slot))
    assert got["per_sample"][0] == 0 and got["n_unparsable"] == 1


def test_a_clip_of_thousands_of_events_is_scored_quickly(records_of):
    text = "".join(f"<audio>a{i},(0 {1 + i % 10})</audio>" for i in range(3000))
    start = time.process_time()
    got = tasks.score("avvp", records_of("avvp"), [text] * 3)
    assert got["n_unparsable"] == 0 and got["primary"] < 0.4
    assert time.process_time() - start < 10
