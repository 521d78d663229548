"""Parameters: what is unknown, missing or of another kind is refused before anything runs."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_notebook
from toys import code, write_notebook

from crab.pipeline import params

NULL = object()  # null in the file; None here stands for a parameter that is not there


def test_section_joins_stage_method_and_profile(repository):
    values = params.section(params.load(repository), "tiny", "stage", "ilora")
    assert values == {
        "profile": "tiny", "passes": 8, "rate": 1, "method": "ilora", "settings": {"r": 4, "num_heads": 3},
    }  # fmt: skip


def test_numbers_are_read_as_dvc_reads_them(repository):
    assert params.section(params.load(repository), "smoke", "stage")["rate"] == 0.005


@pytest.mark.parametrize(
    ("profile", "stage", "method", "said"),
    [
        ("tinny", "stage", None, "did you mean 'tiny'"),
        ("tiny", "stag", None, "did you mean 'stage'"),
        ("tiny", "stage", "ilorra", "did you mean 'ilora'"),
        ("smoke", "stage", "ilora", "profiles.smoke.methods"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(repository, profile, stage, method, said):
    with pytest.raises(ValueError, match=said):
        params.section(params.load(repository), profile, stage, method)


@pytest.mark.parametrize("text", ["profile: [", "profiles: {}", "profile: x\nprofiles: {y: {}}", ""])
def test_malformed_files_are_refused(repository, text):
    (repository / "params.yaml").write_text(text)
    with pytest.raises(ValueError, match="params.yaml"):
        params.load(repository)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        params.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pases": 8, "passes": None}, r"toy.ipynb, profile tiny: parameter 'pases' is unknown; did you mean 'passes'"),
        ({"passes": None}, "'passes' is missing"),
        ({"extra": 1}, "'extra' is unknown"),
        ({"passes": "8"}, "expected int"),
        ({"passes": True}, "expected int"),
        ({"passes": 8.5}, "expected int"),
        ({"rate": "5e-3"}, "expected float"),
        ({"slots": "ave"}, "expected list"),
        ({"slots": NULL}, "parameter 'slots' is None; expected list, such as"),
        ({"slots": []}, "parameter 'slots' is an empty list; give at least one, such as 'ave'"),
        ({"passes": 0}, "parameter 'passes' is 0; give a number of at least 1"),
        ({"rate": -0.1}, "parameter 'rate' is -0.1; give a number of at least 0"),
        ({"rate": float("nan")}, "parameter 'rate' is nan"),
        ({"evaluate": {"segmenter": "grabcat"}}, "parameter 'evaluate.segmenter' is 'grabcat'; give 'grabcut', or a SAM 2 checkpoint"),
        ({"evaluate": {"segmentor": "grabcut"}}, "parameter 'evaluate.segmentor' is unknown; did you mean 'segmenter'"),
        ({"evaluate": {}}, "parameter 'evaluate.segmenter' is missing"),
        ({"evaluate": {"segmenter": 2}}, "parameter 'evaluate.segmenter' is 2; expected str"),
        ({"settings": {"deep": [1, {"r": -4}]}}, r"parameter 'settings.deep\[\].r' is -4; give a number of at least 0"),
    ],
)
def test_check_refuses(repository, change, said):
    good = {"profile": "tiny", "passes": 8, "rate": 0.1, "slots": ["ave"], "settings": {"r": 1}, "evaluate": {"segmenter": "grabcut"}}
    path = write_notebook(repository, "toy", good)
    params.check(path, good)
    params.check(path, good | {"settings": {"rank": 1}})  # its keys are the user's
    bad = {k: None if v is NULL else v for k, v in {**good, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=said):
        params.check(path, bad)


def test_check_takes_a_whole_number_for_a_real_one_anything_for_none_and_checkpoints_by_name_or_folder(repository):
    path = write_notebook(repository, "toy", {"profile": "tiny", "rate": 0.1, "limit": None, "segmenter": "grabcut"})
    for name in ("grabcut", "facebook/sam2.1-hiera-large", "/data/sam2"):
        params.check(path, {"profile": "tiny", "rate": 1, "limit": 5, "segmenter": name})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("methods: {lora: {r: 4}, ilora: {r: 4, num_heads: 3}}", None),
        ("methods: {lora: {r: 4}, ilora: null}", "stage.ipynb, profile tiny: parameter 'settings' is None"),
        ("stag: {}", "profiles.tiny.stag is the section of no notebook; did you mean 'stage'"),
        ("stage: null", "profiles.tiny.stage is None; give the parameters of stage.ipynb"),
        ("stage: {passes: 8, rate: -1}", "parameter 'rate' is -1"),
    ],
)
def test_all_sections_of_the_chosen_profile_are_checked(repository, monkeypatch, change, said):
    write_notebook(repository, "stage", {"profile": "tiny", "passes": 1, "rate": 0.1, "method": "lora", "settings": {"r": 1}})
    text = (repository / "params.yaml").read_text()
    head, name = text.partition("  tiny:\n")[0], change.partition(":")[0]
    lines = {"stage": "stage: {passes: 8, rate: 1}", "methods": "methods: {lora: {r: 4}}", name: change}
    (repository / "params.yaml").write_text(head + "  tiny:\n" + "".join(f"    {line}\n" for line in lines.values()))
    monkeypatch.chdir(repository)
    if said is None:
        params.main(["check"])
    else:
        with pytest.raises(SystemExit, match=said):
            params.main(["check"])


@pytest.mark.parametrize("cells", [[], [code("a = 1", "parameters"), code("b = 1", "parameters")], [code("a = f()", "parameters")], [code("import os", "parameters")]])
def test_parameters_cell_must_be_one_and_plain(tmp_path, cells):
    nbformat.write(new_notebook(cells=cells), tmp_path / "toy.ipynb")
    with pytest.raises(ValueError, match="toy.ipynb"):
        params.defaults(tmp_path / "toy.ipynb")


def test_choose_changes_one_word(repository):
    before = (repository / "params.yaml").read_text()
    params.choose("smoke", repository)
    assert (repository / "params.yaml").read_text() == before.replace("profile: tiny  # chosen", "profile: smoke  # chosen")
    with pytest.raises(ValueError, match="did you mean 'smoke'"):
        params.choose("smok", repository)


def test_defaults_are_written_into_the_cell(repository):
    path = write_notebook(repository, "stage", {"profile": "tiny", "passes": 1, "old": 0})
    assert params.write_defaults(repository) == ["stage.ipynb"]
    assert params.defaults(path) == {"profile": "tiny", "passes": 8, "rate": 1}
    assert params.write_defaults(repository) == []
