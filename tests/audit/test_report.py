"""The audit's report in a real browser: Debian's Chromium, headless, driven by playwright."""

from __future__ import annotations

import copy
import itertools
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from cutlayer.audit import wording
from cutlayer.audit.report import verdict_lines, write_report
from cutlayer.errors import DataError, StorageError
from tests.audit.made_up import FORMAL, audit, finding, guarantee, tokens_of

PHONE = {"viewport": {"width": 360, "height": 740}}
HOSTILE = '</p></script><script>document.title="taken"</script><img src=x onerror="alert(1)">'

CONTRASTS = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const against = (colour) => {
    const [low, high] = [luminance(colour), paper].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const least = (selector, name) => Math.min(
    ...[...document.querySelectorAll(selector)].map((e) => against(getComputedStyle(e)[name])));
  return {text: least("svg text", "fill"), marks: least("svg g", "color")};
}"""


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Return a function that writes a report and opens it from the disk.

    What the page complains of, and what it asks for besides itself, is in `page.troubles`.
    """
    pages = []

    def open_(content: dict[str, Any], **settings: Any) -> Page:
        path = tmp_path / "report.html"
        write_report(content, path)
        page = browser.new_context(**settings).new_page()
        page.troubles = []
        page.on("console", lambda message: page.troubles.append(message.text))
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("dialog", lambda dialog: page.troubles.append(dialog.message))
        page.on("requestfailed", lambda request: page.troubles.append(f"failed {request.url}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((path.as_uri(), "data:"))
                or page.troubles.append(f"asked for {request.url}")
            ),
        )
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()


def least() -> dict[str, Any]:
    """Return the smallest audit that can be reported."""
    channels = [
        {
            "channel": name,
            "verdict": "not sent",
            "sentence": "Nothing left.",
            "decided_by": None,
            "findings": [],
        }
        for name in ("activations", "gradients")
    ]
    return {
        "format": 1,
        "run": {"model": "m", "cut": "1:2", "codec": "raw", "defense": None}
        | {"version": "0", "date": "2026-11-23"},
        "calibration": {"trr": 1.0, "exact": 1.0, "sequences": 16, "passed": True},
        "controls": [],
        "channels": channels,
        "guarantee": guarantee(mechanisms=[], assumptions=[], delta=None),
        "not_measured": [],
    }


def refuted() -> dict[str, Any]:
    """Return an audit with everything that a report can warn of."""
    content = audit()
    content["guarantee"] = [
        guarantee(**FORMAL | {"lower_bound": {"epsilon": 16.4, "trials": 1000}}),
        guarantee(**FORMAL | {"against": "recipients of the adapter"}),
    ]
    content["controls"][1] |= {"passed": False, "found": 0.31}
    content["samples"][0]["tokens"][0] = {"truth": "q" * 500, "guess": "w" * 500, "hit": False}
    content["run"]["model"] = "/data/" + "a-long-folder-name/" * 12
    content["frontier"][0]["sequences"] = 32
    return content


def column_of(page: Page, table: str, column: int) -> list[str]:
    """Return what stands in a column of a table, from top to bottom."""
    script = "(rows, k) => rows.map((row) => row.cells[k].dataset.sort)"
    return page.locator(f"{table} tbody tr").evaluate_all(script, column)


def test_opens_from_the_disk_alone_and_in_silence(opened: Any):
    """Opened from file://, the page logs nothing, asks for nothing and names no other place."""
    page = opened(audit())

    assert page.troubles == []
    assert page.locator("h1").inner_text() == "The server can read this data."
    assert re.findall(r"https?://", page.content()) == []


