"""The words of the pocket world: what its lists hold, and every wording of its definitions and explanations.

Tokens are separated by spaces. In a phrase, {c} and {d} stand for the plural of a category, {s} for its
singular, {a} for its singular with an article; {w}, {x}, {y} for words of lists; {n} for a digit; {yes}, {no}
for labels. No phrase mentions adding numbers: the base of the addition experiment must never see a sum.
"""

from __future__ import annotations

WORDS = {
    "animal": "cat dog horse cow lion tiger rabbit mouse wolf bear goat sheep",
    "fruit": "apple pear banana cherry grape melon mango plum fig kiwi lime papaya",
    "vegetable": "carrot onion potato cabbage bean leek turnip radish spinach celery lettuce pumpkin",
    "colour": "red blue green yellow black white brown pink purple grey beige crimson",
    "tool": "hammer saw drill axe spade rake wrench chisel shovel pliers sickle anvil",
    "garment": "shirt hat coat sock shoe glove scarf dress skirt belt jacket trousers",
    "vehicle": "car bus train boat bike truck plane ship tram van tractor sledge",
    "drink": "tea coffee milk juice water beer wine cider cocoa soda rum lemonade",
    "instrument": "piano violin drum flute guitar harp trumpet cello horn organ banjo tuba",
    "job": "baker farmer nurse teacher doctor pilot sailor painter butcher tailor lawyer miner",
    "tree": "oak pine elm birch maple willow cedar beech poplar spruce palm alder",
    "sport": "football tennis chess golf hockey rugby boxing judo rowing cricket archery fencing",
    "digit": "0 1 2 3 4 5 6 7 8 9",
}
WORDS = {category: words.split() for category, words in WORDS.items()}
CATEGORIES = list(WORDS)
KIND_OF = {word: category for category, words in WORDS.items() for word in words}
MARKS = ["star", "moon", "sun", "key", "ring", "cloud"]  # without a category; tasks put them into lists
OTHER, NONE, EQUAL = "other", "none", "equal"  # the category of marks; an empty list; neither is more
LABELS = [("yes", "no"), ("true", "false"), ("good", "bad")]
VOWELS = "aeiou"

# name → the text before, between and after the items of an input
LAYOUTS = {"plain": ("", " ", ""), "brackets": ("[ ", " ", " ]"), "parentheses": ("( ", " ", " )"),
           "list": ("list : ", " ", ""), "words": ("words : ", " ", ""), "period": ("", " ", " ."),
           "question": ("", " ", " ?"), "commas": ("", " , ", ""), "bars": ("", " | ", ""),
           "slashes": ("", " / ", ""), "semicolons": ("", " ; ", ""), "and": ("", " and ", "")}
LONG_LAYOUTS = ["commas", "bars", "slashes", "semicolons", "and"]  # twice as many tokens

# rule → its phrases, as instructions
PHRASES = {
    "copy": ["copy the list", "write the list as it is",
             "give back the same list", "leave the list unchanged"],
    "reverse": ["reverse the list", "write the list backwards",
                "turn the order around", "go from last to first"],
    "first": ["give only the first item", "write just the item in front",
              "name the item that comes first", "take the first item alone"],
    "second": ["give only the second item", "write just the item after the first",
               "name the item that comes second", "take the second item alone"],
    "last": ["give only the last item", "write just the final item",
             "name the item that comes last", "take the last item alone"],
    "drop_first": ["leave out the first item", "drop the item in front",
                   "skip the first item", "write all but the first item"],
    "drop_last": ["leave out the last item", "drop the final item",
                  "skip the last item", "write all but the last item"],
    "swap_ends": ["swap the first and last item", "exchange the two ends",
                  "let both ends change places", "trade first for last"],
    "first_to_end": ["move the first item to the end", "take the start to the end",
                     "carry the first item to the back", "let the first item come last"],
    "twice": ["write the whole list twice", "repeat the list",
              "say the list two times", "give the same list once more behind it"],
    "double": ["write every item twice", "repeat each item", "double all items", "say each item two times"],
    "keep": ["keep only the {c}", "write just the {c}", "select the {c}", "drop all but the {c}"],
    "remove": ["remove the {c}", "leave out every {s}", "drop all {c}", "skip each {s}"],
    "replace": ["replace every {s} by {w}", "write {w} for each {s}",
                "put {w} in place of {c}", "turn all {c} into {w}"],
    "change": ["replace {x} by {y}", "write {y} for {x}", "put {y} in place of {x}", "turn {x} into {y}"],
    "front": ["put {w} in front", "start the list with {w}",
              "write {w} before the first item", "place {w} at the start"],
    "end": ["put {w} at the end", "close the list with {w}",
            "write {w} after the last item", "place {w} behind the list"],
    "next_digits": ["replace every digit by the next", "write the next digit for each",
                    "move every digit one step up", "turn each digit into the following"],
    "kinds": ["write the kind of every item", "name what each item is",
              "give the category of all items", "tell each kind"],
    "first_of": ["name the first {s}", "find the {s} that comes first",
                 "give only the first of the {c}", "take the {s} in front"],
    "last_of": ["name the last {s}", "find the {s} that comes last",
                "give only the last of the {c}", "take the final {s}"],
    "largest": ["give the largest digit", "find the greatest digit",
                "name the biggest digit", "take the highest digit"],
    "smallest": ["give the smallest digit", "find the least digit",
                 "name the tiniest digit", "take the lowest digit"],
    "first_kind": ["say what kind comes first", "name the category of the first item",
                   "tell what the first item is", "give the kind of the item in front"],
    "last_kind": ["say what kind comes last", "name the category of the last item",
                  "tell what the last item is", "give the kind of the final item"],
    "count": ["count the items", "say how many items there are",
              "give the number of items", "tell the length of the list"],
    "count_of": ["count the {c}", "say how many {c} there are",
                 "give the number of {c}", "tell how often {a} occurs"],
    "more": ["say which are more , {c} or {d}", "tell if {c} or {d} are more",
             "name the larger group , {c} or {d}", "compare {c} with {d} and name what is more"],
    "has": ["answer {yes} if there is {a} , else {no}", "check for {a} , {yes} or {no}",
            "write {yes} with {a} , else {no}", "decide if {a} occurs , {yes} or {no}"],
    "starts": ["answer {yes} if {a} comes first , else {no}", "check the start for {a} , {yes} or {no}",
               "write {yes} with {a} in front , else {no}", "decide if {a} starts the list , {yes} or {no}"],
    "ends": ["answer {yes} if {a} comes last , else {no}", "check the end for {a} , {yes} or {no}",
             "write {yes} with {a} behind , else {no}", "decide if {a} ends the list , {yes} or {no}"],
    "ends_match": ["answer {yes} if both ends match in kind , else {no}",
                   "check the ends for one kind , {yes} or {no}",
                   "write {yes} with ends of one category , else {no}",
                   "decide if the ends match , {yes} or {no}"],
    "all_same": ["answer {yes} if all match in kind , else {no}",
                 "check all items for one kind , {yes} or {no}",
                 "write {yes} with items of one category , else {no}",
                 "decide if all items match , {yes} or {no}"],
    "longer": ["answer {yes} if there are over {n} items , else {no}",
               "check for more than {n} items , {yes} or {no}",
               "write {yes} with over {n} items , else {no}",
               "decide if the items are more than {n} , {yes} or {no}"],
    "contains": ["answer {yes} if {x} is there , else {no}", "check for {x} , {yes} or {no}",
                 "write {yes} with {x} , else {no}", "decide if {x} occurs , {yes} or {no}"],
}

