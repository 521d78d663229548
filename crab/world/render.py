"""A scene as pixels, masks and sound.

Rendering is a pure function of the scene: the same scene gives the same bytes on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from crab.world.scene import CLASSES, EMOTIONS, FACE, SECONDS, SIZE, Scene, Thing

SAMPLE_RATE = 16_000
FPS = 2

_RGB = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (160, 50, 190),
    "orange": (245, 140, 30),
}


@lru_cache(maxsize=512)
def silhouette(name: str, width: int, height: int) -> np.ndarray:
    """The filled shape of a class: bool [height, width], touching all four sides of its box."""
    u = np.abs((2 * np.arange(width) + 1 - width) / width)[None, :]
    v = ((2 * np.arange(height) + 1 - height) / height)[:, None]
    a = np.abs(v)
    full = np.ones((height, width), bool)
    inside = {
        "bell": u <= 0.4 + 0.3 * (v + 1.0) + 1 / width,
        "drum": full,
        "horn": u**2 + a**2 <= 1 + 2 / width,
        "siren": u + a <= 1 + 1 / width,
        "whistle": (u**2 + a**2 <= 1 + 2 / width) & (u**2 + a**2 >= 0.3),
        "clock": (u <= 0.4) | (a <= 0.4),
        "flute": u <= 0.2 + 0.8 * a + 1 / width,
        "engine": (np.maximum(u, a) >= 0.6) | ((u <= 0.25) & (a <= 0.25)),
        FACE: u**2 + a**2 <= 1 + 2 / width,
    }[name]
    return inside & full


@lru_cache(maxsize=256)
def _texture(name: str, width: int, height: int) -> np.ndarray:
    """Brightness of the surface, [height, width, 1] in 0..1: stripes across or along, or plain."""
    kind = CLASSES.index(name) % 3 if name in CLASSES else 0
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    stripe = {0: 0 * rows + 0 * columns, 1: rows // 8 % 2 + 0 * columns, 2: columns // 8 % 2 + 0 * rows}[kind]
    return np.where(stripe, 0.65, 1.0)[..., None]


@lru_cache(maxsize=64)
def _expression(emotion: str, width: int, height: int) -> np.ndarray:
    """Dark features of a face (eyes, brows, mouth): bool [height, width]."""
    u = ((2 * np.arange(width) + 1 - width) / width)[None, :]
    v = ((2 * np.arange(height) + 1 - height) / height)[:, None]
    k = np.abs(u)
    if emotion == "surprise":  # ringed eyes and a wide open mouth, both hollow, under raised brows
        ring = lambda x, y, r: (np.hypot(x, y) < r) & (np.hypot(x, y) > r - 0.12)  # noqa: E731
        brows = (k - 0.4) ** 2 + ((v + 0.45) / 1.4) ** 2
        return ring(k - 0.4, v + 0.15, 0.24) | ring(u, v - 0.5, 0.32) | ((np.abs(brows - 0.06) < 0.025) & (v < -0.6))
    eye_height = {"fear": 0.22, "happy": 0.10}.get(emotion, 0.15)
    eyes = (np.abs(k - 0.4) < 0.14) & (np.abs(v + 0.2) < eye_height)
    slope = {"anger": 0.6, "sad": -0.6, "fear": -0.3, "disgust": 0.3}.get(emotion, 0.0)
    brows = (np.abs(k - 0.4) < 0.22) & (np.abs(v + 0.58 + slope * (k - 0.4)) < 0.07)
    curve = {"happy": -0.9, "sad": 0.9, "anger": 0.5, "disgust": 0.0}.get(emotion, 0.0)
    mouth = (k < 0.45) & (np.abs(v - 0.5 - curve * (u**2 - 0.1)) < 0.07)
    if emotion == "fear":
        mouth = (u / 0.2) ** 2 + ((v - 0.5) / 0.25) ** 2 < 1
    if emotion == "disgust":
        mouth = (k < 0.45) & (np.abs(v - 0.5 - 0.3 * u) < 0.07)
    return eyes | brows | mouth


@lru_cache(maxsize=256)
def _background(pattern: int, shift: int) -> np.ndarray:
    """uint8 [224, 224, 3]: a low-contrast gradient or bands, eight kinds, moved by `shift` pixels."""
    along = np.arange(SIZE) + shift
    there_and_back = SIZE - 0.5 - np.abs(along % (2 * SIZE) - SIZE + 0.5)  # no edge where a gradient begins again
    level = there_and_back.astype(int) * 40 // SIZE if pattern & 2 else 20 * (along // 28 % 2)
    level = 60 + 20 * (pattern >> 2) + (level[None, :] if pattern & 1 else level[:, None])
    return np.broadcast_to(level[..., None], (SIZE, SIZE, 3)).astype(np.uint8)


@lru_cache(maxsize=4096)
def _surface(name: str, colour: str, dim: bool, emotion: str | None, width: int, height: int) -> np.ndarray:
    """The pixels of a thing's box, uint8 [height, width, 3]."""
    rgb = np.asarray(_RGB[colour], float) * (0.45 if dim else 1.0)
    surface = (rgb * _texture(name, width, height)).astype(np.uint8)
    if emotion:
        surface[_expression(emotion, width, height)] = 15
    return surface


