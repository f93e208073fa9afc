"""What several tests share."""

from minicd.t5 import T5, T5Config, initialise


def tiny_t5(vocab_size: int = 16, seed: int = 0, **settings) -> T5:
    """A random T5 of a few thousand parameters, in eval mode."""
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "feed_forward_proj": "gated-gelu",
              "tie_word_embeddings": False, "dropout_rate": 0.0, **settings}
    return initialise(T5(T5Config(vocab_size=vocab_size, **config)), seed).eval()
