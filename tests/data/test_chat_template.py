"""Templates written as those of released models are, against transformers; and hostile ones."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from jaxtrain.data import chat_template
from jaxtrain.data.chat_template import ChatTemplate
from jaxtrain.data.tokenizer_hf import HfTokenizer

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TEMPLATES = {
    "chatml": """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{%- set first = messages[0]['content'] + '\n\n' -%}\
{%- set rest = messages[1:] -%}{% else %}{%- set first = '' -%}{%- set rest = messages -%}{% endif %}
{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- set ns.index = ns.index + 1 %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "qwen3": """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>assistant\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
                {{- content.lstrip('\n') }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "filters": """{%- macro turn(m) -%}[{{ m.role|upper }}|{{ m.content|length }}] {{ m.content|replace('\n', ' ~ ') }}\
{%- endmacro -%}
{% for m in messages if m.content %}{% if loop.index > 20 %}{% break %}{% endif %}{% if not m.role %}{% continue %}
{% endif %}{{ turn(m) ~ loop.index ~ '/' ~ loop.length ~ loop.cycle('a', 'b') }}
{{ dict(role=m.role, n=[1, 2.5, none, true])|tojson(indent=2) }}{{ (1, 'é')|tojson }}
{% generation %}{{ m['content'].split('\n')|map('trim')|join('|') }}{% endgeneration %}
{{ "%s-%03d" % (m.role, 7) }}{{ '{:>4}'.format('x') }}{{ '=' * 12 }}{{ [1] + [2] }}{{ 2 ** 10 }}{{ 7 % 3 }}
{% endfor %}{% set block %}{{ messages|map(attribute='role')|list|unique|join(',')|indent(3) }}{% endset %}{{ block }}
{% for key, value in messages[0].items() %}{{ key }}={{ value|trim }};{% else %}none{% endfor %}{{ unknown }}
   {% if messages %}
  indented
   {% endif %}
{% for a in range(3) recursive %}{{ a }}{% if a == 2 %}{{ loop([0, 1]) }}{% endif %}{% endfor %}""",
}

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
CONVERSATIONS = [
    [{**USER, "content": "Hi"}],
    [{**SYSTEM, "content": "Be brief. "}, {**USER, "content": " What is\n\n2+2?\n"}],
    [{**USER, "content": ""}, {**ASSISTANT, "content": ""}, {**USER, "content": "  "}],
    [
        {**SYSTEM, "content": "名前はボット"},
        {**USER, "content": "你好 \U0001f468\u200d\U0001f469"},
        {**ASSISTANT, "content": '<think>\nhm\n</think>\n\nשלום & <b>"x"</b> {{ messages }}'},
        {**USER, "content": "{% raw %} 'q'"},
        {**ASSISTANT, "content": "done\n"},
    ],
]


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_apply_chat_template(name, tiny_files, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the peer here (the 'parity' extra)")
    files = tiny_files(TEMPLATES[name])
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = HfTokenizer(files)
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            wanted = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert ours.chat_template.render(messages, add_generation_prompt=prompt) == wanted
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode_rendered(wanted) == ids
        assert ours.chat_prompt(messages) == ids


def test_variables_reach_the_template():
    render = ChatTemplate(TEMPLATES["qwen3"], VARIABLES).render
    assert render(CONVERSATIONS[0], add_generation_prompt=True, enable_thinking=False).endswith("</think>\n\n")
    assert '{"name": "é<"}' in render(CONVERSATIONS[0], tools=[{"name": "é<"}])
    assert ChatTemplate("{{ bos_token }}{{ strftime_now('%Y') }}", VARIABLES).render([]).startswith("<s>20")


# What would reach out of the sandbox.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'].__mro__ }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment.call_binop.__func__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os.system('true') }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '%s'.format.__self__.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
]

SLOW = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x|tojson }}",
    "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
]

LARGE = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = x %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = n.x|replace('a', 'aa') %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = n.x.join([n.x, n.x, n.x]) %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = [n.x, n.x]|join(n.x) %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "{% set n = namespace(x='aaaaa') %}{% for i in range(60) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(width=10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a\nb'|indent(10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ 1.5|round(10**9) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ (1).to_bytes(10**9) }}",
]

MISTAKES = [
    "{{ messages[5].content.x }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ nothing() }}",
]


@pytest.mark.parametrize("source", LARGE)
def test_hostile_templates_get_no_memory(source):
    template = ChatTemplate(source, VARIABLES)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="the chat template"):
            template.render(CONVERSATIONS[0])
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", [*ESCAPES, *SLOW, *MISTAKES])
def test_hostile_templates_end_in_a_value_error(source):
    start = time.monotonic()
    with pytest.raises(ValueError, match="the chat template"):
        print(ChatTemplate(source, VARIABLES).render(CONVERSATIONS[0])[:300])
    assert time.monotonic() - start < 3 * chat_template.MAX_SECONDS  # it ends; how fast is the machine's affair


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ a", "{% nonsense %}", "{{ x|nofilter }}", "(" * 9 + "{{" + "(" * 9999, "{% break %}"]
)
def test_templates_that_do_not_compile(source):
    with pytest.raises(ValueError, match="the chat template is not valid Jinja"):
        ChatTemplate(source)


def test_limits_are_told(monkeypatch):
    with pytest.raises(ValueError, match=r"has 1,048,577 characters; at most 1,048,576 are accepted"):
        ChatTemplate("x" * 1048577)
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatTemplate(TEMPLATES["llama2"], VARIABLES).render([{**ASSISTANT, "content": "x"}])
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.0)
    with pytest.raises(ValueError, match="takes more than 0 seconds"):
        ChatTemplate("{% for i in range(9999) %}{% endfor %}").render([])


def test_long_conversations_are_no_attack():
    messages = [{**USER, "content": "word " * 5000}, {**ASSISTANT, "content": "x" * 20000}] * 40
    for name in ("chatml", "llama3", "qwen3", "mistral"):
        assert len(ChatTemplate(TEMPLATES[name], VARIABLES).render(messages)) > 1_500_000
