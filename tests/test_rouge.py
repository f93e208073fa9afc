"""Rouge-L and exact match against figures of the official packages (rouge_score 0.1.2 with nltk 3.10.4's stemmer)."""

import pytest

from minicd.metrics.rouge import normalized_exact_match, rouge_l, stem

F_MEASURES = [
    ("the cats were running", "a cat ran", 0.285714285714), ("running quickly", "runs quick", 0.5), ("ties", "tie", 1),
    ("dying skies", "die sky", 1), ("happily ever after", "happy ever after", 0.666666666667), ("animals", "animal", 1),
    ("Generalizations oscillators", "generally oscillate", 1), ("allied relied tried", "ally rely try", 0.666666666667),
    ("proceeding succeed", "proceed success", 0.5), ("cat dog horse", "horse dog cat", 0.333333333333),
    ("cat dog horse", "cat horse", 0.8), ("star star pear", "pear star", 0.4), ("the the the", "the", 0.5),
    ("one two three four five six", "one three five seven", 0.6), ("café crème", "cafe creme", 0), ("naïve", "naive", 0),
    ("İstanbul", "istanbul", 0), ("\u212aelvin", "kelvin", 1), ("x²", "x2", 0), ("日本語", "日本語", 0), ("", "", 0), ("", "a", 0),
    ("a", "", 0), ("!!!", "?", 0), ("It's John's", "its johns", 0.333333333333), ("don’t stop", "don't stop", 1),
    ("under_score", "under score", 1), ("3.14", "3 14", 1), ("A-B-C", "a b c", 1), ("YES", "yes", 1), ("yes", "no", 0),
    ("  spaces\tand\nlines  ", "spaces and lines", 1),
    ("1: Moonves 2: Moonves 3: a TV exec", "1: hampering 2: limited 3: hampered", 0.428571428571),
    ("#1 return home cities \n#2 return different #1", "#1 return large cubes \n#2 return color of #1", 0.588235294118),
    ("I_TURN_LEFT I_TURN_LEFT I_RUN I_TURN_RIGHT I_JUMP", "I_TURN_LEFT I_WALK I_TURN_RIGHT I_TURN_RIGHT I_WALK", 0.692307692308),
    ("#1 return regions \n#2 return number of  #1", "#1 return quebec city \n#2 return landform region of #1", 0.666666666667),
    ("SINGLE_RELATIVE", "SINGLE_CONN_START", 0.4), ("The Grand Budapest Hotel", "The Greatest Showman", 0.285714285714)]

STEMS = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "outings": "outing", "cannings": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
    "dies": "die", "died": "die", "ties": "tie", "tied": "tie", "spied": "spi", "sees": "see", "feed": "feed", "agreed": "agre",
    "plastered": "plaster", "bled": "bled", "motoring": "motor", "sing": "sing", "conflated": "conflat", "troubled": "troubl",
    "sized": "size", "hopping": "hop", "tanned": "tan", "falling": "fall", "hissing": "hiss", "fizzed": "fizz", "failing": "fail",
    "filing": "file", "happy": "happi", "enjoy": "enjoy", "by": "by", "say": "say", "radically": "radic", "analogy": "analog",
    "pedagogy": "pedagogi", "hopefully": "hope", "possibly": "possibl", "rate": "rate", "cease": "ceas", "controll": "control",
    "roll": "roll", "a1": "a1", "1990s": "1990", "oxen": "oxen", "eye": "eye", "oed": "o", "iing": "i", "yyyy": "yyyi",
    "literalism": "liter", "administration": "administr", "situational": "situat", "legislators": "legisl", "finely": "fine",
    "responsibility": "respons", "latency": "latenc", "consistently": "consist", "truthfulness": "truth", "activity": "activ",
    "forgiveness": "forgiv", "generalizations": "gener", "sanitizer": "sanit", "nanotechnology": "nanotechnolog",
    "continuously": "continu", "graciousness": "gracious", "intentional": "intent", "fictionalized": "fiction",
    "legislative": "legisl", "healthful": "health", "classical": "classic", "indicated": "indic", "simplicity": "simplic",
    "hardness": "hard", "memorable": "memor", "canal": "canal", "variance": "varianc", "dominated": "domin", "bible": "bibl",
    "advertisement": "advertis", "experiences": "experi", "antibiotic": "antibiot", "minions": "minion", "racism": "racism",
    "gravity": "graviti", "expressive": "express", "amorphous": "amorph", "housing": "hous", "vigilante": "vigilant"}


@pytest.mark.parametrize("prediction, reference, f", F_MEASURES)
def test_f_measures(prediction, reference, f):
    assert rouge_l(prediction, [reference]) == pytest.approx(f, abs=1e-9)
    assert rouge_l(reference, [prediction]) == pytest.approx(f, abs=1e-9)


def test_stems():
    assert {word: stem(word) for word in STEMS} == STEMS


def test_short_words_keep_their_ending():
    assert rouge_l("car", ["cars"]) == 1  # cars is stemmed, car is too short to be
    assert rouge_l("cat", ["ats"]) == rouge_l("as", ["a"]) == rouge_l("its", ["it"]) == 0


def test_the_best_reference_counts():
    assert rouge_l("a b", ["x", "a b c d", "b"]) == pytest.approx(2 / 3)
    assert normalized_exact_match("cat", ["dog", "Cat."]) and not normalized_exact_match("cat", ["dog", "the cat"])


@pytest.mark.parametrize("prediction, reference, equal", [
    ("Yes.", "yes", True), ("  a \t b\n", "a b", True), ("don't", "dont", True), ("a-b", "ab", True), ("a - b", "a b", True),
    ("the cat", "cat", False), ("cats", "cat", False), ("café", "cafe", False), ("“a”", "a", False), ("", "?!", True),
    ("", "a", False)])
def test_normalized_exact_match(prediction, reference, equal):
    assert normalized_exact_match(prediction, [reference]) is normalized_exact_match(reference, [prediction]) is equal


@pytest.mark.parametrize("metric", [rouge_l, normalized_exact_match])
@pytest.mark.parametrize("references", ["yes", [], ""])
def test_references_are_a_list(metric, references):
    with pytest.raises(ValueError, match="list of at least one string"):
        metric("yes", references)
