"""Temporal localization: what happens from when to when."""

from crab.world import chains
from crab.world.scene import CLASSES, SECONDS, sample_interval
from crab.world.staging import Stage, View, around, cast


def ave(stage: Stage) -> View:
    """AVE: one event that is heard and seen, and when it is both. A silent thing or a sound may distract."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "event")
    make = cast(rng, name)
    core = start, end = sample_interval(rng)
    visible, sounding = around(rng, core)
    event = make[0](visible=visible, sounding=sounding)
    things = [event]
    if rng.random() < 0.5:
        things.append(make[1](visible=sample_interval(rng, 4)))
    if rng.random() < 0.3:
        things.append(make[2].sounds(2, visible=None))
    both = chains.say("both", times=chains.lasting(core))
    chain = f"{chains.hear([event])} {chains.see([event], times=True)} {both}"
    fields = {"vid": stage.stems[0], "event": name, "start_time": start, "end_time": end}
    return stage.clip(stage.scene(rng, things), chain, (name, start, end), **fields)


# Roles of a clip's one or two things: seen and heard, only heard (off screen), only seen.
_ROLES = (("both",), ("heard", "seen"), ("both", "heard"), ("both", "seen"))


def avvp(stage: Stage) -> View:
    """LLP: audio and visual events, each with its own times. Sounds may be off screen, and things silent."""
    rng, name, roles = stage.rng(), stage.wanted(CLASSES, "event"), stage.wanted(_ROLES, "roles")
    things = [
        m(
            visible=sample_interval(rng) if role != "heard" else None,
            sounding=sample_interval(rng) if role != "seen" else None,
        )
        for role, m in zip(roles, cast(rng, name), strict=False)
    ]
    scene = stage.scene(rng, things)
    events = [("audio", t.name, *t.sounding) for t in chains.by_time(scene.sounding)]
    events += [("visual", t.name, *t.visible) for t in chains.by_place(scene.visible)]
    chain = f"{chains.hear(scene.sounding)} {chains.see(scene.visible, times=True)}"
    fields = {"filename": stage.stems[0], "vid": stage.stems[0], "event": ",".join(sorted(t.name for t in things))}
    return stage.clip(scene, chain, events, **fields)


def unav(stage: Stage) -> View:
    """UnAV-100: three or four events at once, each in view while it sounds. Three may have a distractor beside them."""
    rng, name, count = stage.rng(), stage.wanted(CLASSES, "event"), stage.wanted((3, 3, 4), "events")
    make = cast(rng, name)
    shared = int(rng.integers(1, SECONDS - 1))  # a second in which all sound
    things = []
    for m in make[:count]:
        start = int(rng.integers(max(0, shared - 5), shared + 1))
        end = int(rng.integers(shared + 2, min(SECONDS, shared + 6) + 1))
        visible = (0, SECONDS)
        if rng.random() >= 0.5:
            visible = int(rng.integers(start + 1)), int(rng.integers(end, SECONDS + 1))
        things.append(m(visible=visible, sounding=(start, end)))
    events = [(t.name, *t.sounding) for t in chains.by_time(things)]
    if count == 3 and rng.random() < 0.6:
        sounding = sample_interval(rng, 3)
        things.append(make[3](**({"visible": None, "sounding": sounding} if rng.random() < 0.5 else {})))
    scene = stage.scene(rng, things)
    return stage.clip(scene, f"{chains.hear(scene.sounding)} {chains.see(scene.visible)}", events, vid=stage.stems[0])


VIEWS = {"ave": ave, "avvp": avvp, "unav": unav}
