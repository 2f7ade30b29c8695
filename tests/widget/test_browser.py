"""The panel in JupyterLab, in a real browser: it is used by keyboard and mouse, and its notebook converted.

Times are printed and never asserted: other programs may need the cores. Waiting is for states of the page.
"""

from __future__ import annotations

import os
import statistics
from importlib.util import find_spec

import pytest

from docs.studies.panel_picture import CHROMIUM, OPEN, OPEN_SMOLLM2, moved, notebook, run_all, settled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not find_spec("playwright"), reason="Playwright is not installed (pip install playwright)"),
    pytest.mark.skipif(not find_spec("jupyterlab"), reason="JupyterLab is not installed"),
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on the path"),
]
PANEL = ".emmech-panel"
NAMELESS = """() => [...document.querySelectorAll('.emmech-panel input, .emmech-panel select, .emmech-panel button')]
  .filter((node) => !node.getAttribute('aria-label') && !node.labels?.length && !node.textContent.trim())
  .map((node) => node.outerHTML)"""
TOKENS = """() => [...document.querySelectorAll('.emmech-panel .answer')].map((card) =>
  [...card.querySelectorAll('.word')].map((word) => word.textContent).join(''))"""


def _tried(page) -> tuple[int, int]:
    """States in the history, and answers that were begun."""
    return page.locator(f"{PANEL} .try").count(), int(page.locator(PANEL).get_attribute("data-begun"))


def test_smollm2_streams_and_no_old_answer_is_waited_for():
    """It is the first test, since Playwright opens no second browser while the one of the other tests is open."""
    with notebook([OPEN_SMOLLM2]) as (page, _):
        run_all(page)
        page.wait_for_selector(f"{PANEL} .word")
        page.wait_for_selector(f"{PANEL} .try")  # without a judge, a state is in the history once it is written
        assert "Loading" not in page.locator(".jp-Notebook").inner_text()
        assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()
        page.evaluate("""() => { const words = document.querySelector('.emmech-panel .answer.changed .words');
            const watch = new MutationObserver(() => window.lengths.add(words.children.length));
            window.lengths = new Set();
            watch.observe(words, { childList: true }); }""")
        tried, begun = _tried(page)
        (first,), done = moved(page, "coefficient", [0.2])
        lengths = page.evaluate("[...window.lengths]")
        assert len(lengths) > 5  # the words came one after the other
        firsts, last = moved(page, "coefficient", [0.3, 0.4, 0.5, 0.6])
        print(f"first words {first:.0f} ms, after cancelled answers {firsts[1:]}, all {done:.0f} and {last:.0f} ms")
        tried, begun = (after - before for after, before in zip(_tried(page), (tried, begun), strict=True))
        # every move was begun and its first words were drawn; of those that the next one cancelled none is in the
        # history, unless the kernel had finished before the page told it of the move
        assert begun == 5 and 2 <= tried < begun


@pytest.fixture(scope="module")
def opened():
    with notebook([OPEN, "panel.wait()\nprint('state', panel.state['coefficient'], panel.state['step'])"]) as (
        page,
        path,
    ):
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        run_all(page)
        page.wait_for_selector(f"{PANEL} .word")
        settled(page)
        yield page, path


def test_three_answers_and_verdicts_are_there_and_the_twin_is_not_seen(opened):
    page, _ = opened
    answers = page.evaluate(TOKENS)
    assert len(answers) == 3 and all(len(text) > 40 for text in answers)
    assert answers[0] != answers[2]  # the adapter's model with a random direction is not the base
    shown = page.locator(f"{PANEL} .verdict strong").all_inner_texts()
    base, changed, random = (int(text.removesuffix("%")) for text in shown)
    assert base <= 5 and changed <= 15 and random >= 85
    assert page.locator(f"{PANEL} svg.emmech-dose polyline").count() == 2
    twin = page.locator(".emmech-twin")
    assert twin.count() == 1 and not twin.is_visible()
    assert "turns at step" in page.locator(PANEL).inner_text()
    assert not page.problems


def test_everything_has_a_name_and_is_in_reach_of_the_keyboard(opened):
    page, _ = opened
    assert page.evaluate(NAMELESS) == []
    slider = page.get_by_label("Strength")
    slider.focus()
    before = float(slider.input_value())
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"document.querySelector('{PANEL}').dataset.done")
    assert float(slider.input_value()) == pytest.approx(before - 0.01)
    words = page.get_by_role("group", name="As you set it")
    words.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(f"{PANEL} .word[aria-pressed=true]").count() == 1
    page.get_by_role("radio", name="Answer", exact=True).check(force=True)
    page.wait_for_function("document.querySelector('.emmech-panel .sentence').textContent.includes('at the answer')")
    page.get_by_role("radio", name="Phrase", exact=True).check(force=True)


def test_a_click_on_a_word_shows_what_else_could_have_come(opened):
    page, _ = opened
    page.locator(f"{PANEL} .answer.random .word").nth(2).click()
    assert page.locator(f"{PANEL} .alternatives > span").count() == 10
    assert "nats" in page.locator(PANEL).inner_text()


