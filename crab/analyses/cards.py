"""The gallery's page: one card per sample, as HTML with what is answered drawn over pictures and seconds.

Cards hold no script. They follow the reader's light or dark setting, the width of the window, and words for what is
drawn stand in labels that a screen reader says. Media are linked, not embedded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from crab import tasks
from crab.analyses.clips import contours, outline, poster
from crab.analyses.gallery import PLACED, TIMED
from crab.analyses.picks import ALL, ANY, APART, Pick, graded, right
from crab.data import media
from crab.study import figures
from crab.study.score import masks_of
from crab.world import verify

SIDE = media.SIZE  # pixels of a picture as the model gets it
SENSES = {"audio": ("♪", "heard"), "visual": ("◉", "seen")}
MARKS = {
    "right": '<span class="mark ok">✓ {}</span>',
    "partly right": '<span class="mark part">◐ {}</span>',
    "wrong": '<span class="mark no">✗ {}</span>',
}


@dataclass(frozen=True)
class Answer:
    """What a method says about a sample, or the truth of it.

    Attributes:
        name, colour: of the method. parsed: what `crab.tasks.parse` reads in ``text``; None if nothing.
        score: the sample's primary score; None for the truth. mask: bool [224, 224] of a pixel-level answer, or None.
        statements: of the reasoning before the answer, each with its verdict; without verdict if no scene is known.
    """

    name: str
    colour: str
    text: str
    parsed: Any
    score: float | None = None
    mask: np.ndarray | None = None
    statements: Sequence[tuple[str, str]] = field(default=())


def truth(slot: tasks.Slot, record: Mapping) -> Answer:
    """The truth of a record, as an answer. Of a pixel-level slot it is the mask, or that the thing is not there."""
    if not slot.masks:
        return Answer("truth", "CanvasText", "", tasks.truth(slot, record))
    if record.get("split") == "test_n":
        return Answer("truth", "CanvasText", "", tasks.NULL)
    return Answer("truth", "CanvasText", "", None, mask=media.read_mask(record["mask"]))


def answer(
    slot: tasks.Slot, record: Mapping, family: str, text: str, score: float, segmenter: str,
    shown: verify.Evidence | None,
) -> Answer:  # fmt: skip
    """What a run of ``family`` answers.

    Args:
        segmenter: cuts the mask of its box and points (`crab.models.segment.segmenter`).
        shown: the scene of the sample, against which its reasoning is checked; None if it is not known.
    """
    name, parsed, mask = figures.display_name(family), tasks.parse(slot, text, record), None
    if slot.masks and parsed not in (None, tasks.NULL):
        mask = masks_of(slot.name, segmenter)["masks"].segment(record, *parsed)
    statements: Sequence[tuple[str, str]] = ()
    if family.endswith("-explicit"):
        bare = [(part, "") for part in verify.statements(verify.chain(slot, text))]
        statements = verify.verify_answer(slot, text, shown) if shown else bare
    return Answer(name, figures.COLOURS.get(name, "#767676"), text, parsed, score, mask, statements)


def say(slot: tasks.Slot, parsed: Any) -> str:
    """An answer in words."""
    if parsed is None:
        return "cannot be read"
    if slot.kind == "temporal":
        return f"{parsed.event}, {parsed.start}–{parsed.end} s"
    if slot.kind == "video_parsing":
        events = [f"{SENSES[e.modality][1]}: {e.event}, {e.start}–{e.end} s" for e in parsed]
        return "; ".join(events) or "nothing is seen or heard"
    if slot.kind in PLACED:
        if parsed == tasks.NULL:
            return "not in the picture"
        box = parsed if slot.kind == "spatial" else parsed[0]
        return "box from {}, {} to {}, {}".format(*box) + ("" if slot.kind == "spatial" else " and three points")
    if slot.kind == "matching":
        return ("video " if slot.media == "two_videos_audio" else "sound ") + str(parsed)
    return str(parsed)


def mark(slot: tasks.Slot, answer: Answer) -> str:
    """Right, partly right or wrong, by sign, word and colour; of a graded answer the score in place of the word."""
    verdict = "right" if right(slot.name, answer.score) else "wrong"
    word = label = verdict
    if graded(slot.name):
        verdict = "partly right" if 0 < answer.score < 1 else verdict
        word = f"{answer.score:.2f}"
        label = f"{verdict}, {slot.metric} {word}"
    return MARKS[verdict].format(word).replace("<span ", f'<span title="{label}" ', 1)


# ---------------------------------------------------------------- what is drawn


def overlay(slot: tasks.Slot, answer: Answer, true: Answer | None = None) -> str:
    """An SVG over a picture of `SIDE` pixels: box, points and mask of an answer, and the truth dashed.

    A box covers the pixels x1 <= x < x2. A point lies in the middle of its pixel.
    """
    parts = [] if true is None else _place(slot, true, "true")
    parts += _place(slot, answer, "true" if true is None else "said")
    label = f"{answer.name}: {say(slot, answer.parsed)}" if answer.parsed is not None or true else answer.name
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(label)}" style="--c:{answer.colour}">'
        f"{''.join(parts)}</svg>"
    )


def _place(slot: tasks.Slot, answer: Answer, kind: str) -> list[str]:
    parts, names = [], ("case", kind)  # each line has a dark edge, so that it shows on any picture
    if answer.mask is not None:
        path = "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in line) + "Z" for line in contours(answer.mask))
        parts += [f'<path class="{name}" d="{path}"/>' for name in names]
    if answer.parsed in (None, tasks.NULL):
        return parts
    (x1, y1, x2, y2), points = (answer.parsed, ()) if slot.kind == "spatial" else answer.parsed
    if answer.mask is None or kind == "said":
        box = f'x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"/>'
        parts += [f'<rect class="{name} box" {box}' for name in names]
        parts += [f'<circle class="point" cx="{x + 0.5}" cy="{y + 0.5}" r="3.5"/>' for x, y in points]
    return parts


def track(slot: tasks.Slot, answer: Answer, seconds: float) -> str:
    """The seconds of the events of an answer as bars on a line of ``seconds``, one line per event."""
    events = [answer.parsed] if slot.kind == "temporal" and answer.parsed is not None else answer.parsed or ()
    bars = []
    for event in events:
        sense = getattr(event, "modality", None)
        sign = SENSES[sense][0] + " " if sense else ""
        left, width = 100 * event.start / seconds, 100 * (event.end - event.start) / seconds
        style = f"margin-left:{left:.4g}%;width:{min(width, 100 - left):.4g}%"
        bars.append(f'<div class="bar {sense or ""}" style="{style}">{sign}{escape(event.event)}</div>')
    return f'<div class="track" style="--c:{answer.colour};--n:{seconds:g}">{"".join(bars) or "&nbsp;"}</div>'


def waveform(wave: np.ndarray, label: str) -> str:
    """A sound over its length, as high as it is loud."""
    parts = outline(wave)
    loudest = max(max(-low, high) for low, high in parts) or 1.0
    step, scale = 1000 / len(parts), 29 / loudest
    top = [f"{(i + 0.5) * step:.0f} {30 - high * scale:.1f}" for i, (_, high) in enumerate(parts)]
    low = [f"{(i + 0.5) * step:.0f} {30 - low * scale:.1f}" for i, (low, _) in enumerate(parts)]
    return (
        f'<svg class="wave" viewBox="0 0 1000 60" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<path d="M{"L".join([*top, *reversed(low)])}Z"/></svg>'
    )


# ---------------------------------------------------------------- the card


def card(
    slot: tasks.Slot, pick: Pick, record: Mapping, loaded: Sequence[tuple[tasks.MediaItem, Any]],
    files: Sequence[tuple[str, str]], strips: Sequence[str], true: Answer, answers: Sequence[Answer], link: str,
    names: Sequence[str],
) -> str:  # fmt: skip
    """One sample.

    Args:
        loaded: each item with what `crab.data.records.load` gives for it.
        files: kind and name of each file that can be played or shown. strips: names of the strips of frames, one per
            video.
        link: what stands before a name to make it a link. names: of the first two methods.
    """
    waves = [data for item, data in loaded if item.kind == "audio"]
    seconds = max((len(wave) / media.RATE for wave in waves), default=10.0)
    parts = [_rule(pick, names), _top(slot, record, files, link)]
    parts += _strips(slot, loaded, strips, link)
    several = len(waves) > 1
    for number, wave in enumerate(waves):
        name = f"sound {('one', 'two')[number]}" if several else "sound"
        parts.append(f'<div class="sound"><small>{name}</small>{waveform(wave, f"{name}, {seconds:g} seconds")}</div>')
    if slot.kind in TIMED:
        ticks = "".join(f"<span>{second}</span>" for second in range(0, int(seconds) + 1, 2 if seconds <= 12 else 10))
        parts.append(f'<div class="ticks" aria-hidden="true">{ticks}</div>')
    if slot.kind in PLACED:
        picture = link + next(name for kind, name in files if kind == "image")
        parts.append('<div class="panels">')
        parts += [_panel(slot, picture, true, None)] + [_panel(slot, picture, each, true) for each in answers]
        parts.append("</div>")
        parts += [_why(each) for each in answers]
    else:
        parts += [_row(slot, each, seconds) for each in (true, *answers)]
    return f'<article class="card">{"".join(filter(None, parts))}</article>'


def _rule(pick: Pick, names: Sequence[str]) -> str:
    apart = " and ".join(names[:2])
    words = {
        ANY: "any sample: the first in order",
        ALL: f"all methods are right ({pick.matching} of {pick.total})",
        APART: f"{apart} differ ({pick.matching} of {pick.total})",
    }[pick.rule]
    words += "" if pick.fits else "; none left, so the next in order"
    return f'<p class="rule">{escape(words)} <span class="id">{escape(pick.id)}</span></p>'


def _top(slot: tasks.Slot, record: Mapping, files: Sequence[tuple[str, str]], link: str) -> str:
    """The players, and the question beside them if there is room."""
    players, counts = [], {kind: sum(k == kind for k, _ in files) for kind, _ in files}
    numbers = dict.fromkeys(counts, 0)
    for kind, name in files:
        if kind == "image":
            continue
        which = f" {('one', 'two')[numbers[kind]]}" if counts[kind] > 1 else ""
        numbers[kind] += 1
        word = {"video": "video", "audio": "sound"}[kind] + which
        caption = f"<figcaption>{word}</figcaption>" if which or len(files) > 2 else ""
        url, attributes = escape(link + name), f'controls preload="none" aria-label="{slot.name}: {word}"'
        tag = "video" if kind == "video" else "audio"
        extra = f' playsinline poster="{escape(link + poster(name))}"' if kind == "video" else ""
        players.append(f'<figure class="{kind}"><{tag} src="{url}" {attributes}{extra}></{tag}>{caption}</figure>')
    question = f'<p class="question">{escape(tasks.instruction(slot, record))}</p>'
    return f'<div class="top">{"".join(players)}{question}</div>'


def _strips(slot: tasks.Slot, loaded: Sequence[tuple], strips: Sequence[str], link: str) -> list[str]:
    videos = [seconds for item, (_, seconds) in ((i, d) for i, d in loaded if i.kind == "video")]
    parts = []
    for number, (name, seconds) in enumerate(zip(strips, videos, strict=True)):
        which = f"of video {('one', 'two')[number]}, " if len(strips) > 1 else ""
        alt = f"frames {which}from {seconds[0]:.1f} to {seconds[-1]:.1f} s"
        parts.append(f'<img class="strip" src="{escape(link + name)}" alt="{alt}" loading="lazy">')
    return parts


def _name(answer: Answer) -> str:
    return f'<span class="name"><span class="dot" style="--c:{answer.colour}"></span>{escape(answer.name)}</span>'


def _row(slot: tasks.Slot, answer: Answer, seconds: float) -> str:
    words = say(slot, answer.parsed) if answer.parsed is not None else f"cannot be read: {answer.text[:120]}"
    hidden = ' class="unseen"' if slot.kind == "video_parsing" and answer.parsed is not None else ""  # bars show it
    head = f'{_name(answer)} <span class="words"><span{hidden}>{escape(words)}</span></span>'
    head += mark(slot, answer) if answer.score is not None else ""
    bars = track(slot, answer, seconds) if slot.kind in TIMED else ""
    return f'<div class="row"><div class="head">{head}</div>{bars}{_why(answer)}</div>'


def _panel(slot: tasks.Slot, picture: str, answer: Answer, true: Answer | None) -> str:
    note = "not in the picture" if answer.parsed == tasks.NULL else ""
    note = "cannot be read" if answer.parsed is None and true is not None else note
    note = f'<span class="note">{note}</span>' if note else ""
    words = escape(f"The frame; {answer.name}: {say(slot, answer.parsed)}")
    shown = f'<img src="{escape(picture)}" alt="{words}" loading="lazy">{overlay(slot, answer, true)}{note}'
    below = _name(answer) + (mark(slot, answer) if answer.score is not None else "")
    return f'<figure class="panel"><div class="frame">{shown}</div><figcaption>{below}</figcaption></figure>'


def _why(answer: Answer) -> str:
    if not answer.statements:
        return ""
    judged = [verdict for _, verdict in answer.statements if verdict]
    count = f": {judged.count(verify.TRUE)} of {len(judged)} statements are true" if judged else ""
    rows = []
    for statement, verdict in answer.statements:
        sign = {verify.TRUE: MARKS["right"].format(""), "": ""}.get(verdict, MARKS["wrong"].format(verdict))
        rows.append(f"<li>{escape(statement)} {sign}</li>")
    summary = f"<summary>its reasoning{count}</summary>"
    return f'<details class="why">{summary}<ul>{"".join(rows)}</ul></details>'


def section(slot: tasks.Slot, shares: Mapping[str, float], colours: Mapping[str, str], cards: Sequence[str]) -> str:
    """The cards of a slot, below how often each method is right on all its test samples."""
    bars = "".join(
        f'<span><span class="dot" style="--c:{colours[name]}"></span>{escape(name)} <b>{share:.0%}</b></span>'
        for name, share in shares.items()
    )
    title = f"{escape(slot.name)} <small>{escape(slot.family)}, stands for {escape(slot.dataset)}</small>"
    head = f'<h3 id="gallery-{slot.name}">{title}</h3><p class="shares">Right on all test samples: {bars}</p>'
    return f'<section class="slot">{head}<div class="grid">{"".join(cards)}</div></section>'


def links(slots: Sequence[tasks.Slot]) -> str:
    """A list of links to the sections, by family."""
    groups = []
    for family in dict.fromkeys(slot.family for slot in slots):
        names = [slot.name for slot in slots if slot.family == family]
        slots_of = ", ".join(f'<a href="#gallery-{name}">{name}</a>' for name in names)
        groups.append(f"<span>{escape(family)}: {slots_of}</span>")
    return f'<p class="jump">{" ".join(groups)}</p>'
