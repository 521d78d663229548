"""Cards of the gallery: what is drawn where, and that everything is said in words, too."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from crab import tasks
from crab.analyses import cards, clips
from crab.analyses.cards import Answer
from crab.analyses.picks import ALL, ANY, Pick
from crab.data import records
from crab.study.score import score_slot
from crab.world import verify
from crab.world.generate import build

SLOTS = ("ave", "avvp", "arig", "s4", "ref_avs", "avqa", "cremad", "a2v", "v2a")
FAMILIES = ("single-lora-bare", "joint-ilora-explicit")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards") / "dataset"
    build(root, 3, 2, 2, 2, workers=1, slots=SLOTS, progress=False)
    return root


def drawn(built, folder, name, texts, fits=True):
    """The card of the first test record of a slot, answered by these texts; and the record."""
    slot, (record, *_) = tasks.get_slot(name), records.read(built, name, "test")
    (shown,) = verify.read_evidence(built, name, "test", [record])
    loaded = list(zip(record["media"], records.load(record, slot.frames), strict=True))
    answers = [
        cards.answer(
            slot, record, family, text, score_slot(name, [record], {record["id"]: text}, "grabcut")["scores"][0],
            "grabcut", shown,
        )
        for family, text in zip(FAMILIES, texts, strict=True)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    files = clips.write_media(folder, name, loaded, 64, 30)
    strips = [f"{name}-{i}.jpg" for i, (item, _) in enumerate(loaded) if item.kind == "video"]
    pick = Pick(name, record["id"], ALL, 7, 9, fits)
    true = cards.truth(slot, record)
    return cards.card(slot, pick, record, loaded, files, strips, true, answers, "media/", FAMILIES), record, files


class Tags(HTMLParser):
    """All tags of a page, and whether each is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("name", SLOTS)
def test_a_card_is_whole_and_everything_in_it_has_a_name(built, tmp_path, name):
    record = records.read(built, name, "test")[0]
    html, _, files = drawn(built, tmp_path, name, ["<b>no & answer", tasks.target(name, record, "explicit")])
    page = Tags(html)
    assert not page.open
    played = [attributes for tag in ("video", "audio") for attributes in page.all(tag)]
    assert {p["src"] for p in played} == {f"media/{file}" for kind, file in files if kind != "image"}
    assert all("controls" in p and p["aria-label"].startswith(name) for p in played)
    assert all("alt" in image for image in page.all("img"))
    assert all(image["role"] == "img" and image["aria-label"] for image in page.all("svg"))
    assert "<b>no" not in html and html.count("✓") >= 1 and html.count("✗") == 1
    assert re.search(r"all methods are right \(7 of 9\)", html) and record["id"] in html
    assert "statements are true" in html


def numbers(attributes, *names):
    return [float(attributes[name]) for name in names]


def test_boxes_points_and_masks_lie_on_their_pixels(built, tmp_path):
    html, record, _ = drawn(built, tmp_path, "arig", ["<obj>(16,24)(80,88)</obj>", "hm"])
    boxes = [numbers(box, "x", "y", "width", "height") for box in Tags(html).all("rect") if "case" not in box["class"]]
    (x1, y1), (x2, y2) = record["top_left"], record["bottom_right"]
    true = [x1, y1, x2 - x1, y2 - y1]
    assert boxes == [true, true, [16, 24, 64, 64], true]  # alone; under the answer; and the answer that cannot be read
    html, record, _ = drawn(built, tmp_path, "s4", ["[56,64,120,128] [80,90] [90,100] [100,110]", "[1,2"])
    page = Tags(html)
    points = [numbers(point, "cx", "cy") for point in page.all("circle")]
    assert points == [[80.5, 90.5], [90.5, 100.5], [100.5, 110.5]]
    masks = [path["d"] for path in page.all("path") if path.get("class") == "true"]
    assert len(masks) == 3 and len(set(masks)) == 1
    inside = np.array([[float(v) for v in point.split()] for point in re.split("[MLZ]", masks[0]) if point])
    true = np.argwhere(records.media.read_mask(record["mask"]))[:, ::-1]
    assert np.abs(inside.min(0) - true.min(0) - 0.5).max() <= 0 and np.abs(inside.max(0) - true.max(0) - 0.5).max() <= 0


