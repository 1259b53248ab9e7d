"""tools/check-docs finds what nobody has described, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check-docs"

HEADER = """/* A file's comment is none of a function's. */
#ifndef A_H
#define A_H

/* Said. */
int pml_said(int a,
             int b);
int pml_said_with_it(void);

int pml_behind(void); /* said */

typedef struct pml_thing pml_thing;

void pml_thing_destroy(pml_thing **thing);
%s
#endif
"""

MODULE = '''
def plain():
    """Do."""
    try:
        raise ValueError("it is caught")
    except ValueError as error:
        raise error

def told():
    """Do.

    Raises
    ------
    KeyError
        Always.
    """
    raise KeyError("x")

def _own():
    raise OSError("nobody else calls it")
%s
'''


@pytest.mark.parametrize(
    ("header", "module", "said"),
    [
        ("", "", []),
        ("\nint pml_bare(int a,\n             int b);\n", "", ["pml_bare has no comment"]),
        ("", 'def bad():\n    """Do."""\n    raise OSError("x")\n', ["bad raises OSError"]),
        ("", 'def bad():\n    """No OSError."""\n    raise Error("x")\n', ["bad raises Error"]),
        (
            "",
            'class A:\n    def bad(self):\n        """Do."""\n        try:\n            pass\n'
            '        except KeyError:\n            raise OSError("x") from None\n',
            ["bad raises OSError"],
        ),
    ],
)
def test_what_is_found(tmp_path: Path, header: str, module: str, said: list[str]) -> None:
    for folder in ("engine", "ext/pantheraml"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "engine/a.h").write_text(HEADER % header)
    (tmp_path / "ext/pantheraml/a.py").write_text(MODULE % module)
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True)
    assert done.returncode == (1 if said else 0)
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), done.stdout + done.stderr
    assert all(word in line for word, line in zip(said, lines, strict=True))
