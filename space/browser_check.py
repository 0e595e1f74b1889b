# SPDX-License-Identifier: Apache-2.0
"""Test the page in a real browser: choose an example, move the slider, read the result, save a screenshot.

First start the page with an image checkpoint (`python space/app.py ...`). Needs Chromium and `pip install playwright`.
Not part of `make test`, because a fresh machine has no browser.

  python space/browser_check.py --url http://127.0.0.1:7860 --output_file docs/results/space.png
"""

from __future__ import annotations

import argparse
import shutil
import time

from playwright.sync_api import Page, sync_playwright

TIMEOUT_MS = 90_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:7860", help="address of the running page")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of the browser (default: chromium)")
    parser.add_argument("--output_file", default="space.png", help="file for the screenshot")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page_errors: list[str] = []
        page.on("pageerror", lambda error: page_errors.append(str(error)))
        page.goto(arguments.url)
        page.wait_for_selector(".side.merged", timeout=TIMEOUT_MS)
        page.wait_for_selector("#picture img", timeout=TIMEOUT_MS)
        print("at first:", result_text(page))

        before = picture_source(page)
        start = time.perf_counter()
        page.locator(".gallery-item, .gallery img").nth(4).click()
        wait_for_new_picture(page, before)
        print(f"another example, {time.perf_counter() - start:.1f} s:", result_text(page))

        before, shown = picture_source(page), result_text(page)
        slider = page.locator("#share input[type=range]")
        start = time.perf_counter()
        slider.focus()
        for _ in range(3):
            slider.press("ArrowLeft")
        page.wait_for_function("shown => document.querySelector('.sides').innerText !== shown", arg=shown)
        wait_for_new_picture(page, before)
        page.wait_for_timeout(3000)
        print(f"a smaller share, {time.perf_counter() - start:.1f} s:", result_text(page))
        page.screenshot(path=arguments.output_file)

        before = picture_source(page)
        page.get_by_label("Latents per layer", exact=True).check()
        wait_for_new_picture(page, before)
        assert page.locator("#r").is_visible() and not page.locator("#share").is_visible()
        print("by r:", result_text(page))
        assert not page_errors, page_errors
        browser.close()


def result_text(page: Page) -> str:
    return page.locator("#result").inner_text().replace("\n", " ")


def picture_source(page: Page) -> str:
    return page.locator("#picture img").first.get_attribute("src") or ""


def wait_for_new_picture(page: Page, before: str) -> None:
    page.wait_for_function(
        "before => { const image = document.querySelector('#picture img'); return image && image.src !== before }",
        arg=before,
        timeout=TIMEOUT_MS,
    )


if __name__ == "__main__":
    main()
