"""Chat templates: the formats that a recipe can name, the models' own, and literal ones in Jinja.

The named ones are public formats, written here in our own words: Alpaca's headings, ChatML, EXAONE, Llama 3 and Mistral's `[INST]`. Where mergekit's texts
miss the format by white space (no break before Alpaca's last heading, a line feed between Llama 3's turns, indents in EXAONE's), these do not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from thetau.errors import RecipeError, nearest

AUTO = "auto"
_SHORTEST = 20  # characters; as mergekit: whatever is shorter is a name

NAMED = {
    "alpaca": (
        "{%- set system = messages | selectattr('role', 'equalto', 'system') | list -%}\n"
        "{{- (system | last).content | trim if system else '' }}{{ '\\n\\n' }}\n"
        "{%- set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}\n"
        "{%- for message in messages if message['role'] in titles -%}\n"
        "{{- '### ' + titles[message['role']] + ':\\n' + message['content'] | trim }}{{ '\\n\\n' if not loop.last else '' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '\\n\\n### Response:\\n' }}{% endif -%}\n"
    ),
    "chatml": (
        "{%- for message in messages -%}\n"
        "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
    ),
    "exaone": (
        "{%- if messages and messages[0]['role'] != 'system' -%}{{- '[|system|][|endofturn|]\\n' -}}{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "{{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}\n"
        "{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}\n"
    ),
    "llama3": (
        "{%- if messages -%}{{- bos_token -}}{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content'] | trim ~ '<|eot_id|>' -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}\n"
    ),
    "mistral": (
        "{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none -%}\n"
        "{%- set turns = messages if system is none else messages[1:] -%}\n"
        "{{- bos_token -}}\n"
        "{%- for message in turns -%}\n"
        "{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}\n"
        "{{- raise_exception('After an optional system message, turns of user and assistant must alternate, the user first.') -}}\n"
        "{%- elif message['role'] == 'user' -%}\n"
        "{{- ' [INST] ' ~ (system ~ '\\n\\n' if loop.first and system is not none else '') ~ message['content'] ~ ' [/INST]' -}}\n"
        "{%- else -%}{{- ' ' ~ message['content'] ~ eos_token -}}{%- endif -%}\n"
        "{%- endfor -%}\n"
    ),
}


def chosen_template(said: str, found: Sequence[str]) -> str | None:
    """The template that a recipe's `chat_template` stands for; None where it is `auto` and no model has one.

    `found` are the models' own in the recipe's order: `auto` takes the one that most of them have, the first among equals.

    Raises:
        RecipeError: it is neither `auto`, nor a known name, nor a template.

    Examples:
        >>> chosen_template("auto", ["{{ a }}", "{{ b }}", "{{ b }}"])
        '{{ b }}'
    """
    if said == AUTO:
        counted = Counter(template.strip() for template in found if template.strip())
        return counted.most_common(1)[0][0] if counted else None  # of equals, the one that was counted first
    if said in NAMED:
        return NAMED[said]
    if len(said) < _SHORTEST or "{" not in said:
        raise RecipeError(
            [
                f"must be {AUTO!r}, one of {', '.join(NAMED)}, or a template in Jinja. Got {said!r}, which is none: "
                f"a template has at least {_SHORTEST} characters and a brace.{nearest(said, (AUTO, *NAMED))}"
            ],
            "chat_template",
        )
    _check(said)
    return said


def _check(template: str) -> None:
    """Raise where Jinja cannot read it."""
    import jinja2

    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # a tag of transformers' own
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError([f"is not valid Jinja: {error.message} in its line {error.lineno}."], "chat_template") from error
