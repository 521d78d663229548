"""Scenes, their pixels and their sounds."""

from dataclasses import replace
from itertools import combinations

import numpy as np

from crab.world import render
from crab.world.scene import CLASSES, EMOTIONS, FACE, Scene, Thing, sample_scene

FACES = {e: Thing(FACE, "red", "still", (56, 56), (40, 40), (0, 10), (0, 10), emotion=e) for e in EMOTIONS}


def test_faces_of_the_base_show_all_emotions_and_most_voices_agree():
    faces = [t for i in range(3000) for t in sample_scene(i, faces=1).things if t.name == FACE]
    assert 0.75 < np.mean([t.heard_emotion == t.emotion for t in faces]) < 0.85
    assert len({(t.emotion, t.heard_emotion) for t in faces}) == len(EMOTIONS) ** 2  # all pairs of face and voice
    assert all(t.voice is None for i in range(100) for t in sample_scene(i).things if t.name != FACE)


def test_every_emotion_looks_and_sounds_different():
    pictures = {e: render.frame(Scene(1, 0, (t,)), 0)[::2, ::2].astype(int) for e, t in FACES.items()}
    for one, other in combinations(EMOTIONS, 2):
        assert (np.abs(pictures[one] - pictures[other]).max(2) > 50).sum() > 25, (one, other)
    spectra = [np.abs(np.fft.rfft(render.sound_loop(n)))[:4000].reshape(-1, 50).sum(1) for n in (*EMOTIONS, *CLASSES)]
    spectra = np.stack([s / np.linalg.norm(s) for s in spectra])
    assert np.triu(spectra @ spectra.T, 1).max() < 0.97


def test_a_face_is_heard_in_the_emotion_of_its_voice():
    anxious = replace(FACES["neutral"], voice="fear")
    assert (render.waveform(Scene(1, 0, (anxious,))) == render.waveform(Scene(1, 0, (FACES["fear"],)))).all()
    assert (render.frame(Scene(1, 0, (anxious,)), 0) == render.frame(Scene(1, 0, (FACES["neutral"],)), 0)).all()
    assert (anxious.heard_emotion, FACES["sad"].heard_emotion) == ("fear", "sad")


def test_a_pan_moves_the_background_only():
    thing = FACES["happy"]
    still, panned = Scene(1, 5, (thing,)), Scene(1, 5, (thing,), pan=8)
    off = ~render.mask(thing, 3)
    assert (render.frame(still, 3)[~off] == render.frame(panned, 3)[~off]).all()
    assert (np.roll(render.frame(replace(still, things=()), 0), -24, 1)[off] == render.frame(panned, 3)[off]).all()
    for background in range(8):  # neighbours in a gradient stay neighbours, and bands keep their two levels
        for second in range(10):
            levels = render.frame(Scene(1, background, (), pan=-16), second)[..., 0].astype(int)
            steps = np.abs(np.diff(levels, axis=background % 2)).max()
            assert steps <= 1 if background & 2 else set(np.unique(levels)) <= {60, 80, 100}


def test_a_union_holds_the_pixels_of_each_thing_and_no_others():
    bell = Thing("bell", "red", "swaying", (168, 168), (24, 32), (2, 6), None)
    things = [FACES["sad"], bell]
    assert render.union(things, 3).sum() == render.mask(bell, 3).sum() + render.mask(FACES["sad"], 3).sum()
    assert (render.union(things, 7) == render.mask(FACES["sad"], 7)).all() and not render.union([], 0).any()
