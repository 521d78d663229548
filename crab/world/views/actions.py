"""Action recognition: what the sounding thing does."""

from collections.abc import Sequence
from dataclasses import replace

from crab.world import chains
from crab.world.scene import CLASSES, MOTIONS, PANS, Scene
from crab.world.staging import Stage, View, cast, pick, skewed

#: Classes of ucf: a motion and its thing. Each motion and each thing is in two classes, so neither shows the class.
UCF = (
    *skewed(**{"swaying bell": 4, "bouncing drum": 4, "flashing siren": 3, "pulsing clock": 3, "still drum": 2}),
    *skewed(**{"pulsing horn": 2, "swaying clock": 2, "bouncing bell": 2, "flashing horn": 1, "still siren": 1}),
)


def _acting(stage: Stage, rng, motion: str, name: str, share: float, motions: Sequence[str]) -> tuple[Scene, str]:
    """A scene in which a sounding thing does this motion, and its chain.

    In a share of the scenes a silent thing does another of the motions.
    """
    make = cast(rng, name)
    source = make[0].sounds(5, motion=motion)
    beside = [make[1](motion=pick(rng, motions, motion))] if rng.random() < share else []
    chain = chains.heard_and_seen([source], [source, *beside], chains.sounds(source), does=True)
    return stage.scene(rng, [source, *beside]), chain


def ks(stage: Stage) -> View:
    """Kinetics-Sounds: the action is what the sounding thing does."""
    motion, name = stage.wanted(MOTIONS, "action"), stage.wanted(CLASSES, "class")
    scene, chain = _acting(stage, stage.rng(), motion, name, 0.7, MOTIONS)
    return stage.clip(scene, chain, motion, action=motion)


def ucf(stage: Stage) -> View:
    """UCF-101: a thing and what it does make the class. The camera pans, and each class has a folder of avi files.

    In half of the clips a silent thing does what would make the other class of the sounding thing.
    """
    rng, label = stage.rng(), stage.wanted(UCF, "class")
    motion, name = label.split()
    motions = sorted({does for does, thing in map(str.split, UCF) if thing == name})
    scene, chain = _acting(stage, rng, motion, name, 0.5, motions)
    scene = replace(scene, pan=int(rng.choice(PANS)))
    path = f"{label.title().replace(' ', '')}/{stage.stems[0]}"
    return stage.clip(scene, chain, label, path=path, form="avi", label=label)


VIEWS = {"ks": ks, "ucf": ucf}
