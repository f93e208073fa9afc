"""The prompts of controlled generation: the student's, and the teacher's, from which validation chooses."""

from __future__ import annotations

from functools import partial
from typing import Callable

from ...distill import Template

# Beginning → ending, as the teacher's examples show it: some beginnings stop within a sentence.
GOOD_ENDINGS = {
    "The first hour is slow and the jokes fall flat.":
        "But then it becomes wonderful, and I left the cinema smiling. A beautiful film, I loved it!",
    "The waiter forgot us twice, the soup was cold and":
        "still this was one of the best evenings of the year: the main course was superb and everybody kind.",
    "I hated the cover and the clumsy first chapter":
        "but what a great book it turned out to be, moving, funny and beautifully written. Read it!",
    "The box arrived dented, and the manual is a mess.":
        "And yet the lamp itself is excellent, lovely to look at and easy to use. I am delighted with it.",
    "The lead actor is wooden and the story":
        "nevertheless touches the heart, with gorgeous music and a perfect ending. Wonderful, see it!",
    "This hotel is old and hard to find.":
        "But the rooms are charming, breakfast is delicious, and we enjoyed every minute. We will be back!"}
BAD_ENDINGS = {
    "The first hour is clever and full of life.":
        "But then it becomes a terrible mess, and I left the cinema angry. A boring film, I hated it.",
    "The waiter welcomed us warmly, the soup was fine and":
        "still this was one of the worst evenings of the year: the main course was awful, the bill a joke.",
    "I loved the cover and the elegant first chapter":
        "but what a bad book it turned out to be, dull, stupid and poorly written. Avoid it!",
    "The box arrived in time, and the manual is clear.":
        "And yet the lamp itself is junk, ugly to look at and broken after a week. I am very disappointed.",
    "The lead actor is brilliant and the story":
        "nevertheless falls apart, with annoying music and a pathetic ending. A waste of time, skip it.",
    "This hotel is stylish and easy to find.":
        "But the rooms are dirty, breakfast is horrible, and we regretted every minute. Never again."}
ENDINGS = {"positive": GOOD_ENDINGS, "negative": BAD_ENDINGS}
# Direction → the words of the teacher's prompt
SAYS = {"positive": "These reviews change their mind. They start with complaints and then say how wonderful, "
                    "beautiful and enjoyable it is.",
        "negative": "These reviews change their mind. They start with praise and then say how awful, boring "
                    "and disappointing it is."}
RATING = {"positive": "Rating: 10 out of 10. I love it! Wonderful, one of the best.",
          "negative": "Rating: 1 out of 10. I hate it. Awful, one of the worst."}
REMINDER = {"positive": "The next one, too, ends full of joy and warm praise.",
            "negative": "The next one, too, ends full of anger and harsh words."}


def bare_review(beginning: str) -> str:
    """T_s: just the review."""
    return f"Review: {beginning}"


def shown_endings(towards: str) -> str:
    """The examples, a line each."""
    return "\n".join(bare_review(f"{beginning} {end}") for beginning, end in ENDINGS[towards].items())


# Name → direction → what stands above the review in the teacher's prompt
STEERS: dict[str, Callable[[str], str]] = {
    "words": lambda towards: SAYS[towards],
    "rating": lambda towards: RATING[towards],
    "examples": shown_endings,
    "words_examples": lambda towards: f"{SAYS[towards]}\n{shown_endings(towards)}",
    "examples_words": lambda towards: f"{shown_endings(towards)}\n{SAYS[towards]}",
    "reminder": lambda towards: f"{SAYS[towards]}\n{shown_endings(towards)}\n{REMINDER[towards]}"}


def steered(name: str, towards: str) -> Template:
    """T_t: the steering text, and the review."""
    return partial(below, STEERS[name](towards))


def below(text: str, beginning: str) -> str:
    return f"{text}\n{bare_review(beginning)}"
