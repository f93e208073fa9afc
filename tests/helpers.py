"""What several tests share."""

from minicd import decoder
from minicd.decoder import Decoder, DecoderConfig
from minicd.t5 import T5, T5Config, initialise


def tiny_t5(vocab_size: int = 16, seed: int = 0, **settings) -> T5:
    """A random T5 of a few thousand parameters, in eval mode."""
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "feed_forward_proj": "gated-gelu",
              "tie_word_embeddings": False, "dropout_rate": 0.0, **settings}
    return initialise(T5(T5Config(vocab_size=vocab_size, **config)), seed).eval()


def tiny_decoder(vocab_size: int = 16, seed: int = 0, **settings) -> Decoder:
    """A random Llama-shaped decoder of a few thousand parameters, in eval mode."""
    config = {"family": "llama", "d_model": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_kv": 8, "d_ff": 32,
              "max_positions": 128, "positions": "rotary", "norm": "rms", "activation": "silu", "gated": True,
              "qkv_bias": False, "o_bias": False, "ff_bias": False, "qk_norm": False, "tie_word_embeddings": True,
              "layer_norm_epsilon": 1e-6, "eos_token_id": 1, **settings}
    model = decoder.initialise(Decoder(DecoderConfig(vocab_size=vocab_size, **config)), seed)
    for parameter in model.parameters():  # larger than GPT-2's, so that the models tell prompts apart
        if parameter.ndim == 2:
            parameter.data.mul_(10)
    return model.eval()
