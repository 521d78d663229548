"""Media made by PyAV's encoders and muxers, and what reader and probe say of a file, for the tests of readers."""

from fractions import Fraction

import av
import numpy as np
import pytest

from crab.data import media, probe
from crab.data.media import MediaError

FRAMES = 6  # taken of each clip
READ = {
    "video": lambda path: media.read_video(path, FRAMES), "audio": media.read_audio,
    "image": media.read_image, "mask": media.read_mask,
}  # fmt: skip


def agreed(path, kind):
    """What the reader gives, or None if it refuses the file; probe and reader agree on that and on the length."""
    quick, whole = (probe.probe(str(path), f"{way}{kind}") for way in ("", "whole "))
    try:
        result = READ[kind](path)
    except MediaError as error:
        assert whole.problem and "; " in str(error), (error, whole)
        return None
    # a clip may be damaged in frames that are not taken
    assert not quick.problem and (not whole.problem or "breaks off inside" in whole.words), (quick, whole)
    if kind == "video":
        assert quick.seconds == pytest.approx(media.clip_seconds(path), abs=1e-3), quick
        assert result[0].shape == (FRAMES, 224, 224, 3) and result[0].dtype == np.uint8
        assert (np.diff(result[1]) >= 0).all() and 0 <= result[1][0] and result[1][-1] <= quick.seconds
    elif kind == "audio":
        assert quick.seconds == pytest.approx(len(result) / 16000, abs=0.07)
        assert len(result) == round(whole.seconds * 16000)
        assert result.dtype == np.float32 and np.abs(result).max() <= 1.03
    return result


def blocks(count, size=224):
    """Frames of coloured blocks of 16 pixels, each frame different."""
    colours = np.random.default_rng(0).integers(40, 200, (count, size // 16, size // 16, 3))
    return np.repeat(np.repeat(colours, 16, 1), 16, 2).astype(np.uint8)


def grey(level):
    return np.full((48, 64, 3), level, np.uint8)


def tone(seconds, rate=16000):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def film(stream, pictures, stamps, rate):
    """Packets of pictures that begin at time stamps in units of 1 / rate s."""
    stream.height, stream.width = pictures[0].shape[:2]
    stream.pix_fmt = "yuvj420p" if stream.codec_context.name == "mjpeg" else "yuv420p"
    packets = []
    for picture, stamp in zip(pictures, stamps, strict=True):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = int(stamp), Fraction(1, rate)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def encoded(stream, wave, begin=0):
    """Packets of a wave [channels, samples] that begins at a second."""
    context, rate = stream.codec_context, stream.rate
    frame = av.AudioFrame.from_ndarray(wave.astype(np.float32), format="fltp", layout=context.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(begin * rate), Fraction(1, rate)
    cut = av.AudioResampler(context.format, context.layout, rate, frame_size=context.frame_size or 1024)
    return [p for part in [*cut.resample(frame), *cut.resample(None), None] for p in stream.encode(part)]


def holed(packets, hole):
    """The packets with a hole of some seconds in their middle, as if the recorder had stopped for a while."""
    for packet in packets[len(packets) // 2 :]:
        packet.pts, packet.dts = (stamp + round(hole / packet.time_base) for stamp in (packet.pts, packet.dts))
    return packets


def mux(container, packets):
    for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
        container.mux(packet)


def muxed(path, pictures=(), stamps=None, sound=None, still=False, rate=10, codec="libx264", **options):
    """A clip of pictures and sound: (codec, wave, rate, layout, begin, hole). A still picture may stand before both."""
    with av.open(str(path), "w") as container:
        packets = film(container.add_stream("mjpeg", rate=1), [grey(255)], [0], 1) if still else []
        if len(pictures):
            stamps = range(len(pictures)) if stamps is None else stamps
            packets += film(container.add_stream(codec, rate=rate, options=options), pictures, stamps, rate)
        if sound:
            name, wave, hertz, layout, begin, hole = sound
            stream = container.add_stream(name, rate=hertz, layout=layout, options={"b": "256000"})
            packets += holed(encoded(stream, wave, begin), hole)
        mux(container, packets)
    return path


def remux(source, target, start=0.0, end=np.inf, **options):
    """Copy packets between two times without decoding them. They begin at a key frame; an edit list hides the rest."""
    with av.open(str(source)) as old, av.open(str(target), "w", **options) as new:
        stream = old.streams[0]
        into = new.add_stream_from_template(stream)
        old.seek(int(start * 1e6))
        for packet in old.demux(stream):
            if packet.dts is not None and packet.pts * stream.time_base < end:
                packet.pts, packet.dts = (stamp - int(start / stream.time_base) for stamp in (packet.pts, packet.dts))
                packet.stream = into
                new.mux(packet)
    return target
