"""What several legs need at once is made once, and used when it is whole."""

import threading
from concurrent.futures import ThreadPoolExecutor

from dynamo_tools.compat import environments
from dynamo_tools.compat.environments import Environments
from dynamo_tools.releases import releases


def test_a_source_is_used_when_all_of_its_files_are_there(clone, tmp_path, monkeypatch):
    clone.release("dynamo-core")
    made = Environments(clone.workspace(), tmp_path)
    release = releases(made.workspace, "dynamo-core")[-1]
    begun, go_on = threading.Event(), threading.Event()
    extract = environments.extract

    def slowly(workspace, commit, folder):
        folder.mkdir(parents=True)
        begun.set()
        assert go_on.wait(20)
        extract(workspace, commit, folder)

    monkeypatch.setattr(environments, "extract", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made.source, "dynamo-core", release)
        assert begun.wait(20)
        second = pool.submit(made.source, "dynamo-core", release)
        # Without the lock the second ends here, at a folder that is still empty.
        threading.Timer(0.2, go_on.set).start()
        assert second.result(20).version == first.result(20).version == release.version