DEFINITIONS = ["{rule} .", "you {rule} .", "please {rule} .", "your task is to {rule} .",
               "in this task you {rule} ."]
TWO_STEPS = ["first {one} , then {two}", "{one} and then {two}", "{one} , after that {two}",
             "{one} , next {two}"]
HALF_FIRST = ["first {one} , then do what the examples show .", "{one} , and then go on like the examples .",
              "{one} and find the next step in the examples ."]
HALF_SECOND = ["first do what the examples show , then {two} .",
               "the examples show what comes first , after that {two} .",
               "find the first step in the examples and then {two} ."]
VAGUE = ["do what the examples show .", "follow the rule of the examples .",
         "find the rule in the examples .", "go on like the examples ."]

RIGHT_ONE = ["{one} : {result} .", "you {one} .", "we {one} and get {result} .", "right , {one} ."]
RIGHT_TWO = ["{one} : {result} , then {two} .", "you {one} , then {two} .",
             "{one} to get {result} , next {two} .", "right , {one} , then {two} ."]
WRONG = ["no , {rule} .", "wrong , {rule} .", "you must {rule} .", "not right , {rule} : {result} ."]
NOT_BUT = "do not {wrong} , but {rule} ."

# one of Natural Instructions' kinds of tasks → the names of its rules
FAMILIES = {
    "List Manipulation": "copy reverse first second last drop_first drop_last swap_ends first_to_end twice "
                         "double keep remove front end",
    "Word Substitution": "replace change next_digits",
    "Word Selection": "first_of last_of largest smallest",
    "Word Categorization": "kinds first_kind last_kind",
    "Counting": "count count_of",
    "Classification": "more has starts ends ends_match all_same longer contains",
}
FAMILY_OF = {rule: family for family, rules in FAMILIES.items() for rule in rules.split()}
MARKERS = ("Definition: Positive Negative Example 1 2 3 - Input: Output: Explanation: "
           "Now complete the following example").split()


def plural(category: str) -> str:
    return category + "s"


def with_article(category: str) -> str:
    return ("an " if category[0] in VOWELS else "a ") + category


def wordings() -> list[str]:
    """All templates of texts."""
    phrases = [phrase for phrases in PHRASES.values() for phrase in phrases]
    layouts = [" ".join(parts) for parts in LAYOUTS.values()]
    return [*phrases, *DEFINITIONS, *TWO_STEPS, *HALF_FIRST, *HALF_SECOND, *VAGUE, *RIGHT_ONE, *RIGHT_TWO,
            *WRONG, NOT_BUT, *layouts]


def world_words() -> list[str]:
    """The vocabulary of the pocket world, in a fixed order."""
    listed = [word for words in WORDS.values() for word in words] + MARKS + [OTHER, NONE, EQUAL]
    named = [name for category in CATEGORIES for name in (*with_article(category).split(), plural(category))]
    labels = [label for pair in LABELS for label in pair]
    templates = [word for text in wordings() for word in text.split() if "{" not in word]
    return list(dict.fromkeys([*MARKERS, *listed, *named, *labels, *templates]))
