"""Action recognition: what the sounding thing does."""

from __future__ import annotations

from dataclasses import replace

from crab import tasks
from crab.world import chains
from crab.world.staging import Stage, cast, others, skewed
from crab.world.views.view import View, clip
from crab.world.scene import CLASSES, MOTIONS, PANS, sample_interval


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


#: Classes of ucf: a motion and its thing, unevenly many. Every motion and every thing comes in two, so neither alone tells.
UCF = skewed(**{
    "swaying bell": 4, "bouncing drum": 4, "flashing siren": 3, "pulsing clock": 3, "still drum": 2,
    "pulsing horn": 2, "swaying clock": 2, "bouncing bell": 2, "flashing horn": 1, "still siren": 1,
})


def ucf(stage: Stage) -> View:
    """UCF-101: a thing and what it does make the class; the camera pans, and clips are avi files in a folder a class.

    In half of them something silent does what would make the sounding thing's other class.
    """
    rng, label = stage.rng(), stage.wanted(UCF, "class")
    motion, name = label.split()
    make = cast(rng, [name, *others(rng, name)[:1]])
    source = make[0](sounding=sample_interval(rng, 5), motion=motion)
    things = [source]
    if rng.random() < 0.5:
        (other,) = {does for does, what in map(str.split, UCF) if what == name} - {motion}
        things.append(make[1](motion=other))
    chain = f"{chains.hear([source], times=False)} {chains.see(things, does=True)} {chains.sounds(source)}"
    scene = replace(stage.scene(rng, things), pan=int(rng.choice(PANS)))
    path = f"{label.title().replace(' ', '')}/{stage.stems[0]}"
    return clip(stage, scene, path, "avi", label=label, new_label=f"{chain} {tasks.answer('ucf', label)}")


VIEWS = {"ks": ks, "ucf": ucf}
