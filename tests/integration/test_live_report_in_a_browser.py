"""The live pages in a real Chromium: lines that arrive, ticks, both colour schemes, phone width, no foreign request.

Skipped where Playwright or Chromium is missing: pip install playwright, apt-get install chromium.
"""

import shutil

import pytest

from tests.integration import live_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
PAGES = ("/", "/run?name=going", "/run?name=whole", "/sweep?name=sweep", "/compare?run=whole&run=left")


@pytest.fixture
def storage(tmp_path):
    live_runs.write_all(tmp_path)
    return tmp_path


@pytest.fixture
def address(storage):
    with live_runs.served(storage) as address:
        yield address


@pytest.fixture
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_ask_nobody_else_and_say_no_error(browser, address, scheme, width):
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    for path in PAGES:
        page.goto(address + path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        ink, ground = (
            page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, ground[4:-1].split(",")))) == (scheme == "dark")
    assert errors == [] and all(url.startswith(address) for url in asked)


def test_lines_that_arrive_are_drawn_into_the_chart_that_is_there(browser, address, storage):
    page = browser.new_page()
    page.goto(f"{address}/run?name=going")
    page.wait_for_selector("#chart-loss .main-svg")
    page.evaluate("document.getElementById('chart-loss').mine = true; document.querySelector('details').open = true")
    live_runs.append(storage / "going", 70, grad_norm=1.0)
    page.wait_for_selector("header:has-text('step 70 of 100')")
    page.wait_for_selector("#chart-grad_norm .main-svg")
    drawn = page.evaluate("(c => [c.mine, c.data[0].x.at(-1)])(document.getElementById('chart-loss'))")
    assert drawn == [True, 70] and page.evaluate("document.querySelector('details').open")


def test_ticks_stay_while_rows_change_and_lead_to_the_comparison(browser, address, storage):
    page = browser.new_page()
    page.goto(address)
    for name in ("whole", "sweep/trials/t0001"):
        page.check(f'input[value="{name}"]')
    live_runs.append(storage / "going", 80)
    page.wait_for_selector("td:has-text('80 / 100')")
    page.click("text=Compare")
    page.wait_for_selector("text=2 runs compared")
    page.wait_for_selector("#chart-loss .main-svg")


def test_first_line_of_a_run_brings_its_charts(browser, address, storage):
    page = browser.new_page()
    page.goto(f"{address}/run?name=begun")
    page.wait_for_selector("text=No step has been logged yet.")
    live_runs.append(storage / "begun", 10)
    page.wait_for_selector("#chart-loss .main-svg")


def test_page_says_when_its_server_is_gone_and_goes_on_when_it_is_back(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.context.set_offline(True)
    page.wait_for_selector("#live.failed:has-text('server not reached')")
    page.context.set_offline(False)
    page.wait_for_selector("#live:not(.failed):has-text('live')")
