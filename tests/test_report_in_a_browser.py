"""The report opened in headless Chromium: by mouse, by keyboard, on a phone, in light and dark, on paper."""

from __future__ import annotations

import base64
import json
import os
import shutil

import pytest
from report_folder import make_folder

from asdm_compress.workflows.report import write_report

WIDTHS = (320, 1280)
THEMES = ("light", "dark")
_MISSING = "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"


@pytest.fixture(scope="module")
def page(tmp_path_factory, pipeline, mini_profile):
    folder = make_folder(tmp_path_factory.mktemp("browser") / "student", pipeline, mini_profile)
    write_report(folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"this test {_MISSING}")
        pytest.skip(_MISSING)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


def _open(browser, page, width=1280, theme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for log in ("performance", "browser"):
        browser.get_log(log)  # what came before
    browser.get(page)
    browser.execute_script("try { localStorage.clear() } catch {}")
    browser.refresh()


def _requests(browser):
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def _one(browser, selector):
    from selenium.webdriver.common.by import By

    return browser.find_element(By.CSS_SELECTOR, selector)


def _press(browser, *keys):
    """Keys to whatever has the focus, seen or not."""
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def _background(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_quietly_and_fits(browser, page, width, theme):
    _open(browser, page, width, theme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    outside = [url for url in _requests(browser) if not url.startswith(("file:", "data:"))]
    assert outside == []
    wide = browser.execute_script(
        "const w = document.documentElement.clientWidth;"
        "return [document.documentElement.scrollWidth, w, Array.from(document.querySelectorAll('main > section > *'))"
        ".filter(e => e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 80))]"
    )
    assert wide[0] <= wide[1], wide[2]
    assert (_background(browser) == "rgb(255, 255, 255)") == (theme == "light")


def test_a_slider_moves_by_mouse_and_by_keyboard(browser, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    _open(browser, page)
    slider = _one(browser, ".pairs .compare input")
    shown = "return getComputedStyle(document.querySelector('.pairs .right')).clipPath"
    assert "50%" in browser.execute_script(shown)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", slider)
    ActionChains(browser).move_to_element_with_offset(slider, slider.size["width"] // 4, 0).click().perform()
    value = int(slider.get_property("value"))
    assert 65 <= value <= 85
    assert f"{value}%" in browser.execute_script(shown)
    _press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert f"{value + 2}%" in browser.execute_script(shown)
    # All at once, and the other views.
    browser.execute_script("document.getElementById('all').focus()")
    _press(browser, Keys.HOME)
    values = browser.execute_script("return Array.from(document.querySelectorAll('.compare input'), i => i.value)")
    assert values == ["0"] * len(values)
    for view in ("side", "difference", "slide"):
        _one(browser, f"input[name=view][value={view}]").click()
        assert _one(browser, ".pairs").get_attribute("data-view") == view
        shown = "return getComputedStyle(document.querySelector('.pairs .compare input')).display"
        assert (browser.execute_script(shown) != "none") == (view == "slide")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_point_of_the_frontier_shows_its_plan(browser, page, width):
    from selenium.webdriver.common.keys import Keys

    _open(browser, page, width)
    visible = "return Array.from(document.querySelectorAll('.panel')).filter(p => !p.hidden).map(p => p.id)"
    first, points = browser.execute_script(
        "return [document.querySelector('.panel:not([hidden])').id,"
        " document.querySelectorAll('.pick[data-opens]').length]"
    )
    assert points == len(browser.execute_script("return Array.from(document.querySelectorAll('.panel'))")) >= 3
    other = "plan-0" if first != "plan-0" else "plan-1"
    point = _one(browser, f".pick[data-opens={other}] .point")
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'})", point
    )
    point.click()
    assert browser.execute_script(visible) == [other]
    assert _one(browser, f".pick[data-opens={other}]").get_attribute("aria-pressed") == "true"
    browser.execute_script("document.querySelector('.pick[data-opens=plan-0]').focus()")
    _press(browser, Keys.END)  # the student as measured, which opens nothing
    assert browser.execute_script("return document.activeElement.dataset.label") == "this student, as measured"
    _press(browser, Keys.PAGE_UP)
    last = browser.execute_script("return document.activeElement.dataset.opens")
    assert last == f"plan-{points - 1}"
    _press(browser, Keys.ENTER)
    assert browser.execute_script(visible) == [last]
    _press(browser, Keys.HOME, Keys.SPACE)
    assert browser.execute_script(visible) == ["plan-0"]


def test_every_edit_of_the_cloud_is_told_by_the_keyboard(browser, page):
    from selenium.webdriver.common.keys import Keys

    _open(browser, page)
    cloud = "document.querySelector('#frontier [aria-label=\"Every edit that could be chosen\"]')"
    told = f"return {cloud}.closest('.picture').querySelector('.readout').textContent"
    points, picks = browser.execute_script(
        f"return ['.point', '.pick'].map(kind => {cloud}.querySelectorAll(kind).length)"
    )
    assert points == picks > 1
    browser.execute_script(f"{cloud}.querySelector('.pick[tabindex=\"0\"]').focus()")
    seen = set()
    for key in (Keys.HOME, Keys.END):
        _press(browser, key)
        seen.add(browser.execute_script(told))
    assert len(seen) == 2
    assert all("of the latency" in one and "damage" in one for one in seen)


def test_parts_of_the_unet_tell_their_figures(browser, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    _open(browser, page)
    told = "return document.querySelector('#plan .readout').textContent"
    part = _one(browser, '.unet .pick[data-label="down_blocks.2.resnets.1"] .name')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", part)
    ActionChains(browser).move_to_element(part).perform()
    assert "replaced by experts (conv1x1*4@timestep)" in browser.execute_script(told)
    assert "latency" in browser.execute_script(told)
    browser.execute_script("document.querySelector('.unet .pick[tabindex=\"0\"]').focus()")
    before = browser.execute_script(told)
    assert "conv_in" in before
    _press(browser, Keys.ARROW_DOWN)
    after = browser.execute_script(told)
    assert after != before
    assert browser.execute_script("return document.querySelectorAll('.unet .pick[tabindex=\"0\"]').length") == 1
    hatched = browser.execute_script("return document.querySelectorAll('.unet .cell.gone').length")
    assert hatched >= 1 + 3  # a ResNet, and what the mid block has


def test_colours_can_be_chosen_and_are_kept(browser, page):
    _open(browser, page, theme="dark")
    dark = _background(browser)
    button = _one(browser, "#theme")
    button.click()
    assert (button.text, _background(browser)) == ("Colours: light", "rgb(255, 255, 255)")
    browser.refresh()
    assert _background(browser) == "rgb(255, 255, 255)"
    _one(browser, "#theme").click()
    assert (_one(browser, "#theme").text, _background(browser)) == ("Colours: dark", dark)


def test_the_keyboard_reaches_everything_once(browser, page):
    from selenium.webdriver.common.keys import Keys

    _open(browser, page, 320)
    seen = []
    for _ in range(200):
        _press(browser, Keys.TAB)
        here = browser.execute_script(
            "const e = document.activeElement; if (e === document.body) return null;"
            "window.seen = window.seen || new Map(); if (!seen.has(e)) seen.set(e, seen.size);"
            "return [seen.get(e), e.tagName, e.closest('section')?.id ?? '', e.getAttribute('role') ?? '']"
        )
        if here is None or here in seen:
            break
        seen.append(here)
    sections = [section for _, _, section, _ in seen if section]
    assert sections == sorted(sections, key=sections.index)  # in the order of the page, no section twice
    order = list(dict.fromkeys(sections))
    assert order[0] == "images"
    assert {"plan", "damage", "frontier", "schedule", "experts", "commands"} <= set(order)
    assert seen[0][1] == "A"  # past the navigation
    picks = [section for _, tag, section, _ in seen if tag == "g"]
    assert picks == ["plan", "damage", "frontier", "frontier", "schedule", "experts"]


def test_names_are_there_for_those_who_do_not_see(browser, page):
    _open(browser, page)
    problems = browser.execute_script("""
      const name = e => (e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent || '').trim();
      const lacking = Array.from(document.querySelectorAll('button, input, a, summary, [role=button], [role=region]'))
        .filter(e => !name(e)).map(e => e.outerHTML.slice(0, 90));
      const images = Array.from(document.images).filter(i => !i.alt).map(i => i.className);
      const drawings = Array.from(document.querySelectorAll('svg')).filter(s => !s.getAttribute('aria-label') && s.getAttribute('aria-hidden') !== 'true');
      const ids = Array.from(document.querySelectorAll('[id]'), e => e.id);
      const levels = Array.from(document.querySelectorAll('h1, h2, h3'), h => Number(h.tagName[1]));
      return [lacking, images, drawings.length, ids.filter((id, i) => ids.indexOf(id) !== i),
              levels.filter((l, i) => i && l > levels[i - 1] + 1).length, document.documentElement.lang];
    """)  # noqa: E501 - a script
    assert problems == [[], [], 0, [], 0, "en"]


def test_on_paper_everything_is_unfolded_and_light(browser, page):
    _open(browser, page, theme="dark")
    browser.execute_script(
        "addEventListener('beforeprint', () => {"
        " window.folded = document.querySelectorAll('main details:not([open])').length })"
    )
    pdf = base64.b64decode(browser.print_page())
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000  # the images are in it
    assert browser.execute_script("return window.folded") == 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert _background(browser) == "rgb(255, 255, 255)"
    assert not _one(browser, "nav").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_policy_stops_what_the_page_does_not_need(browser, page):
    _open(browser, page)
    stopped = browser.execute_async_script("""
      const done = arguments[arguments.length - 1], found = [];
      document.addEventListener('securitypolicyviolation', e => found.push(e.effectiveDirective));
      const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);
      const script = document.createElement('script'); script.textContent = 'window.broken = 1'; document.body.append(script);
      fetch('http://127.0.0.1:9/').catch(() => 0).finally(() => setTimeout(() => done([found.sort(), window.broken ?? 0]), 100));
    """)  # noqa: E501 - a script
    assert stopped[0] == ["connect-src", "img-src", "script-src-elem"]
    assert stopped[1] == 0
