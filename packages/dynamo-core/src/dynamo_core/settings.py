"""Settings: one class per component gives flags, environment, file, defaults, JSON schema and documentation.

Order: flag, environment (``DYN_<COMPONENT>_<FIELD>``), file (``--config``), default. Unknown keys and values out of
range are errors that name the option, the value and the fix. Only this module and each package's ``_settings.py``
read the environment.
"""

from __future__ import annotations

import argparse
import difflib
import os
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dynamo_core._option_text import is_list, parse_flag, parse_text, plain_types
from dynamo_core.errors import ConfigurationError

S = TypeVar("S", bound="DynamoSettings")


class DynamoSettings(BaseSettings):
    """Base of every settings class. Subclasses set ``component`` and describe each field.

    Constructing one directly takes keyword arguments and defaults only, so that a library user gets no surprise from
    the environment; ``resolve_settings`` is what commands use.
    """

    # Inputs are hidden in pydantic's own error texts, which end up in tracebacks, since they may be secrets.
    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)
    component: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Former name of an option and its present one. As a flag, variable, key or keyword it still works, and warns."""

    @model_validator(mode="before")
    @classmethod
    def _take_former_names(cls, given: Any) -> Any:
        return _in_present_names(given, cls.renamed, _OwnNames()) if cls.renamed else given

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but what the constructor is given."""
        return (init_settings,)

    @classmethod
    def env_name(cls, field: str) -> str:
        """Environment variable of a field."""
        return f"DYN_{cls.component.upper().replace('-', '_')}_{field.upper()}"


class _OwnNames(dict[str, str]):
    """Shows every name as it is."""

    def __missing__(self, key: str) -> str:
        return key


class SettingOrigin(BaseModel):
    """Where a value came from.

    Attributes:
        value: The value as text, secrets redacted.
        source: ``flag``, ``environment``, ``file`` or ``default``.
        detail: The flag, variable or file.
    """

    value: str
    source: str
    detail: str = ""


class ResolvedSettings:
    """Settings of one command line, with the origin of each value."""

    def __init__(
        self,
        values: Mapping[type[DynamoSettings], DynamoSettings],
        origins: Mapping[str, SettingOrigin],
        extra_args: list[str],
    ) -> None:
        self._values = dict(values)
        self.origins = dict(origins)
        self.extra_args = extra_args

    def get(self, kind: type[S]) -> S:
        """Return the settings of one class."""
        value = self._values[kind]
        assert isinstance(value, kind)
        return value

    def all(self, kinds: Sequence[type[DynamoSettings]]) -> tuple[DynamoSettings, ...]:
        """Return the settings of several classes in order."""
        return tuple(self._values[kind] for kind in kinds)

    def describe(self) -> str:
        """Return a table of every option, its value and its origin, for ``--print-config``."""
        width = max((len(name) for name in self.origins), default=0)
        lines = [
            f"{name:<{width}}  {origin.value}  ({origin.source}{': ' + origin.detail if origin.detail else ''})"
            for name, origin in sorted(self.origins.items())
        ]
        return "\n".join(lines)


