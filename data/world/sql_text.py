"""The text of the base data/pocket-sql: databases of `databases.py`, each with questions and queries.

A document has a schema and DOCUMENT questions with their queries. All queries count in the loss, so that one
document is practice with 0, 1, 2 … examples. Repeated blocks of random words come first, then queries without
their schema: from databases alone it learnt neither to copy nor, once it could, what jargon means, since in
a schema with two columns half of all guesses are right. Then databases grow, level by level, each begun when
the last is learnt.
"""

from __future__ import annotations

import random

import torch
from tokenizers import processors
from torch import Tensor, nn

from minicd.decoder import Decoder, initialise
from minicd.hf.families import read_config
from minicd.labels import LabelBatch
from minicd.metrics.sql import sql_exact_match
from minicd.sampling import generate
from minicd.tasks.parts.natural_instructions import inputs_prompt
from minicd.tasks.parts.spider import Question, schema_text
from minicd.tasks.parts.sql_eval import sql_prompt
from minicd.tokenizer import TextTokenizer, word_tokenizer

from . import databases as world

Piece = tuple[str, bool]  # a part of a document; whether it counts in the loss
DOCUMENT = 9  # questions: the last one has eight examples
EXAMPLES = (0, 1, 2, 4, 8)  # in the prompts of the held-out figures
SHORTEST, LONGEST, REPEATED = 4, 12, 64  # words of a random block, and with all its repeats
KINDS = ("blocks", "queries", "inputs", "pairs")  # of documents, and their shares, level by level
SHARES = [(0.8, 0.0, 0.0, 0.2), (0.1, 0.9, 0.0, 0.0), (0.05, 0.3, 0.0, 0.65), (0.05, 0.15, 0.05, 0.75)]
LEARNT = 97.0  # percent from which the next level begins
TRIES = 3  # pieces of training after which it begins anyway, if copying and looking up are learnt
SIMPLEST = world.Level(1, 2, shapes=1)
LEVELS = [world.Level(1, 2, 4, 8, 1), SIMPLEST, SIMPLEST, world.Level(1, 3, shapes=3),
          world.Level(1, 4, shapes=7), world.Level(1, 5), world.FULL]


def sql_words() -> list[str]:
    """The vocabulary: schemas, users' words, queries."""
    templates = [word for shape in world.SHAPES for text in shape for word in text.split() if "{" not in word]
    keys, numbers = [f"{name}_id" for name in world.TABLES], map(str, range(world.LARGEST + 1))
    return list(dict.fromkeys([
        "Question:", "SQL:", "Input:", ";", ",", "(", ")", *templates, *world.FUNCTIONS,
        *world.FUNCTIONS.values(), *numbers, *world.TABLES, "id", *keys, *world.TEXTS, *world.NUMBERS,
        *world.VALUES, *world.NONSENSE]))


def sql_tokenizer() -> TextTokenizer:
    """One token a word; a semicolon ends a query, and prompts just end."""
    backend = word_tokenizer(sql_words()).backend
    backend.post_processor = processors.TemplateProcessing(single="$A")
    return TextTokenizer(backend, eos=";", pad=None, ends_prompts=False)


def sql_model(tokenizer: TextTokenizer, seed: int) -> Decoder:
    """A random Llama of 0.85 million parameters. With three layers it stopped learning at four columns."""
    config = read_config({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_id})
    return initialise(Decoder(config), seed)


# --- documents ---


def asked(database: world.Database, rng: random.Random, n: int) -> list[Question]:
    return [Question(database.schema["db_id"], *database.question(rng)) for _ in range(n)]


def pairs(database: world.Database, rng: random.Random, n: int = DOCUMENT) -> list[Piece]:
    """The schema and n questions with queries, as in `sql_prompt`."""
    return [(schema_text(database.schema), False),
            *(piece for each in asked(database, rng, n)
              for piece in ((f"Question: {each.question} SQL:", False), (f"{each.query} ;", True)))]


def inputs(database: world.Database, rng: random.Random) -> list[Piece]:
    """Questions alone, as in `inputs_prompt`, for a model that writes its own."""
    *shown, last = [database.question(rng)[0] for _ in range(rng.randint(4, DOCUMENT))]
    return [(inputs_prompt(shown), False), (f"{last} ;", True)]


