"""``dyn slow``: the jobs name what exists, and an environment is made and read with the real tools."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dynamo_tools.process import run, tool
from dynamo_tools.slow.environment import Environment
from dynamo_tools.slow.jobs import COMPONENTS, JOBS, Job
from dynamo_tools.workspace import Workspace, find_root

WORKSPACE = Workspace(find_root(Path(__file__)))


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_job_runs_files_that_are_there(job: Job) -> None:
    for test in job.tests:
        path = WORKSPACE.root / test
        assert path.is_file()
        assert not path.name.startswith("test_"), "an ordinary run would collect it"
        assert "pytest.mark.slow" in path.read_text()
    assert [WORKSPACE.find(name).folder.is_dir() for name in COMPONENTS] == [True] * len(COMPONENTS)


def test_versions_are_those_of_the_environment(tmp_path: Path) -> None:
    job = Job(name="one", requirements=(), tests=(), versions=("Some_Package", "absent"))
    environment = Environment(tmp_path, job, "")
    folder = environment.python.parents[1]
    assert run([tool("uv"), "venv", "--quiet", "--python", sys.executable, str(folder)], tmp_path).returncode == 0
    (site,) = folder.glob("lib/*/site-packages")
    (site / "some_package-1.2.dist-info").mkdir()
    (site / "some_package-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: some-package\nVersion: 1.2\n"
    )
    assert environment.versions() == ["some-package==1.2"]


def test_the_tests_hear_of_the_model_and_of_the_jobs_variables(tmp_path: Path) -> None:
    job = Job(name="one", requirements=(), tests=(), env={"A": "1"})
    environment = Environment(tmp_path, job, "")
    assert "DYNAMO_SLOW_GGUF" not in environment.variables(WORKSPACE)
    model = tmp_path / "one" / "models" / "some" / "model.gguf"
    model.parent.mkdir(parents=True)
    model.touch()
    found = environment.variables(WORKSPACE)
    assert (found["A"], found["DYNAMO_SLOW_GGUF"]) == ("1", str(model))
    sentences = tmp_path / "one" / "models" / "other" / "config_sentence_transformers.json"
    sentences.parent.mkdir(parents=True)
    sentences.touch()
    assert environment.variables(WORKSPACE)["DYNAMO_SLOW_SENTENCES"] == str(sentences.parent)


def test_what_cannot_be_installed_is_named(tmp_path: Path) -> None:
    job = Job(name="one", requirements=("dynamo-core @ file:///nowhere",), tests=())
    with pytest.raises(LookupError, match="nowhere"):
        Environment(tmp_path, job, "").install(WORKSPACE)
