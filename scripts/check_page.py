#!/usr/bin/env python3
"""Opens a page of `potstill inspect --html` in headless Chromium, offline, and clicks through it as a reader would.

    pip install playwright && apt-get install chromium
    scripts/check_page.py page.html --shots DIR          screenshots at desktop and phone sizes, light and dark
    scripts/check_page.py page.html --hostile            opens every conversation: its text must have done nothing

A page for the last one: precompute with the reference teacher in tests/fixtures/golden over tests/fixtures/inspect/hostile.jsonl.

Checked: no error, no request, no violation of the page's policy; the figures are drawn; a conversation opens; hover, click, keys,
search, order, modes, theme and links into the page work; nothing is wider than the screen; contrast of text on heat. Exits 1 with a
sentence at the first thing that is wrong.
"""
import argparse
import re
import shutil
import sys
from pathlib import Path

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sys.exit("check_page: playwright is not installed; pip install playwright")

SIZES = {"desktop": (1360, 900), "tablet": (900, 1100), "phone": (390, 844)}
# WCAG 2.2, 1.4.3: text of normal size.
LEAST_CONTRAST = 4.5
# Control characters but tab and line breaks, invisible ones, and those that change the direction of text.
CODES = (*range(9), 11, 12, *range(14, 32), *range(0x7F, 0xA0), 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
ACTING = {chr(code) for code in CODES}


def wrong(sentence):
    sys.exit(f"check_page: {sentence}")


def expect(found, expected, what):
    if found != expected:
        wrong(f"{what}: expected {expected!r}, found {found!r}")


class Reader:
    """One browser window on the page, and everything that it complains of."""

    def __init__(self, browser, page_file, size, scheme):
        width, height = SIZES[size]
        touch = size == "phone"
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch,
                                           is_mobile=touch, device_scale_factor=2 if touch else 1, offline=True)
        self.page, self.size, self.complaints, self.requests = self.context.new_page(), size, [], []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = page_file.resolve().as_uri()
        self.open("")

    def open(self, place):
        self.page.goto("about:blank")
        self.page.goto(self.address + place)
        self.page.wait_for_selector("html[data-ready=true]", timeout=30_000)

    def count(self, selector):
        return self.page.locator(selector).count()

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    def close(self):
        expect(self.complaints, [], f"complaints of the browser ({self.size})")
        foreign = [url for url in self.requests if url.partition("#")[0] not in (self.address, "about:blank") and not url.startswith("blob:")]
        expect(foreign, [], f"requests ({self.size})")
        self.context.close()


def is_drawn(reader):
    """Figures and a conversation are there, and fit."""
    if reader.count("#plots svg") < 1 or reader.count("#plots rect, #plots circle") < 5:
        wrong("the figures are not drawn")
    if reader.count(".list button") < 1 or reader.count(".text .t") < 2:
        wrong("no conversation is open")
    fits(reader, "at the start")


def fits(reader, when):
    over = reader.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if over > 0:
        wide = reader.page.evaluate("""[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right >
            document.documentElement.clientWidth + 1).slice(0, 3).map(e => e.tagName + '.' + e.className)""")
        wrong(f"the page is {over} px wider than a {reader.size} screen {when}: {wide}")


def hover_and_click(reader):
    page = reader.page
    scored = page.locator(".text .t:not(.u)")
    target = scored.nth(min(3, scored.count() - 1))
    if reader.size == "phone":
        target.tap()
    else:
        target.hover()
        expect(reader.count("aside.idle"), 0, "panels that wait, with the mouse on a token")
        target.click()
    expect(reader.count("aside.pinned"), 1, "pinned panels after a click")
    if reader.count("aside .choices li") < 2:
        wrong("the panel shows no alternatives")
    expect(reader.count(".t.on"), 1, "tokens in hand")
    fits(reader, "with a token in hand")
    shares = page.eval_on_selector_all("aside .choices li", "all => all.reduce((s, e) => s + parseFloat(e.style.getPropertyValue('--p')), 0)")
    if not 0.97 < shares < 1.03:
        wrong(f"the alternatives and all others add up to {shares}, not to 1")


def keys(reader):
    page = reader.page
    at = lambda: page.evaluate("Number(document.querySelector('.t.on')?.dataset.j ?? -1)")
    before = at()
    page.keyboard.press("ArrowRight")
    expect(at(), before + 1, "token after →")
    page.keyboard.press("ArrowLeft")
    expect(at(), before, "token after ←")
    page.keyboard.press("ArrowDown")
    below = at()
    if below <= before:
        wrong(f"↓ went from token {before} to {below}")
    page.keyboard.press("ArrowUp")
    if not at() < below:
        wrong("↑ does not go up")
    page.keyboard.press("s")
    place = page.evaluate("location.hash")
    expect(place.split(".")[-1], str(at()), "the address's token after s")
    reader.open(place)
    expect(page.evaluate("location.hash"), place, "the address after opening a link into the page")
    expect(reader.count("aside.pinned"), 1, "pinned panels after opening such a link")
    page.keyboard.press("Escape")
    expect(reader.count(".t.on"), 0, "tokens in hand after Esc")


