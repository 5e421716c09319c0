"""Take the README's pictures of the web demo: the real pages, with the weights and logs of out/, in a real browser."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Page, browser, demo, missing

from model.errors import UserError, run_main
from model.weights import OUT_DIR
from trainer.arguments import Parser

QUESTIONS = {"en": "What is 652 plus 561?", "zh": "请计算(179 - 131) * 122。"}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="folder of weights and logs")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images", help="folder to write the pictures to")
    args = parser.parse_args()
    if lack := missing():
        raise UserError(lack)
    args.images.mkdir(parents=True, exist_ok=True)
    with demo(args.save_dir.absolute()) as url:
        for language, locale in (("en", "en-US"), ("zh", "zh-CN")):
            with browser(1280, 800, locale) as driver:
                page = Page(driver)
                page.open(url)
                page.save(args.images / f"welcome_{language}.png")
                page.click("example_1")
                page.wait_for_answers(1)
                page.click("example_2") if page.has("example_2") else None
                page.save(args.images / f"chat_{language}.png")


if __name__ == "__main__":
    run_main(main)
