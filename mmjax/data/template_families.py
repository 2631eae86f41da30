"""Chat templates by name: the forms of the common model families, as their makers publish them.

Where a family has no system or tool turn, a system turn stands before the first user's text, and a
tool's result is a user's turn. `plain` needs no token but <eos>.
"""

_SYSTEM = """\
{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim %}
{% set messages = messages[1:] %}
{% endif %}
"""

PLAIN = """\
{% for message in messages %}
{{- message['role'] + ':\\n' + message['content'] -}}
{% if message['role'] == 'assistant' %}
{{- eos_token -}}
{% endif %}
{{- '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- 'assistant:\\n' -}}
{% endif %}
"""

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

LLAMA_2 = (
  _SYSTEM
  + """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim + ' ' + eos_token -}}
{% elif loop.first and system is defined %}
{{- bos_token + '[INST] <<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}
{{- message['content'] | trim + ' [/INST]' -}}
{% else %}
{{- bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' -}}
{% endif %}
{% endfor %}
"""
)

LLAMA_3 = """\
{{- bos_token -}}
{% for message in messages %}
{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}
"""

MISTRAL = (
  """\
{{- bos_token -}}
"""
  + _SYSTEM
  + """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim + eos_token -}}
{% elif loop.first and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' -}}
{% else %}
{{- '[INST] ' + message['content'] + '[/INST]' -}}
{% endif %}
{% endfor %}
"""
)

GEMMA = (
  """\
{{- bos_token -}}
"""
  + _SYSTEM
  + """\
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\\n' -}}
{% if loop.first and system is defined %}
{{- system + '\\n\\n' -}}
{% endif %}
{{- message['content'] | trim + '<end_of_turn>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<start_of_turn>model\\n' -}}
{% endif %}
"""
)

_MARKS = """\
{% set marks = {'system': '<|system|>', 'user': '<|user|>', 'tool': '<|tool|>',
'assistant': '<|assistant|>'} %}
"""

ZEPHYR = (
  _MARKS
  + """\
{% for message in messages %}
{{- marks[message['role']] + '\\n' + message['content'] + eos_token + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|assistant|>\\n' -}}
{% endif %}
"""
)

VICUNA = (
  """\
{{- bos_token -}}
"""
  + _SYSTEM
  + """\
{% if system is defined %}
{{- system + ' ' -}}
{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{- 'ASSISTANT: ' + message['content'] + eos_token -}}
{% else %}
{{- 'USER: ' + message['content'] + ' ' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- 'ASSISTANT:' -}}
{% endif %}
"""
)

PHI_3 = (
  _MARKS
  + """\
{% for message in messages %}
{{- marks[message['role']] + '\\n' + message['content'] + '<|end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|assistant|>\\n' -}}
{% endif %}
"""
)

DEEPSEEK = (
  """\
{{- bos_token -}}
"""
  + _SYSTEM
  + """\
{% if system is defined %}
{{- system -}}
{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{- '<\uff5cAssistant\uff5c>' + message['content'] + eos_token -}}
{% else %}
{{- '<\uff5cUser\uff5c>' + message['content'] -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- '<\uff5cAssistant\uff5c>' -}}
{% endif %}
"""
)

FAMILIES = {
  "plain": PLAIN,
  "chatml": CHATML,
  "llama-2": LLAMA_2,
  "llama-3": LLAMA_3,
  "mistral": MISTRAL,
  "gemma": GEMMA,
  "zephyr": ZEPHYR,
  "vicuna": VICUNA,
  "phi-3": PHI_3,
  "deepseek": DEEPSEEK,
}
