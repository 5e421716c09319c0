"""Take the pictures of the web demo (with the weights and logs of out/) or, with --site, of the book's first page."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

from browser import Page, browser, demo, missing

from model.cli import Parser, UserError, run_main
from model.weights import OUT_DIR

SECOND = {"en": "Please compute 151 * 53.", "zh": "请计算91 + 854 - 518。"}


def take(url: str, folder: Path, language: str) -> None:
    """The chat with two tool calls, the comparison and the curves, in one language."""
    with browser(1280, 1140, {"en": "en-US", "zh": "zh-CN"}[language]) as driver:
        page = Page(driver)
        page.open(url, "example_2")
        page.click("example_2")
        page.wait_for("retry")
        page.ask(SECOND[language])
        page.settle()
        page.save(folder / f"chat_{language}.png")
        page.open(f"{url}/curves", "runs")
        page.wait_for_css("canvas, svg.marks")
        page.settle()
        page.save(folder / f"curves_{language}.png")


def take_site(site: Path, folder: Path) -> None:
    """The first page of the built site in both languages, on a desktop and on a phone."""
    with browser() as driver:
        for language, page in (("en", "index.html"), ("zh", "zh/index.html")):
            for screen, width, height in (("", 1280, 900), ("_phone", 390, 844)):
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                    "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
                driver.get((site / page).absolute().as_uri())
                driver.save_screenshot(str(folder / f"site_{language}{screen}.png"))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="folder of weights and logs")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images", help="folder to write the pictures to")
    parser.add_argument("--site", type=Path, help="folder that `make docs-build` wrote")
    args = parser.parse_args()
    if lack := missing():
        raise UserError(lack)
    args.images.mkdir(parents=True, exist_ok=True)
    if args.site:
        return take_site(args.site, args.images)
    with demo(args.save_dir.absolute()) as url:
        for language in SECOND:
            take(url, args.images, language)


if __name__ == "__main__":
    run_main(main)
