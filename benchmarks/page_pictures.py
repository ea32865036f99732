"""The pictures of the page in docs/page.md, taken in a headless Chromium.

    nanokimi demo --output_dir runs/demo        # the model that continues Python
    python -m benchmarks.page_pictures          # writes docs/images/page-*.png

For the chat it trains a `tiny` model once, for two minutes, on questions and answers made from docstrings of Python's
standard library. Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright

IMAGES = Path(__file__).parent.parent / "docs" / "images"
NANOKIMI = Path(sys.executable).parent / "nanokimi"
MODULES = "argparse ast base64 bisect calendar collections copy csv datetime fileinput fnmatch functools glob gzip"
MODULES += " heapq json logging os pathlib pprint queue random shutil socket statistics string tempfile textwrap"
MODULES += " threading timeit tokenize typing urllib uuid zipfile"
TEMPLATE = """{% for m in messages %}### {{ "Question" if m.role == "user" else "Answer" }}
{{ m.content }}
{% endfor %}{% if add_generation_prompt %}### Answer
{% endif %}"""
PROMPT = 'def read_text(path):\n    """Return'
QUESTIONS = ("What does shutil.copyfile do?", "And heapq.heappush?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", default="runs/demo/checkpoints/final.pt", metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/page"), help="of the chat model (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=120, help="of training it (default: %(default)s)")
    args = parser.parse_args()
    checkpoint, template = args.folder / "checkpoints" / "final.pt", args.folder / "talk.jinja"
    if not checkpoint.exists():
        train_talker(args.folder, args.seconds)
    template.write_text(TEMPLATE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with served(args.demo) as address:
            picture_text(browser, address)
            picture_phone(browser, address)
        with served(checkpoint, "--chat_template", template) as address:
            picture_chat(browser, address)
        browser.close()


# ---- a model that talks -------------------------------------------------------------------------


def train_talker(folder: Path, seconds: int) -> None:
    """A `tiny` model of short talks about the standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "talk.txt"
    text.write_text("<|endoftext|>\n".join(talks(random.Random(0))))
    flags = "--preset tiny --set tokenizer_name=bpe:2048 --batch_size 8 --gradient_accumulation 1 --warmup_steps 10"
    flags += f" --max_steps 5000 --decay_fraction 0.8 --eval_interval 100 --max_seconds {seconds}"
    subprocess.run([NANOKIMI, "train", *flags.split(), "--data_path", text, "--output_dir", folder], check=True)


def talks(draw: random.Random, count: int = 4000) -> Iterator[str]:
    """Each asks for two or three of the library's functions and classes."""
    library = Path(sysconfig.get_path("stdlib"))
    known = [entry for name in MODULES.split() for entry in described(library, name)]
    for _ in range(count):
        lines = []
        for i, (name, about) in enumerate(draw.sample(known, draw.choice((2, 3)))):
            ask = f"What does {name} do?" if i == 0 or draw.random() < 0.5 else f"And {name}?"
            lines += ["### Question", ask, "### Answer", about]
        yield "\n".join(lines) + "\n"


def described(library: Path, module: str) -> Iterator[tuple[str, str]]:
    """Names of a module's public functions and classes, and the first paragraph of what each says of itself."""
    path = library / f"{module}.py"
    tree = ast.parse((path if path.exists() else library / module / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            about = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            if 20 <= len(about) <= 200:
                yield f"{module}.{node.name}", about


# ---- pictures -----------------------------------------------------------------------------------


@contextmanager
def served(checkpoint: Path | str, *flags: Path | str) -> Iterator[str]:
    """The address of a server of ``checkpoint``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = subprocess.Popen([NANOKIMI, "serve", checkpoint, "--model_name", "tiny", "--port", str(port), *flags])
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit("the server did not start")
        yield address
    finally:
        server.terminate()
        server.wait()


def open_page(browser: Browser, address: str, width: int, height: int, scheme: str, *, phone: bool = False) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=phone, has_touch=phone
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#model strong")
    return page


def choose(page: Page, **settings: float) -> None:
    """Fills in settings, also those of a folded card."""
    page.evaluate("document.getElementById('sampling').open = true")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
        page.press(f"#{name}", "Tab")


def picture_text(browser: Browser, address: str) -> None:
    page = open_page(browser, address, 1280, 880, "light")
    write_text(page)
    page.check("#surprise")
    uncertain(page).click()
    page.evaluate("document.querySelector('main').scrollTo(0, 0)")
    page.screenshot(path=IMAGES / "page-text.png")


def picture_phone(browser: Browser, address: str) -> None:
    page = open_page(browser, address, 375, 780, "light", phone=True)
    write_text(page)
    page.evaluate("document.getElementById('sampling').open = false")
    uncertain(page).tap()
    page.screenshot(path=IMAGES / "page-phone.png")


def write_text(page: Page) -> None:
    choose(page, temperature=0.5, seed=1, max_tokens=110)
    page.fill("#prompt", PROMPT)
    page.click("#generate")
    page.wait_for_selector("body[data-state=ready]")


def uncertain(page: Page) -> Locator:
    """A word of which the model was not sure."""
    doubtful = page.locator("#text :is(.surprise-2, .surprise-3):not(.prompt)")
    return doubtful.filter(has_text=re.compile("^ [a-z]{4,}$")).first


def picture_chat(browser: Browser, address: str) -> None:
    page = open_page(browser, address, 1280, 880, "dark")
    choose(page, temperature=0.3, seed=1)
    for i, question in enumerate(QUESTIONS):
        page.fill("#message", question)
        page.press("#message", "Enter")
        page.wait_for_selector(f".read >> nth={i}")
    page.click(".read summary >> nth=1")
    asked = page.locator(".read[open] :is(.surprise-3, .surprise-4, .surprise-5)")
    asked.filter(has_text=re.compile("[a-z]{3}")).last.hover()
    page.screenshot(path=IMAGES / "page-chat.png")


if __name__ == "__main__":
    main()
