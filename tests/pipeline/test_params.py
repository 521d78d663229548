"""Parameters: what is unknown, missing or wrong is refused before anything runs, and the message says how to fix it."""

import re

import nbformat
import pytest
from nbformat.v4 import new_notebook
from toys import REPOSITORY, code, write_notebook

from crab.pipeline import params, stages
from crab.pipeline.__main__ import main


def change(contents, place, value):
    """Set one value of params.yaml; ``...`` takes it out."""
    *keys, last = place.split(".")
    for key in keys:
        contents = contents[key]
    contents[last] = value
    if value is ...:
        del contents[last]


def resolve(profile="tiny"):
    return params.resolve(REPOSITORY, profile)


def test_a_profile_changes_what_it_names_and_replaces_maps_whose_keys_the_user_chooses(loaded):
    methods = {"lora": {"r": 2, "lora_alpha": 4, "runs": ["joint-bare"]}}
    train = {"rates": {"extend": 9}, "methods": methods, "given_rates": None}
    change(loaded, "profiles.smoke", {"train": train, "encode": {"slots": ["ks"]}})
    default, smoke = resolve("tiny"), resolve("smoke")
    assert list(default["train"]["methods"]) == ["lora", "lora_matched", "ilora"] and default["train"]["given_rates"]
    assert smoke["train"] == {**default["train"], **train, "rates": {**default["train"]["rates"], "extend": 9}}
    assert smoke["encode"] == {**default["encode"], "slots": ["ks"]}
    assert all(smoke[name] == default[name] for name in default if name not in ("profile", "train", "encode"))


def test_a_map_takes_from_the_experiments_what_it_leaves_out(loaded):
    own = {"slots": ["ks"], "rank": 4, "seeds": 7}
    change(loaded, "experiments.maps", {"short": {"rank": [1, 2]}, "own": own})
    change(loaded, "profiles.smoke", {"experiments": {"passes": 5}})
    plan = resolve()["experiments"]
    rest = {name: plan[name] for name in ("slots", "passes", "seeds")}
    rest |= {"samples": None, "conventions": 1, "routed": None}
    assert plan["maps"]["short"] == {**rest, "tasks": len(plan["slots"]), "rank": [1, 2]}
    assert plan["maps"]["own"] == {**rest, "tasks": 1, **own}
    assert resolve("smoke")["experiments"]["maps"]["short"]["passes"] == 5


def test_numbers_are_read_as_dvc_reads_them(repository):
    path = repository / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("margin: 0.02", "margin: 5e-3"), encoding="utf-8")
    assert params.resolve(repository)["shared"]["margin"] == 0.005


@pytest.mark.parametrize("text", ["profile: [", "profiles: {}", "profile: x\nprofiles: {y: {}}", "", None])
def test_a_malformed_or_missing_file_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="params.yaml: " + ("no such file" if text is None else "")):
        params.load(tmp_path)


