"""Media beside the gallery's page: what a reader of the files finds in them."""

import av
import numpy as np
import pytest
from PIL import Image

from crab import tasks
from crab.analyses import clips
from crab.data import media


def decoded(path):
    """By kind of track: its length in seconds, and what is in it."""
    tracks = {}
    with av.open(str(path)) as container:
        for stream in container.streams:
            container.seek(0)
            frames = list(container.decode(stream))
            tracks[stream.type] = (float(stream.duration * stream.time_base), frames)
    return tracks


def shades(frames):
    """The mean grey of each frame, 0 to 255."""
    return [round(frame.to_ndarray(format="gray").mean()) for frame in frames]


@pytest.mark.parametrize(("fps", "count", "expected"), [(2, 20, 20), (5, 20, 20), (25, 100, 32)])
def test_a_clip_keeps_its_length_and_its_pictures_their_time(tmp_path, fps, count, expected):
    """The shade of each frame tells when it is on display."""
    levels = np.linspace(20, 220, count).round().astype(int)
    frames = [np.full((48, 64, 3), level, np.uint8) for level in levels]
    media.write_video(tmp_path / "in.mp4", frames, fps)
    wave = np.sin(np.arange(count / fps * media.RATE) * 0.2).astype(np.float32) / 2
    clips.write_clip(tmp_path / "out.mp4", tmp_path / "in.mp4", wave, 24, 20)
    tracks = decoded(tmp_path / "out.mp4")
    length, pictures = tracks["video"]
    assert length == pytest.approx(count / fps, abs=0.02) and len(pictures) == expected
    assert (pictures[0].height, pictures[0].width) == (24, 32)
    shown = [levels[int(picture.time * fps + 1e-6)] for picture in pictures]
    assert np.abs(np.array(shades(pictures)) - shown).max() <= 4
    length, sounds = tracks["audio"]
    heard = np.concatenate([sound.to_ndarray()[0] for sound in sounds])
    assert length == pytest.approx(count / fps, abs=0.1)
    assert np.sqrt(np.mean(heard**2)) == pytest.approx(0.354, abs=0.03)


def test_equal_input_gives_equal_files(tmp_path):
    rng = np.random.default_rng(0)
    media.write_video(tmp_path / "in.mp4", rng.integers(0, 255, (6, 48, 64, 3), np.uint8), 2)
    wave = rng.normal(0, 0.1, 3 * media.RATE).astype(np.float32)
    for name in "ab":
        clips.write_clip(tmp_path / f"{name}.mp4", tmp_path / "in.mp4", wave, 48, 30)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (["video", "audio"], [("video", "x.mp4")]),
        (["image", "audio"], [("image", "x.jpg"), ("audio", "x.m4a")]),
        (["audio", "video", "video"], [("audio", "x.m4a"), ("video", "x-1.mp4"), ("video", "x-2.mp4")]),
        (["video", "audio", "audio"], [("video", "x.mp4"), ("audio", "x-1.m4a"), ("audio", "x-2.m4a")]),
    ],
)
def test_each_medium_of_a_prompt_can_be_played_alone_and_a_clip_with_its_sound(tmp_path, kinds, names):
    path = tmp_path / "in.mp4"
    media.write_video(path, np.zeros((4, 32, 32, 3), np.uint8), 2)
    frames = np.full((4, 224, 224, 3), 9, np.uint8)
    data = {
        "video": (frames, np.arange(4) / 2),
        "image": np.zeros((224, 224, 3), np.uint8),
        "audio": np.zeros(2 * media.RATE, "f4"),
    }
    loaded = [(tasks.MediaItem(kind, str(path), "field", None), data[kind]) for kind in kinds]
    (tmp_path / "out").mkdir()
    assert clips.write_media(tmp_path / "out", "x", loaded, 32, 30) == names
    posters = [name.replace(".mp4", "-poster.jpg") for kind, name in names if kind == "video"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*posters, *(name for _, name in names)}
    for poster in posters:
        assert np.asarray(Image.open(tmp_path / "out" / poster)).mean() == pytest.approx(9, abs=2)
    together = set(decoded(tmp_path / "out/x.mp4")) if "x.mp4" in dict(map(reversed, names)) else set()
    assert together == ({"video", "audio"} if len(names) == 1 else {"video"} if together else set())


def test_a_strip_shows_the_frames_from_left_to_right(tmp_path):
    frames = np.stack([np.full((224, 224, 3), shade, np.uint8) for shade in (40, 120, 200)])
    clips.write_strip(tmp_path / "strip.jpg", frames)
    strip = np.asarray(Image.open(tmp_path / "strip.jpg")).mean(-1)
    assert strip.shape == (clips.FRAME, 3 * clips.FRAME)
    assert [round(strip[64, clips.FRAME * i + 64]) for i in range(3)] == pytest.approx([40, 120, 200], abs=3)


def test_the_outline_of_a_sound_is_its_range_in_each_part():
    assert clips.outline(np.array([0, 1, -2, 3, 4, -5.0]), 3) == [(0, 1), (-2, 3), (-5, 4)]
    assert clips.outline(np.array([0.5]), 160) == [(0.5, 0.5)]


def test_contours_enclose_the_pixels_of_a_mask_and_no_others():
    """Each pixel's centre is tested against the lines by counting how many of them lie to its left."""
    mask = np.zeros((40, 50), bool)
    mask[5:20, 8:30] = mask[25:35, 30:45] = True
    mask[10:14, 12:20] = False  # a hole
    inside = np.zeros_like(mask)
    for line in clips.contours(mask):
        for (x1, y1), (x2, y2) in zip(line, line[1:] + line[:1], strict=True):
            if y1 != y2:
                for row in range(40):
                    centre = row + 0.5 + 1e-3  # beside the corners
                    if min(y1, y2) <= centre < max(y1, y2):
                        x = x1 + (centre - y1) * (x2 - x1) / (y2 - y1)
                        inside[row] ^= np.arange(50) + 0.5 >= x
    edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
    near = edge | (~mask & (np.roll(edge, 1, 0) | np.roll(edge, -1, 0) | np.roll(edge, 1, 1) | np.roll(edge, -1, 1)))
    assert (inside == mask)[~near].all() and inside[~near].any()
