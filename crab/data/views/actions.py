"""Action recognition: what the sounding thing does."""

from __future__ import annotations

from crab import tasks
from crab.data import chains
from crab.data.staging import Stage, cast, others
from crab.data.views.view import View, clip
from crab.data.world import CLASSES, MOTIONS, sample_interval


def ks(stage: Stage) -> View:
    """Kinetics-Sounds: the action is what the sounding thing does; a silent one may do something else."""
    rng, motion, name = stage.rng(), stage.wanted(MOTIONS, "action"), stage.wanted(CLASSES, "class")
    make = cast(rng, [name, *others(rng, name)[:1]])
    source = make[0](sounding=sample_interval(rng, 5), motion=motion)
    things = [source]
    if rng.random() < 0.7:
        things.append(make[1](motion=str(rng.choice([m for m in MOTIONS if m != motion]))))
    chain = f"{chains.hear([source], times=False)} {chains.see(things, does=True)} {chains.sounds(source)}"
    return clip(stage, stage.scene(rng, things), action=motion, label=f"{chain} {tasks.answer('ks', motion)}")


VIEWS = {"ks": ks}
