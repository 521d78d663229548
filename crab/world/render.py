"""A scene as pixels, masks and sound. The same scene gives the same bytes on one machine."""

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


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the pixels of a box, from -1 to 1: u [1, width] to the right, v [height, 1] down."""
    u, v = ((2 * np.arange(side) + 1 - side) / side for side in (width, height))
    return u[None, :], v[:, None]


@lru_cache(maxsize=512)
def silhouette(name: str, width: int, height: int) -> np.ndarray:
    """The filled shape of a class: bool [height, width]. It touches all four sides of its box."""
    u, v = _grid(width, height)
    u, a = np.abs(u), np.abs(v)
    full = np.ones((height, width), bool)
    disc = u**2 + a**2 <= 1 + 2 / width
    inside = {
        "bell": u <= 0.4 + 0.3 * (v + 1.0) + 1 / width,
        "drum": full,
        "horn": disc,
        "siren": u + a <= 1 + 1 / width,
        "whistle": disc & (u**2 + a**2 >= 0.3),
        "clock": (u <= 0.4) | (a <= 0.4),
        "flute": u <= 0.2 + 0.8 * a + 1 / width,
        "engine": (np.maximum(u, a) >= 0.6) | ((u <= 0.25) & (a <= 0.25)),
        FACE: disc,
    }[name]
    return inside & full


@lru_cache(maxsize=64)
def _expression(emotion: str, width: int, height: int) -> np.ndarray:
    """Dark features of a face (eyes, brows, mouth): bool [height, width]."""
    u, v = _grid(width, height)
    k = np.abs(u)
    if emotion == "surprise":  # ringed eyes and an open mouth, all hollow, under raised brows
        eyes, mouth = np.hypot(k - 0.4, v + 0.15), np.hypot(u, v - 0.5)
        brows = (k - 0.4) ** 2 + ((v + 0.45) / 1.4) ** 2
        rings = ((eyes < 0.24) & (eyes > 0.24 - 0.12)) | ((mouth < 0.32) & (mouth > 0.32 - 0.12))
        return rings | ((np.abs(brows - 0.06) < 0.025) & (v < -0.6))
    eye_height = {"fear": 0.22, "happy": 0.10}.get(emotion, 0.15)
    eyes = (np.abs(k - 0.4) < 0.14) & (np.abs(v + 0.2) < eye_height)
    slope = {"anger": 0.6, "sad": -0.6, "fear": -0.3, "disgust": 0.3}.get(emotion, 0.0)
    brows = (np.abs(k - 0.4) < 0.22) & (np.abs(v + 0.58 + slope * (k - 0.4)) < 0.07)
    if emotion == "fear":
        mouth = (u / 0.2) ** 2 + ((v - 0.5) / 0.25) ** 2 < 1
    elif emotion == "disgust":
        mouth = (k < 0.45) & (np.abs(v - 0.5 - 0.3 * u) < 0.07)
    else:
        curve = {"happy": -0.9, "sad": 0.9, "anger": 0.5}.get(emotion, 0.0)
        mouth = (k < 0.45) & (np.abs(v - 0.5 - curve * (u**2 - 0.1)) < 0.07)
    return eyes | brows | mouth


@lru_cache(maxsize=256)
def _background(pattern: int, shift: int) -> np.ndarray:
    """uint8 [224, 224, 3]: a low-contrast gradient or bands, eight kinds, moved by `shift` pixels."""
    along = np.arange(SIZE) + shift
    there_and_back = SIZE - 0.5 - np.abs(along % (2 * SIZE) - SIZE + 0.5)  # so that a gradient repeats without an edge
    level = there_and_back.astype(int) * 40 // SIZE if pattern & 2 else 20 * (along // 28 % 2)
    level = 60 + 20 * (pattern >> 2) + (level[None, :] if pattern & 1 else level[:, None])
    return np.broadcast_to(level[..., None], (SIZE, SIZE, 3)).astype(np.uint8)


@lru_cache(maxsize=4096)
def _surface(name: str, colour: str, dim: bool, emotion: str | None, width: int, height: int) -> np.ndarray:
    """The pixels of a thing's box, uint8 [height, width, 3]: plain, or striped across or along."""
    rows, columns = np.indices((height, width))
    stripes = (0 * rows, rows // 8 % 2, columns // 8 % 2)[CLASSES.index(name) % 3 if name in CLASSES else 0]
    rgb = np.asarray(_RGB[colour], float) * (0.45 if dim else 1.0)
    surface = (rgb * np.where(stripes, 0.65, 1.0)[..., None]).astype(np.uint8)
    if emotion:
        surface[_expression(emotion, width, height)] = 15
    return surface


def frame(scene: Scene, second: int) -> np.ndarray:
    """The picture of one second: uint8 [224, 224, 3]."""
    image = _background(scene.background, scene.pan * second).copy()
    for thing in scene.things:
        if thing.seen_at(second):
            x1, y1, x2, y2 = thing.box(second)
            size = x2 - x1, y2 - y1
            dim = thing.motion == "flashing" and second % 2 == 1
            surface = _surface(thing.name, thing.colour, dim, thing.emotion, *size)
            np.copyto(image[y1:y2, x1:x2], surface, where=silhouette(thing.name, *size)[..., None])
    return image


def frames(scene: Scene) -> np.ndarray:
    """The whole clip: uint8 [10 * FPS, 224, 224, 3]."""
    return np.repeat(np.stack([frame(scene, s) for s in range(SECONDS)]), FPS, axis=0)


def mask(thing: Thing, second: int) -> np.ndarray:
    """Pixels of one thing at a second: bool [224, 224]. Empty while it is not visible."""
    out = np.zeros((SIZE, SIZE), bool)
    if thing.seen_at(second):
        x1, y1, x2, y2 = thing.box(second)
        out[y1:y2, x1:x2] = silhouette(thing.name, x2 - x1, y2 - y1)
    return out


def union(things: Iterable[Thing], second: int) -> np.ndarray:
    """Pixels of any of these things at a second: bool [224, 224]. Empty for no things."""
    return np.any([np.zeros((SIZE, SIZE), bool), *(mask(t, second) for t in things)], axis=0)


@lru_cache(maxsize=64)
def sound_loop(name: str) -> np.ndarray:
    """One second of a class's sound, or of a voice in an emotion: float [16000], peak about 1."""
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    noise = np.random.default_rng(7).standard_normal(SAMPLE_RATE) * 0.4

    def tone(frequency: float) -> np.ndarray:
        return np.sin(2 * np.pi * frequency * t)

    def sweep(frequencies: np.ndarray) -> np.ndarray:
        return np.sin(2 * np.pi * np.cumsum(frequencies) / SAMPLE_RATE)

    def hits(per_second: int, decay: float) -> np.ndarray:
        return np.exp(-decay * ((t * per_second) % 1.0))

    loop = {
        "bell": (tone(880) + 0.5 * tone(2200)) / 1.5 * hits(2, 5),
        "drum": (tone(90) + noise) / 1.4 * hits(3, 9),
        "horn": np.sign(tone(220)) * 0.6 + 0.4 * tone(440),
        "siren": sweep(700 + 300 * tone(2)),
        "whistle": tone(3000),
        "clock": noise * hits(4, 40) * 2,
        "flute": sweep(1300 + 30 * tone(6)),
        "engine": np.sign(tone(55)) * (0.6 + 0.4 * tone(11)) * 0.8 + 0.2 * noise,
        "anger": sweep(300 + 60 * np.sign(tone(8))) * (0.6 + 0.4 * tone(8)),
        "disgust": sweep(180 - 60 * t) * (0.7 + 0.3 * tone(3)),
        "fear": sweep(650 + 80 * tone(10)),
        "happy": sweep(350 + 250 * np.abs(tone(2))),
        "neutral": tone(250),
        "sad": sweep(260 - 140 * t) * hits(1, 1.5),
        "surprise": sweep(400 + 1100 * ((2 * t) % 1.0)),
    }[name]
    # Its second harmonic makes a voice different from a flute.
    return 0.7 * loop + 0.3 * loop * np.abs(loop) if name in EMOTIONS else loop


def waveform(scene: Scene) -> np.ndarray:
    """The clip's sound: float32 [160000], 16 kHz mono in -1..1."""
    mix = np.zeros(SECONDS * SAMPLE_RATE)
    for thing in scene.sounding:
        start, end = thing.sounding
        loop = np.roll(sound_loop(thing.heard_emotion or thing.name), -thing.shift)
        mix[start * SAMPLE_RATE : end * SAMPLE_RATE] += 0.4 * thing.gain * np.tile(loop, end - start)
    return np.clip(mix, -1, 1).astype(np.float32)
