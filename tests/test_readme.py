"""What README says of settings is what they are."""

from __future__ import annotations

import re
import typing
from pathlib import Path

from pydantic.fields import FieldInfo

from server.config import ServerConfig

README = Path(__file__).parent.parent / "README.md"


def row(name: str, field: FieldInfo) -> str:
    flag = "--" + name.replace("_", "-")
    flags = f"`{flag}`"
    if bool in (field.annotation, *typing.get_args(field.annotation)):
        flags += f", `--no-{flag[2:]}`"
    default = "" if field.default is None or field.default == [] else str(field.default)
    return f"| {flags} | {default} | {field.description} |"


def test_every_setting_has_its_row() -> None:
    """To write them anew, print `expected`."""
    section = README.read_text(encoding="utf-8").partition("\n## Settings\n")[2].partition("\n## ")[0]
    expected = [row(name, field) for name, field in ServerConfig.model_fields.items() if name != "model"]
    assert re.findall(r"^\| `--.*$", section, re.MULTILINE) == expected
