"""config.json: what is refused rather than computed otherwise than it says."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from test_checkpoint import FIXTURES, change_config, copied, folder, refused  # noqa: F401 (a fixture)

from minicd import checkpoint

# Every number that a family's reader looks at; "a.b" is b inside a. Those after None may be null, which means the default.
LLAMA = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
         "rms_norm_eps", "eos_token_id", "rope_theta"]
NUMBERS = {
    "t5-v1.1": ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "relative_attention_num_buckets",
                "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor", "pad_token_id",
                "eos_token_id", "decoder_start_token_id", None, "num_decoder_layers"],
    "gpt2": ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon", "resid_pdrop", "eos_token_id", None,
             "n_inner"],
    "xglm": ["vocab_size", "d_model", "ffn_dim", "num_layers", "attention_heads", "max_position_embeddings", "dropout",
             "eos_token_id"],
    "llama": [*LLAMA, *(f"rope_scaling.{key}" for key in ("factor", "low_freq_factor", "high_freq_factor",
                                                          "original_max_position_embeddings")),
              None, "num_key_value_heads", "head_dim"],
    "qwen2": [*LLAMA, None, "num_key_value_heads", "head_dim"],
    "qwen3": [*LLAMA, "rope_parameters.rope_theta", None, "num_key_value_heads", "head_dim"],
}
SWITCHES = {"t5-v1.1": ["tie_word_embeddings"], "gpt2": ["tie_word_embeddings", "scale_attn_weights", "add_cross_attention"],
            "xglm": ["tie_word_embeddings", "scale_embedding", "add_cross_attention"],
            "llama": ["tie_word_embeddings", "attention_bias", "mlp_bias"],
            "qwen2": ["tie_word_embeddings", "use_sliding_window"], "qwen3": ["tie_word_embeddings", "attention_bias"]}
WORDS = {"t5-v1.1": ["feed_forward_proj"], "gpt2": ["activation_function"], "xglm": ["activation_function"], "llama": ["hidden_act"],
         "qwen2": ["hidden_act"], "qwen3": ["hidden_act"]}
WRONG = ["16", "", -1, -0.5, True, False, [], {}, [1.5], {"a": 1}, math.nan, math.inf, -math.inf, 10**30]
UNTIL_NULL = {name: keys[: keys.index(None)] if None in keys else keys for name, keys in NUMBERS.items()}
KEYS = [(name, key) for name, keys in NUMBERS.items() for key in keys if key]


def changed(name: str, key: str, *value) -> dict:
    """The config of a fixture with another value, or none, under a key."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    *outer, key = key.split(".")
    place = config[outer[0]] if outer else config
    place.pop(key, None)
    if "rope_parameters" in config and not outer and key == "rope_theta":
        del config["rope_parameters"]  # which would have been looked at in place of it
    place.update({key: one for one in value})
    return config


def outcome(tmp_path: Path, config: dict):
    """What a config.json says, but for its own text; or the message of the error, which must name the file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    try:
        read = checkpoint.load_config(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable(), error
        return str(error)
    return dataclasses.replace(read, source={}) if hasattr(read, "source") else read


@pytest.mark.parametrize("name, key", KEYS)
def test_a_number_that_is_none(name, key, tmp_path):
    for value in [*WRONG, 0.5 if key in whole_numbers(name) else None]:
        said = outcome(tmp_path, changed(name, key, value))
        assert isinstance(said, str) and key.split(".")[-1] in said, (key, value, said)


def whole_numbers(name: str) -> list[str]:
    return [key for key in NUMBERS[name] if key and not key.endswith(("_rate", "_epsilon", "_eps", "_factor", "dropout", "_pdrop",
                                                                      "rope_theta", ".factor", "original_max_position_embeddings"))
            or key == "max_position_embeddings"]


@pytest.mark.parametrize("name, key", KEYS)
def test_null_and_a_missing_number(name, key, tmp_path):
    """Null is the default only where transformers takes it so. A required number is missed by name."""
    absent, null = (outcome(tmp_path, changed(name, key, *value)) for value in ([], [None]))
    assert isinstance(absent, str) <= (key in absent if isinstance(absent, str) else True)
    if key in UNTIL_NULL[name]:
        assert isinstance(null, str) and key.split(".")[-1] in null
    else:
        assert null == absent and not isinstance(null, str)
