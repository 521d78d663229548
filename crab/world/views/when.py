"""Temporal localization: what happens from when to when."""

from __future__ import annotations

from crab import tasks
from crab.world import chains
from crab.world.staging import ALWAYS, Stage, around, cast, others
from crab.world.views.view import View, clip
from crab.world.scene import CLASSES, SECONDS, sample_interval


def ave(stage: Stage) -> View:
    """AVE: one event both heard and seen, and where the two overlap.  A silent thing or a sound may distract."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "event")
    make = cast(rng, [name, *others(rng, name)[:2]])
    core = sample_interval(rng)
    visible, sounding = around(rng, core)
    thing = make[0](visible=visible, sounding=sounding)
    things = [thing]
    if rng.random() < 0.5:
        things.append(make[1](visible=sample_interval(rng, 4)))
    if rng.random() < 0.3:
        things.append(make[2](visible=None, sounding=sample_interval(rng)))
    start, end = core
    chain = f"{chains.hear([thing])} {chains.see([thing], times=True)} {chains.both_hold(core)}"
    return clip(stage, stage.scene(rng, things), vid=stage.stems[0], event=name, start_time=start, end_time=end,
                 label_content=f"{chain} {tasks.answer('ave', (name, start, end))}")


# Roles of a clip's one or two things: seen and heard, only heard (off screen), only seen.
_ROLES = (("both",), ("heard", "seen"), ("both", "heard"), ("both", "seen"))


def avvp(stage: Stage) -> View:
    """LLP: audio and visual events, each with its own times, off-screen sounds and silent things included."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "event")
    roles = stage.wanted(_ROLES, "roles")
    things = [
        make(visible=sample_interval(rng) if role != "heard" else None,
             sounding=sample_interval(rng) if role != "seen" else None)
        for role, make in zip(roles, cast(rng, [name, *others(rng, name)[:1]]), strict=False)
    ]
    scene = stage.scene(rng, things)
    events = [("audio", t.name, *t.sounding) for t in chains.by_time(scene.sounding)]
    events += [("visual", t.name, *t.visible) for t in chains.by_place(scene.visible)]
    chain = f"{chains.hear(scene.sounding)} {chains.see(scene.visible, times=True)}"
    return clip(stage, scene, filename=stage.stems[0], vid=stage.stems[0],
                 event=",".join(sorted(t.name for t in things)),
                 label_content=f"{chain} {tasks.answer('avvp', events)}")


def unav(stage: Stage) -> View:
    """UnAV-100: three or four events at once, each in view as long as it sounds; beside three, a distractor at times."""
    rng, name, count = stage.rng(), stage.wanted(CLASSES, "event"), stage.wanted((3, 3, 4), "events")
    makers = cast(rng, [name, *others(rng, name)[:3]])
    shared = int(rng.integers(1, SECONDS - 1))  # the second in which all go on
    things = []
    for make in makers[:count]:
        start, end = int(rng.integers(max(0, shared - 5), shared + 1)), int(rng.integers(shared + 2, min(SECONDS, shared + 6) + 1))
        visible = ALWAYS if rng.random() < 0.5 else (int(rng.integers(start + 1)), int(rng.integers(end, SECONDS + 1)))
        things.append(make(visible=visible, sounding=(start, end)))
    events = chains.by_time(things)
    if count == 3 and rng.random() < 0.6:
        off = {"visible": None, "sounding": sample_interval(rng, 3)}
        things.append(makers[3](**(off if rng.random() < 0.5 else {})))
    scene = stage.scene(rng, things)
    chain = f"{chains.hear(scene.sounding)} {chains.see(scene.visible)}"
    answer = tasks.answer("unav", [(t.name, *t.sounding) for t in events])
    return clip(stage, scene, vid=stage.stems[0], label_content=f"{chain} {answer}")


VIEWS = {"ave": ave, "avvp": avvp, "unav": unav}
