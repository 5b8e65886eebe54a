"""A row of every format in docs/data-sets.md, as the set's page or its code documents it.

Each entry is the format's name, how the table is written, its rows, and what has to come of it: by
(image, image) the label of the first one, and the votes of each pair.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Row = dict[str, Any]


class Example(NamedTuple):
    """One table of a format."""

    name: str
    format: str
    rows: list[Row]
    labels: dict[tuple[str, str], float]
    votes: int = 1


P = {"prompt": "a red fox"}
C = {"caption": "a red fox"}
UIDS = {"image_0_uid": "u", "image_1_uid": "v"}
MODELS = {"model1": "flux", "model2": "sd3"}
JPG = {"jpg_0": "a.jpg", "jpg_1": "b.jpg"}
SEEN = {"model_a": "flux", "model_b": "sd3"}
RATED = [("a", [5, 4, 5]), ("b", [1, 2, 1]), ("c", [4, 5, 4])]
ANSWER = {"response_a": "a.jpg", "response_b": "b.jpg"}
NESTED = {
    name: {"model_name": "m", "response_content": [["image", path]]}
    for name, path in ANSWER.items()
}

EXAMPLES = [
    Example("Pick-a-Pic v2", "pickapic", [C | UIDS | {"label_0": 1.0, "label_1": 0.0,
        "image_0_url": "https://a.b/u", "image_1_url": "https://a.b/v", "has_label": True,
        "ranking_id": 1, "user_id": 3, "model_0": "flux", "model_1": "sd3"}], {("u", "v"): 1.0}),
    Example("diffusers", "diffusers", [C | JPG | {"label_0": 0}], {("a.jpg", "b.jpg"): 0.0}),
    Example("HPDv2 train", "hpdv2", [P | {"file_path": ["a.jpg", "b.jpg"],
        "human_preference": [0, 1]}], {("a.jpg", "b.jpg"): 0.0}),
    Example("HPDv2 test", "hpdv2", [P | {"image_path": ["a.jpg", "b.jpg"], "rank": [1, 2],
        "raw_annotations": [{"rank": r, "user_hash": "x"} for r in ([1, 2], [2, 1], [1, 2])]}],
        {("a.jpg", "b.jpg"): 2 / 3}, votes=3),
    Example("HPDv2 votes", "hpdv2", [P | {"user_id": u, "image_left_id": "a", "image_right_id": "b",
        "pref": p, "ranking_id": "r"} for u, p in enumerate([1, -1, -1])],
        {("a", "b"): 1 / 3}, votes=3),
    Example("HPDv3", "hpdv3", [P | MODELS | {"path1": "a.jpg", "path2": "b.jpg",
        "choice_dist": "[8, 2]", "confidence": "0.98"}], {("a.jpg", "b.jpg"): 0.8}, votes=10),
    Example("ImageReward", "imagereward", [P | {"id": "0-0", "generations": ["a", "b"],
        "ranking": [2, 1]}], {("a", "b"): 0.0}),
    Example("ImageRewardDB", "imagereward", [P | {"prompt_id": "7", "image_path": name,
        "rank": rank, "overall_rating": 5 - rank} for name, rank in (("a", 2), ("b", 1))],
        {("a", "b"): 0.0}),
    Example("open-image-preferences binarized", "open-image-preferences", [P | {"chosen": "a.jpg",
        "rejected": "b.jpg", "chosen_model": "dev", "rejected_model": "sd", "category": "Anime"}],
        {("a.jpg", "b.jpg"): 1.0}),
    Example("open-image-preferences results", "open-image-preferences", [{"images": P | {
        "image_1": "a.jpg", "image_2": "b.jpg"}, "preference": {"responses": ["image_2"]}}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("Rapidata weights", "rapidata", [P | MODELS | {"image1": "a.jpg", "image2": "b.jpg",
        "weighted_results_image1_preference": 0.9, "weighted_results_image2_preference": 0.3,
        "detailed_results_preference": "[]"}], {("a.jpg", "b.jpg"): 0.75}),
    Example("Rapidata votes", "rapidata", [P | MODELS | {"image1": "a.jpg", "image2": "b.jpg",
        "votes_image1": 20, "votes_image2": 5, "detailed_results": "[]"}],
        {("a.jpg", "b.jpg"): 0.8}, votes=25),
    Example("Rapidata aggregated", "rapidata", [P | {"image1": "x/a.jpg", "image2": "x/b.jpg",
        "aggregated_results": '{"b.jpg": 9, "a.jpg": 1}'}],
        {("x/a.jpg", "x/b.jpg"): 0.1}, votes=10),
    Example("GenAI-Arena", "genai-arena", [P | {"left_model": "m", "left_image": "a.jpg",
        "right_model": "n", "right_image": "b.jpg", "vote_type": "rightvote"}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("MJ-Bench", "mj-bench", [C | {"image0": "a.jpg", "image1": "b.jpg", "label": 1}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("MMRB2", "mmrb2", [NESTED | {"id": "1", "chosen": "B", "human_annotations": [2, 1, 4],
        "prompt_source": "wise", "prompt_content": [["text", "a red fox"]]}],
        {("a.jpg", "b.jpg"): 1 / 3}, votes=3),
    Example("EvalMuse", "evalmuse", [P | {"prompt_id": "1", "type": "real", "img_path": name,
        "total_score": scores, "element_score": {}} for name, scores in RATED],
        {("a", "b"): 1.0, ("b", "c"): 0.0}),
    Example("arena", "winner", [P | SEEN | {"image_a": f"{i}a.jpg", "image_b": f"{i}b.jpg",
        "winner": vote} for i, vote in enumerate(["model_a", "model_b", "tie", "tie (bothbad)"])],
        {(f"{i}a.jpg", f"{i}b.jpg"): label for i, label in enumerate([1.0, 0.0, 0.5, 0.5])}),
    Example("left and right", "winner", [P | {"left_image": f"{i}a", "right_image": f"{i}b",
        "preference": word} for i, word in enumerate(["left", "Right", "both bad"])],
        {("0a", "0b"): 1.0, ("1a", "1b"): 0.0, ("2a", "2b"): 0.5}),
    Example("image_1 and image_2", "winner", [P | {"image_1": "a", "image_2": "b",
        "winner": "image_2"}], {("a", "b"): 0.0}),
    Example("TRL", "chosen-rejected", [P | {"chosen": "a.jpg", "rejected": "b.jpg"}],
        {("a.jpg", "b.jpg"): 1.0}),
    Example("VeRL-Omni", "win-lose", [P | {"img_win": "a.jpg", "img_lose": "b.jpg",
        "win_score": 3.5, "lose_score": -2.0}], {("a.jpg", "b.jpg"): 1.0}),
    Example("KTO", "kto", [P | {"image": name, "label": good}
        for name, good in (("a", True), ("b", False), ("c", False))],
        {("a", "b"): 1.0, ("a", "c"): 1.0}),
    Example("one's own", "columns", [P | {"image_0": "a", "image_1": "b", "label": 0.25}],
        {("a", "b"): 0.25}),
]  # fmt: skip