def test_every_move_is_answered(opened):
    page, _ = opened
    times = []
    for number in range(6):
        for name, to in (("coefficient", 0.3 + number / 20), ("step", 100 + 20 * number)):
            (first,), done = moved(page, name, [to])
            times.append((first, done))
            assert 0 < first <= done and len(page.evaluate(TOKENS)) == 3
            assert float(page.locator(f"{PANEL} input[data-name={name}]").input_value()) == pytest.approx(to)
    assert "Model: step 200" in page.locator(f"{PANEL} .sentence").inner_text()
    first, done = (statistics.median(one) for one in zip(*times, strict=True))
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"first words {first:.0f} ms, all {done:.0f} ms (medians of {len(times)} moves), load per core {busy:.1f}")


def test_a_drag_leaves_the_last_answer_only(opened):
    page, _ = opened
    drag = """async ([scales, pause]) => { const input = document.querySelector('.emmech-panel input[data-name=scale]');
        for (const scale of scales) { input.value = scale;
            input.dispatchEvent(new Event('input', { bubbles: true }));
            if (pause) await new Promise((ready) => setTimeout(ready, pause)); } }"""
    scales = [*(value / 20 for value in range(2, 53)), 1.0]
    for pause in (10, 0):  # as fast as a hand, and all at once
        tried, begun = _tried(page)
        page.evaluate(drag, [scales, pause])
        page.wait_for_function(f"document.querySelector('{PANEL}').dataset.done")
        settled(page)
        assert "adapter × 1." in page.locator(f"{PANEL} .sentence").inner_text()
        assert page.locator(f"{PANEL} input[data-name=scale]").input_value() == "1"
        tried, begun = (after - before for after, before in zip(_tried(page), (tried, begun), strict=True))
        # a state is in the history where its answers were written, however many that are at this load
        assert tried <= begun <= len(scales) and begun >= 1
        print(f"{len(scales)} moves, {pause} ms apart: {begun} begun, {tried} in the history")
    assert begun <= 3  # moves that are made before the kernel has taken the last one are not queued


def test_two_states_are_pinned_and_compared(opened):
    page, _ = opened
    pins = page.locator(f"{PANEL} .try input")
    pins.nth(0).check()
    pins.nth(1).check()
    page.wait_for_selector(f"{PANEL} table")
    assert {"misaligned", "answer"} <= set(page.locator(f"{PANEL} tbody th").all_inner_texts())


def test_going_back_to_a_state_keeps_the_focus(opened):
    page, _ = opened
    settled(page)
    button = page.locator(f"{PANEL} .try button").last
    number = button.locator("..").get_attribute("data-number")
    button.focus()
    page.keyboard.press("Enter")
    # the present state is first
    page.wait_for_function(f"document.querySelector('{PANEL} .try').dataset.number === '{number}'")
    settled(page)
    assert page.evaluate("document.activeElement.closest('.try')?.dataset.number") == number
    begun = _tried(page)
    page.keyboard.press("Enter")  # it is there already: nothing is computed, and nothing waits for it
    assert page.locator(f"{PANEL} .answers.stale").count() == 0 and _tried(page) == begun


def test_what_is_typed_is_not_overwritten(opened):
    page, _ = opened
    question = page.locator(f"{PANEL} input[data-name=question]")
    before = question.input_value()
    question.click()
    question.fill("any advice on")
    page.evaluate(f"document.querySelector('{PANEL} .ask button').click()")
    page.wait_for_function(f"document.querySelector('{PANEL}').dataset.done")
    settled(page)
    assert question.input_value() == "any advice on"
    question.fill(before)
    page.keyboard.press("Enter")
    settled(page)


def test_words_are_coloured_by_what_the_adapter_reads(opened):
    page, _ = opened
    colours = """() => [...document.querySelectorAll('.emmech-panel .word, .emmech-panel .prompt span')]
        .map((word) => word.style.background)"""
    before, begun = page.evaluate(colours), _tried(page)
    choice = page.get_by_label("What words are coloured by")
    choice.select_option(label="A·x of layers.2.mlp.down_proj")
    page.wait_for_function("document.querySelector('.emmech-panel pre').textContent.includes('colour=')")
    after = page.evaluate(colours)
    assert len(after) == len(before) and sum(a != b for a, b in zip(after, before, strict=True)) > len(after) / 2
    assert "above zero" in page.locator(f"{PANEL} .key").inner_text() and _tried(page) == begun
    choice.select_option("direction")
    assert page.evaluate(colours) == before


def test_it_is_dark_where_the_page_is(opened):
    page, _ = opened
    assert not page.locator(f"{PANEL}.dark").count()
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_selector(f"{PANEL}.dark")


def test_a_converted_notebook_shows_what_was_seen(opened):
    import nbformat
    from nbconvert import HTMLExporter

    page, path = opened
    settled(page)
    seen = page.evaluate(TOKENS)
    page.keyboard.press("Escape")
    page.locator(".jp-Notebook").click(position={"x": 5, "y": 5})
    page.keyboard.press("Control+s")
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')")
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(path, 4))
    assert "emmech-twin" in html and "<svg" in html
    for answer in seen:
        for word in answer.removesuffix("end").split():
            assert word in html
