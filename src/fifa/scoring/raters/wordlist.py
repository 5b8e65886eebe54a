"""Words that leave no doubt: what the default rater flags by its wording alone.

A linear head on embeddings ranks harm, but misses prompts that name it outright. This list holds
only words whose ordinary use in an image prompt is the harmful one, so it is short, English, and
easily written around; docs/quality.md has what it finds and what it costs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fifa.shards.files import digest

_WORDS = {
    "sexual": r"""
        nsfw | nudes? | nudity | naked | topless | porn\w* | hentai | ecchi | xxx | erotic\w*
        | blow\W?jobs? | hand\W?jobs? | cum\W?shots? | creampies? | dildos? | penis(?:es)?
        | vaginas? | pussy | genitals? | genitalia | nipples? | tits | boobs? | orgasm\w*
        | masturbat\w* | upskirts? | creep\W?shots? | bdsm | milfs? | sybian | sex
        | (?:having|oral|anal|group) \s sex | (?:her|his|a|big|huge) \s (?:dick|cock)
    """,
    "violence": r"""
        gore | gory | mutilat\w* | dismember\w* | decapitat\w* | behead\w* | disembowel\w*
        | corpses? | entrails | dead \s bod(?:y|ies) | tortur\w* | murder(?:ed|ing|s)? | massacre\w*
        | lynch(?:ed|ing) | raped? | raping | severed \s (?:head|limb|arm|leg|hand)s?
        | blood \W? (?:splatter|soaked|bath)\w*
    """,
    "hate": r"""
        swastikas? | kkk | ku \s klux \s klan | white \s (?:power|supremac\w+) | nigg(?:er|a)s?
        | fagg?ots? | kikes?
    """,
    "self-harm": r"""
        suicid\w* | self\W?harm\w* | (?:hang(?:s|ed|ing)?|kill(?:s|ed|ing)?|cut(?:s|ting)?) \s
        (?:him|her|them|my)sel(?:f|ves) | (?:slit|cut)(?:ting)? \s (?:his|her|their|my) \s wrists?
    """,
    "minors": r"lolis? | lolicon | shota(?:con)? | jail\W?bait | under\W?age",
}
_CHILD = r"""
    child(?:ren)? | kids? | toddlers? | baby | babies | infants? | school\W?(?:girl|boy)s?
    | little \s (?:girl|boy)s? | teens? | teen\W?age\w*
    | (?:[1-9]|1[0-7]) \W? (?:yo | years? \W? old)
"""


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE | re.VERBOSE)


_CHILDREN = _pattern(_CHILD)
_PATTERNS = {flag: _pattern(words) for flag, words in _WORDS.items()}
WORDS_DIGEST = digest(_WORDS, _CHILD)  # part of the default rater's identity


def word_flags(prompt: str) -> list[str]:
    """The unsafe flags that the prompt's words raise, a subset of `fifa.config.UNSAFE_FLAGS`.

    ``minors`` is raised by its own words, and wherever a child stands beside sexual words.
    """
    flags = [flag for flag, pattern in _PATTERNS.items() if pattern.search(prompt)]
    if "sexual" in flags and "minors" not in flags and _CHILDREN.search(prompt):
        flags.append("minors")
    return flags


def add_word_flags(prompts: Sequence[str], flags: Sequence[str]) -> list[str]:
    """``flags`` (comma-joined, a prompt each) with those that the prompts' words raise."""
    return [
        ",".join(sorted({*filter(None, known.split(",")), *word_flags(prompt)}))
        for prompt, known in zip(prompts, flags, strict=True)
    ]
