"""What someone who has never seen the repository does with one package, and what the gates answer.

Everything happens in a clone and in empty environments: the package's folder and core's, no lock, no workspace.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

from dynamo_tools import site
from dynamo_tools.examples import run_blocks
from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.releases import changelog_section, releases
from dynamo_tools.releasing import plan, prepare, record_head
from dynamo_tools.semver.judge import judge
from dynamo_tools.verbs.semver import report
from dynamo_tools.wheels import inspect
from dynamo_tools.workspace import CORE, Package, Workspace

FRAGMENT = "Everything asks for a reason."
_LINE = re.compile(r"^(?P<head>\s*(?:async )?def \w+\(self)(?P<rest>[,)].*)$")


def clone(workspace: Workspace, folder: Path) -> Workspace:
    """Clone what is committed.

    Raises:
        LookupError: if git cannot.
    """
    for argv in (
        ["git", "clone", "--quiet", "--no-hardlinks", str(workspace.root), str(folder)],
        ["git", "-C", str(folder), "config", "user.name", "Stranger"],
        ["git", "-C", str(folder), "config", "user.email", "stranger@example.com"],
    ):
        result = run(argv, workspace.root)
        if result.returncode:
            raise LookupError(result.tail())
    return Workspace(folder)


def alone(cloned: Workspace, package: Package, folder: Path, *, tests: bool = True) -> Iterator[str]:
    """Install, test, build and read one package with only its folder and core's; what goes wrong.

    Args:
        cloned: A clone.
        package: The package.
        folder: An empty folder for the copies and the environment.
        tests: Whether to run the package's tests.
    """
    kept = {CORE: cloned.find(CORE), package.name: package}
    for item in kept.values():
        shutil.copytree(item.folder, folder / item.name, ignore=shutil.ignore_patterns("__pycache__"))
    python = folder / "env" / "bin" / "python"
    wanted = [str(folder / name) for name in kept]
    wanted += [str(entry) for entry in package.config.get("dependency-groups", {}).get("test", [])]
    commands = {
        "does not install": [tool("uv"), "pip", "install", "--quiet", "--python", str(python), *wanted],
        "does not build": [tool("uv"), "build", "--quiet", "--wheel", "--out-dir", str(folder / "dist"), "."],
    }
    if tests:
        # The pytest settings are the repository's; everything else is the package's own.
        settings = ["-c", str(cloned.root / "pyproject.toml"), "--rootdir", str(folder / package.name)]
        argv = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *settings, "tests"]
        commands["fails its tests"] = argv
    run([tool("uv"), "venv", "--quiet", "--python", sys.executable, str(folder / "env")], folder)
    for problem, argv in commands.items():
        result = run(argv, folder / package.name, env=clean_environment())
        if result.returncode:
            yield f"{problem}: {result.tail(25)}"
            return
    yield from inspect(package, next((folder / "dist").glob(f"{package.import_name}-*.whl")))
    yield from _pages(cloned, package, python)


def changed(cloned: Workspace, package: Package) -> Iterator[str]:
    """Break a public signature in the clone, declare it, and release it; what the gates get wrong.

    Raises:
        LookupError: if a release cannot be made.
    """
    if not releases(cloned, package.name):
        _release_as_it_is(cloned, package)
        package = Workspace(cloned.root).find(package.name)
    name = break_signature(package)
    verdict = judge(cloned, package)
    named = [line for line in report(package, verdict) if name in line and "major" in line]
    if verdict.passes or not named:
        yield f"the gate does not name the break of {name}: {report(package, verdict)}"
        return
    fragment = package.folder / "changes" / "+reason.breaking.md"
    fragment.write_text(FRAGMENT + "\n", encoding="utf-8")
    if not judge(cloned, package).passes:
        yield f"a fragment that declares the break of {name} does not satisfy the gate"
        return
    planned = plan(cloned, package)
    if any("releas" not in refusal for refusal in planned.refusals):
        yield f"the release is refused: {planned.refusals}"
        return
    prepare(cloned, planned)
    section = changelog_section(Workspace(cloned.root).find(package.name), planned.version)
    if not section.startswith(f"## {planned.version} (") or f"### Breaking\n\n- {FRAGMENT}\n" not in section:
        yield f"the changelog does not say what changed:\n{section}"


def break_signature(package: Package) -> str:
    """Give a public method a required parameter; return its dotted name.

    Raises:
        LookupError: if the package has no public method on one line.
    """
    module = griffe.load(package.import_name, search_paths=[package.src.parent], allow_inspection=False)
    for exported in module.exports or []:
        member = module.members.get(str(exported))
        target = member.final_target if isinstance(member, griffe.Alias) else member
        if isinstance(target, griffe.Class) and isinstance(target.filepath, Path):
            for function in target.functions.values():
                if not function.name.startswith("_") and "property" not in function.labels and _edit(target, function):
                    return f"{package.import_name}.{exported}.{function.name}"
    raise LookupError(f"{package.name} has no public method that could be changed")


def _edit(target: griffe.Class, function: griffe.Function) -> bool:
    path = target.filepath
    assert isinstance(path, Path)
    lines = path.read_text(encoding="utf-8").split("\n")
    for number in range((function.lineno or 1) - 1, function.endlineno or 0):
        if found := _LINE.match(lines[number]):
            lines[number] = f"{found['head']}, reason: str{found['rest']}"
            path.write_text("\n".join(lines), encoding="utf-8")
            return True
    return False


def _release_as_it_is(cloned: Workspace, package: Package) -> None:
    """Make a first release in the clone, core's before a component's."""
    core = cloned.find(CORE)
    for item in dict.fromkeys([core.name, package.name]):
        if not releases(cloned, item):
            prepare(cloned, plan(cloned, cloned.find(item)))
            fresh = Workspace(cloned.root)
            _commit(fresh, f"Release {item}")
            record_head(fresh, fresh.find(item))
            _commit(fresh, f"Record {item}")


def _commit(cloned: Workspace, message: str) -> None:
    for arguments in (("add", "-A"), ("commit", "--quiet", "-m", message)):
        if cloned.git(*arguments) is None:
            raise LookupError(f"git {arguments[0]} fails in the clone")


def _pages(cloned: Workspace, package: Package, python: Path) -> Iterator[str]:
    ran = run_blocks(package.folder / "README.md", python, first_only=True)
    if not ran or ran[0].result.returncode:
        yield f"its README's example fails: {ran[0].result.tail() if ran else 'there is none'}"
    page = cloned.root / "docs" / "packages" / package.name.removeprefix("dynamo-") / "index.md"
    if not page.is_file():
        yield f"{cloned.relative(page)} is missing"
    elif "from the sources" in site.expand(page.read_text(encoding="utf-8"), cloned):
        yield f"{cloned.relative(page)} asks for something that there is not"
