"""config.json: what is refused, rather than computed otherwise than it says."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from test_checkpoint import FIXTURES, change_config, copied, refused

from minicd.hf import checkpoint
from minicd.tokenizer import word_tokenizer

# What the readers look at, by the fixture whose config.json has it; "a.b" is b inside a.
LLAMA = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
         "num_key_value_heads", "head_dim", "eos_token_id"]
WHOLE = {
    "t5-v1.1": ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "pad_token_id",
                "relative_attention_num_buckets", "relative_attention_max_distance", "eos_token_id", "decoder_start_token_id"],
    "gpt2": ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner", "eos_token_id"],
    "xglm": ["vocab_size", "d_model", "ffn_dim", "num_layers", "attention_heads", "max_position_embeddings", "eos_token_id"],
    "llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
REAL = {
    "t5-v1.1": ["dropout_rate", "layer_norm_epsilon", "initializer_factor"], "gpt2": ["layer_norm_epsilon", "resid_pdrop"],
    "xglm": ["dropout"], "qwen2": ["rms_norm_eps", "rope_theta"], "qwen3": ["rms_norm_eps", "rope_parameters.rope_theta"],
    "llama": ["rms_norm_eps", "rope_theta", "rope_scaling.factor", "rope_scaling.low_freq_factor",
              "rope_scaling.high_freq_factor", "rope_scaling.original_max_position_embeddings"]}
OTHER = {
    "t5-v1.1": ["tie_word_embeddings", "feed_forward_proj", "scale_decoder_outputs"],
    "gpt2": ["tie_word_embeddings", "activation_function", "scale_attn_weights"],
    "xglm": ["tie_word_embeddings", "activation_function", "scale_embedding"],
    "llama": ["tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias"],
    "qwen2": ["tie_word_embeddings", "hidden_act", "use_sliding_window"],
    "qwen3": ["tie_word_embeddings", "hidden_act", "attention_bias"]}
MAY_BE_NULL = {"num_decoder_layers", "n_inner", "num_key_value_heads", "head_dim"}  # which transformers takes as the default
SEEN_NOWHERE = {"max_position_embeddings", "relative_attention_max_distance", "decoder_start_token_id", "eos_token_id"}
NO_NUMBER = ["16", "", True, False, [], {}, [1.5], [None], {"a": 1}, math.nan, math.inf, -math.inf, 10**30, -1, -0.5]
NO_SWITCH = ["true", "", 2, 0.5, [], [True], {}, math.nan, -1]


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, key) for name, keys in table.items() for key in keys]


def word(key: str, value=None) -> str:
    """What a message calls it: an activation by another name is unknown, anything else is none at all."""
    activation = key in ("hidden_act", "activation_function") and isinstance(value, str)
    return "activation" if activation else key.split(".")[-1]


def changed(name: str, key: str, *value) -> dict:
    """The config of a fixture with another value, or none, under a key."""
    config = checkpoint.read_json(FIXTURES / name / "config.json")
    *outer, key = key.split(".")
    place = config[outer[0]] if outer else config
    place.pop(key, None)
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


@pytest.mark.parametrize("name, key", [*pairs(WHOLE), *pairs(REAL)])
def test_what_is_no_number_where_one_is_read(name, key, tmp_path):
    for value in NO_NUMBER + ([0.5, 2.0] if key in WHOLE[name] else []):
        said = outcome(tmp_path, changed(name, key, value))
        assert isinstance(said, str) and word(key) in said, (value, said)


@pytest.mark.parametrize("name, key", pairs(OTHER))
def test_what_is_no_switch_or_word_where_one_is_read(name, key, tmp_path):
    for value in NO_SWITCH:
        said = outcome(tmp_path, changed(name, key, value))
        assert isinstance(said, str) and word(key, value) in said, (value, said)


@pytest.mark.parametrize("name, key", [*pairs(WHOLE), *pairs(REAL), *pairs(OTHER)])
def test_null_and_absent(name, key, tmp_path):
    absent, null = (outcome(tmp_path, changed(name, key, *value)) for value in ([], [None]))
    assert not isinstance(absent, str) or word(key) in absent and "missing" in absent
    if key in MAY_BE_NULL or (key == "eos_token_id" and name != "t5-v1.1"):  # other files may name a decoder's
        assert null == absent and not isinstance(null, str)
    else:
        assert isinstance(null, str) and word(key) in null


@pytest.mark.parametrize("name", WHOLE)
def test_sizes_that_belong_to_no_model(name, tmp_path):
    """Each could be a size by itself, so that only the tensors tell; nothing of these sizes is made, or this would not end."""
    for key in WHOLE[name]:
        for value in (3, 2**20, 2**28):
            folder = tmp_path / f"{key}{value}"
            folder.mkdir()
            for file in ("model.safetensors", "tokenizer.json"):
                (folder / file).symlink_to(FIXTURES / name / file)
            (folder / "config.json").write_text(json.dumps(changed(name, key, value)))
            try:
                checkpoint.load(folder)
            except ValueError as error:
                assert str(folder) in str(error)
            else:
                assert key in SEEN_NOWHERE or value == checkpoint.read_json(FIXTURES / name / "config.json").get(key)


@pytest.mark.parametrize("content", ["[]", "null", '"t5"', "{}", '{"model_type": "bert"}', '{"model_type": null}',
                                     '{"model_type": ["t5"]}', '{"model_type": {"a": "t5"}}', '{"model_type": "\\ud800\\n"}'])
def test_a_config_of_something_else(content, tmp_path):
    folder = copied("t5-v1.1", tmp_path)
    (folder / "config.json").write_text(content)
    refused(folder, "config.json: it describes a model of type", "known are t5, gpt2, xglm, llama, qwen2, qwen3")


@pytest.mark.parametrize("content", [b"", b"{", b"{'model_type': 't5'}", b"\xff\xfe\x00", b"not json", b"[" * 10**5,
                                     b'{"vocab_size": ' + b"9" * 5000 + b"}"])
def test_a_config_that_is_not_json(content, tmp_path):
    folder = copied("gpt2", tmp_path)
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json is not valid JSON")


@pytest.mark.parametrize("name, fields, words", [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
    ("xglm", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation 'quick_gelu' is unknown; known: relu, gelu, silu, gelu_new"),
    ("llama", {"hidden_act": "mish"}, "activation 'mish' is unknown"),
    ("t5-v1.1", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj 'gated-tanh' is unknown"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than full_attention"),
    ("qwen3", {"layer_types": 3}, "config.json"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic' is not supported"),
    ("qwen3", {"rope_parameters": {"rope_type": ["linear"]}}, "rope scaling ['linear'] is not supported"),
    ("llama", {"rope_scaling": {"rope_type": None}}, "rope scaling None is not supported"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling cannot be 'linear'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 32}}, "low_freq_factor must be below high_freq_factor"),
    ("llama", {"num_key_value_heads": 3}, "4 heads cannot share 3 key heads evenly"),
    ("llama", {"num_attention_heads": 3}, "3 heads cannot share 2 key heads evenly"),
    ("llama", {"head_dim": 7}, "rotary positions need an even head size, not 7"),
    ("llama", {"num_attention_heads": 2**20, "head_dim": 2**20}, "1048576 heads of 1048576 dimensions are too many"),
    ("t5-v1.1", {"relative_attention_num_buckets": 3}, "3 relative_attention_num_buckets do not fit"),
    ("t5-v1.1", {"relative_attention_max_distance": 16}, "do not fit a relative_attention_max_distance of 16"),
    ("t5-v1.1", {"num_layers": 10**8}, "does not fit its config.json: 100000002 layers from 61 tensors"),
    ("qwen2", {"num_hidden_layers": 10**8}, "does not fit its config.json: 100000000 layers"),
    ("qwen2", {"model_type": "qwen3"}, "missing model.layers.0.self_attn.k_norm.weight"),
    ("qwen2", {"model_type": "llama"}, "unexpected model.layers.0.self_attn.k_proj.bias"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight is no copy of model.embed_tokens.weight"),
    ("llama-bias", {"tie_word_embeddings": False}, "missing lm_head.weight"),
    ("llama-bias", {"mlp_bias": False}, "unexpected model.layers.0.mlp.down_proj.bias"),
    ("llama", {"mlp_bias": True}, "missing model.layers.0.mlp.down_proj.bias"),
    ("t5-v1.1", {"feed_forward_proj": "relu"}, "missing decoder.block.0.layer.2.DenseReluDense.wi.weight"),
    ("gpt2", {"n_positions": 65}, "transformer.wpe.weight is [64, 16], not [65, 16]")])
def test_a_config_that_another_model_would_have(name, fields, words, tmp_path):
    folder = copied(name, tmp_path)
    change_config(folder, **fields)
    refused(folder, words)


def test_a_long_value_makes_no_long_message(tmp_path):
    folder = copied("llama", tmp_path)
    long = {"hidden_size": -(10**4000), "rope_theta": [1] * 10**5, "hidden_act": "x\n" * 10**5, "model_type": "x" * 10**5}
    for key, value in long.items():
        change_config(folder, **{key: value})
        refused(folder, "config.json")


# the tokenizer's tokens


@pytest.mark.parametrize("name", ["gpt2", "xglm", "llama", "qwen2", "qwen3"])
def test_several_tokens_may_end_a_completion(name, tmp_path):
    folder = copied(name, tmp_path)
    change_config(folder, eos_token_id=[7, 60, 7])
    model, tokenizer = checkpoint.load(folder)
    assert (model.config.eos_token_id, model.config.more_eos_token_ids, tokenizer.eos_id) == (7, (60, 7), 7)
    checkpoint.save(model, tokenizer, tmp_path / "saved")
    assert checkpoint.load(tmp_path / "saved")[0].config.more_eos_token_ids == (60, 7)


@pytest.mark.parametrize("named, first", [("a", "a"), ("zzz", None), (None, None)])
def test_of_several_ends_answers_have_the_one_of_the_tokenizer(named, first, tmp_path):
    """Llama 3's instructed models end texts with one and turns with another: tokenizer_config.json names the latter."""
    folder = copied("llama", tmp_path)
    tokenizer = checkpoint.load(folder)[1]
    ids = [tokenizer.eos_id, tokenizer.backend.token_to_id("a"), tokenizer.backend.token_to_id("b")]
    change_config(folder, eos_token_id=ids)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "c" if named == "zzz" else named}))
    model, tokenizer = checkpoint.load(folder)
    wanted = [ids[1], ids[0], ids[2]] if first else ids
    assert [model.config.eos_token_id, *model.config.more_eos_token_ids] == wanted and tokenizer.eos_id == wanted[0]


