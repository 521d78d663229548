"""Pages for readers: what a page opens with, the front page, names for people, tables and pictures."""

import base64
import html
import json
import re
from itertools import pairwise

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from PIL import Image
from toys import PIXEL, REPOSITORY, code

from crab.pipeline import front, outputs, params, report

OPENING = "# Toy: does it help?\n\n**Question.** Is it so?\n\nHow it is done.\n\n**Bad news would be** no."
BYTES = base64.b64decode(PIXEL)


def executed(repository, stage, *cells):
    """Put an executed notebook of a stage, and the same without outputs, where the report looks for them."""
    run = new_notebook(cells=list(cells), metadata={"crab": {"seconds": 200.0, "peak_gib": 0.25}})
    target = repository / "reports/tiny" / stage / "notebook.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(run, target)
    (now,) = (repository / "notebooks").glob(f"*_{stage}.ipynb")
    nbformat.write(run, now)
    return target


def shows(source, data, *tags):
    cell = code(source, *tags)
    cell.outputs = [new_output("display_data", data)]
    return cell


@pytest.fixture
def written(repository):
    """A report with two pages; the first has a figure for the front page."""
    figure = repository / "reports/tiny/transfer/figures/rates.png"
    figure.parent.mkdir(parents=True)
    figure.write_bytes(BYTES)
    came = shows("a", {"text/markdown": "joint-ilora-bare gains on 3 of 4. It is +0.1. It is more."}, "answer")
    executed(
        repository, "transfer", new_markdown_cell(OPENING), code("import a"), came,
        shows("b", {"image/png": PIXEL}, "leading"), code("print('details')"),
    )  # fmt: skip
    executed(repository, "routing", new_markdown_cell("# Routing: which?"), code("1"))
    report.write(repository, "tiny")
    return repository / "reports/tiny"


@pytest.mark.parametrize("profile", ["tiny", "study", "bridge"])
def test_the_front_pages_in_git_show_what_strength_says_now(profile):
    _, entry = report._everywhere(REPOSITORY, params.notebooks(REPOSITORY))
    index = html.unescape(text_of((REPOSITORY / "reports" / profile / "index.html").read_text(encoding="utf-8")))
    assert front.sentences(entry.answer).replace("**", "") in index


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_a_page_opens_with_what_it_asks_what_came_out_and_what_would_be_bad_news(written):
    html = (written / "pages/transfer.html").read_text(encoding="utf-8")
    text = text_of(html)
    came = "What came out. I-LoRA gains on 3 of 4."
    parts = ["Toy: does it help?", "Question. Is it so?", came, "Bad news would be no", "How it is done."]
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and text.count("gains on 3") == 1
    assert html.count("<summary>") == 2  # code without outputs is joined with the next one


def test_the_front_page_starts_with_the_finding_and_its_figure(written):
    html = (written / "index.html").read_text(encoding="utf-8")
    text = text_of(html)
    assert text.index("Is it so?") < text.index("I-LoRA gains on 3 of 4.") < text.index("Routing: which?")
    assert 'src="transfer/figures/rates.png"' in html and 'href="pages/routing.html"' in html
    assert "details" not in text and "joint-ilora" not in text and "3 min, at most 0.2 GiB" in text
    assert "What it is made of" not in text  # no stage that a card needs has run
    assert (written / "pages/style.css").is_file() and 'href="pages/style.css"' in html
    again = report.write(written.parents[1], "tiny").read_text(encoding="utf-8")
    assert again == html


def test_every_front_page_shows_where_joint_training_hurts_and_links_to_its_report(written):
    reports = written.parent
    figure = reports / "strength/strength/figures/strength.png"
    figure.parent.mkdir(parents=True)
    figure.write_bytes(BYTES)
    run = new_notebook(cells=[
        new_markdown_cell("# Strength: where?"), shows("a", {"text/markdown": "At rank 1. It is."}, "answer"),
        shows("b", {"image/png": PIXEL}, "leading"),
    ])  # fmt: skip
    nbformat.write(run, reports / "strength/strength/notebook.ipynb")
    html = report.write(reports.parent, "tiny").read_text(encoding="utf-8")
    text = text_of(html)
    assert text.index("I-LoRA gains on 3") < text.index("Strength: where?") < text.index("At rank 1. It is.")
    assert 'src="../strength/strength/figures/strength.png"' in html and 'href="../strength/index.html"' in html


