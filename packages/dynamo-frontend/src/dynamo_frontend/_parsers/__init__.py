"""Parsers of output text, by family through the plug-in group ``dynamo_core.parsers``.

A family is a grammar (``machine``) over text that arrives in pieces. The same grammar serves whole replies and streams.

Tool calls:

==================  ==============================================================  ===================
name                form                                                            models
==================  ==============================================================  ===================
``deepseek_v3``     section tokens, name on a line, fenced JSON                     DeepSeek V3, R1
``deepseek_v3_1``   section tokens, name, JSON                                      DeepSeek V3.1
``deepseek_v3_2``   DSML ``function_calls``, ``invoke``, ``parameter``              DeepSeek V3.2
``deepseek_v4``     DSML ``tool_calls``, ``invoke``, ``parameter``                  DeepSeek V4
``default``         JSON that begins a line, an object or an array                  any
``gemma4``          ``call:NAME{KEY:VALUE}`` between tokens                         Gemma 4
``glm47``           ``tool_call`` with ``arg_key`` and ``arg_value``                GLM 4.5, 4.7
``harmony``         channels, the function as recipient                             gpt-oss
``hermes``          JSON in ``tool_call`` tags                                      Qwen2.5, Qwen3, Hermes
``jamba``           JSON array in ``tool_calls`` tags                               Jamba
``kimi_k2``         section tokens, ``functions.NAME:INDEX``, JSON                  Kimi K2, K2.5
``llama3_json``     JSON, with ``<|python_tag|>`` or beginning a line               Llama 3.x
``minimax_m2``      ``invoke`` and ``parameter`` in ``minimax:tool_call``           MiniMax M2
``minimax_m3``      nested elements behind a namespace token                        MiniMax M3
``mistral``         ``[TOOL_CALLS]`` and an array, or names with ``[ARGS]``         Mistral
``nemotron_deci``   JSON array in ``TOOLCALL`` tags                                 Nemotron Super, Ultra
``nemotron_nano``   as ``qwen3_coder``                                              Nemotron Nano
``phi4``            ``functools`` and a JSON array                                  Phi-4
``pythonic``        a list of Python calls that begins a line                       Llama 4
``qwen3_coder``     ``function=`` and ``parameter=`` tags                           Qwen3-Coder, Qwen3.5
==================  ==============================================================  ===================

Reasoning; *forced* means that output begins inside, unless the prompt says otherwise:

========================  ==============================================  ======
name                      form                                            forced
========================  ==============================================  ======
``basic``, ``qwen3``      ``<think>``                                     no
``deepseek_r1``           ``<think>``; also ``nemotron3``,                yes
                          ``nemotron_v3``, ``nemotron_nano``
``deepseek_v4``           ``<think>``                                     no
``gemma4``                ``<|channel>thought`` to ``<channel|>``         no
``glm45``                 ``<think>``                                     no
``gpt_oss``               the ``analysis`` channel                        no
``granite``               "Here is my thought process:"                   no
``kimi``                  ``◁think▷``                                       no
``kimi_k25``              ``<think>``; a section of calls ends it         yes
``minimax_append_think``  ``<think>``                                     yes
``minimax_m2``            ``<think>``                                     yes
``minimax_m3``            ``<mm:think>``                                  no
``mistral``               ``[THINK]``                                     yes
``nemotron_deci``         ``<think>``                                     no
``step3``                 ``<think>``                                     yes
========================  ==============================================  ======

What holds for all of them:

* A marker is markup only where a call can follow. Prose that mentions one keeps it.
* A body that begins like a call and is none becomes text without its markers. A call that the output's end cut off
  before its name was known is dropped; one whose name was known is given as far as it was written.
* White space between markers and text belongs to the markup, up to ``machine.MAX_BLANK`` characters.
* Values written as text get the types of the tool's schema, and are strings where they do not fit it.
* Arguments written as JSON are passed on as they come; only control characters in strings are escaped.
"""