def _paint(image: np.ndarray, thing: Thing, second: int) -> None:
    x1, y1, x2, y2 = thing.box(second)
    size = x2 - x1, y2 - y1
    dim = thing.motion == "flashing" and second % 2 == 1
    surface = _surface(thing.name, thing.colour, dim, thing.emotion, *size)
    np.copyto(image[y1:y2, x1:x2], surface, where=silhouette(thing.name, *size)[..., None])


def frame(scene: Scene, second: int) -> np.ndarray:
    """What is seen during one second: uint8 [224, 224, 3]."""
    image = _background(scene.background, scene.pan * second).copy()
    for thing in scene.things:
        if thing.seen_at(second):
            _paint(image, thing, second)
    return image


def frames(scene: Scene, fps: int = FPS) -> np.ndarray:
    """The whole clip: uint8 [10 * fps, 224, 224, 3]."""
    return np.repeat(np.stack([frame(scene, s) for s in range(SECONDS)]), fps, axis=0)


def mask(thing: Thing, second: int) -> np.ndarray:
    """Pixels of one thing at a second: bool [224, 224]; empty while it is not visible."""
    out = np.zeros((SIZE, SIZE), bool)
    if thing.seen_at(second):
        x1, y1, x2, y2 = thing.box(second)
        out[y1:y2, x1:x2] = silhouette(thing.name, x2 - x1, y2 - y1)
    return out


def union(things: Iterable[Thing], second: int) -> np.ndarray:
    """Pixels of any of these things at a second: bool [224, 224]; empty where there is no thing."""
    return np.any([np.zeros((SIZE, SIZE), bool), *(mask(t, second) for t in things)], axis=0)


@lru_cache(maxsize=64)
def sound_loop(name: str) -> np.ndarray:
    """One second of a class's sound, or of a voice in an emotion: float [16000], peak about 1."""
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = lambda f: np.sin(2 * np.pi * f * t)  # noqa: E731
    sweep = lambda f: np.sin(2 * np.pi * np.cumsum(f) / SAMPLE_RATE)  # noqa: E731
    hits = lambda per_second, decay: np.exp(-decay * ((t * per_second) % 1.0))  # noqa: E731
    noise = np.random.default_rng(7).standard_normal(SAMPLE_RATE) * 0.4
    voice = {
        "anger": sweep(300 + 60 * np.sign(tone(8))) * (0.6 + 0.4 * tone(8)),
        "disgust": sweep(180 - 60 * t) * (0.7 + 0.3 * tone(3)),
        "fear": sweep(650 + 80 * tone(10)),
        "happy": sweep(350 + 250 * np.abs(tone(2))),
        "neutral": tone(250),
        "sad": sweep(260 - 140 * t) * hits(1, 1.5),
        "surprise": sweep(400 + 1100 * ((2 * t) % 1.0)),
    }
    if name in EMOTIONS:
        carrier = voice[name]
        return 0.7 * carrier + 0.3 * carrier * np.abs(carrier)  # a second harmonic: a throat, not a flute
    return {
        "bell": (tone(880) + 0.5 * tone(2200)) / 1.5 * hits(2, 5),
        "drum": (tone(90) + noise) / 1.4 * hits(3, 9),
        "horn": np.sign(tone(220)) * 0.6 + 0.4 * tone(440),
        "siren": sweep(700 + 300 * tone(2)),
        "whistle": tone(3000),
        "clock": noise * hits(4, 40) * 2,
        "flute": sweep(1300 + 30 * tone(6)),
        "engine": np.sign(tone(55)) * (0.6 + 0.4 * tone(11)) * 0.8 + 0.2 * noise,
    }[name]


def waveform(scene: Scene) -> np.ndarray:
    """The clip's sound: float32 [160000], 16 kHz mono in -1..1."""
    mix = np.zeros(SECONDS * SAMPLE_RATE)
    for thing in scene.sounding:
        start, end = thing.sounding
        loop = np.roll(sound_loop(thing.heard_emotion or thing.name), -thing.shift)
        mix[start * SAMPLE_RATE : end * SAMPLE_RATE] += 0.4 * thing.gain * np.tile(loop, end - start)
    return np.clip(mix, -1, 1).astype(np.float32)