@pytest.mark.parametrize("content", [least(), refuted()], ids=["least", "refuted"])
@pytest.mark.parametrize("settings", [{}, PHONE], ids=["desktop", "phone"])
def test_odd_audits_are_shown_too(opened: Any, content: dict[str, Any], settings: dict[str, Any]):
    """An audit that found nothing to attack, and one full of warnings, make sound pages."""
    page = opened(content, **settings)

    assert page.troubles == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_tables_sort_by_click(opened: Any):
    """A click on a header sorts by number up, a second one down, and the header says so."""
    page = opened(audit())
    heads = page.locator("#attacks th[scope=col]")
    button = heads.nth(3).get_by_role("button")
    expected = sorted(column_of(page, "#attacks", 3), key=float)

    button.click()
    upwards = column_of(page, "#attacks", 3)
    says = [heads.nth(k).get_attribute("aria-sort") for k in (2, 3)]
    button.click()

    assert upwards == expected
    assert says == ["none", "ascending"]
    assert column_of(page, "#attacks", 3) == expected[::-1]
    assert heads.nth(3).get_attribute("aria-sort") == "descending"
    assert page.locator("#sorted").inner_text() == "Sorted by Read back, descending"


def test_tables_sort_by_keyboard(opened: Any):
    """Tab reaches a table's headers in order; Enter and Space sort, words as well as numbers."""
    page = opened(audit())
    page.locator("#frontier th[scope=col] button").first.focus()

    page.keyboard.press("Enter")
    by_name = column_of(page, "#frontier", 0)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")

    assert by_name == sorted(by_name)
    rates = column_of(page, "#frontier", 2)
    assert rates == sorted(rates, key=float)
    assert page.locator("#frontier th").nth(2).get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize(
    ("content", "scheme", "settings"),
    [
        (audit(), "light", {}),
        (audit(), "dark", PHONE),
        (refuted(), "dark", {}),
        (least(), "light", PHONE),
    ],
    ids=["whole", "whole-dark-phone", "refuted-dark", "least-phone"],
)
def test_is_accessible(opened: Any, content: Any, scheme: str, settings: Any):
    """Axe finds nothing, on a desktop and a phone, in both schemes; drawings have contrast too."""
    page = opened(content, color_scheme=scheme, **settings)
    contrasts = page.evaluate(CONTRASTS)

    found = Axe().run(page).response["violations"]

    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
    assert contrasts["text"] >= 4.5
    assert contrasts["marks"] >= 3


def test_is_built_as_a_document(opened: Any):
    """One h1, no heading level left out, a caption per table, title and description per drawing."""
    page = opened(audit())
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((h) => +h.tagName[1])")

    assert page.locator("html").get_attribute("lang") == "en"
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    bare = "table:not(:has(> caption)), svg:not(:has(> title)), svg:not(:has(> desc))"
    assert page.locator(bare).count() == 0
    assert page.locator("table").count() == 6
    assert page.locator("svg").count() == 7


def test_no_sideways_scrolling_on_a_phone(opened: Any):
    """At 360 pixels nothing reaches beyond the edge, and tables keep their roles."""
    page = opened(audit(), **PHONE)
    beyond = """all => all.filter((e) => e.getBoundingClientRect().right > 360.5
        && !e.closest(".vh") && getComputedStyle(e).position !== "absolute").length"""

    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("body *").evaluate_all(beyond) == 0
    assert page.get_by_role("cell").count() > 50


def test_print_shows_everything_on_white(opened: Any):
    """Printed from a dark screen, the page is dark on white, and no row or drawing is missing."""
    page = opened(audit(), color_scheme="dark", viewport={"width": 680, "height": 1000})
    page.emulate_media(media="print")
    seen = "section, tr, td, th, svg, p:not(.vh), li:not(nav li), dt, dd, .t"
    missing = """all => all.filter((e) => {
        const box = e.getBoundingClientRect();
        return box.width === 0 || box.height === 0 || box.right > 681;
    }).map((e) => e.outerHTML.slice(0, 80))"""

    assert page.locator(seen).evaluate_all(missing) == []
    colours = "(e) => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    assert page.locator("body").evaluate(colours) == ["rgb(255, 255, 255)", "rgb(27, 29, 33)"]


def test_reads_without_script(opened: Any):
    """Without script nothing is hidden and no header pretends to be a button."""
    page = opened(audit(), java_script_enabled=False)

    assert page.locator("th button").count() == 0
    assert page.get_by_text("Advantage", exact=True).first.is_visible()


