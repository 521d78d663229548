"""Pairs of labelled clips of different classes (a2v, v2a), from a set of AVE's form."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from crab.data.sources.events import AVE, ave_rows
from crab.data.sources.raw import Draft, LeftOut, Raw, SourceError, one_of
from crab.tasks.matching import CHOICES


def pair_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Two records a pair: each of its clips is asked for once, so that no guess from one side helps.

    A clip is in one pair. Clips with several labels are left out, since one may show what the other is asked for.
    """
    listed = list(ave_rows(raw, slot, split))
    labels = Counter(row["VideoID"] for _, row in listed)
    clips = []
    for where, row in listed:
        try:
            event = one_of(where, row["Category"], AVE)
            if labels[row["VideoID"]] > 1:
                raise LeftOut("several labels", row["VideoID"])
            fields, files = raw.clip(row["VideoID"])
            clips.append({"where": where, "event": event, **fields, "files": files})
        except LeftOut as left:
            raw.leave(left.reason, f"{where}: {left.about}")
        except SourceError as error:
            raw.fault(error)
    random.Random(f"{raw.seed} {split}").shuffle(clips)
    while clips:
        first = clips.pop()
        place = next((i for i in reversed(range(len(clips))) if clips[i]["event"] != first["event"]), None)
        if place is None:
            raw.leave("no clip of another class is left to pair with", first["where"])
            continue
        pair = (first, clips.pop(place))
        for right in (0, 1):
            yield first["where"], {"pair": pair, "right": right}


def match(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """Which of two videos a sound belongs to, or which of two sounds a video; AVE's events are both heard and seen."""
    pair, asked = row["pair"], row["pair"][row["right"]]
    two, one = ("video", "audio") if slot == "a2v" else ("audio", "video")
    record = {f"{two}{n}_path": clip[f"{two}_path"] for n, clip in enumerate(pair, 1)}
    record |= {f"{one}_path": asked[f"{one}_path"], f"correct_{two}": row["right"] + 1, f"{one}_event": asked["event"]}
    record |= {f"{two}{n}_event": clip["event"] for n, clip in enumerate(pair, 1)}
    names = [(two, pair[0]), (two, pair[1]), (one, asked)]
    files = {name: clip["files"][name] for kind, clip in names for name in [f"{kind}/{clip[f'{kind}_path']}"]}
    first, second = (clip["event"] for clip in pair)
    if slot == "a2v":
        chain = f"i hear : {asked['event']} . video one shows : {first} . video two shows : {second} ."
    else:
        chain = f"i see : {asked['event']} . sound one is : {first} . sound two is : {second} ."
    yield Draft(where, record, CHOICES[row["right"]], chain, files, (first, second))
