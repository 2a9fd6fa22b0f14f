"""``dynamo-frontend keys``: makes, lists and revokes API keys."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_frontend._access.keys import ApiKey, edited_keys, new_key, read_keys


def keys_command(arguments: Sequence[str]) -> list[str]:
    """Do what the arguments say and return the lines to print.

    Raises:
        ConfigurationError: if the file cannot be used, or there is no such key.
    """
    options = _parser().parse_args(arguments)
    path = Path(options.file)
    if options.action == "new":
        return [_new(path, options)]
    if options.action == "list":
        return _list(path)
    return [_revoke(path, options.key_id)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dynamo-frontend keys", description="API keys of a frontend or gateway.")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("new", help="make a key and print it; it is shown only this once")
    new.add_argument("--name", default="", help="whose it is")
    new.add_argument("--tenant", default="", help="keys of one tenant share cached blocks; default: the key alone")
    new.add_argument("--requests-per-minute", type=int, default=0, help="0 for no limit")
    new.add_argument("--tokens-per-minute", type=int, default=0, help="0 for no limit")
    listing = actions.add_parser("list", help="list the keys without their secrets")
    revoke = actions.add_parser("revoke", help="take a key no longer")
    revoke.add_argument("key_id", help="its id, the part between the underscores")
    for action in (new, listing, revoke):
        action.add_argument("--file", required=True, help="key file, the value of --api-keys-file")
    return parser


def _new(path: Path, options: argparse.Namespace) -> str:
    for name in ("requests_per_minute", "tokens_per_minute"):
        if getattr(options, name) < 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 0")
    text, record = new_key(
        name=options.name,
        tenant=options.tenant,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        created_at_s=int(time.time()),
    )
    with edited_keys(path) as keys:
        keys.append(record)
    return text


def _list(path: Path) -> list[str]:
    lines = [f"{'id':<14}{'state':<9}{'requests/min':>13}{'tokens/min':>12}  tenant  name"]
    for key in read_keys(path).keys:
        state = "revoked" if key.revoked else "valid"
        limits = f"{key.requests_per_minute or '-':>13}{key.tokens_per_minute or '-':>12}"
        lines.append(f"{key.key_id:<14}{state:<9}{limits}  {key.tenant or '-'}  {key.name}".rstrip())
    return lines


def _revoke(path: Path, key_id: str) -> str:
    with edited_keys(path) as keys:
        for index, key in enumerate(keys):
            if key.key_id == key_id:
                keys[index] = _revoked(key)
                return f"{key_id} is revoked; servers that use the file take it no longer within seconds"
        raise ConfigurationError(f"there is no key {key_id!r} in {path}; `keys list` shows them")


def _revoked(key: ApiKey) -> ApiKey:
    return msgspec.structs.replace(key, revoked=True)