def test_seconds_are_drawn_as_shares_of_the_clip():
    slot = tasks.get_slot("avvp")
    parsed = tasks.parse(slot, "<audio>bell,(2 6)</audio> <visual>horn,(0 8)</visual>")
    html = cards.track(slot, Answer("I-LoRA", "#123456", "", parsed), 8.0)
    bars = [(bar["class"], bar["style"]) for bar in Tags(html).all("div")[1:]]
    assert bars == [("bar audio", "margin-left:25%;width:50%"), ("bar visual", "margin-left:0%;width:100%")]
    assert "♪ bell" in html and "◉ horn" in html
    assert "bar" not in cards.track(slot, Answer("I-LoRA", "#123456", "hm", None), 8.0).replace("bar:", "")


@pytest.mark.parametrize(
    ("slot", "text", "words"),
    [
        ("ave", "<event>bell</event> <range>2,6</range>", "bell, 2–6 s"),
        ("avvp", "<audio>bell,(2 6)</audio> <visual>bell,(0 8)</visual>", "heard: bell, 2–6 s; seen: bell, 0–8 s"),
        ("avvp", "<audio></audio> <visual></visual>", "nothing is seen or heard"),
        ("arig", "<obj>(1,2)(3,4)</obj>", "box from 1, 2 to 3, 4"),
        ("s4", "[1,2,30,40] [5,6] [7,8] [9,10]", "box from 1, 2 to 30, 40 and three points"),
        ("ref_avs", "<answer>false</answer>", "not in the picture"),
        ("a2v", "<answer>one</answer>", "video one"),
        ("v2a", "<answer>2</answer>", "sound two"),
        ("ks", "<answer>ring</answer>", "ring"),
        ("ks", "ring", "cannot be read"),
    ],
)
def test_answers_in_words(slot, text, words):
    assert cards.say(tasks.get_slot(slot), tasks.parse(slot, text)) == words


def test_a_mark_is_a_sign_a_word_and_a_colour_and_of_graded_answers_the_score():
    of = {(slot, score): cards.mark(tasks.get_slot(slot), Answer("x", "red", "", None, score))
          for slot, score in (("ks", 1.0), ("ks", 0.0), ("s4", 1.0), ("s4", 0.49), ("s4", 0.0))}  # fmt: skip
    assert [re.search('class="mark (.*?)">(.*?)<', text).groups() for text in of.values()] == [
        ("ok", "✓ right"), ("no", "✗ wrong"), ("ok", "✓ 1.00"), ("part", "◐ 0.49"), ("no", "✗ 0.00"),
    ]  # fmt: skip
    assert 'title="partly right, J 0.49"' in of["s4", 0.49]


def test_a_sample_that_fits_no_rule_says_so(built, tmp_path):
    html, *_ = drawn(built, tmp_path, "ave", ["hm", "hm"], fits=False)
    assert "none left, so the next in order" in html and html.count("✗") == 3
    assert "first in order" in cards._rule(Pick("ave", "x", ANY, 1, 1, True), FAMILIES)


def test_sections_have_headings_that_the_links_lead_to():
    slots = [tasks.get_slot(name) for name in ("ave", "avvp", "ks")]
    names, colours = {"joint LoRA": 0.5}, {"joint LoRA": "#e69f00"}
    page = Tags(cards.links(slots) + "".join(cards.section(slot, names, colours, ["x"]) for slot in slots))
    assert [link["href"][1:] for link in page.all("a")] == [title["id"] for title in page.all("h3")]
    assert not page.open
