"""pytest within pytest, with the repository's conftest and without the plugins that would shuffle or remember."""

import shutil

import pytest
from built_packages import ROOT


def prepare(pytester: pytest.Pytester) -> None:
    """The repository's conftest where the inner tests are."""
    shutil.copy(ROOT / "conftest.py", pytester.path)
    (pytester.mkdir("beside") / "conftest.py").touch()  # where folders differ in plugins, pytest compares those


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    """pytest with these words."""
    plain = [word for name in ("randomly", "hypothesispytest", "cacheprovider") for word in ("-p", f"no:{name}")]
    return pytester.runpytest_inprocess(*plain, *words)
