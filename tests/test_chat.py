"""Chat templates: rendered as transformers renders them, found in every place, carried along, and with one BOS."""

import json
from pathlib import Path

import pytest
from helpers import tiny_t5
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minicd.hf import checkpoint
from minicd.hf.chat import Chat, added_system, bare_adds_system, chat_template, render
from minicd.tokenizer import Rendered, TextTokenizer, word_tokenizer

TEMPLATES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "chat_templates"
needs_templates = pytest.mark.skipif(not TEMPLATES.exists(), reason=f"the published templates are not at {TEMPLATES}")
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
POLITE = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe polite.<|im_end|>\n{% endif %}" + CHATML
HI = [{"role": "user", "content": "Hi"}]


def rendered(template: str, messages=HI, **more) -> str:
    return render(template, messages, **{"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **more})


@needs_templates
def test_published_templates_render_as_in_transformers():
    cases = json.loads((TEMPLATES / "renderings.json").read_text())
    wrong = []
    for case in cases:
        template, expected = (TEMPLATES / case.pop("template")).read_text(), case.pop("text")
        try:
            found = rendered(template, **case)
        except ValueError as error:
            found = None
            assert str(error).startswith("the chat template cannot render") and "\n" not in str(error)
        wrong += [(case, found, expected)] if found != expected else []
    assert len(cases) > 100 and not wrong, wrong[:2]


@pytest.mark.parametrize("template, expected", [
    ("{% for m in messages %}\n  {{ m.content }}\n{% endfor %}\n", "  Hi\n"),
    ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
    ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
    ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, indent=2, sort_keys=True) }}", '{\n  "a": 1,\n  "b": "\\u00e9"\n}'),
    ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
    ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
    ("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}", "11"),
    ("{{ strftime_now('%d %B %Y') }}", "26 July 2024"),
    ("{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ nothing }}", "TrueTrueFalse"),
    ("{{ bos_token + messages[-1]['content'].strip().upper()[::-1] + eos_token }}", "<s>IH</s>"),
    ("{% macro say(x) %}[{{ x }}]{% endmacro %}{% set ns = namespace(n=0) %}{% for k, v in messages[0].items() %}"
     "{% set ns.n = ns.n + loop.index0 %}{{ say(k) }}{% endfor %}{{ ns.n }}", "[role][content]1"),
    ("{{ enable_thinking is defined and enable_thinking is false }}", "False"),
    ("{{ '{}'.format(7) ~ ('a b'.split() | join('-')) ~ ('%s' | format(3)) }}", "7a-b3")])
def test_what_templates_use(template, expected):
    assert rendered(template) == expected


def test_further_variables_and_missing_tokens():
    assert rendered("{{ enable_thinking }}{{ tools[0].name }}", enable_thinking=False, tools=[{"name": "f"}]) == "Falsef"
    assert rendered("{{ bos_token is defined }}", bos_token=None) == "False", "None: the tokenizer has no such token"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}]
    assert rendered("{% for p in messages[0].content %}{{ p.text if p.type == 'text' else '<i>' }}{% endfor %}", parts) == "Hi<i>"


@pytest.mark.parametrize("template, problem", [
    ("{{ raise_exception('no\nsystem role') }}", "no system role"), ("{% if %}", "Expected an expression"),
    ("{{ messages.append(1) }}", "unsafe"), ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ nothing.x }}", "undefined"),
    ("{{ 'a' + 1 }}", "TypeError"), ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ range(10 ** 9) | list }}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"), ("{% include 'secrets' %}", "")])
def test_what_a_template_refuses_is_one_sentence(template, problem):
    with pytest.raises(ValueError, match="the chat template cannot render these messages: ") as caught:
        rendered(template)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_templates_are_found_in_every_place(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert chat_template(tmp_path) is None and Chat.of(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert chat_template(tmp_path) == "old"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    assert chat_template(tmp_path) == "one" and chat_template(tmp_path, "tool_use") == "two"
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "bos_token": "<other>"}')
    assert Chat.of(tmp_path).tokens == {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    with pytest.raises(ValueError, match="no chat template named 'rag', but default, tool_use"):
        chat_template(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("three")
    assert chat_template(tmp_path) == "file" and chat_template(tmp_path, "rag") == "three"
    (tmp_path / "chat_template.jinja").unlink(), (tmp_path / "additional_chat_templates" / "rag.jinja").unlink()
    for damaged in ('{"chat_template": 7}', "[]", "{", '{"chat_template": [{"name": "x"}]}'):
        config.write_text(damaged)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            chat_template(tmp_path)


def test_a_system_prompt_that_nobody_wrote_is_noticed():
    assert not bare_adds_system(CHATML) and bare_adds_system(POLITE) and "Be polite." in added_system(POLITE)
    assert not bare_adds_system("{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    empty = "{% if messages[0].role != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}"
    assert not bare_adds_system(empty + CHATML), "an empty turn says nothing"
    one = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    assert not bare_adds_system(one + CHATML) and bare_adds_system(one + POLITE)


@needs_templates
def test_published_templates_with_a_system_prompt():
    own = {path.stem: added_system(path.read_text()) for path in TEMPLATES.glob("*.jinja") if path.stem != "llava_next"}
    assert {name for name in own if own[name]} == {"qwen2_5", "llama3_1"}
    assert "You are Qwen" in own["qwen2_5"] and "Today Date: 26 Jul 2024" in own["llama3_1"]


def with_bos(ends_prompts: bool = False) -> TextTokenizer:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "Hi": 3, "user": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return TextTokenizer(backend, pad=None, ends_prompts=ends_prompts)


def test_a_rendered_prompt_has_one_bos():
    tokenizer, chat = with_bos(), Chat("{{ bos_token }}user {{ messages[0].content }}", {"bos_token": "<s>"})
    prompt = chat.prompt(HI)
    assert isinstance(prompt, Rendered) and tokenizer.encode(prompt) == [0, 4, 3]
    assert tokenizer.encode("Hi") == [0, 3], "a plain prompt gets its BOS as before"
    assert tokenizer.encode_all([prompt, "Hi", prompt]) == [[0, 4, 3], [0, 3], [0, 4, 3]]
    assert tokenizer.encode(Rendered("user Hi")) == [4, 3], "where the template has none, transformers adds none"


def test_what_belongs_to_chats_is_carried_along(folder, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "model_max_length": 99,
              "auto_map": {"AutoTokenizer": "code.py"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "chat_template.jinja").write_text("é{{ messages }}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    for saved in (tmp_path / "once", tmp_path / "twice"):
        checkpoint.save(*checkpoint.load(folder), saved)
        found = json.loads((saved / "tokenizer_config.json").read_text())
        assert found["chat_template"] == CHATML and found["model_max_length"] == 99
        assert found["eos_token"] == "</s>" and "auto_map" not in found, "code stays behind"
        for name in ("generation_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
            assert (saved / name).read_bytes() == (folder / name).read_bytes()
        folder = saved


def test_a_model_without_a_folder_is_saved_as_before(tmp_path):
    checkpoint.save(tiny_t5(16), word_tokenizer(["one"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json",
                                                          "tokenizer_config.json"}
