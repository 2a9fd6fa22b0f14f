import pytest

from dynamo_tools.catalogue import Metric, Setting, metrics, settings

SOURCE = "packages/dynamo-router/src/dynamo_router"
SETTINGS = """
from typing import Annotated, ClassVar

from pydantic import Field

from dynamo_core.settings import DynamoSettings


class Base(DynamoSettings):
    component: ClassVar[str] = "router"

    policy: str = Field("kv", description="Policy.")
    verbose: bool = Field(default=False, description="More.")


class Service(Base):
    component: ClassVar[str] = "service"

    port: Annotated[int, Field(ge=0, description="Port.")] = 80
    folder: str = Field(description="Folder.")
    names: list[str] = Field(default_factory=list, description="Names.")


class Heir(Base):
    renamed: ClassVar[Mapping[str, str]] = {"width": "size"}

    size: int = Field(1, ge=1, description="Size.")


class Plain(DynamoSettings):
    depth: int = Field(2, description="Depth.")


class Deep(Plain):
    component: ClassVar[str] = "deep"


class Other:
    size: int = 1
"""
METRICS = """
SEEN = "dynamo_router_seen_total"
HELD = "dynamo_router_held"
WAIT = "dynamo_router_wait_seconds"
OPEN = "dynamo_router_open"
LOOSE = "dynamo_router_loose"


class RouterMetrics:
    def __init__(self, metrics):
        both = ("model", "reason")
        self.seen = metrics.counter(SEEN, "Seen", (*both, "kind"))
        histogram = metrics.histogram
        self.wait = histogram(WAIT, "Wait", labels=["model"], buckets=(1,))

        def gauge(name, text):
            return metrics.gauge(name, text, ["model"]).labels(model="m")

        self.held = gauge(HELD, "Held")
        self.watch(OPEN, "Open")
"""


@pytest.fixture
def router(tree):
    tree.write(f"{SOURCE}/_settings.py", SETTINGS)
    tree.write(f"{SOURCE}/_metrics.py", METRICS)
    return tree.workspace().find("router")


def test_settings_are_read_with_all_their_forms(router):
    assert settings(router) == [
        Setting("router", "policy", "str", "'kv'", "", "Policy."),
        Setting("router", "verbose", "bool", "False", "", "More."),
        Setting("service", "policy", "str", "'kv'", "", "Policy."),
        Setting("service", "verbose", "bool", "False", "", "More."),
        Setting("service", "port", "int", "80", "ge=0", "Port."),
        Setting("service", "folder", "str", None, "", "Folder."),
        Setting("service", "names", "list[str]", "list()", "", "Names."),
        Setting("router", "size", "int", "1", "ge=1", "Size."),
        Setting("router", "width", "int", "1", "ge=1", "Deprecated: the former name of `--size`"),
        Setting("deep", "depth", "int", "2", "", "Depth."),
    ]


def test_flag_and_variable_follow_the_name(router):
    policy, verbose, *_ = settings(router)
    assert (policy.flag, policy.variable) == ("--policy", "DYN_ROUTER_POLICY")
    assert (verbose.flag, verbose.variable) == ("--verbose/--no-verbose", "DYN_ROUTER_VERBOSE")


def test_metrics_are_read_with_kind_labels_and_text(router):
    assert metrics(router) == [
        Metric("dynamo_router_held", "gauge", ("model",), "Held"),
        Metric("dynamo_router_loose", "", (), ""),
        Metric("dynamo_router_open", "gauge", (), "Open"),
        Metric("dynamo_router_seen_total", "counter", ("model", "reason", "kind"), "Seen"),
        Metric("dynamo_router_wait_seconds", "histogram", ("model",), "Wait"),
    ]


def test_equal_names_of_two_modules_are_kept_apart(tree, router):
    tree.write(f"{SOURCE}/_bus/_metrics.py", 'SEEN = "dynamo_router_bus_seen_total"\n')
    user = "from dynamo_router._bus import _metrics\n\nx = m.counter(_metrics.SEEN, 'On the bus')\n"
    tree.write(f"{SOURCE}/_bus/links.py", user)
    found = {metric.name: metric.text for metric in metrics(router)}
    assert found["dynamo_router_bus_seen_total"] == "On the bus"
    assert found["dynamo_router_seen_total"] == "Seen"
