"""The records of each slot against the scene graph, by a second, plain reading of what a slot asks."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab import tasks
from crab.tasks.segmentation import points_inside
from crab.world import render
from crab.world.scene import CLASSES, EMOTIONS, MOTIONS
from crab.world.staging import BASE_IDS, apart, around, scene_id
from crab.world.views import VIEWS, view
from crab.world.views.questions import QUESTIONS
from crab.world.views.referring import KINDS

LONGEST_CHAIN = {"avcap": 99, "unav": 62, "ms3": 56, "ref_avs": 49}  # words; 45 in other slots


def quadrant(thing):
    x, y = thing.centre
    return f"{'top' if y < 112 else 'bottom'} {'left' if x < 112 else 'right'}"


def samples(slot, count=60):
    for split in tasks.get_slot(slot).splits:
        for index in range(count):
            yield split, index, view(slot, split, index, 3)


def masks(one):
    return {path: what for path, (kind, *what) in one.files.items() if kind == "mask"}


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


# Slot -> the field of the label, and how often each label comes.
PRIORS = {
    "cremad": ("emotion", dict.fromkeys(EMOTIONS[:6], 1)),
    "meld": ("Emotion", dict(anger=4, disgust=1, fear=1, joy=6, neutral=17, sadness=3, surprise=4)),
    "mer24": ("discrete", dict(angry=5, happy=4, neutral=5, sad=3, surprise=1, worried=2)),
    "dfew": ("emotion", dict(angry=4, disgust=1, fear=2, happy=5, neutral=6, sad=4, surprise=3)),
    "mafw": ("emotion", dict(anger=5, disgust=2, fear=2, happiness=4, neutral=4, sadness=5, surprise=3)),
}
PRIORS["mafw"][1].update(anxiety=3, contempt=2, disappointment=2, helplessness=2)
WORLD = {"joy": "happy", "happiness": "happy", "sadness": "sad", "angry": "anger", "worried": "fear"}
COMPOUND = {"anxiety": ("neutral", "fear"), "contempt": ("neutral", "disgust")}
COMPOUND |= {"disappointment": ("sad", "neutral"), "helplessness": ("sad", "fear")}


def reference_answer(text, scene):
    """The answer to a question of avqa or avqa_thu."""
    seen, heard = [t for t in scene.things if t.visible], [t for t in scene.things if t.sounding]
    named, starts = {t.name: t for t in scene.things}, {t.name: t.sounding[0] for t in heard}
    starts |= {f"thing at {quadrant(t)}": t.sounding[0] for t in heard if t.visible}

    def yes(value):
        return "yes" if value else "no"

    def number(things):
        return "zero one two three four".split()[len(things)]

    patterns = {
        r"is there an? (\w+) sound \?": lambda name: yes(name in starts),
        r"is there an? (\w+) in the video \?": lambda name: yes(name in {t.name for t in seen}),
        r"does the (.+) sound before the (.+) \?": lambda one, two: yes(starts[one] < starts[two]),
        r"which thing sounds before the (\w+) \?": lambda it: [t.name for t in heard if starts[t.name] < starts[it]],
        r"which thing is at (\w+ \w+) \?": lambda place: [t.name for t in seen if quadrant(t) == place],
        r"which thing is heard \?": lambda: [t.name for t in heard],
        r"which thing sounds first \?": lambda: min(heard, key=lambda t: t.sounding[0]).name,
        r"when does the (\w+) sound \?": lambda name: "from {} to {}".format(*named[name].sounding),
        r"what happens to the sounding thing \?": lambda: [t.motion for t in heard],
        r"what happens to the (\w+) \?": lambda name: named[name].motion,
        r"where is the sounding thing \?": lambda: [quadrant(t) for t in heard],
        r"where is the (\w+ \w+) \?": lambda noun: [quadrant(t) for t in seen if f"{t.colour} {t.name}" == noun],
        r"what does the sound come from \?": lambda: [f"{t.colour} {t.name}" for t in heard],
        r"is the sounding thing in the video \?": lambda: yes(len(heard) == 1 and heard[0].visible),
        r"how many sounds are heard \?": lambda: number(heard),
        r"how many things are seen \?": lambda: number(seen),
        r"how many things are both seen and heard \?": lambda: number([t for t in seen if t in heard]),
    }
    pattern = next(pattern for pattern in patterns if re.fullmatch(pattern, text))
    answer = patterns[pattern](*re.fullmatch(pattern, text).groups())
    if isinstance(answer, list):
        (answer,) = answer  # only one thing fits
    return answer


def reference_truth(slot, index, one):
    """The truth of a record, by a plain reading of its scenes."""
    things = one.scenes[0].things
    seen, heard = [t for t in things if t.visible], [t for t in things if t.sounding]
    both = [t for t in seen if t.sounding]
    match slot:
        case "ave":
            (event,) = both
            seconds = [s for s in range(10) if event.seen_at(s) and event.heard_at(s)]
            return event.name, seconds[0], seconds[-1] + 1
        case "avvp":
            sounds = {("audio", t.name, *t.sounding) for t in heard}
            return sounds | {("visual", t.name, *t.visible) for t in seen}
        case "unav":
            return {(t.name, *t.sounding) for t in both}
        case "arig":
            return box_of(render.mask(*heard, one.record["second"]))
        case "avqa" | "avqa_thu":
            return reference_answer(one.record["question" if slot == "avqa" else "question_text"], one.scenes[0])
        case "ks" | "ucf":
            (source,) = heard
            assert all(t.motion != source.motion for t in things if t is not source)
            return source.motion if slot == "ks" else f"{source.motion} {source.name}"
        case "a2v" | "v2a":
            names = [{t.name for t in scene.things} for scene in one.scenes]
            (source,) = [t for t in one.scenes[index % 2].things if t.sounding]
            assert source.visible and source.name not in names[1 - index % 2]
            return ("one", "two")[index % 2]
        case slot if slot in PRIORS:
            faces = [t for t in things if t.name == "face"]
            (face,) = [t for t in faces if t.sounding] or faces
            assert face.visible and (face.sounding or slot == "dfew")
            labels = {COMPOUND.get(x, (WORLD.get(x, x),) * 2): x for x in PRIORS[slot][1]}
            return labels[face.emotion, face.heard_emotion]


@pytest.mark.parametrize("slot", VIEWS)
def test_records_have_their_fields_and_their_answer_is_the_truth(slot):
    for split, index, one in samples(slot, 110):
        assert set(tasks.get_slot(slot).fields(split)) <= set(one.record)
        assert one.record["scene"] == ([s.id for s in one.scenes] if len(one.scenes) > 1 else one.scenes[0].id)
        json.dumps(one.record, allow_nan=False)
        chain, bare = (tasks.target(slot, one.record, form) for form in ("explicit", "bare"))
        if slot != "avcap":
            truth = tasks.truth(slot, one.record)
            assert tasks.parse(slot, bare) == truth and chain.endswith(bare)
            chain = chain[: -len(bare)].strip()
            if slot not in ("s4", "ms3", "ref_avs"):  # their truth has points, see below
                expected = reference_truth(slot, index, one)
                assert expected == (set(map(tuple, truth)) if isinstance(expected, set) else truth), one
        assert chain.endswith(" .") and len(chain.split()) <= LONGEST_CHAIN.get(slot, 45)
        for scene in one.scenes:  # colour and class name one visible thing; a quadrant holds one
            seen = [t for t in scene.things if t.visible]
            assert len({(t.colour, t.name) for t in seen}) == len({quadrant(t) for t in seen}) == len(seen)


def test_unav_events_overlap_and_are_seen_while_they_sound():
    counts = Counter()
    for _, _, one in samples("unav"):
        events = [t for t in one.scenes[0].things if t.sounding and t.visible]
        assert set.intersection(*(set(range(*t.sounding)) for t in events))
        assert all(set(range(*t.sounding)) <= set(range(*t.visible)) for t in events)
        counts[len(events), len(one.scenes[0].things)] += 1
    assert counts[4, 4] == 20 and counts[3, 3] and counts[3, 4]


# (sounding things, silent things) -> how many of 120 records have them
MIXES = {"arig": {(1, 1): 80, (1, 2): 40}, "s4": {(1, 0): 40, (1, 1): 80}, "ms3": {(2, 1): 40, (2, 2): 40, (3, 1): 40}}


@pytest.mark.parametrize("slot", MIXES)
def test_box_points_and_mask_are_those_of_the_sources(slot):
    mixes = Counter()
    for _, _, one in samples(slot):
        scene, second = one.scenes[0], one.record["second"]
        sources = {t.name: render.mask(t, second) for t in scene.things if t.heard_at(second)}
        mixes[len(sources), len(scene.things) - len(sources)] += 1
        assert all(t.seen_at(second) for t in scene.things) and one.record["a_obj"].split(",") == sorted(sources)
        mask = sum(sources.values()).astype(bool)
        if slot == "arig":
            assert tuple(one.record["top_left"] + one.record["bottom_right"]) == box_of(mask)
            continue
        ((things, at),) = masks(one).values()
        assert at == second and (render.union(things, at) == mask).all()
        prompt = tasks.truth(slot, one.record)
        assert tuple(prompt.box) == box_of(mask) and len(set(prompt.points)) == 3
        assert all(mask[y, x] and x % 8 == y % 8 == 0 for x, y in prompt.points)
        assert all(any(source[y, x] for x, y in prompt.points) for source in sources.values())
    assert mixes == MIXES[slot]


def referents(words, scene, second):
    """The visible things that a description fits."""
    pattern = r"the (?:(silent thing)|(?:thing|(?:(\w+) )?(\w+))( that sounds)?(?: at (\w+ \w+))?)"
    silent, colour, name, sounds, place = re.fullmatch(pattern, words).groups()
    return [
        t
        for t in scene.things
        if t.seen_at(second)
        and (not silent or not t.heard_at(second))
        and (not sounds or t.heard_at(second))
        and (colour in (None, t.colour) and name in (None, t.name) and place in (None, quadrant(t)))
    ]


def test_ref_avs_describes_one_thing_or_none():
    answers, kinds, trained = Counter(), Counter(), set()
    for split, _, one in samples("ref_avs", 200):
        words = one.record["description" if split == "train" else "object"]
        things = referents(words, one.scenes[0], one.record["second"])
        part, prompt = one.record.get("split", "train"), tasks.truth("ref_avs", one.record)
        answers[part, prompt != tasks.NULL] += 1
        kinds[re.sub(rf"the (\w+) ({'|'.join(CLASSES)})", "the C N", words).split(" at ")[0], bool(things)] += 1
        if prompt == tasks.NULL:
            assert not things and not masks(one)
            continue
        (thing,) = things
        ((path, (target, second)),) = masks(one).items()
        assert target == (thing,) and f"AVUIE_2/ref_avs/{path}" == tasks.mask_path("ref_avs", one.record)
        mask = render.mask(thing, second)
        assert tuple(prompt.box) == box_of(mask) and all(mask[y, x] for x, y in prompt.points)
        pair = thing.colour, thing.name
        if part == "train":
            trained.add(pair)
        else:  # training describes nothing of the unseen split, and all else
            assert (pair in trained) == (part == "test_s"), pair
            assert part == "test_s" or " ".join(pair) in words
    assert len(trained) == 40  # of 48 colours and classes
    parts = {"train": (150, 50), "test_s": (80, 0), "test_u": (60, 0), "test_n": (0, 60)}
    assert all((answers[part, True], answers[part, False]) == counts for part, counts in parts.items())
    assert len(kinds) >= 10  # every kind of description is sometimes right and sometimes wrong


@pytest.mark.parametrize("kind", KINDS)
def test_neither_numbers_nor_classes_show_whether_the_thing_is_there(kind):
    means = []
    for there in (True, False):
        scenes = [KINDS[kind](np.random.default_rng(i), "bell", "red", there, (3, 4))[1] for i in range(300)]
        seen = [[t.name for t in things if t.visible] for things in scenes]
        means.append(np.array([np.mean([len(names) for names in seen]), np.mean([n.count("bell") for n in seen])]))
    assert (abs(means[0] - means[1]) < 0.15).all()


def test_ucf_classes_are_folders_and_neither_motion_nor_thing_shows_the_class():
    views = [one for _, _, one in samples("ucf", 72)]
    for one in views:
        folder = one.record["label"].title().replace(" ", "")
        assert re.fullmatch(rf"{folder}/\w+\.avi", one.record["video_path"]) and one.scenes[0].pan
        assert one.record["audio_path"].startswith(f"{folder}/")
    counts = Counter(one.record["label"] for one in views)
    assert sorted(counts.values()) == [6, 6, 12, 12, 12, 12, 18, 18, 24, 24]  # two splits of three times 24
    for word in (0, 1):
        assert set(Counter(label.split()[word] for label in counts).values()) == {2}


@pytest.mark.parametrize("slot", PRIORS)
def test_each_emotion_set_has_its_labels_and_shares(slot):
    field, prior = PRIORS[slot]
    split, total = "test" if tasks.get_slot(slot).test else "train", sum(prior.values())
    labels = [view(slot, split, i, 4).record[field] for i in range(max(100, 3 * total))]
    assert Counter(labels[: 3 * total]) == {label: 3 * share for label, share in prior.items()}
    assert len(set(labels[:100])) == len(prior)


def test_the_emotion_sets_are_staged_differently():
    things = {slot: [one.scenes[0].things for _, _, one in samples(slot)] for slot in PRIORS}
    faces = {slot: [[t for t in clip if t.name == "face"] for clip in clips] for slot, clips in things.items()}
    assert all(len(clip) == 1 for clip in things["cremad"])
    two = [clip for clip in faces["meld"] if len(clip) == 2]
    assert 0.3 < len(two) / len(faces["meld"]) < 0.7
    assert all(a.emotion != b.emotion and a.colour != b.colour and bool(a.sounding) != bool(b.sounding) for a, b in two)
    assert all(t.sounding[1] - t.sounding[0] <= 3 for clip in faces["meld"] for t in clip if t.sounding)
    assert all(sum(bool(t.sounding) for t in clip) >= 3 for clip in things["mer24"])
    for (face,), clip in zip(faces["mer24"], things["mer24"], strict=True):
        assert all(face.gain < t.gain for t in clip if t is not face)
    heard = Counter(tuple(sorted({t.name == "face" for t in clip if t.sounding})) for clip in things["dfew"])
    assert heard == {(True,): 60, (False,): 30, (): 30}  # a voice, only a thing, nothing
    assert any(face.visible != (0, 10) for (face,) in faces["dfew"])


def test_question_types_are_those_of_the_published_sets():
    types = {tuple(json.loads(one.record["type"])) for _, _, one in samples("avqa")}
    both = ("Existential", "Location", "Counting", "Comparative", "Temporal")
    kinds = {"Audio": ("Counting", "Comparative"), "Visual": ("Counting", "Location"), "Audio-Visual": both}
    assert types == {(modality, kind) for modality in kinds for kind in kinds[modality]}
    records = [one.record for _, _, one in samples("avqa_thu", 160)]
    kinds = {"Sound": ("Which", "Before Next", "When"), "View": ("Which", "Happening")}
    kinds["Both"] = ("Happening", "Where", "Come From")
    types = Counter((record["question_relation"], record["question_type"]) for record in records)
    assert types == {(relation, kind): 40 for relation in kinds for kind in kinds[relation]}


def test_avqa_thu_offers_four_choices_in_balanced_places():
    places = Counter()
    for _, _, one in samples("avqa_thu", 160):
        offered, place = one.record["multi_choice"], one.record["answer"]
        assert len(set(offered)) == len(offered) == 4 and offered[place] == tasks.truth("avqa_thu", one.record)
        places[place] += 1
        if one.record["question_type"] == "Come From":  # each class and each colour is offered twice
            assert all(n == 2 for word in (0, 1) for n in Counter(c.split()[word] for c in offered).values())
    assert places == dict.fromkeys(range(4), 80)


@pytest.mark.parametrize("question", [q for q in QUESTIONS if q.answers == ("yes", "no")])
def test_how_many_things_there_are_does_not_show_a_yes(question):
    perceived = "sounding" if question.relation == "Audio" else "visible"
    means = []
    for answer in question.answers:
        scenes = [question.stage(np.random.default_rng(i), answer).things for i in range(300)]
        means.append(np.mean([sum(bool(getattr(t, perceived)) for t in things) for things in scenes]))
    assert abs(means[0] - means[1]) < 0.2


BALANCED = {"ave": ("event", CLASSES), "arig": ("a_obj", CLASSES), "s4": ("a_obj", CLASSES), "ks": ("action", MOTIONS)}
BALANCED |= {"a2v": ("correct_video", (1, 2)), "v2a": ("correct_audio", (1, 2))}


@pytest.mark.parametrize("slot", BALANCED)
def test_labels_are_balanced_in_changing_order(slot):
    field, choices = BALANCED[slot]
    labels = [view(slot, "test", i, 0).record[field] for i in range(5 * len(choices))]
    assert Counter(labels) == dict.fromkeys(choices, 5)
    assert len(choices) == 2 or labels[: len(choices)] != labels[len(choices) : 2 * len(choices)]


def test_no_scene_is_in_two_places_and_a_view_depends_on_its_arguments_only():
    owners = {}
    for slot in VIEWS:
        for split, _, one in samples(slot, 40):
            for scene in one.scenes:
                assert scene.id >= BASE_IDS  # ids below are for the base's training
                assert owners.setdefault(scene.id, (slot, split)) == (slot, split)
    blocks = {scene_id(name, split, 0) for name in VIEWS for split in ("train", "test")}
    assert len(blocks) == 2 * 19 and max(blocks) + BASE_IDS < 2**53
    assert min(np.diff(sorted(blocks))) >= BASE_IDS
    with pytest.raises(ValueError, match="room for"):
        scene_id("ave", "train", BASE_IDS)
    assert view("avqa", "test", 7, 1) == view("avqa", "test", 7, 1)
    assert view("avqa", "test", 7, 1).scenes != view("avqa", "test", 7, 2).scenes
    with pytest.raises(ValueError, match="no view makes"):
        view("msx", "train", 0, 0)


@given(st.integers(0, 2**32), st.integers(0, 8), st.integers(2, 10))
def test_the_overlap_of_two_intervals_around_a_core_is_the_core(seed, start, length):
    core = (start, min(start + length, 10))
    first, second = around(np.random.default_rng(seed), core)
    assert set(range(*first)) & set(range(*second)) == set(range(*core))
    assert 0 <= min(first[0], second[0]) and max(first[1], second[1]) <= 10


@given(st.integers(0, 2**32))
def test_intervals_apart_are_in_order(seed):
    early, late = apart(np.random.default_rng(seed))
    assert 0 <= early[0] <= late[0] - 2 and early[0] + 2 <= early[1] <= 10 and late[0] + 2 <= late[1] <= 10


def test_points_fall_inside_any_mask():
    for mask in (np.ones((224, 224), bool), np.pad(np.ones((3, 3), bool), ((17, 204), (9, 212)))):
        points = points_inside(mask)
        assert len(set(points)) == 3 and all(mask[y, x] for x, y in points)
    with pytest.raises(ValueError, match="0 pixels"):
        points_inside(np.zeros((224, 224), bool))