def test_tokens_stand_side_by_side_and_not_by_colour_alone(opened: Any):
    """What was read is underlined, what was misread struck through, and both are said in words."""
    page = opened(audit())
    sides = page.locator(".sample").first.locator(".tokens")
    decorated = "e => getComputedStyle(e).textDecorationLine"

    assert sides.nth(0).locator("mark .t").first.evaluate(decorated) == "underline"
    assert sides.nth(1).locator("s .t").first.evaluate(decorated) == "line-through"
    assert "[wrong:  Joanham] " in sides.nth(1).text_content()
    truths = sides.nth(0).locator(".t").all_text_contents()
    assert truths == [t["truth"].replace("\n", "↵\n") for t in tokens_of()]
    assert sides.nth(0).bounding_box()["y"] == sides.nth(1).bounding_box()["y"]


def test_foreign_text_is_shown_and_never_run(opened: Any):
    """HTML and script in a token, a name or a sentence stands there as text, wherever it is."""
    content = audit()
    content["samples"][0]["tokens"][3] = {"truth": HOSTILE, "guess": HOSTILE, "hit": True}
    content["channels"][0]["sentence"] = HOSTILE
    content["channels"][0]["findings"][1]["attack"] = HOSTILE
    content["channels"][0]["findings"][1]["params"] = {HOSTILE: HOSTILE}
    content["frontier"][0]["defense"] = HOSTILE
    content["recovery"][1]["points"][0]["x"] = HOSTILE
    content["recovery"][2]["axis"] = HOSTILE
    content["run"] |= {"model": HOSTILE, "commit": HOSTILE}
    content["not_measured"] = [HOSTILE]

    page = opened(content)

    assert page.troubles == []
    assert page.title().startswith("Cutlayer audit: </p>")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.locator(".sample").first.locator("mark .t", has_text=HOSTILE).count() == 2
    assert page.locator(".sentence").first.inner_text() == HOSTILE


def test_no_script_but_the_report_s_own_can_run(opened: Any):
    """If markup did escape its place, the page's policy would still not run it."""
    page = opened(audit())

    page.evaluate("""() => {
        const added = document.createElement("script");
        added.textContent = 'document.title = "taken"';
        document.body.append(added);
    }""")

    assert page.title().startswith("Cutlayer audit: Hugging")
    assert "Content Security Policy" in " ".join(page.troubles)


def test_what_would_mislead_the_eye_is_made_visible(opened: Any):
    """Control and direction characters in a token are written out; a line break keeps its place."""
    content = audit()
    for k, text in enumerate(["\u202etxet", "a\x00b", "\ud800", "", "\n"]):
        content["samples"][0]["tokens"][k] = {"truth": text, "guess": text, "hit": True}

    page = opened(content)

    shown = page.locator(".sample .tokens").first.locator(".t").all_text_contents()[:5]
    assert shown == ["⟨202E⟩txet", "a⟨0000⟩b", "⟨D800⟩", "∅", "↵\n"]


def test_redacted_text_is_nowhere_in_the_file(opened: Any, tmp_path: Path):
    """A redacted sample leaves no word of text in the file, even if the audit's dict holds it."""
    content = audit()
    content["samples"] = [content["samples"][0] | {"redacted": True}]

    page = opened(content)
    written = (tmp_path / "report.html").read_text()

    words = [t[side].strip() for t in tokens_of() for side in ("truth", "guess")]
    assert [word for word in words if len(word) > 5 and word in written] == []
    assert page.locator(".sample .blocks [aria-hidden]").all_text_contents()[:2] == ["■■", "□□"]
    assert "2 read back, then 2 not read back" in page.locator(".blocks .vh").last.text_content()
    assert "holds no text of your data" in page.locator("footer").inner_text()


def test_a_hidden_token_hides_its_guess(opened: Any, tmp_path: Path):
    """Where only some tokens are hidden, what was guessed for them is hidden too."""
    content = audit()
    content["samples"] = content["samples"][:1]
    content["samples"][0]["tokens"][1] |= {"truth": None}

    page = opened(content)

    assert "Maria" not in (tmp_path / "report.html").read_text()
    assert page.locator(".t.hidden").count() == 2