WRONG = [
    ("train.pases", 8, "train.pases is unknown"),
    ("shared.answer.segmentor", "grabcut", "shared.answer.segmentor is unknown"),
    ("experiments.maps.conflict.ranks", 1, "experiments.maps.conflict.ranks is unknown"),
    ("train.passes", ..., "train.passes is missing; add it"),
    ("benchmark.sweep.at", ..., "benchmark.sweep.at is missing"),
    ("train.passes", "8", "train.passes is '8'; it should be a valid integer"),
    ("train.passes", True, "train.passes is True"),
    ("train.passes", 8.5, "train.passes is 8.5"),
    ("train.passes", 0, "train.passes is 0; it should be greater than or equal to 1"),
    ("train.methods.ilora.num_heads", -3, "train.methods.ilora.num_heads is -3; give finite numbers of at least 0"),
    ("train.methods.lora.runs", ["both-bare"], "train.methods.lora.runs.0 is 'both-bare'; it should be 'single-bare'"),
    ("train.methods.lora.runs", [], "train.methods.lora.runs is []; give at least 1"),
    ("train.rates.tried", [0.01, 0.0], "train.rates.tried.1 is 0.0; it should be greater than 0"),
    ("shared.margin", "5e-3", "shared.margin is '5e-3'"),
    ("shared.margin", float("nan"), "shared.margin is nan; it should be a finite number"),
    ("shared.precision", "fp16", "shared.precision is 'fp16'; it should be 'fp32' or 'bf16'"),
    ("shared.answer.segmenter", "grabcat", "shared.answer.segmenter is 'grabcat'; give 'grabcut', or a SAM 2"),
    ("train.methods.lora.targets", "all", "lora.targets is 'all'; it should be 'language' or 'published'"),
    ("train.methods.lora.targets", "published", "encode.cache is true, but train.methods.lora adapts the encoders"),
    ("train.methods.ilora.weights", "/a.bin", "encode.cache is true, but train.methods.ilora adapts the encoders"),
    ("train.methods.lora_matched.weights", "/a.bin", "train.methods.lora_matched.weights is a published I-LoRA"),
    ("encode.slots", "ave", "encode.slots is 'ave'; it should be a valid list"),
    ("encode.slots", [], "encode.slots is []"),
    ("encode.slots", ["avee"], "encode.slots.0 is 'avee'; it should be 'ave', 'unav'"),
    ("build.raw", {"avee": "/data"}, "build.raw.avee is 'avee'; it should be 'ave', 'unav'"),
    ("base.folder", "../models", "base.folder is '../models'"),
    ("experiments.variants", {"own": {"r": [1, -2]}}, "experiments.variants.own.r is [1, -2]"),
    ("experiments.maps.conflict.rank", [], "experiments.maps.conflict.rank is []; give a whole number"),
    ("experiments.maps.conflict.passes", [0], "conflict.passes is [0]; give finite numbers of at least 1"),
    ("experiments.maps", None, "experiments.maps is None"),
    ("benchmark.shapes", [[1, 2, 3]], "benchmark.shapes.0 is [1, 2, 3]"),
    ("routing", None, "routing is None"),
    ("strength.as_many_steps", [{"steps": None, "rank": 9}], "which is no point of strength.steps and strength.ranks"),
    ("strength.others", {"x": "stdy"}, "strength.others.x is 'stdy', which is no profile; did you mean 'study'?"),
    (
        "transfer.rival",
        "lora_mached",
        "transfer.rival is 'lora_mached', which is not run; did you mean 'lora_matched'?",
    ),
    ("transfer.baseline", "single-ilora-bare", "transfer.baseline is 'single-ilora-bare', which is not run"),
    ("train.given_rates.lora", {"single-bare": 0.1}, "train.given_rates.lora has no rate of joint-bare; add it, or"),
    (
        "train.given_rates.lora.joint-explicit",
        0.1,
        "lora.joint-explicit is the rate of a run that train.methods has not",
    ),
    ("train.methods.dora", {"r": 1, "lora_alpha": 2, "runs": ["joint-bare"]}, "train.methods.dora unknown method"),
    ("experiments.variants.ilora.method", "lra", "experiments.variants.ilora.method is 'lra'; did you mean 'lora'?"),
    ("experiments.variants.ilora.method", ..., "experiments.variants.ilora.method is missing; give lora or ilora"),
    ("experiments.variants.ilora.form", ["bare", "short"], "experiments.variants.ilora.form is 'short'; known: bare"),
    ("experiments.baseline", "owm", "experiments.baseline is 'owm', which is no variant; did you mean 'own'?"),
    ("extra", {"a": 1}, "extra is unknown; known: base, benchmark"),
]
#: Options of adapters, which PEFT knows.
OPTIONS = [
    (
        "train.methods.ilora.routr",
        "uniform",
        "train.methods.ilora: ilora: option 'routr' is unknown; did you mean 'router'?",
    ),
    ("train.methods.ilora.num_heads", 0, "train.methods.ilora: ILoraConfig: `num_heads` must be a whole number"),
    (
        "experiments.variants.ilora.gian",
        2,
        "experiments.variants.ilora: ilora: option 'gian' is unknown; see ILoraConfig",
    ),
    ("experiments.routed.new", {"shared_a": False}, "experiments.routed.new: ilora: option 'shared_a' is unknown"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_what_is_wrong_is_refused(loaded, place, value, message):
    change(loaded, place, value)
    with pytest.raises(ValueError, match="^params.yaml, profile tiny: ") as error:
        resolve()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"), [("train.passes", "train.pases"), ("routing", "rooting"), ("base.size.n_fft", "base.size.nfft")]
)
def test_a_misspelt_name_is_told_with_the_nearest(loaded, old, new):
    change(loaded, old, ...)
    change(loaded, new, 1)
    meant = old.rpartition(".")[2]
    with pytest.raises(ValueError, match=re.escape(f"{new} is unknown; did you mean '{meant}'?")):
        resolve()
    with pytest.raises(ValueError, match="profile 'tinny' is unknown; did you mean 'tiny'"):
        resolve("tinny")


@pytest.mark.parametrize(("place", "value", "message"), OPTIONS)
def test_wrong_options_of_adapters_are_refused_before_anything_runs(loaded, place, value, message):
    change(loaded, place, value)
    (line,) = set(stages._wrong_options(resolve()))  # of each run of a method
    assert line.startswith("params.yaml, profile tiny: ") and message in line


def test_the_options_of_all_profiles_are_known(loaded):
    assert not [line for name in loaded["profiles"] for line in stages._wrong_options(resolve(name))]


@pytest.mark.parametrize("name", ["../x", "a/b", "my profile"])
def test_a_profile_has_the_name_of_a_folder(loaded, name):
    loaded["profiles"][name] = {}
    with pytest.raises(
        ValueError, match=f"params.yaml: profiles: '{re.escape(name)}' is no name of a folder; use letters"
    ):
        resolve()


def test_an_empty_profile_is_the_default(loaded):
    change(loaded, "profiles.smoke", None)
    assert resolve("smoke") == {**resolve(), "profile": "smoke"}


def test_all_faults_are_told_at_once(loaded):
    change(loaded, "train.passes", 0)
    change(loaded, "profiles.smoke", {"shared": {"margin": -1}})
    with pytest.raises(ValueError, match="smoke: shared.margin is -1; .*\n.* smoke: train.passes is 0;"):
        resolve("smoke")


def test_whole_numbers_stand_for_real_ones_and_checkpoints_have_a_slash(loaded):
    change(loaded, "shared.margin", 1)
    for name in ("grabcut", "facebook/sam2.1-hiera-large", "/data/sam2"):
        change(loaded, "shared.answer.segmenter", name)
        assert resolve()["shared"]["answer"]["segmenter"] == name


def test_a_prompts_file_is_checked_before_anything_runs_and_its_words_count(repository):
    path = repository / "params.yaml"
    text = path.read_text(encoding="utf-8").replace("prompts: null", "prompts: mine.yaml")
    path.write_text(text.replace("slots: null\n  compatibility", "slots: [ks]\n  compatibility"), encoding="utf-8")
    files = []
    for line in ("", 'ave: {question: "?"}', 'ks: {question: "{colour}?"}', 'ks: {question: "Why?"}'):
        (repository / "mine.yaml").write_text(line, encoding="utf-8")
        try:
            stages.resolve(repository)
            files.append((repository / ".stage/encode.json").read_text(encoding="utf-8"))
        except ValueError as error:
            files.append(str(error))
    messages = ("mine.yaml: holds no slots", "slot ks: there is no entry", "slot ks: field 'question' quotes")
    assert all(message in file for message, file in zip(messages, files, strict=False)) and "Why?" in files[3]


def test_choose_changes_one_word(repository, monkeypatch):
    monkeypatch.chdir(repository)
    before = (repository / "params.yaml").read_bytes()
    main(["choose", "smoke"])
    assert (repository / "params.yaml").read_bytes() == before.replace(b"profile: tiny\n", b"profile: smoke\n", 1)
    with pytest.raises(SystemExit, match="did you mean 'smoke'"):
        main(["choose", "smok"])


def test_a_cell_gets_its_section_and_the_shared_values_it_names(repository):
    values = resolve("smoke")
    path = write_notebook(repository, "routing", {"answer": 0, "profile": "", "samples": 0})
    cell_values = params.parameters(path, params.read_notebook(path), "routing", values)
    assert list(cell_values.items()) == [("answer", values["shared"]["answer"]), ("profile", "smoke"), ("samples", 8)]
    # of two values of one name, the section's
    path = write_notebook(repository, "benchmark", dict.fromkeys(["profile", *values["benchmark"]], 0))
    assert params.parameters(path, params.read_notebook(path), "benchmark", values)["batch_size"] == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("profile", "'samples' is missing in the parameters cell; run python -m crab.pipeline defaults"),
        ("samples", "'profile' is missing"),
        ("profile samples resample", "'resample' .* not in section routing of params.yaml; did you mean 'resamples'"),
    ],
)
def test_a_cell_that_does_not_fit_is_refused(repository, names, message):
    write_notebook(repository, "routing", dict.fromkeys(names.split(), 1))
    with pytest.raises(ValueError, match=f"09_routing.ipynb: {message}"):
        stages.resolve(repository)