def resolve_settings(  # noqa: PLR0913 - keyword-only options of one call per process
    prog: str,
    kinds: Sequence[type[DynamoSettings]],
    argv: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    allow_extra_args: bool = False,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> ResolvedSettings:
    """Resolve several settings classes from one command line.

    ``--help`` prints and exits 0; ``--print-config`` prints every value with its origin and exits 0.

    Args:
        prog: Command as typed, for messages.
        kinds: Settings classes; their field names must not collide.
        argv: Arguments after the command.
        environ: Environment; the process's own if omitted.
        allow_extra_args: Collect unknown flags into ``extra_args`` instead of refusing them.
        description: First paragraph of the help text.
        defaults: Values that this command uses in place of the classes' defaults.

    Raises:
        ConfigurationError: for an unknown flag, variable or file key, a bad value, or an option that one source gives
            under two names.

    Warns:
        FutureWarning: for an option that is given by a former name.
    """
    environ = os.environ if environ is None else environ
    fields = _fields_by_name(kinds)
    former = _former_names(kinds, fields)
    parser = _parser(prog, kinds, description)
    namespace, extra = parser.parse_known_args(list(argv))
    given = vars(namespace)
    print_config = bool(given.pop("print_config"))
    config_path = given.pop("config") or environ.get("DYN_CONFIG")
    if extra and not allow_extra_args:
        raise ConfigurationError(_unknown("flag", extra[0], [_flag(name) for name in fields], prog))
    origins: dict[str, SettingOrigin] = {}
    values = _merge(_Options(fields, former), given, environ, config_path, defaults or {}, origins)
    resolved = ResolvedSettings({kind: _build(kind, values, origins) for kind in kinds}, origins, list(extra))
    _record_defaults(resolved, kinds)
    if print_config:
        print(resolved.describe())  # noqa: T201 - the output of --print-config
        raise SystemExit(0)
    return resolved


def settings_schema(kinds: Sequence[type[DynamoSettings]]) -> dict[str, Any]:
    """Return one JSON schema for a configuration file of these classes.

    No option is required in it, since flags and the environment may give what the file leaves out.
    """
    parent = {"type": "string", "description": "file whose options this one adds to, relative to this one"}
    merged: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": {"parent": parent}}
    for kind in kinds:
        schema = kind.model_json_schema()
        merged["properties"] |= schema.get("properties", {})
        if "$defs" in schema:
            merged.setdefault("$defs", {}).update(schema["$defs"])
    return merged


class _Options(typing.NamedTuple):
    """The options of one command: class and declaration by name, and present name by former name."""

    fields: Mapping[str, tuple[type[DynamoSettings], FieldInfo]]
    former: Mapping[str, str]

    def variables(self) -> dict[str, str]:
        present = {name: kind.env_name(name) for name, (kind, _) in self.fields.items()}
        return present | {old: self.fields[new][0].env_name(old) for old, new in self.former.items()}


def _fields_by_name(kinds: Sequence[type[DynamoSettings]]) -> dict[str, tuple[type[DynamoSettings], FieldInfo]]:
    found: dict[str, tuple[type[DynamoSettings], FieldInfo]] = {}
    for kind in kinds:
        for name, info in kind.model_fields.items():
            if name in found:
                other = found[name][0].__name__
                raise ConfigurationError(f"option {name!r} is declared by {other} and {kind.__name__}")
            found[name] = (kind, info)
    return found


def _former_names(kinds: Sequence[type[DynamoSettings]], fields: Mapping[str, Any]) -> dict[str, str]:
    former: dict[str, str] = {}
    for kind in kinds:
        for old, new in kind.renamed.items():
            if old in fields or old in former or new not in kind.model_fields:
                raise ConfigurationError(f"{kind.__name__}.renamed: {old!r} cannot be a former name of {new!r}")
            former[old] = new
    return former


def _in_present_names(given: Mapping[str, Any], former: Mapping[str, str], shown: Mapping[str, str]) -> dict[str, Any]:
    """Values of one source by the present name of their option."""
    present = {name: value for name, value in given.items() if name not in former}
    for old in given.keys() & former.keys():
        new = former[old]
        if new in present:
            raise ConfigurationError(f"{shown[old]} is the former name of {shown[new]}; give only {shown[new]}")
        warnings.warn(f"{shown[old]} is deprecated; it is called {shown[new]} now", FutureWarning, stacklevel=2)
        present[new] = given[old]
    return present


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigurationError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser(prog: str, kinds: Sequence[type[DynamoSettings]], description: str) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; may name one `parent` file")
    parser.add_argument("--print-config", action="store_true", help="show each value and where it came from")
    for kind in kinds:
        group = parser.add_argument_group(kind.component or kind.__name__, (kind.__doc__ or "").split("\n")[0])
        for name, info in kind.model_fields.items():
            _add_flag(group, kind, name, info)
        for old, new in kind.renamed.items():
            options = _flag_options(old, kind.model_fields[new])
            group.add_argument(_flag(old), **options, help=argparse.SUPPRESS)
    return parser


def _add_flag(
    group: argparse._ArgumentGroup,  # pyright: ignore[reportPrivateUsage] - argparse names it nowhere else
    kind: type[DynamoSettings],
    name: str,
    info: FieldInfo,
) -> None:
    default = "" if info.is_required() else f" (default: {_show(info.get_default(call_default_factory=True))})"
    text = f"{info.description or ''}{default} [{kind.env_name(name)}]".replace("%", "%%")
    group.add_argument(_flag(name), **_flag_options(name, info), help=text)


def _flag_options(name: str, info: FieldInfo) -> dict[str, Any]:
    options: dict[str, Any] = {"dest": name, "default": None}
    if bool in plain_types(info.annotation):
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = name.rsplit("_", 1)[-1].upper()
    if is_list(info.annotation):
        options["action"] = "append"
    return options


def _merge(
    options: _Options,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    config_path: str | None,
    defaults: Mapping[str, Any],
    origins: dict[str, SettingOrigin],
) -> dict[str, Any]:
    fields, former = options
    variables = options.variables()
    values: dict[str, Any] = dict(defaults)
    for name in defaults:
        if name not in fields:
            raise ConfigurationError(_unknown("default", name, list(fields), "this command's settings"))
        origins[name] = SettingOrigin(value="", source="default", detail="of this command")
    if config_path:
        content = _read_config(Path(config_path), [*fields, *former])
        keys = {name: f"option {name} of {config_path}" for name in variables}
        for name, value in _in_present_names(content, former, keys).items():
            values[name] = value
            origins[name] = SettingOrigin(value="", source="file", detail=config_path)
    set_ones = {name: environ[variable] for name, variable in variables.items() if variable in environ}
    for name, text in _in_present_names(set_ones, former, variables).items():
        values[name] = parse_text(text, fields[name][1], variables[name])
        origins[name] = SettingOrigin(value="", source="environment", detail=variables[name])
    _refuse_unknown_variables(fields, set(variables.values()), environ)
    typed = {name: value for name, value in flags.items() if value is not None}
    for name, value in _in_present_names(typed, former, {name: _flag(name) for name in variables}).items():
        values[name] = parse_flag(value, fields[name][1], _flag(name))
        origins[name] = SettingOrigin(value="", source="flag", detail=_flag(name))
    return values


def _refuse_unknown_variables(
    fields: Mapping[str, tuple[type[DynamoSettings], FieldInfo]], known: set[str], environ: Mapping[str, str]
) -> None:
    prefixes = {kind.env_name("") for kind, _ in fields.values() if kind.component}
    for variable in environ:
        if variable not in known and any(variable.startswith(prefix) for prefix in prefixes):
            raise ConfigurationError(_unknown("environment variable", variable, sorted(known), "the environment"))


def _read_config(path: Path, known: Sequence[str], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigurationError(f"--config {path}: {error.strerror}; give a readable YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigurationError(f"--config {path} must be a mapping of option names to values")
    content = {str(key).replace("-", "_"): value for key, value in typing.cast("dict[Any, Any]", loaded).items()}
    parent = content.pop("parent", None)
    for name in content:
        if name not in known:
            raise ConfigurationError(_unknown("option", name, known, str(path)))
    if parent is None:
        return content
    parent_path = (path.parent / str(parent)).resolve()
    if parent_path in seen or parent_path == path.resolve():
        raise ConfigurationError(f"--config {path}: parent {parent} leads back to itself; remove the loop")
    return {**_read_config(parent_path, known, (*seen, path.resolve())), **content}


def _build(
    kind: type[DynamoSettings], values: Mapping[str, Any], origins: Mapping[str, SettingOrigin]
) -> DynamoSettings:
    mine = {name: values[name] for name in kind.model_fields if name in values}
    try:
        return kind(**mine)
    except ValidationError as error:
        raise ConfigurationError(_explain(error, kind, origins)) from error


def _explain(error: ValidationError, kind: type[DynamoSettings], origins: Mapping[str, SettingOrigin]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if first["type"] == "missing":
        return f"option {_flag(name)} is required; give it as a flag or as {kind.env_name(name)}"
    origin = origins.get(name)
    where = f" from {origin.source} {origin.detail}" if origin else ""
    shown = "(secret)" if _is_secret(kind.model_fields.get(name)) else repr(first["input"])
    return f"option {_flag(name)} has the value {shown}{where}: {message}"


def _record_defaults(resolved: ResolvedSettings, kinds: Sequence[type[DynamoSettings]]) -> None:
    for kind in kinds:
        settings = resolved.get(kind)
        for name in kind.model_fields:
            origin = resolved.origins.get(name, SettingOrigin(value="", source="default"))
            shown = _show(getattr(settings, name))
            resolved.origins[name] = origin.model_copy(update={"value": shown})


def _is_secret(info: FieldInfo | None) -> bool:
    return info is not None and any(kind in (SecretStr, SecretBytes) for kind in plain_types(info.annotation))


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value or "''"
    return str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(what: str, name: str, known: Sequence[str], where: str) -> str:
    close = difflib.get_close_matches(name.split("=", maxsplit=1)[0], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see --help for what there is"
    return f"{what} {name!r} is not known to {where}{hint}"
