"""Weaker bases are the finished base's own training, stopped earlier."""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from crab.models import checkpoint
from crab.models.base import curriculum, train, weaker
from tests.models.test_base import VOCABULARY, section  # noqa: F401  section is a fixture


@pytest.fixture
def base(tmp_path, section):  # noqa: F811
    """A finished base, and copies of its model as it was on the way, by number of steps."""
    on_the_way = {}
    learn = curriculum.train_language_model

    def watched(model, *rest):
        def keep(number, _):
            on_the_way[number] = {name: value.half().float() for name, value in model.state_dict().items()}

        return learn(model, *rest, keep=keep)

    with mock.patch.object(curriculum, "train_language_model", watched):
        model, processor, report = train.make_base(
            None, VOCABULARY, section, code=str, phases=tmp_path / "phases", workers=0
        )
    train.keep(tmp_path / "base", model, processor, report)
    return tmp_path / "base", on_the_way


def make(folder, section, steps, code=str):  # noqa: F811
    return weaker.make_weaker(folder, steps, section, code=code, phases=folder.parent / "weaker", workers=0)


def test_they_are_the_states_of_the_finished_training(base, section):  # noqa: F811
    folder, on_the_way = base
    reports = make(folder, section, [2, 6])
    for number, report in reports.items():
        model, _ = checkpoint.load_base(checkpoint.weaker_folder(folder, number))
        assert all(torch.equal(value, on_the_way[number][name]) for name, value in model.state_dict().items())
        assert [record["step"] for record in report["history"]] == list(range(2, number + 1, 2))
        assert set(report["gates"]) and report["steps"] == number
        own = load_file(checkpoint.weaker_folder(folder, number) / weaker.OWN)
        assert own and not any(name.startswith(("visual", "audio_tower")) for name in own), "kept twice"
    assert checkpoint.base_digest(checkpoint.weaker_folder(folder, 2)) != checkpoint.base_digest(folder)
    with mock.patch.object(curriculum, "train_language_model", side_effect=AssertionError("trained again")):
        assert make(folder, section, [2, 6]) == reports
    again = make(folder, section, [2], code=lambda name: f"new {name}")
    assert again[2]["key"] != reports[2]["key"] and again[2]["history"] == reports[2]["history"]


@pytest.mark.parametrize(("asked", "kept"), [([2, 6], {2}), ([6], set())])
def test_a_killed_one_goes_on_and_more_may_be_asked_for_then(base, section, asked, kept):  # noqa: F811
    """Killed at the third look: at 2 the second one is that of its gates; without them it is past 4 then."""
    folder, on_the_way = base
    killed = mock.Mock(wraps=curriculum.probe_accuracy, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(curriculum, "probe_accuracy", killed), pytest.raises(KeyboardInterrupt):
        make(folder, section, asked)
    assert {number for number in (2, 6) if checkpoint.weaker_folder(folder, number).is_dir()} == kept
    assert set(make(folder, section, [2, 6])) == {2, 6}
    for number in (2, 6):
        model, _ = checkpoint.load_base(checkpoint.weaker_folder(folder, number))
        assert all(torch.equal(value, on_the_way[number][name]) for name, value in model.state_dict().items())
    assert asked != [2, 6] or not list((folder.parent / "weaker").iterdir())


@pytest.mark.parametrize("number", [3, 8, 0])
def test_a_number_of_steps_at_which_nothing_can_be_kept_is_named(base, section, number):  # noqa: F811
    with pytest.raises(ValueError, match=rf"base.weaker: {number} cannot be kept; give multiples of .*\(2\)"):
        make(base[0], section, [number])
