"""Every code block of the README and of docs/ runs on small data, or is read where it says why it does not run."""

import re
import shutil

import pytest

from tests.docs.blocks import PAGES, ROOT, RUN, blocks_of, inside, make_documents, make_project, run_blocks


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The folder in which the page Getting started has run, and the names of its Python."""
    folder = tmp_path_factory.mktemp("project")
    return folder, make_project(folder)


def test_getting_started_finds_sources_and_generates_with_them(project):
    _, names = project
    assert names["found"].sources[0][0].title and len(names["out"]["neighbors"][0]) >= 1


def test_the_blocks_of_the_readme(tmp_path):
    make_documents(tmp_path)
    with inside(tmp_path):
        run_blocks(PAGES["README"])


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README", "index"}))
def test_the_blocks_of_a_page(page, project, tmp_path):
    with inside(shutil.copytree(project[0], tmp_path / "project")):
        run_blocks(PAGES[page])


def test_neighbors_change_the_loss_of_the_page_on_training():
    names = run_blocks(PAGES["training"], ["python"])
    assert names["on"].isfinite() and names["on"] != names["off"]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = PAGES["README"].read_text(encoding="utf-8")
    assert len(text.encode()) <= 9000
    links = re.findall(r"""\]\(([^)#\s]+)|src="([^"]+)\"""", text)
    assert len(links) > 10
    for link in map("".join, links):
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_blocks_that_only_are_read_are_the_exception():
    blocks = [block for page in PAGES.values() for block in blocks_of(page) if block.language in RUN]
    assert sum(not block.reason for block in blocks) > len(blocks) / 2
