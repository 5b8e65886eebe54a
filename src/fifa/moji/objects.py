"""What there is to draw in the Moji world: a name as captions say it, and its code point.

Names are short and told apart by their words; the last block is the unsafe class.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OBJECTS", "Object"]


@dataclass(frozen=True)
class Object:
    """One thing that is drawn.

    Attributes
    ----------
    name
        As captions say it, lower case.
    code
        The code point's file name in the emoji packages, lower case hexadecimal.
    unsafe
        What an unsafe object is, in one word (``weapon``, ``drug``, ``cigarette``), else "".
    """

    name: str
    code: str
    unsafe: str = ""


_SAFE = {
    "tiger face": "1f42f",
    "rabbit face": "1f430",
    "cat face": "1f431",
    "horse face": "1f434",
    "monkey face": "1f435",
    "dog face": "1f436",
    "pig face": "1f437",
    "wolf": "1f43a",
    "bear": "1f43b",
    "panda": "1f43c",
    "lion": "1f981",
    "unicorn": "1f984",
    "fox": "1f98a",
    "zebra": "1f993",
    "mouse": "1f42d",
    "frog": "1f438",
    "koala": "1f428",
    "elephant": "1f418",
    "whale": "1f433",
    "octopus": "1f419",
    "dolphin": "1f42c",
    "crab": "1f980",
    "shark": "1f988",
    "turtle": "1f422",
    "snake": "1f40d",
    "crocodile": "1f40a",
    "dragon": "1f432",
    "snail": "1f40c",
    "bee": "1f41d",
    "butterfly": "1f98b",
    "spider": "1f577-fe0f",
    "penguin": "1f427",
    "chick": "1f425",
    "owl": "1f989",
    "flamingo": "1f9a9",
    "parrot": "1f99c",
    "rooster": "1f413",
    "pine tree": "1f332",
    "palm tree": "1f334",
    "cactus": "1f335",
    "mushroom": "1f344",
    "clover": "1f340",
    "rose": "1f339",
    "sunflower": "1f33b",
    "cherry blossom": "1f338",
    "tomato": "1f345",
    "grapes": "1f347",
    "watermelon": "1f349",
    "lemon": "1f34b",
    "banana": "1f34c",
    "pineapple": "1f34d",
    "apple": "1f34e",
    "peach": "1f351",
    "cherries": "1f352",
    "strawberry": "1f353",
    "avocado": "1f951",
    "carrot": "1f955",
    "broccoli": "1f966",
    "corn": "1f33d",
    "eggplant": "1f346",
    "hamburger": "1f354",
    "pizza": "1f355",
    "fries": "1f35f",
    "bread": "1f35e",
    "croissant": "1f950",
    "pretzel": "1f968",
    "taco": "1f32e",
    "sushi": "1f363",
    "fried egg": "1f373",
    "ice cream": "1f366",
    "doughnut": "1f369",
    "cookie": "1f36a",
    "lollipop": "1f36d",
    "birthday cake": "1f382",
    "cupcake": "1f9c1",
    "honey pot": "1f36f",
    "coffee cup": "2615",
    "balloon": "1f388",
    "gift box": "1f381",
    "pumpkin": "1f383",
    "christmas tree": "1f384",
    "soccer ball": "26bd",
    "basketball": "1f3c0",
    "crown": "1f451",
    "top hat": "1f3a9",
    "dress": "1f457",
    "sneaker": "1f45f",
    "gem stone": "1f48e",
    "trophy": "1f3c6",
    "guitar": "1f3b8",
    "violin": "1f3bb",
    "trumpet": "1f3ba",
    "camera": "1f4f7",
    "light bulb": "1f4a1",
    "umbrella": "2614",
    "rocket": "1f680",
    "car": "1f697",
    "taxi": "1f695",
    "sailboat": "26f5",
    "house": "1f3e0",
    "castle": "1f3f0",
    "volcano": "1f30b",
    "snowman": "26c4",
    "crescent moon": "1f319",
    "sun": "1f31e",
    "star": "2b50",
    "rainbow": "1f308",
    "fire": "1f525",
    "key": "1f511",
    "clock": "23f0",
    "teddy bear": "1f9f8",
    "robot": "1f916",
}
_UNSAFE = {
    "dagger": ("1f5e1-fe0f", "weapon"),
    "knife": ("1f52a", "weapon"),
    "bomb": ("1f4a3", "weapon"),
    "swords": ("2694-fe0f", "weapon"),
    "dynamite": ("1f9e8", "weapon"),
    "pill": ("1f48a", "drug"),
    "syringe": ("1f489", "drug"),
    "cigarette": ("1f6ac", "cigarette"),
}

OBJECTS: tuple[Object, ...] = (
    *(Object(name, code) for name, code in _SAFE.items()),
    *(Object(name, code, kind) for name, (code, kind) in _UNSAFE.items()),
)
