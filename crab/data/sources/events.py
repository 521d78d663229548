"""Events in time: AVE, LLP and UnAV-100."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from crab.data.sources.raw import Draft, LeftOut, Raw, SourceError, need, one_of, span
from crab.tasks.temporal import EventRange
from crab.tasks.video_parsing import ModalEvent

AVE = (
    "Church bell", "Male speech, man speaking", "Bark", "Fixed-wing aircraft, airplane", "Race car, auto racing",
    "Female speech, woman speaking", "Helicopter", "Violin, fiddle", "Flute", "Ukulele", "Frying (food)", "Truck", "Shofar",
    "Motorcycle", "Acoustic guitar", "Train horn", "Clock", "Banjo", "Goat", "Baby cry, infant cry", "Bus", "Chainsaw", "Cat",
    "Horse", "Toilet flush", "Rodents, rats, mice", "Accordion", "Mandolin",
)
LLP = (
    "Speech", "Car", "Cheering", "Dog", "Cat", "Frying_(food)", "Basketball_bounce", "Fire_alarm", "Chainsaw", "Cello", "Banjo",
    "Singing", "Chicken_rooster", "Violin_fiddle", "Vacuum_cleaner", "Baby_laughter", "Accordion", "Lawn_mower", "Motorcycle",
    "Helicopter", "Acoustic_guitar", "Telephone_bell_ringing", "Baby_cry_infant_cry", "Blender", "Clapping",
)
AVE_COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")


def listing(events: Sequence[tuple[str, float, float]]) -> str:
    """"dog from 0 to 3 and dog from 5 to 6"."""
    return " and ".join(f"{name} from {start} to {end}" for name, start, end in events)


def ave_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Rows of Annotations.txt (`Category&VideoID&Quality&StartTime&EndTime`) that trainSet.txt or testSet.txt lists."""
    labelled: dict[tuple[str, str], list] = {}
    for where, row in raw.rows("Annotations.txt", AVE_COLUMNS, "&", header=False):
        labelled.setdefault((row["VideoID"], row["Category"]), []).append((where, row))
    for where, row in raw.rows(f"{split}Set.txt", AVE_COLUMNS, "&", header=False):
        found = labelled.get((row["VideoID"], row["Category"]))
        if found:
            yield found.pop(0) if len(found) > 1 else found[0]
        else:
            raw.fault(SourceError(f"{where}: video {row['VideoID']!r} with {row['Category']!r} is not in Annotations.txt; "
                                  "correct the line or add it there"))


def ave(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """AVE labels when an event is both heard and seen, and nothing of the rest."""
    event = EventRange(one_of(where, row["Category"], AVE), *span(where, row["StartTime"], row["EndTime"]))
    fields, files = raw.clip(row["VideoID"])
    record = {**fields, "vid": row["VideoID"], "event": event.event, "start_time": event.start, "end_time": event.end}
    yield Draft(where, record, event, f"{listing([event])} is both heard and seen .", files, (event.event,))


def llp_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Clips of LLP with events of known modality and time.

    The set labels these for its validation and test clips alone.  Of the training clips it says only what occurs, so
    that no answer can be written; they are left out, unless AVVP_train_audio.csv and AVVP_train_visual.csv, of the form
    of the AVVP_eval ones, label them.  The validation clips are for training.
    """
    names = ["AVVP_eval_audio.csv", "AVVP_eval_visual.csv"]
    more = ["AVVP_train_audio.csv", "AVVP_train_visual.csv"]
    if split == "train" and any(map(raw.has, more)):
        names += more
    dense: dict[str, list[ModalEvent | SourceError]] = {}
    for name in names:
        for where, row in raw.rows(name, ("filename", "onset", "offset", "event_labels"), "\t"):
            events = dense.setdefault(row["filename"], [])
            try:
                modality = "audio" if name.endswith("audio.csv") else "visual"
                events.append(ModalEvent(modality, one_of(where, row["event_labels"], LLP), *span(where, row["onset"], row["offset"])))
            except LeftOut as left:  # no segment is marked by it, in the set's own reading
                raw.leave(left.reason, f"{where}: {left.about}")
            except SourceError as error:  # to be raised for the clip, which must not be taken for whole
                events.append(error)
    for name in ["AVVP_train.csv", "AVVP_val_pd.csv"] if split == "train" else ["AVVP_test_pd.csv"]:
        for where, row in raw.rows(name, ("filename", "event_labels"), "\t"):
            events = dense.get(row["filename"])
            if events:
                yield where, {**row, "events": events}
            else:
                raw.leave("labels without modality and times", f"{where}: {row['filename']}")


def llp(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """LLP labels each event with when it is heard and when it is seen, apart."""
    for label in row["event_labels"].split(","):
        one_of(where, label, LLP)
    for error in (e for e in row["events"] if isinstance(e, SourceError)):
        raise error
    events = sorted(row["events"], key=lambda e: (e.modality, e.start, e.end, e.event))
    name = row["filename"]
    vid = name.rsplit("_", 2)[0]
    fields, files = raw.clip(vid, name, name[:11])
    labels = tuple(sorted({e.event for e in events}))
    told = []
    for modality, verb, said in (("audio", "hear", "heard"), ("visual", "see", "seen")):
        part = [e[1:] for e in events if e.modality == modality]
        told.append(f"i {verb} {listing(part)} ." if part else f"none of the events is {said} .")
    record = {**fields, "filename": name, "vid": vid, "event": ",".join(labels)}
    yield Draft(where, record, tuple(events), " ".join(told), files, labels)


def unav_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Videos of unav100_annotations.json: `database` -> video -> `subset`, `annotations` (`segment`, `label`)."""
    for where, entry in raw.entries("unav100_annotations.json", "database"):
        if entry.get("subset") == split:
            yield where, entry
        elif entry.get("subset") not in ("validation", "test"):
            raw.fault(SourceError(f"{where}, field 'subset': is {entry.get('subset')!r:.80}; give train, validation or test"))


def unav(raw: Raw, slot: str, split: str, where: str, entry: dict) -> Iterator[Draft]:
    """UnAV-100 labels events that are both heard and seen; times to a tenth of a second."""
    events = []
    for number, part in enumerate(need(where, entry, "annotations", list)):
        if not isinstance(part, dict):
            raise SourceError(f"{where}, annotation {number}: is a {type(part).__name__}; it must be an object with fields")
        label, segment = need(where, part, "label").strip(), need(where, part, "segment", list)
        try:
            start, end = (round(float(t), 1) for t in segment)
        except (TypeError, ValueError):
            start = end = math.nan
        if not 0 <= start < end < 10_000:
            raise SourceError(f"{where}, annotation {number}, field 'segment': {segment!r:.80} must be [start, end] in seconds, "
                              "0 <= start < end; correct it")
        events.append(EventRange(label, *(int(t) if t == int(t) else t for t in (start, end))))
    if not events:
        raise LeftOut("no event", "no annotations")
    fields, files = raw.clip(entry["key"])
    events.sort(key=lambda e: (e.start, e.end, e.event))
    yield Draft(where, {**fields, "vid": entry["key"]}, tuple(events), f"both heard and seen : {listing(events)} .", files,
                tuple(sorted({e.event for e in events})))
