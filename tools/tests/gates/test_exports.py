from dynamo_tools.gates import exports

INIT = "packages/dynamo-router/src/dynamo_router/__init__.py"


def test_the_tree_passes(tree):
    assert tree.failures(exports.check) == []


def test_an_unsorted_list_fails(tree):
    tree.write(INIT, '__all__ = ["b", "a"]\na = 1\nb = 2\n')
    assert tree.failures(exports.check) == [f"{INIT}:1: exports: __all__ is not sorted or repeats a name, at 'a'"]


def test_a_public_name_that_is_not_listed_fails(tree):
    tree.write(INIT, 'from dynamo_router._a import Secret\n\n__all__ = ["a"]\na = 1\n')
    [found] = tree.failures(exports.check)
    assert found.startswith(f"{INIT}:3: exports: Secret is public and not in __all__")


def test_a_listed_name_that_is_not_defined_fails(tree):
    tree.write(INIT, '__all__ = ["a", "b"]\na = 1\n')
    [found] = tree.failures(exports.check)
    assert "__all__ names b, which the package does not define" in found


def test_names_for_type_checkers_count_and_foreign_imports_do_not(tree):
    code = "import json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dynamo_router._a import A as A\n"
    tree.write(INIT, code + '__all__ = ["A"]\n_hidden = json\n')
    assert tree.failures(exports.check) == []


def test_a_package_with_code_and_no_list_fails(tree):
    tree.write(INIT, "a = 1\nb = 2\n")
    assert "__all__ is missing" in tree.failures(exports.check)[0]


def test_a_package_without_code_is_only_noted(tree):
    tree.write(INIT, '"""Nothing here."""\n')
    assert tree.failures(exports.check) == []
    assert any("__all__ is missing" in str(note) for note in exports.check(tree.workspace()))


def test_a_missing_export_test_fails(tree):
    tree.remove("packages/dynamo-router/tests/api/test_exports.py")
    [found] = tree.failures(exports.check)
    assert "packages/dynamo-router/tests/api/test_exports.py is missing" in found


def test_the_list_of_any_module_is_checked(tree):
    tree.write("packages/dynamo-core/src/dynamo_core/ids.py", '__all__ = ["nothing"]\n')
    [found] = tree.failures(exports.check)
    assert "__all__ names nothing, which is not there" in found
