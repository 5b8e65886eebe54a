"""Draw docs/images/vote.png, the voting page over drawn images: python scripts/draw_vote.py."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter
from playwright.sync_api import Page, sync_playwright

from fifa.run.folder import begin
from fifa.shards.files import write_table

OUT = Path(__file__).parents[1] / "docs" / "images" / "vote.png"
HIGH = 800  # of both windows
SIZE, FINE = 512, 3  # pixels; drawn larger and made small, for smooth edges
SKIES = {
    "at night": ((18, 26, 58), (70, 92, 140), (244, 240, 214)),
    "at dawn": ((108, 120, 176), (246, 190, 160), (255, 238, 200)),
    "at noon": ((84, 160, 222), (196, 226, 240), (255, 246, 190)),
}
HOUSES = {"red": (186, 58, 48), "white": (236, 232, 222), "yellow": (226, 178, 66)}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        make_run(run)
        command = [sys.executable, "-m", "fifa", "vote", str(run), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        try:
            take_pictures(server.stdout.readline().strip())
        finally:
            server.kill()


def take_pictures(link: str) -> None:
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--headless", "--no-sandbox"]
        )
        wide = browser.new_page(viewport={"width": 1180, "height": HIGH})
        phone = browser.new_page(
            viewport={"width": 390, "height": HIGH}, is_mobile=True, has_touch=True
        )
        for page in (wide, phone):
            show_pair(page, link)
        beside(wide.screenshot(), phone.screenshot())
        browser.close()


def make_run(run: Path) -> None:
    begin(run)
    rows = []
    for model in ("base", "fifa"):
        for i in range(24):
            when, colour = list(SKIES)[i % 3], list(HOUSES)[i // 3 % 3]
            name = f"images/{model}/{i:04d}.png"
            (run / "evaluate" / name).parent.mkdir(parents=True, exist_ok=True)
            draw(colour, when, i, sound=model != "base").save(run / "evaluate" / name)
            prompt = f"a small {colour} house among hills {when}"
            row = {"model": model, "prompt_id": f"{colour} {when}", "prompt": prompt}
            rows.append(row | {"seed": i // 9, "file": name, "category": when})
    write_table(run / "evaluate" / "images.parquet", pa.Table.from_pylist(rows))


def draw(colour: str, when: str, seed: int, *, sound: bool) -> Image.Image:
    """A house among hills; not ``sound``: out of true, and a little blurred."""
    rng = np.random.default_rng([seed, sound])
    n = SIZE * FINE
    top, horizon, light = (np.array(c, float) for c in SKIES[when])
    fade = np.linspace(0, 1, n)[:, None, None] ** 0.8
    image = Image.fromarray(np.broadcast_to(top + (horizon - top) * fade, (n, n, 3)).astype("u1"))
    pen = ImageDraw.Draw(image)
    x, y, r = rng.uniform(0.15, 0.85) * n, rng.uniform(0.1, 0.24) * n, 0.06 * n
    pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(light.astype(int).tolist()))
    shade = {"at night": 0.42, "at dawn": 0.8, "at noon": 1.0}[when]
    across = np.linspace(0, 1, 200)
    for depth, green in enumerate([(110, 150, 128), (84, 138, 88), (58, 116, 62)]):
        wave = 0.5 + 0.11 * depth + 0.05 * np.sin(across * rng.uniform(5, 9) + rng.uniform(0, 6))
        ridge = [(float(a) * n, float(b) * n) for a, b in zip(across, wave, strict=True)]
        fill = tuple(int(c * shade) for c in green)
        pen.polygon([(0, n), *ridge, (n, n)], fill=fill)
        if depth == 1:
            house(pen, n, colour, shade, rng, sound=sound)
    if not sound:
        image = image.filter(ImageFilter.GaussianBlur(2.2 * FINE))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def house(
    pen: ImageDraw.ImageDraw,
    n: int,
    colour: str,
    shade: float,
    rng: np.random.Generator,
    *,
    sound: bool,
) -> None:
    x, y, w, h = rng.uniform(0.34, 0.5) * n, 0.52 * n, 0.24 * n, 0.17 * n
    off = (lambda: 0.0) if sound else (lambda: float(rng.normal(0, 0.022)) * n)
    wall = tuple(int(c * (0.5 + shade / 2)) for c in HOUSES[colour])
    roof, glow = (72, 52, 50), (255, 214, 120)

    def polygon(points: list[tuple[float, float]], fill: tuple[int, ...]) -> None:
        pen.polygon([(a + off(), b + off()) for a, b in points], fill=fill)

    polygon([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], wall)
    polygon([(x - 0.03 * n, y), (x + w / 2, y - 0.12 * n), (x + w + 0.03 * n, y)], roof)
    for left in (0.14, 0.6):
        a, b, s = x + left * w, y + 0.25 * h, 0.24 * w
        polygon([(a, b), (a + s, b), (a + s, b + s), (a, b + s)], glow)
    polygon(
        [
            (x + 0.42 * w, y + h),
            (x + 0.42 * w, y + 0.5 * h),
            (x + 0.57 * w, y + 0.5 * h),
            (x + 0.57 * w, y + h),
        ],
        roof,
    )


def show_pair(page: Page, link: str) -> None:
    page.goto(link)
    page.get_by_role("button", name="Start").click()
    page.wait_for_selector("#vote")
    page.wait_for_load_state("networkidle")
    for number in range(2, 8):
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(
            "n => document.querySelector('#count').textContent.includes(` ${n} of`)", arg=number
        )
    page.wait_for_timeout(400)


def beside(wide: bytes, phone: bytes) -> None:
    left, right = (Image.open(io.BytesIO(data)).convert("RGB") for data in (wide, phone))
    both = Image.new("RGB", (left.width + right.width + 24, left.height), (128, 128, 128))
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 24, 0))
    both.quantize(200, dither=Image.Dither.NONE).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