def test_guarantee_is_the_mechanism_s_or_none(opened: Any):
    """An epsilon is shown rounded up, with its lower bound; without one stand the set words."""
    content = audit() | {"guarantee": guarantee(**FORMAL)}
    formal = opened(content).locator("#guarantee").inner_text()
    none = opened(audit())

    assert "(8.01, 1e-05)-differential privacy" in formal
    assert "ε = 8.01" in formal
    assert "ε is at least 7.14 at δ = 1e-5, by the distinguishing game; n = 1,000" in formal
    assert "Refuted" not in formal
    assert none.locator(".promise").inner_text() == "no formal guarantee against the server"
    assert "ε =" not in none.locator("#guarantee").inner_text()
    assert "gradients leave without a mechanism" in none.locator("#guarantee").inner_text()


def test_what_went_wrong_stands_first(opened: Any):
    """A failed control and a refuted promise are said before any figure."""
    page = opened(refuted())

    head = page.locator("header").inner_text()
    assert "A control failed: Noise in place of activations gives chance." in head
    assert "refuted by measurement" in head
    assert page.locator("#controls .failed").inner_text() == "✗ failed"


def test_the_strongest_attack_decides():
    """A verdict that is not the strongest attack's is refused: there is no averaging."""
    content = audit()
    content["channels"][0]["verdict"] = "severe"

    with pytest.raises(DataError, match=r"'severe' for activations.*found 'plaintext'"):
        verdict_lines(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format is 2, not 1"),
        ({"calibration": {"trr": 0.9991, "exact": 0.9, "passed": False}}, "recovered 99.9%"),
        ({"calibration": {"trr": 1.0, "exact": 1.0, "passed": True}}, "incomplete.*sequences"),
        ({"run": {"model": "m"}}, "incomplete"),
    ],
)
def test_an_audit_that_proves_nothing_is_not_reported(tmp_path: Path, change: Any, says: str):
    """Another format, a failed calibration or a missing part: one sentence, and no file."""
    with pytest.raises(DataError, match=says):
        write_report(audit() | change, tmp_path / "report.html")

    assert list(tmp_path.iterdir()) == []


def test_a_missing_part_is_named(tmp_path: Path):
    """What an audit lacks is listed by name."""
    content = audit()
    del content["controls"], content["guarantee"]

    with pytest.raises(DataError, match="lacks 'controls', 'guarantee'"):
        write_report(content, tmp_path / "report.html")


def test_a_full_disk_leaves_the_older_report(tmp_path: Path):
    """When the disk says no, one sentence says so; the older report stands, and nothing beside."""
    path = tmp_path / "report.html"
    write_report(least(), path)
    older = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"could not be written.*File too large"):
            write_report(audit(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert path.read_bytes() == older
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_only_the_owner_can_read_it(tmp_path: Path):
    """The file holds text of the data, so its mode is 0600, also over one that was open to all."""
    path = tmp_path / "made" / "report.html"
    path.parent.mkdir()
    path.write_text("older")
    path.chmod(0o644)

    write_report(audit(), path)

    assert path.stat().st_mode & 0o777 == 0o600


def test_three_lines_for_the_terminal():
    """One line for each channel of the server, and one for what is promised."""
    content = copy.deepcopy(audit())
    content["channels"].pop()

    assert verdict_lines(content) == [
        "activations  plaintext: 95.1% of tokens read back (95% interval 93.0% to 97.2%, "
        "n = 2,048 tokens in 64 sequences, prior 4.3%) by A1, forward search",
        "gradients    plaintext: 100% of tokens read back (95% interval 100% to 100%, "
        "n = 2,048 tokens in 64 sequences, prior 4.3%) by A4, label inversion",
        "guarantee    no formal guarantee against the server",
    ]
    assert verdict_lines(least())[0] == "activations  not sent"
    assert len(verdict_lines(audit())) == 3


def test_nothing_is_rounded_to_all_or_to_none(opened: Any):
    """A share short of one is not shown as 100%, nor one above zero as 0%."""
    content = audit()
    content["channels"][1]["findings"] = [finding("A4", "gradients", 0.99996, 0.0001)]

    text = opened(content).locator(".card").nth(1).inner_text()

    assert "over 99.9%" in text
    assert "under 0.1%" in text
    assert [wording.percent(x) for x in (1, 0, 0.9994)] == ["100%", "0%", "99.9%"]
