"""The families by name: every constant is an entry of ``dynamo_core.parsers``."""

from __future__ import annotations

from dynamo_core.parsing import ParserFamily
from dynamo_frontend._parsers import gemma4, glm47, harmony, minimax_m3, mistral, pythonic, qwen3_coder
from dynamo_frontend._parsers.bare_json import DEFAULT_JSON, LLAMA3_JSON
from dynamo_frontend._parsers.invoke_xml import DSML_V3_2, DSML_V4, MINIMAX_XML
from dynamo_frontend._parsers.machine import Grammar, GrammarFactory
from dynamo_frontend._parsers.reasoning import (
    FORCED_THINK,
    GEMMA4_CHANNEL,
    GRANITE_PHRASES,
    KIMI_K25_THINK,
    KIMI_THINK,
    MINIMAX_M3_THINK,
    MISTRAL_THINK,
    THINK,
    TaggedReasoning,
)
from dynamo_frontend._parsers.sections import DEEPSEEK_V3_1_SECTION, DEEPSEEK_V3_SECTION, KIMI_K2_SECTION
from dynamo_frontend._parsers.tagged_json import HERMES_JSON, JAMBA_JSON, NEMOTRON_DECI_JSON, PHI4_JSON


def _family(
    tools: Grammar | None, texts: tuple[str, ...] = (), reasoning: TaggedReasoning | None = None
) -> ParserFamily:
    return ParserFamily(
        tool_calls=GrammarFactory(tools) if tools else None,
        reasoning=reasoning.parser if reasoning else None,
        markers=frozenset(texts + (reasoning.tags if reasoning else ())),
        reasoning_tags=reasoning.tags if reasoning else ("", ""),
    )


BASIC = _family(None, reasoning=THINK)
DEEPSEEK_R1 = _family(None, reasoning=FORCED_THINK)
DEEPSEEK_V3 = _family(DEEPSEEK_V3_SECTION, DEEPSEEK_V3_SECTION.texts)
DEEPSEEK_V3_1 = _family(DEEPSEEK_V3_1_SECTION, DEEPSEEK_V3_1_SECTION.texts)
DEEPSEEK_V3_2 = _family(DSML_V3_2, DSML_V3_2.texts)
DEEPSEEK_V4 = _family(DSML_V4, DSML_V4.texts, THINK)
DEFAULT = _family(DEFAULT_JSON)
GEMMA4 = _family(gemma4.gemma4, gemma4.TEXTS, GEMMA4_CHANNEL)
GLM45 = _family(None, reasoning=THINK)
GLM47 = _family(glm47.glm47, glm47.TEXTS)
GPT_OSS = ParserFamily(reasoning=GrammarFactory(harmony.CHANNELS), markers=frozenset(harmony.TEXTS))
GRANITE = ParserFamily(reasoning=GrammarFactory(GRANITE_PHRASES))
HARMONY = _family(harmony.CALLS, harmony.TEXTS)
HERMES = _family(HERMES_JSON, HERMES_JSON.texts)
JAMBA = _family(JAMBA_JSON, JAMBA_JSON.texts)
KIMI = _family(None, reasoning=KIMI_THINK)
KIMI_K2 = _family(KIMI_K2_SECTION, KIMI_K2_SECTION.texts)
KIMI_K25 = _family(None, reasoning=KIMI_K25_THINK)
LLAMA3 = _family(LLAMA3_JSON, LLAMA3_JSON.texts)
MINIMAX_APPEND_THINK = DEEPSEEK_R1
MINIMAX_M2 = _family(MINIMAX_XML, MINIMAX_XML.texts, FORCED_THINK)
MINIMAX_M3 = _family(minimax_m3.minimax_m3, minimax_m3.TEXTS, MINIMAX_M3_THINK)
MISTRAL = _family(mistral.mistral, mistral.TEXTS, MISTRAL_THINK)
NEMOTRON_DECI = _family(NEMOTRON_DECI_JSON, NEMOTRON_DECI_JSON.texts, THINK)
NEMOTRON_NANO = _family(qwen3_coder.qwen3_coder, qwen3_coder.TEXTS, FORCED_THINK)
PHI4 = _family(PHI4_JSON, PHI4_JSON.texts)
PYTHONIC = _family(pythonic.pythonic, pythonic.TEXTS)
QWEN3 = _family(None, reasoning=THINK)
QWEN3_CODER = _family(qwen3_coder.qwen3_coder, qwen3_coder.TEXTS)
STEP3 = DEEPSEEK_R1
