"""Records against the scene graph: an independent reader of the chains, and of the answers."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab import tasks
from crab.world import render
from crab.world.questions import QUESTIONS
from crab.world.references import REFERENCES
from crab.world.staging import BASE_IDS, apart, around, scene_id
from crab.world.views import VIEWS, view
from crab.world.scene import CLASSES, EMOTIONS, MOTIONS, QUADRANTS
from crab.tasks.segmentation import points_inside

NUMBER = dict(zip("zero one two three four".split(), range(5), strict=True))
SIGHT = re.compile(
    r"an? (?P<colour>\w+) (?P<name>\w+)(?: showing (?P<emotion>\w+)| (?P<motion>still|swaying|bouncing|pulsing|flashing))?"
    r" at (?P<quadrant>(?:top|bottom) (?:left|right))(?: from (?P<start>\d+) to (?P<end>\d+))?$"
)
SOUND = re.compile(r"an? (?P<name>\w+)(?: showing (?P<emotion>\w+))?(?: from (?P<start>\d+) to (?P<end>\d+))?$")


def quadrant(thing):
    x, y = thing.centre
    return f"{'top' if y < 112 else 'bottom'} {'left' if x < 112 else 'right'}"


def fits(said, thing, interval, emotion):
    """Whether everything said of a thing is so."""
    truth = {"colour": thing.colour, "name": thing.name, "emotion": emotion, "motion": thing.motion,
             "quadrant": quadrant(thing), "start": str(interval[0]), "end": str(interval[1])}
    return all(truth[key] == value for key, value in said.items() if value is not None)


def listed(text, pattern):
    return [] if text == "nothing" else [pattern.match(part).groupdict() for part in text.split(" and ")]


def is_so(statement, scenes, heard_scene, before):
    """Whether one statement holds; `before` collects the intervals that "both hold" refers to."""
    things = [t for s in scenes for t in s.things]
    if m := re.fullmatch(r"i see no (?:(\w+) )?(\w+)", statement):
        return not any(t.visible and t.name == m[2] and m[1] in (None, t.colour) for t in things)
    if m := re.fullmatch(r"i hear no (\w+)", statement):
        return not any(t.sounding and t.name == m[1] for t in things)
    if m := re.fullmatch(r"i see (.+)|video (?P<video>one|two) shows (?P<sight>.+)", statement):
        within = scenes[NUMBER[m["video"]] - 1].things if m["video"] else things
        said = listed(m["sight"] or m[1], SIGHT)
        before += [(int(s["start"]), int(s["end"])) for s in said if s["start"]]
        return all(sum(fits(s, t, t.visible, t.emotion) for t in within if t.visible) == 1 for s in said) and (
            said or not any(t.visible for t in within))
    if m := re.fullmatch(r"i hear (.+)|sound (?P<which>one|two) is (?P<sound>.+)", statement):
        within = scenes[NUMBER[m["which"]] - 1].things if m["which"] else heard_scene.things
        said = [{**s, "name": "face" if s["name"] == "voice" else s["name"]} for s in listed(m["sound"] or m[1], SOUND)]
        before += [(int(s["start"]), int(s["end"])) for s in said if s["start"]]
        return all(sum(fits(s, t, t.sounding, t.voice or t.emotion) for t in within if t.sounding) == 1 for s in said) and (
            said or not any(t.sounding for t in within))
    if m := re.fullmatch(r"both hold from (\d+) to (\d+)", statement):
        seconds = set(range(*before[0])) & set(range(*before[1]))
        return seconds == set(range(int(m[1]), int(m[2])))
    if m := re.fullmatch(r"the (\w+) (\w+) sounds", statement):
        return any((t.colour, t.name) == (m[1], m[2]) and t.visible and t.sounding for t in things)
    if m := re.fullmatch(r"the (\w+) (\w+) is silent", statement):
        (thing,) = [t for t in things if t.visible and (t.colour, t.name) == (m[1], m[2])]
        return not thing.sounding
    if m := re.fullmatch(r"the (\w+) is first", statement):
        return min((t for t in things if t.sounding), key=lambda t: t.sounding[0]).name == m[1]
    counts = {"seen": lambda t: t.visible, "heard": lambda t: t.sounding, "seen and heard": lambda t: t.visible and t.sounding}
    if m := re.fullmatch(r"(\w+) seen and (\w+) heard", statement):
        return (NUMBER[m[1]], NUMBER[m[2]]) == tuple(sum(map(bool, map(counts[k], things))) for k in ("seen", "heard"))
    if m := re.fullmatch(r"(\w+) (seen|heard|seen and heard)", statement):
        return NUMBER[m[1]] == sum(bool(counts[m[2]](t)) for t in things)
    raise AssertionError(f"no such statement: {statement}")


def chain_of(slot, record):
    explicit, bare = (tasks.target(slot, record, form) for form in ("explicit", "bare"))
    if slot == "avcap":
        return explicit
    assert explicit.endswith(bare)
    return explicit[: -len(bare)].strip()


def samples(slot, count=60):
    for split in ("train", "test") if tasks.get_slot(slot).test else ("train",):
        for index in range(count):
            yield split, index, view(slot, split, index, 3)


@pytest.mark.parametrize("slot", VIEWS)
def test_every_statement_of_every_chain_is_true(slot):
    for split, index, one in samples(slot):
        chain = chain_of(slot, one.record)
        assert chain.endswith(" .") and len(chain.split()) <= {"avcap": 99, "unav": 62, "ms3": 56, "ref_avs": 49}.get(slot, 45)
        heard = one.scenes[index % 2 if slot == "a2v" else 0]
        before = []
        for statement in chain.removesuffix(" .").split(" . "):
            assert is_so(statement, one.scenes, heard, before), (slot, split, index, statement, one.scenes)


def test_the_check_can_fail():
    one = view("ave", "train", 0, 3)
    thing = next(t for t in one.scenes[0].things if t.visible and t.sounding)
    start, end = thing.sounding
    for lie in (f"i hear a {thing.name} from {start} to {end - 1}", f"i see no {thing.name}",
                f"i see a {thing.colour} {thing.name} at {QUADRANTS[QUADRANTS.index(thing.quadrant) - 1]}"):
        assert not is_so(lie, one.scenes, one.scenes[0], [])


@pytest.mark.parametrize("slot", VIEWS)
def test_records_have_their_fields_and_the_answer_is_the_truth(slot):
    for split, _, one in samples(slot):
        for name in tasks.get_slot(slot).fields(split):
            assert name in one.record
        assert one.record["scene"] == ([s.id for s in one.scenes] if len(one.scenes) > 1 else one.scenes[0].id)
        json.dumps(one.record, allow_nan=False)
        if slot != "avcap":
            text = tasks.target(slot, one.record, "bare")
            assert tasks.parse(slot, text) == tasks.truth(slot, one.record)


def test_ave_is_where_the_one_thing_both_seen_and_heard_is_both():
    for _, _, one in samples("ave"):
        both = [t for t in one.scenes[0].things if t.visible and t.sounding]
        assert len(both) == 1
        seconds = [s for s in range(10) if both[0].seen_at(s) and both[0].heard_at(s)]
        assert (one.record["event"], one.record["start_time"], one.record["end_time"]) == (
            both[0].name, seconds[0], seconds[-1] + 1)


def test_avvp_lists_every_sound_and_sight():
    for _, _, one in samples("avvp"):
        things = one.scenes[0].things
        truth = {("audio", t.name, *t.sounding) for t in things if t.sounding}
        truth |= {("visual", t.name, *t.visible) for t in things if t.visible}
        assert {tuple(e) for e in tasks.parse("avvp", one.record["label_content"])} == truth


def test_arig_and_s4_point_at_the_only_source():
    for slot in ("arig", "s4"):
        for _, _, one in samples(slot):
            scene, second = one.scenes[0], one.record["second"]
            (source,) = [t for t in scene.things if t.heard_at(second)]
            assert all(t.seen_at(second) for t in scene.things) and (slot == "s4" or len(scene.things) >= 2)
            mask = render.mask(source, second)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            if slot == "arig":
                assert tuple(one.record["top_left"] + one.record["bottom_right"]) == box
            else:
                prompt = tasks.truth("s4", one.record)
                assert tuple(prompt.box) == box and len(set(prompt.points)) == 3
                assert all(mask[y, x] and x % 8 == y % 8 == 0 for x, y in prompt.points)


def test_ks_and_cremad_name_the_source():
    for _, _, one in samples("ks"):
        (source,) = one.scenes[0].sounding
        assert one.record["action"] == source.motion
        assert all(t.motion != source.motion for t in one.scenes[0].things if t is not source)
    for _, _, one in samples("cremad"):
        (face,) = one.scenes[0].things
        assert one.record["emotion"] == face.emotion and face.visible and face.sounding


def test_unav_lists_all_that_is_both_and_they_overlap():
    counts = Counter()
    for _, _, one in samples("unav"):
        things = one.scenes[0].things
        truth = {(t.name, *t.sounding): t for t in things if t.sounding and t.visible}
        assert {tuple(e) for e in tasks.parse("unav", one.record["label_content"])} == set(truth)
        assert len(set.intersection(*(set(range(*t.sounding)) for t in truth.values()))) >= 1
        assert all(set(range(*t.sounding)) <= set(range(*t.visible)) for t in truth.values())
        counts[len(truth), len(things)] += 1
    assert counts[4, 4] == 20 and counts[3, 3] and counts[3, 4]


def test_ms3_surrounds_two_or_three_sources_and_touches_each():
    counts = Counter()
    for _, _, one in samples("ms3"):
        scene, second = one.scenes[0], one.record["second"]
        sources = [t for t in scene.things if t.heard_at(second)]
        counts[len(sources), len(scene.things) - len(sources)] += 1
        ((things, at),) = one.mask.values()
        mask = render.union(things, at)
        assert at == second and (mask == sum(render.mask(t, second) for t in sources).astype(bool)).all()
        assert one.record["a_obj"].split(",") == sorted(t.name for t in sources)
        prompt = tasks.truth("ms3", one.record)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert tuple(prompt.box) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        touched = {next(t.name for t in sources if render.mask(t, second)[y, x]) for x, y in prompt.points}
        assert touched == {t.name for t in sources} and len(set(prompt.points)) == 3
    assert counts == {(2, 1): 40, (2, 2): 40, (3, 1): 40}


def referents(words, scene, second):
    """The visible things that a description fits."""
    pattern = r"the (?:(silent thing)|(thing|(?:(\w+) )?(\w+))( that sounds)?(?: at (\w+ \w+))?)"
    silent, _, colour, name, sounds, place = re.fullmatch(pattern, words).groups()
    return [t for t in scene.things if t.seen_at(second) and (not silent or not t.heard_at(second))
            and colour in (None, t.colour) and name in (None, t.name) and (not sounds or t.heard_at(second))
            and place in (None, quadrant(t))]


def test_ref_avs_means_one_thing_or_none():
    answers, kinds, trained = Counter(), Counter(), set()
    for split, _, one in samples("ref_avs", 200):
        words = one.record["description" if split == "train" else "object"]
        found = referents(words, one.scenes[0], one.record["second"])
        part = one.record.get("split", "train")
        prompt = tasks.truth("ref_avs", one.record)
        answers[part, prompt != "null"] += 1
        kinds[re.sub(r"the (\w+) (bell|drum|horn|siren|whistle|clock|flute|engine)", "the C N", words).split(" at ")[0], bool(found)] += 1
        if prompt == "null":
            assert not found and not one.mask
            continue
        (thing,) = found
        ((path, (things, at)),) = one.mask.items()
        assert things == (thing,) and f"AVUIE_2/ref_avs/{path}" == tasks.mask_path("ref_avs", one.record)
        mask = render.mask(thing, at)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert tuple(prompt.box) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert all(mask[y, x] for x, y in prompt.points)
        pair = thing.colour, thing.name
        if part == "train":
            trained.add(pair)
        else:  # nothing that training refers to is in the unseen split, all else is
            assert (pair in trained) == (part == "test_s"), pair
            assert part == "test_s" or f"{thing.colour} {thing.name}" in words
    assert len(trained) == 40  # of 48 colours and classes
    assert answers == {("train", True): 150, ("train", False): 50, ("test_s", True): 80, ("test_u", True): 60, ("test_n", False): 60}
    assert len(kinds) >= 10  # every kind of description is right at times and wrong at times


def test_the_ways_of_referring_are_told_neither_by_numbers_nor_by_classes():
    for kind, stage in REFERENCES.items():
        shown = [[stage(np.random.default_rng(i), "bell", "red", there, (3, 4)).things for i in range(300)] for there in (True, False)]
        seen, bells = ([np.mean([sum(bool(t.visible) and t.name in names for t in things) for things in part]) for part in shown]
                       for names in (CLASSES, ("bell",)))
        assert abs(seen[0] - seen[1]) < 0.15 and abs(bells[0] - bells[1]) < 0.15, kind


PRIORS = {  # a set's labels in records of so many
    "cremad": {"anger": 1, "disgust": 1, "fear": 1, "happy": 1, "neutral": 1, "sad": 1},
    "meld": {"anger": 4, "disgust": 1, "fear": 1, "joy": 6, "neutral": 17, "sadness": 3, "surprise": 4},
    "mer24": {"angry": 5, "happy": 4, "neutral": 5, "sad": 3, "surprise": 1, "worried": 2},
    "mafw": {"anger": 5, "anxiety": 3, "contempt": 2, "disappointment": 2, "disgust": 2, "fear": 2, "happiness": 4,
             "helplessness": 2, "neutral": 4, "sadness": 5, "surprise": 3},
    "dfew": {"angry": 4, "disgust": 1, "fear": 2, "happy": 5, "neutral": 6, "sad": 4, "surprise": 3},
}
FIELD = {"cremad": "emotion", "meld": "Emotion", "mer24": "discrete", "mafw": "emotion", "dfew": "emotion"}
WORLD = {"joy": "happy", "happiness": "happy", "sadness": "sad", "angry": "anger", "worried": "fear"}
COMPOUND = {"anxiety": ("neutral", "fear"), "contempt": ("neutral", "disgust"), "disappointment": ("sad", "neutral"),
            "helplessness": ("sad", "fear")}


@pytest.mark.parametrize("slot", PRIORS)
def test_each_emotion_set_has_its_own_labels_and_shares(slot):
    prior, split = PRIORS[slot], "test" if tasks.get_slot(slot).test else "train"
    total = sum(prior.values())
    counts = Counter(view(slot, split, i, 4).record[FIELD[slot]] for i in range(3 * total))
    assert counts == {label: 3 * share for label, share in prior.items()}
    assert len({view(slot, split, i, 4).record[FIELD[slot]] for i in range(100)}) == len(prior)
    if slot == "meld":
        assert counts["neutral"] / (3 * total) == pytest.approx(0.47, abs=0.005)


@pytest.mark.parametrize("slot", PRIORS)
def test_an_emotion_is_what_face_and_voice_show(slot):
    for _, _, one in samples(slot):
        label = one.record[FIELD[slot]]
        shown, voiced = COMPOUND.get(label, (WORLD.get(label, label),) * 2)
        faces = [t for t in one.scenes[0].things if t.name == "face"]
        speakers = [t for t in faces if t.sounding]
        (face,) = speakers or faces
        assert face.visible and (face.emotion, face.heard_emotion) == (shown, voiced)
        assert speakers or slot == "dfew"


def test_the_compounds_need_face_and_voice():
    """Every face and every voice of a compound also belongs to another label."""
    pairs = {(WORLD.get(x, x),) * 2 for x in PRIORS["mafw"] if x not in COMPOUND} | set(COMPOUND.values())
    for face, voice in COMPOUND.values():
        assert sum(f == face for f, _ in pairs) > 1 and sum(v == voice for _, v in pairs) > 1


def test_the_emotion_sets_are_staged_apart():
    things = {slot: [one.scenes[0].things for _, _, one in samples(slot)] for slot in PRIORS}
    faces = {slot: [[t for t in clip if t.name == "face"] for clip in clips] for slot, clips in things.items()}
    assert all(len(clip) == 1 for clip in things["cremad"])
    two = [clip for clip in faces["meld"] if len(clip) == 2]
    assert 0.3 < len(two) / len(faces["meld"]) < 0.7
    assert all(a.emotion != b.emotion and a.colour != b.colour and bool(a.sounding) != bool(b.sounding) for a, b in two)
    assert all(t.sounding[1] - t.sounding[0] <= 3 for clip in faces["meld"] for t in clip if t.sounding)
    assert all(sum(bool(t.sounding) for t in clip) >= 3 for clip in things["mer24"])
    assert all(face.gain < t.gain for (face,), clip in zip(faces["mer24"], things["mer24"], strict=True) for t in clip if t is not face)
    heard = Counter(tuple(sorted({t.name == "face" for t in clip if t.sounding})) for clip in things["dfew"])
    assert heard == {(True,): 60, (False,): 30, (): 30}  # a voice, a thing alone, nothing
    assert any(face.visible != (0, 10) for (face,) in faces["dfew"])


def test_ucf_is_a_thing_and_what_it_does_in_a_folder_of_that_name():
    counts = Counter()
    for _, _, one in samples("ucf", 72):
        label, (scene,) = one.record["label"], one.scenes
        (source,) = scene.sounding
        assert label == f"{source.motion} {source.name}" and scene.pan
        folder = label.title().replace(" ", "")
        assert re.fullmatch(rf"{folder}/\w+\.avi", one.record["video_path"]) and one.record["audio_path"].startswith(f"{folder}/")
        counts[label] += 1
    assert sorted(counts.values()) == [6, 6, 12, 12, 12, 12, 18, 18, 24, 24]  # two splits of three times 24
    for word in (0, 1):  # neither the motion nor the thing tells the class
        assert set(Counter(label.split()[word] for label in counts).values()) == {2}


def test_matching_has_one_right_choice():
    for slot, field in (("a2v", "correct_video"), ("v2a", "correct_audio")):
        for _, index, one in samples(slot):
            right, names = one.record[field] - 1, [{t.name for t in s.things} for s in one.scenes]
            (asked,) = [t for t in one.scenes[right].things if t.sounding]
            assert asked.visible and asked.name in names[right] - names[1 - right]
            assert right == index % 2


def reference_answer(question, scene):
    """A second, plain reading of the questions."""
    seen, heard = [t for t in scene.things if t.visible], [t for t in scene.things if t.sounding]
    yes_no = lambda value: "yes" if value else "no"  # noqa: E731
    number = lambda things: "zero one two three four".split()[len(things)]  # noqa: E731
    if m := re.fullmatch(r"is there an? (\w+) sound \?", question):
        return yes_no(any(t.name == m[1] for t in heard))
    if m := re.fullmatch(r"is there an? (\w+) in the video \?", question):
        return yes_no(any(t.name == m[1] for t in seen))
    if m := re.fullmatch(r"does the (\w+) sound before the (\w+) \?", question):
        begin = {t.name: t.sounding[0] for t in heard}
        assert begin[m[1]] != begin[m[2]]
        return yes_no(begin[m[1]] < begin[m[2]])
    if m := re.fullmatch(r"does the thing at (\w+ \w+) sound before the thing at (\w+ \w+) \?", question):
        begin = {quadrant(t): t.sounding[0] for t in seen}
        assert begin[m[1]] != begin[m[2]]
        return yes_no(begin[m[1]] < begin[m[2]])
    if m := re.fullmatch(r"where is the (\w+) (\w+) \?", question):
        if m[1] == "sounding":
            (thing,) = heard
        else:
            (thing,) = [t for t in seen if (t.colour, t.name) == (m[1], m[2])]
        return quadrant(thing)
    return {
        "how many sounds are heard ?": lambda: number(heard),
        "how many things are seen ?": lambda: number(seen),
        "how many things are both seen and heard ?": lambda: number([t for t in seen if t in heard]),
        "is the sounding thing in the video ?": lambda: yes_no(len(heard) == 1 and heard[0].visible),
        "which thing sounds first ?": lambda: min(heard, key=lambda t: t.sounding[0]).name,
    }[question]()


def test_avqa_answers_are_right_and_types_are_those_of_music_avqa():
    types = Counter()
    for _, _, one in samples("avqa", 110):
        assert reference_answer(one.record["question"], one.scenes[0]) == one.record["answer"]
        types[one.record["type"]] += 1
    assert set(map(tuple, map(json.loads, types))) == {
        (m, k) for m, kinds in {"Audio": "Counting Comparative", "Visual": "Counting Location",
                                "Audio-Visual": "Existential Location Counting Comparative Temporal"}.items()
        for k in kinds.split()}


def reference_choice(question, scene):
    """A second, plain reading of the questions with choices."""
    seen, heard = [t for t in scene.things if t.visible], [t for t in scene.things if t.sounding]
    named = lambda name: next(t for t in scene.things if t.name == name)  # noqa: E731
    if m := re.fullmatch(r"which thing is at (\w+ \w+) \?", question):
        (thing,) = [t for t in seen if quadrant(t) == m[1]]
        return thing.name
    if m := re.fullmatch(r"which thing sounds before the (\w+) \?", question):
        (thing,) = [t for t in heard if t.sounding[0] < named(m[1]).sounding[0]]
        return thing.name
    if m := re.fullmatch(r"when does the (\w+) sound \?", question):
        return "from {} to {}".format(*named(m[1]).sounding)
    if m := re.fullmatch(r"what happens to the (\w+) \?", question):
        return named(m[1]).motion
    (source,) = heard
    return {
        "which thing is heard ?": source.name,
        "what happens to the sounding thing ?": source.motion,
        "where is the sounding thing ?": quadrant(source),
        "what does the sound come from ?": f"{source.colour} {source.name}",
    }[question]


def test_avqa_thu_has_four_choices_of_which_one_is_right():
    places, kinds = Counter(), Counter()
    for _, _, one in samples("avqa_thu", 160):
        record, (scene,) = one.record, one.scenes
        offered = record["multi_choice"]
        assert len(set(offered)) == len(offered) == 4
        assert offered[record["answer"]] == reference_choice(record["question_text"], scene) == tasks.truth("avqa_thu", record)
        places[record["answer"]] += 1
        kinds[record["question_relation"], record["question_type"]] += 1
        if record["question_type"] == "Come From":  # a sound's class and a colour: each offered twice
            assert all(n == 2 for word in (0, 1) for n in Counter(c.split()[word] for c in offered).values())
    assert places == dict.fromkeys(range(4), 80)
    assert kinds == dict.fromkeys([
        ("Sound", "Which"), ("Sound", "Before Next"), ("Sound", "When"), ("View", "Which"), ("View", "Happening"),
        ("Both", "Happening"), ("Both", "Where"), ("Both", "Come From")], 40)


def test_presence_does_not_show_in_numbers():
    """How many things are seen or heard says nothing about a yes."""
    for question in (q for q in QUESTIONS if q.answers == ("yes", "no")):
        means = []
        for answer in question.answers:
            staged = [question.stage(np.random.default_rng(i), answer)[0] for i in range(300)]
            asked = "sounding" if question.modality == "Audio" else "visible"
            means.append(np.mean([sum(bool(getattr(t, asked)) for t in things) for things in staged]))
        assert abs(means[0] - means[1]) < 0.2


@pytest.mark.parametrize("slot, field, choices", [
    ("ave", "event", CLASSES), ("cremad", "emotion", EMOTIONS[:6]), ("ks", "action", MOTIONS),
    ("arig", "a_obj", CLASSES), ("s4", "a_obj", CLASSES), ("a2v", "correct_video", (1, 2)), ("v2a", "correct_audio", (1, 2)),
])
def test_labels_are_balanced(slot, field, choices):
    counts = Counter(view(slot, "test", i, 0).record[field] for i in range(5 * len(choices)))
    assert counts == dict.fromkeys(choices, 5)
    order = [view(slot, "test", i, 0).record[field] for i in range(3 * len(choices))]
    assert len(choices) == 2 or order[: len(choices)] != order[len(choices) : 2 * len(choices)]


def test_no_scene_is_in_two_places():
    owners = {}
    for slot in VIEWS:
        for split, index, one in samples(slot, 40):
            for scene in one.scenes:
                assert scene.id >= BASE_IDS  # ids below are for base training alone
                assert owners.setdefault(scene.id, (slot, split)) == (slot, split)
    names = "ave unav avvp arig s4 ms3 ref_avs avqa avqa_thu meld mer24 cremad mafw dfew ks ucf a2v v2a avcap".split()
    blocks = {scene_id(name, split, 0) for name in names for split in ("train", "test")}
    assert len(blocks) == 2 * len(names) and max(blocks) + BASE_IDS < 2**53
    assert min(np.diff(sorted(blocks))) >= BASE_IDS
    with pytest.raises(ValueError, match="room for"):
        scene_id("ave", "train", BASE_IDS)


def test_a_view_depends_on_its_four_arguments_alone():
    assert view("avqa", "test", 7, 1) == view("avqa", "test", 7, 1)
    assert view("avqa", "test", 7, 1).scenes != view("avqa", "test", 7, 2).scenes
    with pytest.raises(ValueError, match="no view makes"):
        view("msx", "train", 0, 0)


@given(st.integers(0, 2**32), st.integers(0, 8), st.integers(2, 10))
def test_around_overlaps_exactly_in_the_core(seed, start, length):
    core = (start, min(start + length, 10))
    first, second = around(np.random.default_rng(seed), core)
    assert set(range(*first)) & set(range(*second)) == set(range(*core))
    assert 0 <= min(first[0], second[0]) and max(first[1], second[1]) <= 10


@given(st.integers(0, 2**32))
def test_apart_is_in_order(seed):
    early, late = apart(np.random.default_rng(seed))
    assert 0 <= early[0] <= late[0] - 2 and early[0] + 2 <= early[1] <= 10 and late[0] + 2 <= late[1] <= 10


@pytest.mark.parametrize("mask, points", [
    (np.ones((224, 224), bool), 3), (np.pad(np.ones((3, 3), bool), ((17, 204), (9, 212))), 3),
])
def test_points_fall_inside_any_mask(mask, points):
    found = points_inside(mask)
    assert len(set(found)) == points and all(mask[y, x] for x, y in found)


def test_points_need_a_mask():
    with pytest.raises(ValueError, match="0 pixels"):
        points_inside(np.zeros((224, 224), bool))
