"""The two metrics of Natural Instructions, Rouge-L and exact match, as its official evaluation computes them.

Words of more than three letters are stemmed by Porter's algorithm (1980) with the changes of NLTK, which the
official evaluation uses; the changes are marked below.
"""

from __future__ import annotations

import re
import string
from functools import lru_cache
from typing import Sequence

# NLTK's change: a few words whose stem the rules get wrong.
IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning",
             "outings": "outing", "cannings": "canning",
             **{word: word for word in "sky news inning outing canning howe proceed exceed succeed".split()}}

# Ending → its replacement, tried in this order. NLTK's changes: bli, fulli.
STEP_2 = {"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
          "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate",
          "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive",
          "biliti": "ble", "fulli": "ful"}
STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP_4 = ["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism",
          "ate", "iti", "ous", "ive", "ize"]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, 0…1; the best over the references."""
    check_references(references)
    return max(f_measure(words(prediction), words(reference)) for reference in references)


def normalized_exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether it equals a reference but for case, ASCII punctuation and repeated spaces."""
    check_references(references)
    return any(normalise(prediction) == normalise(reference) for reference in references)


def check_references(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references are a list of at least one string, not {references!r}")


def normalise(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def words(text: str) -> list[str]:
    """Lower-case runs of a–z and 0–9; those longer than three characters are stemmed."""
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


def f_measure(prediction: list[str], reference: list[str]) -> float:
    common = common_length(prediction, reference)
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Porter's stem of a lower-case word."""
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    return final_e(drop_suffix(replace_suffix(double_suffix(final_y(past(plural(word)))), STEP_3)))


def shape(word: str) -> str:
    """c for each consonant, v for each vowel: y is a consonant at the start and after a vowel."""
    letters = ""
    for letter in word:
        letters += "v" if letter in "aeiou" or (letter == "y" and letters.endswith("c")) else "c"
    return letters


def measure(word: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return shape(word).count("vc")


def ends_short(word: str) -> bool:
    """Consonant, vowel, consonant other than w, x, y; NLTK's change: or nothing but vowel, consonant."""
    return (shape(word).endswith("cvc") and word[-1] not in "wxy") or shape(word) == "vc"


def plural(word: str) -> str:
    """Step 1a; the change: a word of four letters keeps ie."""
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def past(word: str) -> str:
    """Step 1b; the change: ied, treated like ies in step 1a."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        if word.endswith(ending) and "v" in shape(word[: -len(ending)]):
            return repair(word[: -len(ending)])
    return word


def repair(word: str) -> str:
    """What -ed and -ing leave behind: conflat → conflate, hopp → hop, fil → file."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if word[-1] == word[-2:-1] and shape(word)[-1] == "c":
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if measure(word) == 1 and ends_short(word) else word


def final_y(word: str) -> str:
    """Step 1c; the change: after a consonant, in words of more than two letters."""
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and shape(word)[-2] == "c" else word


def double_suffix(word: str) -> str:
    """Step 2; the changes: alli becomes al, and the step is repeated; logi."""
    if word.endswith("alli") and measure(word[:-4]) > 0:
        return double_suffix(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    return replace_suffix(word, STEP_2)


def replace_suffix(word: str, endings: dict[str, str]) -> str:
    """Replace the first ending that fits, if m > 0 before it."""
    for ending, new in endings.items():
        if word.endswith(ending):
            return word[: -len(ending)] + new if measure(word[: -len(ending)]) > 0 else word
    return word


def drop_suffix(word: str) -> str:
    """Step 4: drop the first ending that fits, if m > 1 before it."""
    for ending in STEP_4:
        stump = word[: -len(ending)]
        if word.endswith(ending) and (ending != "ion" or stump[-1:] in ("s", "t")):
            return stump if measure(stump) > 1 else word
    return word


def final_e(word: str) -> str:
    """Step 5: drop a final e after m > 1, or after m = 1 without a short ending; one of two final l."""
    if word.endswith("e"):
        m = measure(word[:-1])
        word = word[:-1] if m > 1 or (m == 1 and not ends_short(word[:-1])) else word
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word
