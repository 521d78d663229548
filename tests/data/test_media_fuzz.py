"""500 media files, made by encoders and muxers at random or by damaging bytes: reader and probe agree on each.

What is made is held against the input of the encoder; damaged clips against all their frames, decoded plainly.
"""

from collections import Counter

import av
import numpy as np
import pytest
import soundfile
from made_media import FRAMES, agreed, encoded, film, grey, holed, mux
from PIL import Image

from crab.data import media

pytestmark = pytest.mark.slow

SEED = 0
STEP = 8  # grey levels from frame to frame
#: Container, codecs of pictures, codecs of sound. The last three store sound with the encoder's delay before it.
FORMATS = [
    ("mp4", "libx264 mpeg4 libx265", "aac libmp3lame alac flac"),
    ("mov", "libx264 mjpeg", "aac pcm_s16le"),
    ("mkv", "libx264 mpeg4 libvpx mjpeg", "aac libmp3lame libopus vorbis flac pcm_s16le pcm_f32le ac3 mp2"),
    ("webm", "libvpx libvpx-vp9", "libopus vorbis"),
    ("avi", "mpeg4 mjpeg", "libmp3lame pcm_s16le ac3"),
    ("ts", "libx264 mpeg2video", "aac mp2 ac3"),
    ("flv", "flv libx264", "aac libmp3lame"),
    ("wmv", "wmv2", "libmp3lame pcm_s16le"),
]
FAST = {"libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
        "libvpx": {"deadline": "realtime"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}  # fmt: skip
SOUNDS = (
    "wav PCM_U8,wav PCM_16,wav PCM_24,wav FLOAT,wav DOUBLE,flac PCM_16,ogg VORBIS,mp3 MPEG_LAYER_III,aiff PCM_16"
).split(",")
#: What turns a picture upright, by its mark.
TURNS = {
    2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


# ---------------------------------------------------------------- clips


def tones(draw, seconds, rate, channels, peak=0.9):
    """A tone of 500 Hz of another loudness in each channel, [channels, samples], and the loudness of their mean."""
    gains = draw.uniform(0.2, peak, channels)
    if channels == 6:
        gains[3] = 0  # encoders cut a tone out of the channel for effects
    return gains[:, None] * np.sin(2 * np.pi * 500 * np.arange(round(seconds * rate)) / rate), gains.mean()


def make_clip(draw, folder, number):
    """A clip of 2 to 26 grey frames, often with 2 s of a tone and sometimes with a still picture, in any order.

    Returns its path, the seconds at which its frames begin, and of its sound begin, end, begin and length of a hole,
    and loudness; None if it has none.
    """
    form, codecs, sounds = FORMATS[draw.integers(len(FORMATS))]
    codec, name, rate = draw.choice(codecs.split()), draw.choice(sounds.split()), int(draw.choice([5, 10, 25]))
    path, timed = folder / f"{number}.{form}", form != "avi"
    stamps = np.arange(draw.integers(2 + 4 * (form == "ts"), 27))
    if draw.random() < 0.3 and form in ("mp4", "mkv", "webm", "mov") and codec not in ("mpeg4", "libx265"):
        stamps = np.cumsum(draw.integers(1, 5, len(stamps)))
    kinds = draw.permutation(["video", *["sound"] * (draw.random() < 0.75)])
    if form in ("mkv", "mov", "mp4") and draw.random() < 0.3:
        kinds = draw.permutation([*kinds, "still"])
    late = timed * draw.choice([0, 0, 0.4, 1.3])
    hole = timed * (name not in ("libopus", "vorbis", "pcm_s16le")) * draw.choice([0, 0, 0.3, 1.0])
    stamps = stamps - stamps[0] + (4 if form in ("mkv", "mp4", "ts") and not late and draw.random() < 0.3 else 0)
    with av.open(str(path), "w") as container:
        packets, heard = [], None
        for kind in kinds:  # all streams are added before the first packet is muxed
            if kind == "still":
                packets += film(container.add_stream("mjpeg", rate=1), [grey(255)], [0], 1)
            elif kind == "video":
                options = {"b": "1000000", "qmin": "2", "g": str(draw.integers(1, 30)), **FAST.get(codec, {})}
                options |= {"bf": str(draw.integers(0, 4))} if codec == "libx264" and form not in ("avi", "flv") else {}
                stream = container.add_stream(codec, rate=rate, options=options if codec != "mjpeg" else {"qmin": "2"})
                packets += film(stream, [grey(20 + STEP * i) for i in range(len(stamps))], stamps, rate)
            else:
                most = ["mono", "stereo", "5.1"][: 2 if form in ("flv", "avi", "wmv") else 3]
                layout = "stereo" if name in ("libmp3lame", "mp2", "vorbis") else str(draw.choice(most))
                hertz = 48000 if name in ("libopus", "ac3") else int(draw.choice([44100, 48000]))
                options = {"strict": "experimental", "b": "256000"} if name in ("vorbis", "aac") else {}
                stream = container.add_stream(name, rate=hertz, layout=layout, options=options)
                wave, loudness = tones(draw, 2, hertz, {"mono": 1, "stereo": 2, "5.1": 6}[layout])
                sound = encoded(stream, wave, late)
                middle = float(sound[len(sound) // 2].pts * sound[0].time_base)
                heard = late, late + 2 + hole, middle, hole, loudness
                packets += holed(sound, hole)
        mux(container, packets)
    return path, (stamps - (0 if heard else stamps[0])) / rate, heard


def check_clip(path, begins, heard):
    pictures, times = agreed(path, "video")
    shown = np.round((pictures.mean((1, 2, 3)) - 20) / STEP).astype(int)
    step, seconds = max(np.diff(begins).min(), 0.04), media.clip_seconds(path)
    middles = (np.arange(FRAMES) + 0.5) * seconds / FRAMES
    # muxers without exact stamps, and sound with the encoder's delay before it, move frames; avi by a whole tick
    exact = dict.fromkeys((".mp4", ".mov", ".mkv", ".webm"), 0.002)
    slack = {**exact, ".avi": step + 0.05}.get(path.suffix, 0.09)
    first, last = (np.maximum(np.searchsorted(begins, middles + d, "right") - 1, 0) for d in (-slack, slack))
    assert ((first <= shown) & (shown <= last)).all(), ("frames", shown, first, last)
    assert np.abs(times - begins[shown]).max() < slack + step / 2 + 1e-3, ("times", times, begins[shown])
    if heard is None:
        assert agreed(path, "audio") is None
        return
    wave, (begin, end, middle, hole, loudness) = agreed(path, "audio"), heard
    assert len(wave) / 16000 == pytest.approx(end, abs=0.13), ("length", len(wave) / 16000)
    loud = np.sqrt(np.add.reduceat(wave.astype(float) ** 2, np.arange(0, len(wave) - 800, 800)) / 800 * 2)  # by 50 ms
    at = 0.025 + 0.05 * np.arange(len(loud))
    sounds = (at > begin) & (at < end) & ~((at > middle) & (at < middle + hole))
    clear = np.min([abs(at - edge) for edge in (begin, end, middle, middle + hole)], axis=0) > 0.13
    assert np.median(loud[sounds & clear]) == pytest.approx(loudness, rel=0.06), "loudness"
    assert (loud[~sounds & clear] < 0.05 * loudness).all() and (loud[sounds & clear] > 0.5 * loudness).all(), "place"


# ---------------------------------------------------------------- sounds and pictures


def make_sound(draw, folder, number):
    """A tone of any depth, rate and number of channels; some files of floats go beyond 1. (path, loudness, exact)"""
    form, kind = SOUNDS[draw.integers(len(SOUNDS))].split()
    rate, floats = int(draw.choice([16000, 22050, 44100, 48000])), kind in ("FLOAT", "DOUBLE")
    channels = int(draw.integers(1, 3 if form == "mp3" else 7 if form != "ogg" else 3))
    wave, loudness = tones(draw, draw.uniform(0.3, 2), rate, channels, 4 if floats and draw.random() < 0.5 else 0.9)
    path = folder / f"{number}.{form}"
    soundfile.write(path, wave.T, rate, subtype=kind, format=form.upper())
    return path, min(loudness, 1) if floats else loudness, len(wave[0]) / rate


def check_sound(path, loudness, seconds):
    wave = agreed(path, "audio")
    assert len(wave) / 16000 == pytest.approx(seconds, abs=0.001 if path.suffix != ".mp3" else 0.1)
    middle = wave[1600:-1600].astype(float)
    expected = loudness * np.sin(2 * np.pi * 500 * np.arange(1600, len(wave) - 1600) / 16000)
    assert np.sqrt((middle**2).mean() * 2) == pytest.approx(loudness, rel=0.05)
    assert path.suffix in (".mp3", ".ogg") or np.abs(middle - expected).max() < 0.03


def make_picture(draw, folder, number):
    """A picture of blocks. (path, RGB that it shows, mask that it is or None where blocks are not kept exactly)"""
    colours, clear = draw.integers(0, 256, (7, 7, 4)), draw.random((7, 7)) < 0.4
    colours[draw.random((7, 7)) < 0.3, :3] = 0
    mode = str(draw.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F", "CMYK", "jpg"]))
    forms = ["png", "gif" if mode == "P" else "tif"]
    form = {"jpg": "jpg", "CMYK": "jpg", "F": "tif"}.get(mode) or str(draw.choice(forms))
    blocks = np.kron(colours, np.ones((32, 32, 1), int)).astype(np.uint8)
    opaque = np.kron(~clear, np.ones((32, 32), bool))
    rgb, grey = blocks[..., :3], blocks[..., 0]
    shown, mask, options = np.stack([grey] * 3, 2), grey > 0, {}
    if mode == "1":
        picture, shown = Image.fromarray(mask), np.where(mask[..., None], 255, [0, 0, 0])
    elif mode in ("L", "LA"):
        picture = Image.fromarray(grey)
    elif mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "P":  # each block is one of 32 colours, of which the last is transparent
        palette, index = draw.integers(1, 256, (32, 3)), grey // 8
        picture, opaque, options = Image.fromarray(index, "P"), index != 31, {"transparency": 31}
        picture.putpalette(palette.astype(np.uint8).tobytes())
        shown, mask = palette[index], opaque
    else:
        picture, shown, mask = Image.fromarray(rgb), rgb, rgb.any(2)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(opaque).convert("L"))
    if mode in ("LA", "RGBA", "P"):
        shown, mask = np.where(opaque[..., None], shown, 255), mask & opaque
    turn = int(draw.integers(1, 9))
    if form in ("jpg", "png") and mode != "I;16":
        mark = Image.Exif()
        mark[0x0112], mark[0x0128] = turn, 2
        options["exif"] = mark.tobytes()
        shown = TURNS.get(turn, np.asarray)(shown)
    path = folder / f"{number}.{form}"
    (picture.convert("CMYK") if mode == "CMYK" else picture).save(path, **options)
    return path, shown, None if form in ("jpg", "gif") else mask


def check_picture(path, shown, mask):
    assert np.abs(agreed(path, "image").astype(int) - shown).mean() < (6 if path.suffix == ".jpg" else 0.6)
    pixels = agreed(path, "mask")
    assert mask is None or (pixels == mask).all()


MAKERS = {"clips": (make_clip, check_clip, 120), "sounds": (make_sound, check_sound, 60),
          "pictures": (make_picture, check_picture, 60)}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_made_is_read_as_it_was_made(tmp_path, name):
    make, check, count = MAKERS[name]
    wrong = []
    for seed in range(count):
        path, *truth = make(np.random.default_rng(SEED + seed), tmp_path, seed)
        try:
            check(path, *truth)
        except Exception as error:
            wrong.append((seed, path.name, repr(error)[:400]))
        path.unlink()
    assert not wrong, wrong


# ---------------------------------------------------------------- damage


def damaged(draw, content):
    """Bytes with some of them changed, lost, zero or doubled; half of the time in the headers at the front."""
    size = len(content) if draw.random() < 0.5 else min(len(content), 600)
    content, at = bytearray(content), int(draw.integers(size))
    way = draw.choice(["change", "cut", "zero", "lose", "double"])
    if way == "change":
        for place in draw.integers(0, size, draw.integers(1, 12)):
            content[place] = draw.integers(256)
    elif way == "cut":
        del content[at:]
    elif way == "zero":
        content[at : at + size // 10] = bytes(len(content[at : at + size // 10]))
    elif way == "lose":
        del content[at : at + int(draw.integers(1, 40))]
    else:
        content[at:at] = content[at : at + int(draw.integers(1, 400))]
    return bytes(content)


def decoded(packet):
    """The frames of a packet; none if it is damaged."""
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


def check_damaged(path, kind):
    result = agreed(path, kind)
    if kind == "video" and result is not None:  # each picture is among all that a plain reading gives
        with av.open(str(path), metadata_errors="replace") as container:
            for stream in container.streams.video:
                stream.codec_context.thread_count = 1
            frames = (frame for packet in container.demux(container.streams.video) for frame in decoded(packet))
            every = np.stack([f.to_ndarray(format="rgb24", width=224, height=224)[::8, ::8] for f in frames])
        far = [np.abs(every.astype(int) - picture[::8, ::8]).mean((1, 2, 3)).min() for picture in result[0]]
        assert np.median(far) < 8 and max(far) < 32, far  # a decoder may still correct a frame that it has given out
    return result is not None


def test_reader_and_probe_agree_on_damaged_files(tmp_path):
    draw, wrong, counts = np.random.default_rng(SEED + 1000), [], Counter()
    names = ["clips"] * 24 + ["sounds"] * 14 + ["pictures"] * 14
    whole = [(name, MAKERS[name][0](draw, tmp_path, number)[0]) for number, name in enumerate(names)]
    contents = {path: path.read_bytes() for _, path in whole}
    for seed in range(260):
        name, path = whole[seed % len(whole)]
        path.write_bytes(damaged(draw, contents[path]))
        for kind in {"clips": ("video", "audio"), "sounds": ("audio",), "pictures": ("image", "mask")}[name]:
            try:
                counts[kind, check_damaged(path, kind)] += 1
            except Exception as error:
                wrong.append((seed, path.name, kind, repr(error)[:400]))
    assert not wrong, wrong
    assert min(counts.values()) > 10  # both are seen: files that are refused and files that are read
