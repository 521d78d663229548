"""Weaker bases are the finished base's own training, stopped earlier."""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from crab.core.files import read_json
from crab.models import checkpoint
from crab.models.base import curriculum, train, weaker
from tests.models.test_base import VOCABULARY, equal, section  # noqa: F401  section is a fixture


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


def test_a_killed_one_goes_on(base, section):  # noqa: F811
    folder, on_the_way = base
    killed = mock.Mock(wraps=curriculum.probe_accuracy, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(curriculum, "probe_accuracy", killed), pytest.raises(KeyboardInterrupt):
        make(folder, section, [2, 6])  # at 2, the second look is that of its gates
    assert read_json(checkpoint.weaker_folder(folder, 2) / checkpoint.RECORD)["steps"] == 2
    make(folder, section, [2, 6])
    model, _ = checkpoint.load_base(checkpoint.weaker_folder(folder, 6))
    assert all(torch.equal(value, on_the_way[6][name]) for name, value in model.state_dict().items())
    assert not list((folder.parent / "weaker").iterdir())


def test_more_that_are_asked_for_after_a_kill_are_kept_too(base, section):  # noqa: F811
    folder, on_the_way = base
    killed = mock.Mock(wraps=curriculum.probe_accuracy, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(curriculum, "probe_accuracy", killed), pytest.raises(KeyboardInterrupt):
        make(folder, section, [6], code=lambda name: "newer")  # after step 4, past the one that is asked for next
    assert set(make(folder, section, [2, 6], code=lambda name: "newer")) == {2, 6}
    model, _ = checkpoint.load_base(checkpoint.weaker_folder(folder, 2))
    assert all(torch.equal(value, on_the_way[2][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("number", [3, 8, 0])
def test_a_number_of_steps_at_which_nothing_can_be_kept_is_named(base, section, number):  # noqa: F811
    with pytest.raises(ValueError, match=rf"base.weaker: {number} cannot be kept; give multiples of .*\(2\)"):
        make(base[0], section, [number])


def test_equal_is_what_it_says(base):
    one, _ = checkpoint.load_base(base[0])
    two, _ = checkpoint.load_base(base[0])
    assert equal(one, two)
    next(two.parameters()).data.add_(1)
    assert not equal(one, two)
