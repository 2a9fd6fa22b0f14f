import pytest

from dynamo_tools.gates import words

MODULE = "packages/dynamo-router/src/dynamo_router/_a.py"


def test_the_tree_passes(tree):
    tree.write(MODULE, "# Routes such as /v1/models, ~/work and https://example.com/home/x are fine, as is mytodo.\n")
    assert tree.failures(words.check) == []


@pytest.mark.parametrize(
    "text",
    [
        f"/{'work'}/data/x",
        f"/{'root'}/.cache",
        f"see ../../{'shared'}/design",
        f"https://{'py'}pi.org/simple",
        f"files.python{'hosted'}.org",
        f"{'TO'}DO: later",
        f"raise Not{'Implemented'}Error",
    ],
)
def test_a_forbidden_word_fails_at_its_line(tree, text):
    tree.write(MODULE, f'"""Module."""\n# {text}\n')
    [found] = tree.failures(words.check)
    assert found.startswith(f"{MODULE}:2: words: ")


def test_documents_and_workflows_are_read_too(tree):
    tree.write("docs/index.md", f"{'FIX'}ME\n")
    tree.write(".github/workflows/ci.yml", f"run: cat /{'home'}/me/x\n")
    assert len(tree.failures(words.check)) == 2


def test_a_lock_of_a_private_index_fails_once_a_host(tree):
    public = f"https://files.python{'hosted'}.org/a.whl"
    tree.write("uv.lock", f'url = "{public}"\nurl = "http://mirror.local/a.whl"\nurl = "http://mirror.local/b.whl"\n')
    [found] = tree.failures(words.check)
    assert found.startswith("uv.lock:2: words: 'mirror.local'")
