import pytest

from dynamo_tools.semver.change import Level
from dynamo_tools.semver.judge import judge
from dynamo_tools.verbs.semver import report

CORE = "packages/dynamo-core"
INIT = f"{CORE}/src/dynamo_core/__init__.py"
GOLDEN = f"{CORE}/src/dynamo_core/testing/golden/v1/a.bin"


def verdict(tree, name="dynamo-core"):
    workspace = tree.workspace()
    return judge(workspace, workspace.find(name))


def lines(tree, name="dynamo-core"):
    workspace = tree.workspace()
    return "\n".join(report(workspace.find(name), judge(workspace, workspace.find(name))))


def test_before_its_first_release_a_package_passes_and_says_so(tree):
    assert verdict(tree).passes
    assert lines(tree) == "dynamo-core: no release yet, so nothing to compare with"


def test_an_unchanged_package_passes(released):
    found = verdict(released)
    assert found.release.tag == "dynamo-core-v1.2.0"
    assert (found.found, found.passes) == (Level.NONE, True)


def test_a_changed_signature_fails_until_it_is_declared(released):
    released.replace(INIT, "def answer() -> int", "def answer(times: int) -> int")
    assert not verdict(released).passes
    assert "major: dynamo_core.answer gains the required parameter times" in lines(released)
    released.write(f"{CORE}/changes/1.added.md", "Answer several times.\n")
    assert not verdict(released).passes
    released.write(f"{CORE}/changes/2.breaking.md", "`answer` takes `times`.\n")
    assert verdict(released).passes


def test_a_new_name_needs_a_minor_fragment(released):
    released.replace(INIT, '__all__ = ["answer"]', '__all__ = ["answer", "question"]\n\nquestion = 1')
    assert verdict(released).found is Level.MINOR
    released.write(f"{CORE}/changes/1.fixed.md", "Ask.\n")
    assert not verdict(released).passes
    released.write(f"{CORE}/changes/+ask.added.md", "Ask.\n")
    assert verdict(released).passes


def test_griffe_sees_what_it_knows(released):
    released.replace(INIT, "def answer() -> int", "def answer(x: int = 1) -> int")
    released.release("dynamo-core", "1.3.0")
    released.replace(INIT, "x: int = 1", "x: int = 2")
    assert "major: dynamo_core.answer changes the default of x" in lines(released)


def test_each_package_is_compared_with_its_own_release(released):
    released.replace(INIT, "def answer() -> int", "def answer(times: int = 1) -> int")
    released.release("dynamo-core", "1.3.0")
    assert verdict(released).release.version == "1.3.0"
    assert verdict(released, "dynamo-router").release.version == "0.1.0"


def test_the_record_of_the_release_itself_is_not_compared_with_itself(released):
    released.replace(INIT, "def answer() -> int", "def answer(times: int = 1) -> int")
    released.release("dynamo-core", "1.3.0")
    released.git("checkout", "-q", "dynamo-core-v1.3.0")
    assert (verdict(released).release.version, verdict(released).found) == ("1.2.0", Level.MINOR)


def test_the_version_declares_too(released):
    released.replace(INIT, "def answer() -> int", "def answer(times: int = 1) -> int")
    for version, passes in (("1.2.1", False), ("1.3.0", True), ("2.0.0", True)):
        text = released.read(f"{CORE}/pyproject.toml")
        released.write(f"{CORE}/pyproject.toml", text.replace('version = "1.2.0"', f'version = "{version}"'))
        assert verdict(released).passes is passes, version
        released.write(f"{CORE}/pyproject.toml", text)


def test_a_minor_release_of_0_x_may_break_what_its_changelog_admits(released):
    path = "packages/dynamo-router"
    released.replace(f"{path}/src/dynamo_router/__init__.py", "def answer() -> int", "def answer(x: int) -> int")
    released.replace(f"{path}/pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    assert not verdict(released, "dynamo-router").passes
    released.write(f"{path}/CHANGELOG.md", "## 0.2.0 (2026-11-24)\n\n### Breaking\n\n- It takes x.\n")
    assert verdict(released, "dynamo-router").passes


def test_a_golden_file_is_never_edited(released):
    released.write(GOLDEN, "one")
    released.release("dynamo-core", "1.3.0")
    assert verdict(released).passes
    released.write(GOLDEN, "two")
    assert f"major: golden {GOLDEN} is edited" in lines(released)
    released.remove(GOLDEN)
    assert f"major: golden {GOLDEN} is removed" in lines(released)


def test_a_waiver_covers_its_change_and_no_other(released):
    released.replace(INIT, "def answer() -> int", "def answer(times: int) -> int")
    [change] = verdict(released).changes
    waiver = f'[[waiver]]\nfingerprint = "{change.fingerprint}"\nreason = "Nobody calls it."\n'
    released.write(f"{CORE}/api/waivers.toml", waiver)
    found = verdict(released)
    assert (found.passes, found.waived) == (True, [change])
    released.replace(INIT, "times: int", "times: str, loud: bool")
    found = verdict(released)
    assert not found.passes
    assert [item for item in found.problems if "covers no change" in item] == []


@pytest.mark.parametrize(
    ("waiver", "problem"),
    [
        ('fingerprint = "0123"\nreason = "Because."', "waiver 0123 covers no change; remove it"),
        ('fingerprint = "0123"\nreason = ""', "waiver 0123 gives no reason"),
    ],
)
def test_a_waiver_that_is_unused_or_has_no_reason_fails(released, waiver, problem):
    released.write(f"{CORE}/api/waivers.toml", f"[[waiver]]\n{waiver}\n")
    assert not verdict(released).passes
    assert problem in verdict(released).problems


def test_a_clone_without_the_release_is_told_to_fetch(released):
    commit = verdict(released).release.commit
    released.git("tag", "-d", "dynamo-core-v1.2.0")
    released.replace("releases.toml", commit, "0" * 40)
    with pytest.raises(LookupError, match="is not in this clone; fetch all of it"):
        verdict(released)
