"""README.md against the code: the commands that CI and new users run, and the names it promises."""

import re
from pathlib import Path

import pytest

from cli_jax.fusion.registry import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    blocks = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    (tests,) = [block for block in blocks if ".venv-test/bin/pytest" in block]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == tests


def test_every_strategy_is_in_the_table():
    section = README.split("## Fusion strategies")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(STRATEGIES)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:configs|benchmarks)/\w+\.py", README)))
)
def test_files_named_exist(path):
    assert (ROOT / path).is_file()
