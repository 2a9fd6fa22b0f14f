"""Settings: where values come from, and what is refused, with the words that help."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, SecretStr, ValidationError

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings, resolve_settings, settings_schema


class PartSettings(DynamoSettings):
    """Options of a part."""

    component = "part"
    port: int = Field(8000, ge=0, le=65535, description="TCP port")
    host: str = Field("127.0.0.1", description="address to bind")
    block_size: int | None = Field(None, ge=1, description="tokens a block")
    ratio: float = Field(0.5, ge=0, le=1, description="50% by default")
    verbose: bool = Field(False, description="say more")
    cache: bool = Field(True, description="keep things")
    taints: tuple[str, ...] = Field((), description="labels")
    ports: list[int] = Field(default_factory=list[int], description="further ports")
    weights: dict[str, float] = Field(default_factory=dict[str, float], description="weights by name")
    api_key: SecretStr | None = Field(None, description="secret key")


class OtherSettings(DynamoSettings):
    """Options of another part."""

    component = "other-part"
    model: str = Field(description="model name")


def resolve(*argv: str, environ: Mapping[str, str] | None = None, **options: Any) -> PartSettings:
    return resolve_settings("dynamo part", (PartSettings,), argv, environ=environ or {}, **options).get(PartSettings)


def refused(*argv: str, environ: Mapping[str, str] | None = None, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve(*argv, environ=environ, **options)
    return caught.value.message


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nhost: file\nratio: 0.25\n")
    environ = {"DYN_PART_PORT": "2", "DYN_PART_HOST": "environment"}
    found = resolve("--config", str(file), "--port", "3", environ=environ)
    assert (found.port, found.host, found.ratio, found.cache) == (3, "environment", 0.25, True)


def test_command_defaults_stand_below_everything_else(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("host: file\n")
    found = resolve("--config", str(file), defaults={"host": "command", "port": 7})
    assert (found.host, found.port) == ("file", 7)


def test_unknown_command_default_is_refused() -> None:
    assert "prot" in refused(defaults={"prot": 7})


def test_origin_of_each_value_is_known(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ratio: 0.25\n")
    resolved = resolve_settings(
        "p",
        (PartSettings,),
        ["--config", str(file), "--port", "3"],
        environ={"DYN_PART_HOST": "h"},
        defaults={"cache": False},
    )
    found = {name: (origin.value, origin.source, origin.detail) for name, origin in resolved.origins.items()}
    assert found["port"] == ("3", "flag", "--port")
    assert found["host"] == ("h", "environment", "DYN_PART_HOST")
    assert found["ratio"] == ("0.25", "file", str(file))
    assert found["cache"] == ("False", "default", "of this command")
    assert found["verbose"] == ("False", "default", "")


def test_unknown_flag_is_refused_with_a_suggestion() -> None:
    assert refused("--prot", "3") == "flag '--prot' is not known to dynamo part; did you mean --port?"
    assert "did you mean --port?" in refused("--prot=3")


def test_flags_are_not_abbreviated() -> None:
    assert "--verb" in refused("--verb")


def test_stray_argument_is_refused() -> None:
    assert "'stray'" in refused("stray")


def test_flag_without_its_value_is_refused() -> None:
    message = refused("--port")
    assert "--port" in message
    assert "dynamo part" in message


def test_unknown_environment_variable_is_refused_with_a_suggestion() -> None:
    message = refused(environ={"DYN_PART_PROT": "3"})
    assert "DYN_PART_PROT" in message
    assert "did you mean DYN_PART_PORT?" in message


def test_variables_of_other_components_are_left_alone() -> None:
    assert resolve(environ={"DYN_ELSE_PORT": "3", "PATH": "/bin", "DYN_PARTNER_X": "1"}).port == 8000


def test_unknown_file_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("blocksize: 16\n")
    message = refused("--config", str(file))
    assert "blocksize" in message
    assert str(file) in message
    assert "did you mean block_size?" in message


def test_file_keys_may_be_written_as_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("block-size: 16\n")
    assert resolve("--config", str(file)).block_size == 16


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (("--port", "x"), {}, ("--port", "'x'", "flag --port")),
        (("--port", "70000"), {}, ("--port", "'70000'", "65535")),
        ((), {"DYN_PART_PORT": "x"}, ("--port", "'x'", "environment DYN_PART_PORT")),
        (("--ratio", "1.5"), {}, ("--ratio", "'1.5'", "less than or equal to 1")),
        ((), {"DYN_PART_VERBOSE": "maybe"}, ("--verbose", "'maybe'", "DYN_PART_VERBOSE")),
        (("--weights", "{"), {}, ("--weights", "'{'", "JSON")),
        (("--ports", "1,x"), {}, ("--ports", "'x'", "flag --ports")),
        (("--block-size", ""), {}, ("--block-size", "''")),
    ],
)
def test_bad_value_names_option_value_and_source(
    argv: tuple[str, ...], environ: dict[str, str], named: tuple[str, ...]
) -> None:
    message = refused(*argv, environ=environ)
    for part in named:
        assert part in message


def test_bad_value_of_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: many\n")
    message = refused("--config", str(file))
    assert "'many'" in message
    assert str(file) in message


def test_missing_option_is_named_with_its_variable() -> None:
    with pytest.raises(ConfigurationError, match=r"--model is required.*DYN_OTHER_PART_MODEL"):
        resolve_settings("p", (OtherSettings,), [], environ={})


def test_booleans_have_a_negation() -> None:
    assert resolve("--verbose").verbose
    assert not resolve("--no-cache").cache
    assert not resolve("--no-verbose", environ={"DYN_PART_VERBOSE": "true"}).verbose
    assert not resolve(environ={"DYN_PART_CACHE": "0"}).cache


def test_last_flag_wins() -> None:
    assert resolve("--port", "1", "--port", "2").port == 2
    assert not resolve("--verbose", "--no-verbose").verbose


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--taints", "a,b"), ("a", "b")),
        (("--taints", "a", "--taints", "b"), ("a", "b")),
        (("--taints", '["a,b", "c"]'), ("a,b", "c")),
        (("--taints", ""), ()),
    ],
)
def test_lists_take_commas_repetition_and_json(argv: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert resolve(*argv).taints == expected


def test_lists_of_numbers_are_converted() -> None:
    assert resolve("--ports", "1,2").ports == [1, 2]
    assert resolve(environ={"DYN_PART_PORTS": "[3]"}).ports == [3]


def test_lists_and_dictionaries_from_the_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("weights: {a: 1}\ntaints: [x, y]\n")
    assert resolve("--config", str(file)).weights == {"a": 1.0}
    assert resolve("--config", str(file)).taints == ("x", "y")
    assert resolve(environ={"DYN_PART_WEIGHTS": '{"b": 2}'}).weights == {"b": 2.0}


def test_parent_file_is_read_below_the_child(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("port: 1\nhost: base\n")
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("parent: ../base.yaml\nport: 2\n")
    found = resolve("--config", str(child))
    assert (found.port, found.host) == (2, "base")


def test_parent_loops_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("parent: two.yaml\n")
    two.write_text("parent: one.yaml\n")
    assert "loop" in refused("--config", str(one))
    one.write_text("parent: one.yaml\n")
    assert "loop" in refused("--config", str(one))


@pytest.mark.parametrize(
    ("content", "word"), [("- a\n", "mapping"), ("a: [\n", "YAML"), ("parent: absent.yaml\n", "absent.yaml")]
)
def test_broken_file_is_refused(tmp_path: Path, content: str, word: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert word in refused("--config", str(file))


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refused("--config", str(file))


def test_absent_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused("--config", str(tmp_path / "absent.yaml"))


def test_empty_file_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert resolve("--config", str(file)).port == 8000


def test_config_file_may_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 9\n")
    assert resolve(environ={"DYN_CONFIG": str(file)}).port == 9


def test_secrets_are_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve("--print-config", environ={"DYN_PART_API_KEY": "hunter2"})
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "hunter2" not in shown
    assert "api_key" in shown
    assert resolve("--api-key", "hunter2").api_key == SecretStr("hunter2")


def test_bad_secret_is_not_shown_either(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("api_key: [hunter2]\n")
    message = refused("--config", str(file))
    assert "--api-key" in message
    assert "hunter2" not in message


def test_print_config_shows_values_with_their_origin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve("--print-config", "--port", "3", environ={"DYN_PART_HOST": "h"})
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert caught.value.code == 0
    assert lines.keys() == PartSettings.model_fields.keys()
    assert "3  (flag: --port)" in lines["port"]
    assert "h  (environment: DYN_PART_HOST)" in lines["host"]
    assert "0.5  (default)" in lines["ratio"]


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve("--help", description="Runs a part.")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Runs a part." in shown
    for name, info in PartSettings.model_fields.items():
        assert "--" + name.replace("_", "-") in shown
        assert str(info.description) in shown
        assert PartSettings.env_name(name) in shown


def test_several_classes_share_one_command_line() -> None:
    kinds = (PartSettings, OtherSettings)
    argv = ["--port", "1", "--model", "m"]
    resolved = resolve_settings("p", kinds, argv, environ={"DYN_OTHER_PART_MODEL": "e"})
    assert resolved.get(PartSettings).port == 1
    assert resolved.get(OtherSettings).model == "m"
    assert resolved.all(kinds) == (resolved.get(PartSettings), resolved.get(OtherSettings))


def test_classes_may_not_share_a_field_name() -> None:
    class Clash(DynamoSettings):
        component = "clash"
        port: int = 1

    with pytest.raises(ConfigurationError, match="'port' is declared by PartSettings and Clash"):
        resolve_settings("p", (PartSettings, Clash), [], environ={})


def test_extra_arguments_are_collected_in_order() -> None:
    resolved = resolve_settings(
        "p",
        (PartSettings,),
        ["--tensor-parallel", "2", "--port", "1", "--trust"],
        environ={},
        allow_extra_args=True,
    )
    assert resolved.extra_args == ["--tensor-parallel", "2", "--trust"]
    assert resolved.get(PartSettings).port == 1


def test_constructor_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("DYN_PART_PORT", "2")
    assert PartSettings().port == 8000


def test_constructor_refuses_unknown_names_and_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        PartSettings(prot=1)  # pyright: ignore[reportCallIssue] - what is tested
    settings = PartSettings()
    with pytest.raises(ValidationError):
        settings.port = 1


def test_schema_covers_all_classes_and_refuses_others() -> None:
    schema = settings_schema((PartSettings, OtherSettings))
    assert schema["properties"].keys() == {"parent", *PartSettings.model_fields, *OtherSettings.model_fields}
    assert schema["additionalProperties"] is False
    assert "required" not in schema


def test_traceback_of_a_bad_secret_does_not_show_it() -> None:
    bad = {"api_key": ["hunter" + "2"]}
    with pytest.raises(ConfigurationError) as caught:
        resolve_settings("p", (PartSettings,), [], environ={}, defaults=bad)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
