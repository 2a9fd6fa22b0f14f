"""A real browser sees what is wrong with a page."""

from dynamo_tools.looking import look, photograph

GOOD = "<!doctype html><h1>Title</h1><p>text</p>"


def test_a_browser_measures_every_page_at_two_widths(tmp_path):
    (tmp_path / "good.html").write_text(GOOD)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "index.html").write_text(GOOD + "<div style='width: 900px'>wide</div>")
    (tmp_path / "bare.html").write_text("<!doctype html><p>text</p><img src='missing.png'>")
    found = look(tmp_path)
    assert [line for line in found if line.startswith("good")] == []
    assert [line for line in found if line.startswith("wide")] == [
        "wide/index.html: is 908 pixels wide in a window of 390"
    ]
    bare = [line.partition(": ")[2] for line in found if line.startswith("bare.html")]
    assert "shows no heading in a window of 1280" in bare
    assert any("does not show http://127.0.0.1:" in line for line in bare)


def test_pictures_of_pages_are_written(tmp_path):
    (tmp_path / "site" / "page").mkdir(parents=True)
    (tmp_path / "site" / "page" / "index.html").write_text(GOOD)
    [picture] = photograph(tmp_path / "site", tmp_path / "pictures")
    assert picture.name == "page.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
