"""Events in time (AVE, LLP, UnAV-100), and pairs of AVE's clips (a2v, v2a)."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from crab.data.sources.raw import Draft, LeftOut, Raw, Row, SourceError
from crab.tasks.labels import CHOICES
from crab.tasks.temporal import EventRange, ModalEvent

AVE = (
    "Church bell & Male speech, man speaking & Bark & Fixed-wing aircraft, airplane & Race car, auto racing & "
    "Female speech, woman speaking & Helicopter & Violin, fiddle & Flute & Ukulele & Frying (food) & Truck & Shofar & "
    "Motorcycle & Acoustic guitar & Train horn & Clock & Banjo & Goat & Baby cry, infant cry & Bus & Chainsaw & Cat & "
    "Horse & Toilet flush & Rodents, rats, mice & Accordion & Mandolin"
).split(" & ")
LLP = (
    "Speech Car Cheering Dog Cat Frying_(food) Basketball_bounce Fire_alarm Chainsaw Cello Banjo Singing "
    "Chicken_rooster Violin_fiddle Vacuum_cleaner Baby_laughter Accordion Lawn_mower Motorcycle Helicopter "
    "Acoustic_guitar Telephone_bell_ringing Baby_cry_infant_cry Blender Clapping"
).split()
AVE_COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")
LLP_COLUMNS = ("filename", "onset", "offset", "event_labels")
SECONDS = 10  # length of a clip of AVE and LLP


def span(row: Row, first: str, last: str, reverse: bool = False) -> tuple[int, int]:
    """Whole seconds [start, end) from two fields. AVE has an event of no length; it is left out.

    Args:
        reverse: leave out events that end before they start, too.
    """
    start, end = row.whole(first), row.whole(last)
    if start == end:
        raise LeftOut("an event of no length", f"{start} to {end}")
    if reverse and start > end:
        raise LeftOut("an event that ends before it starts", f"{start} to {end}")
    if not start < end <= SECONDS:
        row.fail(first, f"seconds {start} to {end} must be 0 <= start < end <= {SECONDS}", "correct them")
    return start, end


def listing(events: Sequence[tuple[str, float, float]]) -> str:
    """The events in words, e.g. ``dog from 0 to 3 and dog from 5 to 6``."""
    return " and ".join(f"{name} from {start} to {end}" for name, start, end in events)


def ave_rows(raw: Raw, split: str) -> Iterator[Row]:
    """The rows of Annotations.txt that trainSet.txt or testSet.txt lists, in the order of the list."""
    labelled: dict[tuple[str, str], list[Row]] = {}
    for row in raw.rows("Annotations.txt", AVE_COLUMNS, "&", header=False):
        labelled.setdefault((row["VideoID"], row["Category"]), []).append(row)
    for row in raw.rows(f"{split}Set.txt", AVE_COLUMNS, "&", header=False):
        with raw.reading(row):
            rows = labelled.get((row["VideoID"], row["Category"]))
            if not rows:
                fault = f"{row['VideoID']!r} with {row['Category']!r} is not in Annotations.txt"
                row.fail("VideoID", fault, "correct the line or add it there")
            yield rows.pop(0) if len(rows) > 1 else rows[0]


def ave(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """AVE labels when an event is both heard and seen, and says nothing about the rest of the clip."""
    for row in ave_rows(raw, split):
        with raw.reading(row):
            event = EventRange(row.one_of("Category", AVE), *span(row, "StartTime", "EndTime"))
            vid, chain = row["VideoID"], f"{listing([event])} is both heard and seen ."
            record = {"vid": vid, "event": event.event, "start_time": event.start, "end_time": event.end}
            yield raw.clip(Draft(row.place, record, event, chain, (event.event,)), vid)


def pairs(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """Which of two videos a sound belongs to (a2v), or which of two sounds a video (v2a). AVE's clips, paired.

    A clip is in one pair, with a clip of another class. A pair gives two records, one per clip, so that a guess from
    one side does not help. Clips with several labels are left out: one may show the other's event.
    """
    rows = list(ave_rows(raw, split))
    labels = Counter(row["VideoID"] for row in rows)
    clips: list[Draft] = []
    for row in rows:
        with raw.reading(row):
            event, vid = row.one_of("Category", AVE), row["VideoID"]
            if labels[vid] > 1:
                raise LeftOut("several labels", vid)
            clips.append(raw.clip(Draft(row.place, {}, event, ""), vid))
    random.Random(f"{raw.seed} {split}").shuffle(clips)
    two, one = ("video", "audio") if slot == "a2v" else ("audio", "video")
    sense, option, verb = ("hear", "video", "shows") if slot == "a2v" else ("see", "sound", "is")
    while clips:
        first = clips.pop()
        partner = next((i for i in reversed(range(len(clips))) if clips[i].truth != first.truth), None)
        if partner is None:
            raw.leave("no clip of another class is left to pair with", first.place)
            continue
        pair = (first, clips.pop(partner))
        events = tuple(clip.truth for clip in pair)
        options = [f"{option} {number} {verb} : {event} ." for number, event in zip(CHOICES, events, strict=True)]
        for right, asked in enumerate(pair):
            record = {f"{two}{n}_path": clip.record[f"{two}_path"] for n, clip in enumerate(pair, 1)}
            record |= {f"{one}_path": asked.record[f"{one}_path"], f"correct_{two}": right + 1}
            record |= {f"{one}_event": asked.truth} | {f"{two}{n}_event": event for n, event in enumerate(events, 1)}
            # of both clips the media to choose from, of the one asked for also its other medium
            files = [item for clip in pair for item in clip.files.items() if clip is asked or item[0].startswith(two)]
            chain = " ".join([f"i {sense} : {asked.truth} .", *options])
            yield Draft(first.place, record, CHOICES[right], chain, events, files=dict(files))


def llp(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """LLP labels when each event is heard and when it is seen, separately.

    It does so for its validation and test clips only. The validation clips are for training. For the training clips it
    says only what occurs, so no answer can be written and they are left out, unless AVVP_train_audio.csv and
    AVVP_train_visual.csv label them in the form of the AVVP_eval files.
    """
    names = ["AVVP_eval_audio.csv", "AVVP_eval_visual.csv"]
    dense_train = ["AVVP_train_audio.csv", "AVVP_train_visual.csv"]
    names += dense_train if split == "train" and any(map(raw.has, dense_train)) else []
    dense: dict[str, list[ModalEvent | SourceError]] = {}
    for name in names:
        modality = name.rpartition("_")[2].removesuffix(".csv")
        for row in raw.rows(name, LLP_COLUMNS, "\t"):
            events = dense.setdefault(row["filename"], [])
            # For an event of no length, or for "9 to 0", the set's own code marks no segment. It is left out.
            with raw.reading(row):
                try:
                    seconds = span(row, "onset", "offset", reverse=True)
                    events.append(ModalEvent(modality, row.one_of("event_labels", LLP), *seconds))
                except SourceError as error:  # raised below for the whole clip, which is not fully labelled
                    events.append(error)
    for name in ["AVVP_train.csv", "AVVP_val_pd.csv"] if split == "train" else ["AVVP_test_pd.csv"]:
        for row in raw.rows(name, ("filename", "event_labels"), "\t"):
            with raw.reading(row):
                name, events = row["filename"], dense.get(row["filename"])
                if not events:
                    raise LeftOut("labels without modality and times", name)
                for label in row["event_labels"].split(","):
                    Row(row.place, {"event_labels": label}).one_of("event_labels", LLP)
                for error in (event for event in events if isinstance(event, SourceError)):
                    raise error
                events = sorted(events, key=lambda e: (e.modality, e.start, e.end, e.event))
                labels, vid = tuple(sorted({event.event for event in events})), name.rsplit("_", 2)[0]
                sentences = []
                for modality, verb, participle in (("audio", "hear", "heard"), ("visual", "see", "seen")):
                    part = listing([event[1:] for event in events if event.modality == modality])
                    sentences.append(f"i {verb} {part} ." if part else f"none of the events is {participle} .")
                record = {"filename": name, "vid": vid, "event": ",".join(labels)}
                draft = Draft(row.place, record, tuple(events), " ".join(sentences), labels)
                yield raw.clip(draft, vid, name, name[:11])


def unav(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """UnAV-100 labels events that are both heard and seen. Times are rounded to a tenth of a second."""
    for row in raw.entries("unav100_annotations.json", "database"):
        with raw.reading(row):
            if row.one_of("subset", ("train", "validation", "test")) != split:
                continue
            parts = enumerate(row.need("annotations", list))
            events = [_event(f"{row.place}, annotation {number}", part) for number, part in parts]
            if not events:
                raise LeftOut("no event", "no annotations")
            events.sort(key=lambda e: (e.start, e.end, e.event))
            labels = tuple(sorted({event.event for event in events}))
            chain, vid = f"both heard and seen : {listing(events)} .", row["key"]
            yield raw.clip(Draft(row.place, {"vid": vid}, tuple(events), chain, labels), vid)


def _event(place: str, part: object) -> EventRange:
    """One of UnAV-100's `annotations`: a `label` and a `segment` [start, end] in seconds."""
    if not isinstance(part, dict):
        raise SourceError(place, f"is a {type(part).__name__}", "it must be an object with fields")
    row = Row(place, part)
    label, segment = row.need("label").strip(), row.need("segment", list)
    try:
        start, end = (round(float(time), 1) for time in segment)
    except (TypeError, ValueError, OverflowError):
        start = end = math.nan
    if not 0 <= start < end < 10_000:
        row.fail("segment", f"{segment!r:.80} must be [start, end] in seconds, 0 <= start < end")
    return EventRange(label, *(int(time) if time == int(time) else time for time in (start, end)))
