"""Parsers of output text: reasoning and tool calls, by name through the plug-in group ``dynamo_core.parsers``."""
