"""Files of the project that nothing imports: they have to agree with each other."""

import re
import subprocess
import tomllib

import pytest
import yaml

from helpers import config, runs

ROOT = runs.REPOSITORY
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MEGABYTE = 2**20


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def tracked():
    """Files that are part of the project, by git where there is one."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing if (ROOT / name).is_file()]


def test_conda_environment_installs_the_project_from_pyproject():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["name"] == PROJECT["project"]["name"]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert len(pip) == 1, "pyproject.toml is the one list of packages"
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", pip[0]).group(1).split(",")
    assert set(extras) == set(PROJECT["project"]["optional-dependencies"])
    python = [d for d in environment["dependencies"] if str(d).startswith("python")]
    assert python == ["python" + PROJECT["project"]["requires-python"]]


def test_conda_environment_names_no_package_twice():
    named = {
        re.split(r"[<>=!~\[ ]", line)[0].lower()
        for lines in [
            PROJECT["project"]["dependencies"],
            *PROJECT["project"]["optional-dependencies"].values(),
        ]
        for line in lines
    }
    conda = {
        re.split(r"[<>=]", d)[0]
        for d in yaml.safe_load(read("environment.yml"))["dependencies"]
        if isinstance(d, str)
    }
    assert not named & conda


def test_make_has_the_targets_and_lists_them():
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in ("book", "test", "bench", "lab", "clean", "help"):
        assert f"make {target} " in listed
    assert listed.isascii()


def test_ci_runs_the_commands_of_the_readme():
    called = re.findall(r"^make .*$", read(".ci/run"), flags=re.M)
    assert called == ["make test", "make book PRESET=smoke"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", read("README.md"), flags=re.S))
    for target in ("make book", "make test"):
        assert target in blocks


def test_readme_names_every_chapter_and_links_to_what_exists():
    text = read("README.md")
    for chapter in config.CHAPTERS:
        assert f"notebooks/{chapter}.ipynb" in text
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for alt in re.findall(r"!\[([^\]]*)\]", text):
        assert len(alt) > 20


def test_deviations_name_known_parameters():
    table = read("book/deviations.md").split("## Departures")[0]
    for row in re.findall(r"^\| (?!question|---).*$", table, flags=re.M):
        for name in re.findall(r"`(\w+)`", row.split("|")[2]):
            assert name in config.known(), name


def test_workflow_tests_every_change_and_publishes_by_tag():
    text = read(".github/workflows/book.yml")
    flow = yaml.safe_load(text)
    on = flow[True]  # YAML reads the key "on" as true
    assert "pull_request" in on and on["push"]["tags"] == ["v*"]
    assert ".ci/run" in text
    assert "refs/tags/v" in flow["jobs"]["publish"]["if"]


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert f"version: {version}" in read("CITATION.cff")
    assert f"## {version}" in read("CHANGELOG.md")
    assert yaml.safe_load(read("CITATION.cff"))["license"] == PROJECT["project"]["license"]


def test_helpers_are_modules_of_the_one_package():
    assert PROJECT["tool"]["setuptools"]["packages"] == ["helpers"]


def test_only_figures_import_matplotlib():
    for path in (ROOT / "helpers").glob("*.py"):
        if path.name != "figures.py":
            code = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) matplotlib", code, flags=re.M), path.name


def test_weights_are_small_and_have_cards():
    files = sorted((ROOT / "data" / "weights").glob("*.safetensors"))
    assert all(path.stat().st_size <= 15 * MEGABYTE for path in files)
    assert sum(path.stat().st_size for path in files) <= 60 * MEGABYTE
    for path in files:
        card = path.with_suffix(".md").read_text(encoding="utf-8")
        for word in ("python -m helpers.", "seed", "SHA-256", "icence"):
            assert word in card, f"{path.name}: its card says nothing of {word!r}"


def test_weights_are_those_of_their_cards():
    import hashlib

    for path in sorted((ROOT / "data" / "weights").glob("*.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest in path.with_suffix(".md").read_text(encoding="utf-8"), path.name


def test_no_file_of_the_project_is_large():
    large = [path for path in tracked() if path.stat().st_size > 15 * MEGABYTE]
    assert not large


def test_no_file_names_a_machine():
    """Paths of a home or work folder, user names in them, and private hosts stay out."""
    pattern = re.compile(r"(/home/\w+|/Users/\w+|/root/|/work/|file:///|\b10\.\d+\.\d+\.\d+\b)")
    for path in tracked():
        if path.suffix in {".safetensors", ".png", ".jpg"} or path.name == "test_project.py":
            continue
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_every_helper_is_tested():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for path in (ROOT / "helpers").glob("*.py"):
        assert path.stem == "__init__" or re.search(rf"\b{path.stem}\b", tests), path.name


def test_built_pages_load_nothing_from_elsewhere():
    html = ROOT / "book" / "_build" / "html"
    if not (html / "index.html").exists():
        pytest.skip("the book has not been built")
    pattern = re.compile(
        r"<(?:script|img|iframe|link|source)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]+"
    )
    for path in html.rglob("*.html"):
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(html)}: {found.group()}"
    for path in (html / "_static").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", path.read_text(encoding="utf-8"))
