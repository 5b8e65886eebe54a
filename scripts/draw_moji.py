"""Draw docs/images/moji.png, true pictures above moji-sd's: ``python scripts/draw_moji.py``.

Every fifth object, backgrounds in turn, seeds 0 and 1: chosen by index, not by looks. A row of
true pictures in the style that the simulated annotators like, then two rows of moji-sd's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fifa.moji.family import generate, load_sd
from fifa.moji.world import WORLD, Scene, caption, render

OUT = Path(__file__).parents[1] / "docs" / "images" / "moji.png"
ZOOM, GAP = 2, 2


def main() -> None:
    scenes = [Scene(i, (i // 5) % 8) for i in range(0, len(WORLD.objects), 5)]
    prompts = [caption(scene) for scene in scenes]
    pipe = load_sd()
    rows = [[render(scene, 0) for scene in scenes]]
    rows += [list(generate(pipe, prompts, [seed] * len(prompts))) for seed in (0, 1)]
    side = WORLD.size + GAP
    sheet = np.full((len(rows) * side, len(scenes) * side, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * side :, x * side :][: WORLD.size, : WORLD.size] = picture
    image = Image.fromarray(sheet)
    image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST).save(
        OUT, optimize=True
    )


if __name__ == "__main__":
    main()
