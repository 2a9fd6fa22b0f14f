"""Core's suite of output parsers, for every family with the samples of its table."""

import json
from pathlib import Path

import pytest

from dynamo_core.parsing import ParserContext
from dynamo_core.testing import OutputParserConformance
from dynamo_frontend._parsers.chain import load_family

DATA = Path(__file__).parents[2] / "data" / "parsers"
TABLES = sorted(path.name.removesuffix(".json") for path in DATA.glob("*.json"))


@pytest.mark.parametrize("table", TABLES)
class TestFamilies(OutputParserConformance):
    @pytest.fixture(autouse=True)
    def _remember(self, table):
        self.kind, _, self.family = table.partition(".")
        self.table = json.loads((DATA / f"{table}.json").read_text(encoding="utf-8"))

    def make_parser(self, context):
        return getattr(load_family(self.family), self.kind)(context)

    def context(self):
        items = [item for sample in self.table for item in sample["out"] if isinstance(item, dict)]
        return ParserContext(tools={item["call"]: {} for item in items if "call" in item})

    def samples(self):
        return [sample["text"] for sample in self.table]