@pytest.mark.parametrize("eos, words", [([], r"eos_token_id cannot be []"), (True, "eos_token_id cannot be True"),
                                        ([2, True], "eos_token_id cannot be True"),
                                        ([2, None], "eos_token_id cannot be None"), (-1, "eos_token_id cannot be -1"),
                                        (64, "eos_token_id cannot be 64, the vocabulary has 64 tokens"),
                                        ([1, 10**30], "eos_token_id cannot be 1000"), ("2", "eos_token_id cannot be '2'")])
def test_an_end_that_is_no_token(eos, words, tmp_path):
    folder = copied("llama", tmp_path)
    change_config(folder, eos_token_id=eos)
    refused(folder, "config.json", words)


def test_the_tokens_that_config_and_tokenizer_know_must_be_the_same(tmp_path):
    folder = copied("t5-v1.1", tmp_path)
    change_config(folder, eos_token_id=2, pad_token_id=5)
    refused(folder, f"{folder}: the tokenizer does not belong to config.json: </s> has the id 1 there and 2 here, "
                    "<pad> has the id 0 there and 5 here")
    change_config(folder, eos_token_id=[1], pad_token_id=0)
    refused(folder, "config.json: eos_token_id cannot be [1]")
    folder = copied("qwen2", tmp_path)
    change_config(folder, eos_token_id=66)  # a row of the embedding, but no token
    refused(folder, f"{folder}: the tokenizer has no token with the id 66, which is eos_token_id in config.json")


@pytest.mark.parametrize("name, size", [("t5-v1.1", 64), ("gpt2", 64), ("qwen2", 68)])
def test_a_tokenizer_larger_than_the_embedding(name, size, tmp_path):
    folder = copied(name, tmp_path)
    word_tokenizer([f"w{i}" for i in range(66)]).save(folder / "tokenizer.json")
    refused(folder, f"{folder}: the tokenizer has 69 tokens, but the model's embedding only {size}")


def test_a_t5_needs_its_tokens(tmp_path):
    folder = copied("t5-v1.1", tmp_path)
    (folder / "tokenizer.json").write_bytes((FIXTURES / "gpt2" / "tokenizer.json").read_bytes())
    refused(folder, f"{folder}: the tokenizer has no </s> token")
