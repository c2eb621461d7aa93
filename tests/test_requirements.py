"""requirements.lock, which .ci/run installs: everything that a person installs, pinned, and no address."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", LOCK, re.MULTILINE))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-cluster.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_to_a_version_that_it_allows(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line and not line.startswith(("#", "-r ")):
            requirement = Requirement(line)
            assert requirement.specifier.contains(PINS[requirement.name]), line


def test_every_pin_has_a_hash_and_no_line_an_address():
    blocks = re.split(r"^(?=[a-z0-9-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(PINS)
    assert all(re.search(r"\n    --hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)
    assert not re.search(r"://|--index|--extra|--find-links|--trusted|@ |/(home|tmp|opt|root|srv|usr)/", LOCK)
    assert "pip-compile --allow-unsafe --generate-hashes" in LOCK
