from dynamo_tools.gates import lengths

MODULE = "packages/dynamo-router/src/dynamo_router/_long.py"


def lines(count: int, docstring: str = "Module.") -> str:
    return f'"""{docstring}"""\n' + "x = 1\n" * (count - 1)


def test_short_files_pass(tree):
    tree.write(MODULE, lines(400))
    assert tree.failures(lengths.check) == []


def test_a_file_over_400_lines_fails(tree):
    tree.write(MODULE, lines(401))
    [found] = tree.failures(lengths.check)
    assert found.startswith(f"{MODULE}:401: lengths: 401 lines, over 400")


def test_a_reason_in_the_first_lines_allows_600_lines_and_no_more(tree):
    tree.write(MODULE, lines(600, "Module; long because one table is read in one place."))
    assert tree.failures(lengths.check) == []
    tree.write(MODULE, lines(601, "Module; long because one table is read in one place."))
    assert "over 600" in tree.failures(lengths.check)[0]


def test_a_function_over_60_lines_fails_with_its_name_and_line(tree):
    tree.write(MODULE, '"""Module."""\n\n\nclass A:\n    def long(self):\n' + "        x = 1\n" * 60)
    assert any(found.startswith(f"{MODULE}:5: lengths: A.long has 61 lines") for found in tree.failures(lengths.check))


def test_a_function_of_60_lines_passes(tree):
    tree.write(MODULE, '"""Module."""\ndef short(): ...\ndef brief(): ...\ndef long():\n' + "    x = 1\n" * 59)
    assert tree.failures(lengths.check) == []


def test_a_package_whose_median_function_has_10_lines_fails(tree):
    tree.write(MODULE, '"""Module."""\n' + ("def one():\n" + "    x = 1\n" * 9) * 3)
    [found] = tree.failures(lengths.check)
    assert "median function 10 lines" in found


def test_long_tests_fail_too(tree):
    tree.write("packages/dynamo-router/tests/unit/test_long.py", lines(401))
    assert len(tree.failures(lengths.check)) == 1