@pytest.mark.parametrize("cells", [[], ["a = 1", "b = 1"], ["a = f()"], ["import os"]])
def test_the_parameters_cell_must_be_one_and_plain(tmp_path, cells):
    notebook = new_notebook(cells=[code(cell, "parameters") for cell in cells])
    with pytest.raises(ValueError, match="toy.ipynb"):
        params.cell(tmp_path / "toy.ipynb", notebook)


def test_defaults_are_written_into_the_cell(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    path = write_notebook(repository, "benchmark", {"profile": "x", "resamples": 1, "old": 0})
    main(["defaults"])
    assert capsys.readouterr().out == "changed: 11_benchmark.ipynb\n"
    values = params.resolve(repository, "tiny")
    target, cell_values = params.cell(path, params.read_notebook(path))
    assert cell_values == {"profile": "tiny", "resamples": values["shared"]["resamples"], **values["benchmark"]}
    assert max(map(len, target.source.splitlines())) <= 120 and "'" not in target.source
    assert params.write_defaults(repository) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("04_trian.ipynb", "no stage 'trian'; did you mean 'train'"),
        ("12_train.ipynb", "04_train.ipynb is the same stage"),
    ],
)
def test_notebooks_belong_to_one_stage_each(repository, name, message):
    (repository / "notebooks/ask.ipynb").write_text("no stage", encoding="utf-8")
    assert list(params.notebooks(repository)) == params.STAGES
    nbformat.write(new_notebook(), repository / "notebooks" / name)
    with pytest.raises(ValueError, match=message):
        params.notebooks(repository)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "cells": [\n<<<<<<< HEAD\n', ": line 3 is a merge's mark, '<<<<<<< HEAD'; resolve the conflict there"),
        (b'{"cells": [\r\n]\r\n>>>>>>> topic\r\n', ": line 3 is a merge's mark, '>>>>>>> topic'; resolve"),
        (b'{"cells":\n [], }', ", line 2: not a notebook (Expecting property name"),
        (b"", ", line 1: not a notebook (Expecting value"),
        (b"[]", ": not a notebook ("),
        ('{"cells": "ä"}'.encode("latin-1"), ": not a notebook ('utf-8' codec can't decode"),
    ],
)
def test_a_broken_notebook_is_named_with_the_line(repository, content, message):
    (repository / "notebooks/05_evaluate.ipynb").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape("05_evaluate.ipynb" + message)):
        stages.resolve(repository)


def test_a_missing_notebook_is_named(repository):
    (repository / "notebooks/05_evaluate.ipynb").unlink()
    with pytest.raises(ValueError, match="no notebook NN_evaluate.ipynb"):
        stages.resolve(repository)
