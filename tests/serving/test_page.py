"""The page of `beacon-jax serve` in a real browser, as a person uses it.

Where the machine has no Chromium these tests are skipped. Pictures of the page go into
the folder BEACON_PAGE_PICTURES, or into pytest's own.
"""

import json
import os
import re
import urllib.parse
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("websockets", reason="the browser is driven by a websocket")

from tests.serving.page_driver import CHROMIUM, CONTROL, Browser

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: the page has no browser"
)

TEXT = "The pass key is 71492. Remember it. 71492 is the pass key.\n" * 6
CONTROLS = {"button", "textbox", "checkbox", "radio", "combobox", "spinbutton", "link"}
IDLE = "document.querySelector('#make-stop').hidden"
MADE = f"{IDLE} && (!window['bar-key'].hidden || !window['make-error'].hidden)"
ANSWERED = (
    "document.querySelector('#ask-stop').hidden && "
    "document.querySelectorAll('.answer dl:not([hidden])').length"
)
# Text against the colour behind it, as WCAG 2 defines it; None where all is well.
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const [a, b] = [parse(getComputedStyle(node).color), behind(node)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) return `${ratio.toFixed(2)}: ${walker.currentNode.data}`;
  }
  return null;
})()"""
WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server_url):
    """A page with a profile of its own. What it may never do is checked last."""
    page = browser.open(server_url)
    page.refused = None
    page.prefer(reduced_motion="reduce")
    page.until("document.querySelectorAll('#ratios input').length")
    page.until("document.querySelector('#status').innerText === 'Ready'")
    yield page
    host = urllib.parse.urlsplit(server_url).netloc
    addresses = [urllib.parse.urlsplit(url) for url in page.requests]
    # Chromium notes the status of a refusal that a test provoked.
    problems = [p for p in page.problems if f"a status of {page.refused}" not in p]
    page.close()
    assert {a.netloc for a in addresses if a.scheme.startswith("http")} == {host}
    assert not problems


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = os.environ.get("BEACON_PAGE_PICTURES")
    folder = Path(folder) if folder else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(TEXT)
    return path


def compress(page, path, ratio="4"):
    page.choose_file("#file", path)
    page.until("!document.querySelector('#file-line').hidden")
    page.run(f"document.querySelector('[name=ratio][value=\"{ratio}\"]').click()")
    page.click("#make-go")
    made(page)


def made(page):
    """Waits for the memory."""
    page.until(MADE)
    assert page.text("#make-error") == ""


def ask(page, question="The pass key is"):
    page.run("document.querySelector('#max-tokens').value = 8")
    page.run(f"document.querySelector('#question').value = {json.dumps(question)}")
    page.click("#ask-go")
    page.until(ANSWERED)


def chosen(page):
    """The memory that is shown, as the server knows it."""
    name = re.search(r"mem-\w+", page.text("#memory-state"))[0]
    return page.run(f"fetch('/v1/memories/{name}').then((answer) => answer.json())")


def refuse(page, part, status, message, **headers):
    page.refused = status
    page.refusals.append((part, status, headers, {"error": {"message": message}}))


def test_a_dropped_file_becomes_a_memory_and_its_bytes_are_the_servers(page, document):
    page.run(
        "window.states = new Set(); new MutationObserver(() => "
        "states.add(document.querySelector('#memory-state').textContent))"
        ".observe(document.querySelector('#memory-state'), {childList: true})"
    )
    document.write_text("dropped. " + TEXT)  # no other test has made it
    page.drop_file("#drop", document)
    page.until("!document.querySelector('#file-line').hidden")
    assert "keys.txt" in page.text("#file-line")
    page.click("#make-go")
    made(page)
    states = page.run("[...states]")
    assert any(re.match(r"Compressing: \d+ of \d+ windows?\.", s) for s in states), (
        states
    )

    memory = chosen(page)
    shown = page.run("['kept', 'saved'].map((id) => Number(window[id].value))")
    assert shown == [memory["bytes"], memory["full_bytes"] - memory["bytes"]]
    width = page.run("document.querySelector('#bar-kept').style.width")
    share = 100 * memory["bytes"] / memory["full_bytes"]
    assert float(width.rstrip("%")) == pytest.approx(share, abs=1e-3)
    cells = page.run("document.querySelectorAll('#strip .cell').length")
    assert cells == len(memory["windows"])
    assert f"{memory['tokens']:,}" in page.text("#memory-figures")
    assert f"{memory['slots']:,}" in page.text(".memories .chosen")


def test_the_table_of_windows_counts_each_once(page, document):
    compress(page, document)
    page.click("#windows-details summary")
    rows = page.run(
        "[...document.querySelectorAll('#windows tr')].map((row) => "
        "[...row.cells].map((cell) => cell.textContent))"
    )
    tokens = 0
    for which, _, each, _ in rows:
        first, last = (which.split(" to ") * 2)[:2]
        tokens += (int(last) - int(first) + 1) * int(each)
    assert tokens == chosen(page)["tokens"]


def test_full_attention_answers_beside_the_memory(page, document, pictures):
    compress(page, document)
    page.click("#full")
    ask(page)
    titles = page.run(
        "[...document.querySelectorAll('.answer h4')].map((h) => h.innerText)"
    )
    assert titles[0].startswith("Memory, ×") and titles[1:] == ["Full attention"]
    columns = page.run(
        "[...document.querySelectorAll('.answer')].map((box) => ({"
        "said: box.querySelector('.said').textContent,"
        "left: box.getBoundingClientRect().left, terms: Object.fromEntries("
        "[...box.querySelectorAll('dl div')].map((d) => "
        "[d.firstChild.innerText, d.lastChild.innerText]))}))"
    )
    assert columns[0]["left"] < columns[1]["left"]  # side by side
    for column in columns:
        assert column["said"]
        terms = column["terms"]
        assert re.fullmatch(r"\d+\.\d+ s", terms["First token"])
        assert {"Time", "Tokens/s", "Slots", "Bytes"} <= terms.keys()
    slots = [int(c["terms"]["Slots"].replace(",", "")) for c in columns]
    assert slots[0] < slots[1]
    page.picture(pictures / "light.png")
    page.prefer(color_scheme="dark", reduced_motion="reduce")
    page.picture(pictures / "dark.png")
    assert page.run(CONTRAST) is None
    page.prefer(reduced_motion="reduce")
    assert page.run(CONTRAST) is None
    page.resize(360, 740)
    assert page.run(WIDTH) == 360
    page.picture(pictures / "small.png")


def test_a_conversation_goes_on_with_the_memory_that_an_answer_left(page, document):
    compress(page, document)
    ask(page)
    page.run("document.querySelector('#question').value = ' And again:'")
    page.click("#ask-go")
    page.until(f"{ANSWERED} === 2")
    slots = page.run(
        "[...document.querySelectorAll('.answer dl data')].map((d) => Number(d.value))"
    )
    assert slots[0] <= slots[1]
    page.click("#ask-new")
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_the_keyboard_alone_is_enough(page):
    page.tab_to("#text")
    page.type(TEXT)
    page.tab_to("[name=ratio]")
    page.press("ArrowRight")
    page.tab_to("#method")
    page.tab_to("#make-go")
    outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.press("Enter")
    made(page)
    page.tab_to(".memories .choose")
    page.press("Enter")
    page.tab_to("#question")
    page.type("The pass key is")
    page.tab_to("#full")
    page.press(" ")
    assert page.run("document.querySelector('#full').checked")
    page.run("document.querySelector('#max-tokens').value = 8")
    page.run("document.querySelector('#question').focus()")
    page.press("Enter", CONTROL)
    page.until(f"{ANSWERED} === 2")

    name = page.text("#memory-title")
    before = page.run("document.querySelectorAll('.memories li').length")
    page.run("document.querySelector('#memories-title').focus()")
    page.tab_to(".chosen .delete")
    page.press("Enter")
    page.until("document.querySelector('#confirm').open")
    assert name in page.text("#confirm-text")
    page.press("Escape")
    page.until("!document.querySelector('#confirm').open")
    assert page.run("document.querySelectorAll('.memories li').length") == before
    page.press("Enter")
    page.tab_to("#confirm [value=delete]")
    page.press("Enter")
    page.until(f"document.querySelectorAll('.memories li').length === {before - 1}")
    assert page.run("document.activeElement.id") == "memories-title"


def test_every_control_has_a_name(page, document):
    compress(page, document)
    page.run("for (const d of document.querySelectorAll('details')) d.open = true")
    tree = page.tree()
    assert {role for role, _ in tree} >= CONTROLS
    assert [node for node in tree if node[0] in CONTROLS and not node[1]] == []
    names = page.roles()
    assert "Kept" in names["image"][0] or "Kept" in names["image"][1]
    assert any(name.startswith("Windows") for name in names["image"])
    assert any(name.startswith("Delete keys.txt, ×") for name in names["button"])
    page.click(".memories .delete")
    page.until("document.querySelector('#confirm').open")
    assert page.roles()["dialog"] == ["Delete this memory?"]


def test_a_screen_reader_hears_of_the_answer_not_more_than_once_a_second(
    page, document
):
    compress(page, document)
    page.run(
        "window.said = []; new MutationObserver(() => "
        "said.push([performance.now(), document.querySelector('#live').textContent]))"
        ".observe(document.querySelector('#live'), {childList: true})"
    )
    ask(page)
    words = page.run("document.querySelector('.said').textContent").split()
    page.until("said.some(([, text]) => text.trim())", seconds=5)
    page.until(
        f"said.map((s) => s[1]).join(' ').includes({json.dumps(words[-1])})", seconds=5
    )
    times = [time for time, _ in page.run("said")]
    assert all(b - a > 900 for a, b in pairwise(times))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_text_is_lost_on_a_small_screen_or_at_twice_the_size(page, scheme, pictures):
    page.prefer(color_scheme=scheme, reduced_motion="reduce")
    assert page.run(CONTRAST) is None
    page.resize(360, 740)
    assert page.run(WIDTH) == 360
    page.resize(1280, 900)
    page.run("document.documentElement.style.fontSize = '200%'")
    assert page.run(WIDTH) == 1280
    page.picture(pictures / f"twice-{scheme}.png")


def test_a_refused_document_is_answered_in_the_servers_words(page, tmp_path):
    page.refused = 415
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)
    page.choose_file("#file", path)
    page.until("!document.querySelector('#file-line').hidden")
    page.click("#make-go")
    page.until("!document.querySelector('#make-error').hidden")
    assert "picture.png" in page.text("#make-error")
    assert page.run(IDLE)


def test_a_busy_server_says_when_to_try_again(page, document):
    compress(page, document)
    refuse(page, "completions", 429, "16 requests wait.", **{"Retry-After": "12"})
    page.run("document.querySelector('#question').value = 'The pass key is'")
    page.click("#ask-go")
    page.until("document.querySelector('.note.error')")
    said = page.text(".note.error")
    assert re.match(r"16 requests wait\. Try again in 12 seconds, at \d+:\d+", said)
    assert page.run("document.querySelector('#question').value") == "The pass key is"


def test_the_page_waits_until_the_programs_are_compiled(page, server_url):
    page.refused = 503
    told = {"status": "compiling", "done": 2, "of": 5}
    page.refusals.append(("/ready", 503, {}, told))
    page.go(server_url)
    page.until("document.querySelector('#status').innerText === 'Compiling: 2 of 5'")
    assert page.run("document.querySelector('#main').hidden")
    page.until("!document.querySelector('#main').hidden")
    assert page.text("#status") == "Ready"


def test_a_key_is_asked_for_and_kept_in_the_tab(page, server_url):
    refuse(page, "models", 401, "This server needs a key.")
    page.go(server_url)
    page.until("!document.querySelector('#key-form').hidden")
    assert page.text("#page-error") == "This server needs a key."
    assert page.run("document.querySelector('#main').hidden")
    page.type("secret")  # the field has the focus
    page.press("Enter")
    page.until("document.querySelector('#key-form').hidden")
    assert page.run("[...Object.values(sessionStorage)]") == ["secret"]
    assert page.run("localStorage.length") == 0
    assert page.text("#page-error") == ""


def test_without_its_text_a_memory_has_no_full_attention_beside_it(
    page, document, server_url
):
    compress(page, document)
    page.go(server_url)  # the page is read anew: its text is gone
    page.until("document.querySelectorAll('.memories .choose').length")
    page.run(
        "[...document.querySelectorAll('.choose')]"
        ".find((button) => button.innerText === 'keys.txt').click()"
    )
    page.until("document.querySelector('.memories .chosen')")
    assert page.run("document.querySelector('#full').disabled")
    assert "not in the page" in page.text("#full-hint")


def test_an_answer_can_be_stopped(page, document):
    compress(page, document)
    page.run("document.querySelector('#max-tokens').value = 200")
    page.run("document.querySelector('#question').value = 'The pass key is'")
    page.run(
        "document.querySelector('#ask-go').click();"
        "document.querySelector('#ask-stop').click()"
    )
    page.until("document.querySelector('#ask-stop').hidden")
    assert page.text(".note").startswith("Stopped.")