def test_a_card_has_a_number_of_a_metrics_file_and_a_small_picture(written):
    for folder in ("build", "evaluate"):
        (written / folder / "figures").mkdir(parents=True)
    Image.new("RGB", (3000, 2000), "red").save(written / "build/figures/samples.png")
    Image.new("RGB", (3000, 2000), "red").save(written / "evaluate/figures/scores.png")
    (written / "build/metrics.json").write_text('{"records": 12620}', encoding="utf-8")
    cells = [{"seed": seed, "slots": ["ave", "ks"]} for seed in (0, 1)]
    (written / "train").mkdir()
    (written / "train/cells.json").write_text(json.dumps(cells), encoding="utf-8")
    html = report.write(written.parents[1], "tiny").read_text(encoding="utf-8")
    text = text_of(html)
    assert "12,620 samples" in text and "2 adapters: single-task and joint ones, 2 slots, 2 seeds" in text
    assert html.count('class="card"') == 2
    with Image.open(written / "pages/card-data.png") as picture:
        assert max(picture.size) <= front.WIDTH
    Image.new("RGB", (1760, 176), "red").save(written / "evaluate/figures/scores.png")  # that there is nothing to draw
    assert report.write(written.parents[1], "tiny").read_text(encoding="utf-8").count('class="card"') == 1
    (written / "build/metrics.json").write_text('{"records": 12', encoding="utf-8")
    with pytest.raises(ValueError, match="build/metrics.json: malformed JSON at line 1"):
        report.write(written.parents[1], "tiny")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joint-lora-bare vs single-lora-bare", "joint LoRA minus single-task LoRA"),
        ("`joint-ilora-explicit`: 0.01", "`I-LoRA + reasoning`: 0.01"),
        ("single-lora-bare-ref_avs-1", "single-task LoRA, ref_avs, 1"),
        ("joint-lora_matched-bare", "joint LoRA, I-LoRA's size"),
        ("joint-venture, crab.ilora", "joint-venture, crab.ilora"),
    ],
)
def test_names_of_runs_become_names_for_people(text, expected):
    assert outputs.for_people(text) == expected


def test_a_table_keeps_its_cells_and_can_be_reached_and_read():
    frame = pd.DataFrame({"a_number": [0.5, -1.25], "a_word": ["one", "<b>"]}, index=["x_1", "x_2"])
    html = outputs.table(frame.style.format(precision=2, escape="html").to_html(), "Scores & more")
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)", row) for row in re.findall(r"(?s)<tr.*?</tr>", html)]
    names = {"a number", "a word"}
    assert {name for name in rows[0] if name in names} == names
    assert rows[1:] == [["x_1", "0.50", "one"], ["x_2", "-1.25", "&lt;b&gt;"]]
    assert 'tabindex="0"' in html and 'aria-label="Table: Scores &amp; more"' in html and "T_" not in html
    assert html.count('class="text"') >= 3 and "<td>-1.25</td>" in html.replace(" >", ">")
    coloured = frame.style.map(lambda _: "color: red").to_html()
    assert "#T_" in outputs.table(coloured, "x")  # marks that a style needs stay


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is .5. Two is 0.1 more. Three.", "One is .5. Two is 0.1 more."),
        ("Of the slots:\n\n- first. More\n- second", "first. More"),
        ("", ""),
    ],
)
def test_a_line_about_a_page_is_two_sentences(text, expected):
    assert front.sentences(text) == expected


PAGES = sorted([*REPOSITORY.glob("reports/*/index.html"), *REPOSITORY.glob("reports/*/pages/*.html")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPOSITORY / "reports").as_posix())
def test_committed_pages_can_be_read_by_everyone(path):
    html = path.read_text(encoding="utf-8")
    page = BeautifulSoup(html, "html.parser")
    levels = [int(heading.name[1]) for heading in page.find_all(re.compile("^h[1-6]$"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(image.get("alt") for image in page.find_all("img"))
    targets = [tag[name] for name in ("href", "src") for tag in page.find_all(attrs={name: True}) if tag[name]]
    links = {target.partition("#")[0] for target in targets if not re.match(r"(https?|data):|#", target)}
    assert not [target for target in links if not (path.parent / target).exists()]
    weight = sum((path.parent / target).stat().st_size for target in links if not target.endswith((".html", ".md")))
    assert len(html.encode()) + weight <= (600_000 if path.name == "index.html" else 2_000_000)
    words = re.sub(r"(?s)<details.*?</details>|<code.*?</code>", "", html)
    assert not re.search(r"\b(single|joint)-i?lora(_matched)?-(bare|explicit)\b", words)