def search_and_order(reader):
    page = reader.page
    everything = reader.count(".list button")
    row = reader.text(".list button .top span").split()[-1]
    page.keyboard.press("/")
    page.keyboard.type(row)
    if not 1 <= reader.count(".list button") <= everything:
        wrong("the search found nothing by a row's number")
    word = max(re.findall(r"\w+", reader.text(".list .begins")), key=len)
    page.fill("input[type=search]", word)
    if reader.count(".list button") < 1 or reader.count(".t.m") < 1:
        wrong(f"the search does not show where {word!r} is")
    page.fill("input[type=search]", "no text has this in it: \u2603\u2603\u2603")
    expect(reader.count(".list button"), 0, "conversations found for a text that none has")
    page.fill("input[type=search]", "")
    expect(reader.count(".list button"), everything, "conversations after the search was emptied")
    page.select_option("select", label="Most surprising first")
    page.locator(".list button").first.click()
    expect(reader.count(".list button[aria-current=true]"), 1, "current conversations")
    for mode in ("unsure", "missed", "hot"):
        button = page.locator(f".modes button[data-mode={mode}]")
        if button.is_enabled():
            button.click()
            expect(button.get_attribute("aria-checked"), "true", f"mode {mode}")


CONTRAST = """() => {
  const channel = (c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const card = numbers(getComputedStyle(document.querySelector('article')).backgroundColor);
  let worst = [99, ''];
  for (const span of document.querySelectorAll('.text .t')) {
    const style = getComputedStyle(span);
    const back = over(numbers(style.backgroundColor), card);
    const ink = over(numbers(style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, span.textContent];
  }
  return worst;
}"""


def contrast(reader, scheme):
    for mode in ("hot", "unsure", "missed"):
        button = reader.page.locator(f".modes button[data-mode={mode}]")
        if button.is_enabled():
            button.click()
            ratio, where = reader.page.evaluate(CONTRAST)
            if ratio < LEAST_CONTRAST:
                wrong(f"contrast of {where!r} ({scheme}, {mode}): expected at least {LEAST_CONTRAST}, found {ratio:.2f}")
    reader.page.locator(".modes button[data-mode=hot]").click()


def theme(reader):
    ground = lambda: reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    before = ground()
    reader.page.click("#theme")
    if ground() == before:
        wrong("the switch between light and dark does nothing")
    reader.page.click("#theme")
    expect(ground(), before, "ground after switching twice")


def harmless(reader):
    """Every conversation is opened; nothing that the data brought has run or has become an element."""
    for i in range(reader.count(".list button")):
        reader.page.locator(".list button").nth(i).click()
        brought = "#app img, #app script, #app iframe, #app a, header img, #details img, #details script"
        found = reader.page.evaluate("(brought) => [document.querySelectorAll(brought).length, typeof window.hostile, document.title.includes('hostile title')]", brought)
        expect(found, [0, "undefined", False], "elements, variables and title that the data brought")
        whole = reader.page.evaluate("document.body.innerText")
        acting = sorted(f"U+{ord(c):04X}" for c in set(whole) & ACTING)
        expect(acting, [], "characters in the page that act on what stands around them")


def shots(reader, folder, name):
    page = reader.page
    page.evaluate("document.activeElement?.blur(); scrollTo({top: 0, behavior: 'instant'})")
    page.screenshot(path=folder / f"{name}-top.png")
    page.screenshot(path=folder / f"{name}-whole.png", full_page=True)
    page.locator("#conversations").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('article').scrollIntoView({block: 'start', behavior: 'instant'})")
    page.keyboard.press("s")
    page.keyboard.press("s")
    page.wait_for_timeout(100)
    page.screenshot(path=folder / f"{name}-token.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    parser.add_argument("--hostile", action="store_true", help="open every conversation and look for what its text did")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"), help="the browser")
    options = parser.parse_args()
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for size in SIZES:
            for scheme in ("light", "dark"):
                reader = Reader(browser, options.page, size, scheme)
                is_drawn(reader)
                contrast(reader, scheme)
                if options.shots:
                    shots(reader, options.shots, f"{size}-{scheme}")
                    reader.page.keyboard.press("Escape")
                hover_and_click(reader)
                keys(reader)
                search_and_order(reader)
                theme(reader)
                if options.hostile:
                    harmless(reader)
                reader.close()
        print(f"{options.page}: drawn and used at {len(SIZES)} sizes, light and dark; no request, no complaint (Chromium {browser.version})")
        browser.close()


if __name__ == "__main__":
    main()