def blocks(rng: random.Random) -> list[Piece]:
    """A block of different random words again and again."""
    block = " ".join(rng.sample(sql_words(), rng.randint(SHORTEST, LONGEST)))
    return [(block, False), *[(block, True)] * (REPEATED // len(block.split()) - 1)]


def document(kind: str, rng: random.Random, level: int, split: str = "train") -> list[Piece]:
    """One of KINDS. `queries` are pairs without their schema."""
    if kind == "blocks":
        return blocks(rng)
    database = world.draw_database(rng, split, LEVELS[level])
    return inputs(database, rng) if kind == "inputs" else pairs(database, rng)[kind == "queries" :]


def shares(level: int) -> tuple[float, ...]:
    """Of KINDS."""
    return SHARES[min(level, len(SHARES) - 1)]


def draw_documents(rng: random.Random, level: int, n: int) -> list[list[Piece]]:
    """n documents of one kind, which a batch should be."""
    [kind] = rng.choices(KINDS, shares(level))
    return [document(kind, rng, level) for _ in range(n)]


def as_batch(tokenizer: TextTokenizer, documents: list[list[Piece]]) -> tuple[Tensor, LabelBatch]:
    """First words as prompts [B, 1], the others as answers [B, T], with a mask of the pieces that count."""
    ids = tokenizer.backend.get_vocab()
    rows = [[(ids[word], counts) for text, counts in document for word in text.split()]
            for document in documents]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [(0, False)] * (longest - len(row)) for row in rows])
    tokens, mask = padded[:, 1:, 0], padded[:, 1:, 1].bool()
    return padded[:, :1, 0], LabelBatch(tokens, tokens[..., None], mask[..., None].float(), mask)


class SqlText:
    """Batches of documents of one level, by step number."""

    def __init__(self, tokenizer: TextTokenizer, level: int, steps: int, batch_size: int, seed: int):
        self.tokenizer, self.level, self.steps = tokenizer, level, steps
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, LabelBatch]:
        rng = random.Random(f"{self.seed}/{step}")
        return as_batch(self.tokenizer, draw_documents(rng, self.level, self.batch_size))


def sql_item(rng: random.Random, done: float) -> tuple[str, str]:
    """A prompt with examples and its query, for people to look at."""
    database = world.draw_database(rng)
    *shown, last = asked(database, rng, 4)
    return sql_prompt(database.schema, shown, last.question), last.query


# --- how far the model is ---


def covered(document: list[Piece]) -> bool:
    """Whether the jargon of the last question occurs before it: else nobody could know what it means."""
    before = {word for text, _ in document[:-2] for word in text.split()}
    return all(word in before for word in document[-2][0].split() if word in world.NONSENSE)


def judged(level: int, n: int) -> list[list[Piece]]:
    """n documents of the level's most frequent kind, on validation databases. Only the last piece counts."""
    rng, found, (_, kind) = random.Random(f"learnt/{level}"), [], max(zip(shares(level), KINDS))
    while len(found) < n:
        drawn = document(kind, rng, level, "validation")
        if kind == "blocks" or covered(drawn):
            found.append([*((text, False) for text, _ in drawn[:-1]), drawn[-1]])
    return found


@torch.no_grad()
def learnt(model: nn.Module, tokenizer: TextTokenizer, level: int, n: int) -> float:
    """Percent of n last pieces that greedy decoding gets right, word by word."""
    right: list[bool] = []
    documents, device = judged(level, n), next(model.parameters()).device
    for some in (documents[i : i + 64] for i in range(0, n, 64)):
        prompts, labels = as_batch(tokenizer, some)
        said = model(prompts.to(device), labels.tokens.to(device)).argmax(-1).cpu()
        right += ((said == labels.tokens) | ~labels.mask).all(-1).tolist()
    return 100 * sum(right) / n


def next_level(level: int, percents: list[float]) -> int:
    """The level after pieces of training on this one that ended with so many percent learnt.

    Who can neither copy nor look up what a word means, which the first two teach, learns nothing later.
    """
    enough = percents[-1] >= LEARNT or (level > 1 and len(percents) >= TRIES)
    return min(level + enough, len(LEVELS) - 1)


def held_out_queries(model: nn.Module, tokenizer: TextTokenizer, n: int) -> dict[str, float]:
    """Percent of n queries on validation databases that match exactly, with more and more examples."""
    rng, result = random.Random("held-out"), {}
    drawn = [world.draw_database(rng, "validation") for _ in range(n)]
    questions = [asked(database, rng, DOCUMENT) for database in drawn]
    for shown in EXAMPLES:
        prompts = [sql_prompt(database.schema, pairs[:shown], pairs[-1].question)
                   for database, pairs in zip(drawn, questions)]
        written = map(tokenizer.decode, generate(model, tokenizer.encode_all(prompts), 40, temperature=0))
        right = [sql_exact_match(query, pairs[-1].query, database.schema)
                 for query, pairs, database in zip(written, questions, drawn)]
        result[f"{shown} examples"] = round(100 * sum(right) / n, 2)
    return result
