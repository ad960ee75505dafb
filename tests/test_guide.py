"""algorithms/README.md: its links lead to the lines they name, and what it says exists.

`python tests/test_guide.py` puts the numbers of the lines right.
"""

import importlib
import re
from pathlib import Path

import pytest

ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"
GUIDE = ALGORITHMS / "README.md"
LINK = re.compile(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)")
TEXT = GUIDE.read_text()


def line_number(code: str, file: str) -> int:
    """Of the one line that begins with this code."""
    lines = (ALGORITHMS / file).read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, start=1) if line.strip().startswith(code))
    return number


def relinked(text: str) -> str:
    return LINK.sub(lambda link: f"[`{link[1]}`]({link[2]}#L{line_number(link[1], link[2])})", text)


@pytest.mark.parametrize("file", sorted(path.name for path in ALGORITHMS.glob("*.py")))
def test_every_script_has_its_section_and_links_to_its_lines(file):
    links = [link for link in LINK.findall(TEXT) if link[1] == file]
    assert links and re.search(rf"^### .*\b{file[:-3]}\b", TEXT, flags=re.MULTILINE)
    for code, _, number in links:
        assert line_number(code, file) == int(number), "python tests/test_guide.py puts the numbers right"


def test_every_line_that_is_shown_stands_in_its_script():
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        lines = block.splitlines()
        files = [match and match[0] for match in (re.search(r"\w+\.py", line) for line in lines)]
        for line, file in zip(lines, files, strict=True):  # a line without a name is of the file named before
            assert line_number(line.split("  # ")[0], file or files[0])


def test_every_test_and_argument_that_is_named_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", TEXT))
    for section in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]:
        names = re.split(r"[:,]", section.splitlines()[0])[:3]
        modules = [
            importlib.import_module(name.strip()) for name in names if (ALGORITHMS / f"{name.strip()}.py").exists()
        ]
        known = {field for module in modules for field in module.Args.__dataclass_fields__}
        body = section.split("\n## ")[0]
        named = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)", body)}
        known |= {f"no_{field}" for field in known}  # of a switch
        assert named <= known | {"top_fraction"}, (names, named - known)


if __name__ == "__main__":
    GUIDE.write_text(relinked(TEXT))
