"""Figures are files that two equal drawings share, and are shown at half their pixels."""

import PIL.Image
import pytest

from crab.study import figures


def drawn(path, value=1):
    figure, axes = figures.subplots(figsize=(2, 1))
    axes.plot([0, value])
    return figures.save(figure, path)


def test_equal_figures_are_equal_files_and_others_are_not(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        drawn(tmp_path / f"{name}.png", value)
    first, second, third = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second != third


def test_a_figure_is_shown_at_half_its_pixels_and_others_as_they_are(tmp_path):
    image = drawn(tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as figure:
        assert figure.size == (440, 220)  # two inches by one
    assert image._repr_mimebundle_()[1]["image/png"] == {"width": 220, "height": 110}
    PIL.Image.new("RGB", (30, 20)).save(tmp_path / "other.png")
    assert not figures.image(tmp_path / "other.png")._repr_mimebundle_()[1].get("image/png")
    with pytest.raises(FileNotFoundError):
        figures.image(tmp_path / "none.png")
