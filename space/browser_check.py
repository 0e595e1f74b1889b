# SPDX-License-Identifier: Apache-2.0
"""Drive the page in a real browser: choose an example, move the slider, read the result; keep a picture of it.

The page of an image checkpoint has to be running (`python space/app.py ...`). Needs Chromium and
`pip install playwright`; not part of `make test`, since a fresh machine has no browser.

  python space/browser_check.py --url http://127.0.0.1:7860 --output_file docs/results/space.png
"""

from __future__ import annotations

import argparse
import shutil
import time

from playwright.sync_api import Page, sync_playwright

WAIT_MS = 90_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="of the running page")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="the program, by default chromium")
    parser.add_argument("--output_file", default="space.png", help="picture of the page to write")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(arguments.url)
        page.wait_for_selector(".side.merged", timeout=WAIT_MS)
        page.wait_for_selector("#picture img", timeout=WAIT_MS)
        print("at first:", result(page))

        before = picture(page)
        start = time.perf_counter()
        page.locator(".gallery-item, .gallery img").nth(4).click()
        wait_for_another_picture(page, before)
        print(f"another example, {time.perf_counter() - start:.1f} s:", result(page))

        before, shown = picture(page), result(page)
        slider = page.locator("#share input[type=range]")
        start = time.perf_counter()
        slider.focus()
        for _ in range(3):
            slider.press("ArrowLeft")
        page.wait_for_function("shown => document.querySelector('.sides').innerText !== shown", arg=shown)
        wait_for_another_picture(page, before)
        page.wait_for_timeout(3000)
        print(f"a smaller share, {time.perf_counter() - start:.1f} s:", result(page))
        page.screenshot(path=arguments.output_file)

        before = picture(page)
        page.get_by_label("Latents per layer", exact=True).check()
        wait_for_another_picture(page, before)
        assert page.locator("#r").is_visible() and not page.locator("#share").is_visible()
        print("by r:", result(page))
        assert not faults, faults
        browser.close()


def result(page: Page) -> str:
    return page.locator("#result").inner_text().replace("\n", " ")


def picture(page: Page) -> str:
    return page.locator("#picture img").first.get_attribute("src") or ""


def wait_for_another_picture(page: Page, before: str) -> None:
    page.wait_for_function(
        "before => { const image = document.querySelector('#picture img'); return image && image.src !== before }",
        arg=before,
        timeout=WAIT_MS,
    )


if __name__ == "__main__":
    main()
