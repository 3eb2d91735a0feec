# SPDX-License-Identifier: GPL-2.0-or-later
"""Patches of a source tree: applied, replaced, reverted; and a build with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from paprscm.build.patches import set_patches
from paprscm.errors import ConfigError, HostError

SOURCE = {"a.c": "int a;\nint b;\nint c;\n", "b.c": "int x;\n"}


def patch(file: str, old: str, new: str) -> str:
    return f"--- a/{file}\n+++ b/{file}\n@@ -1,1 +1,1 @@\n-{old}\n+{new}\n"


class Folder:
    """A workspace; counts how often the source is unpacked."""

    def __init__(self, place: Path) -> None:
        self.place = place / "workspace"
        self.place.mkdir()
        self.unpacked = 0
        self._patches = place

    def unpack(self, tree: Path) -> None:
        self.unpacked += 1
        tree.mkdir()
        for name, text in SOURCE.items():
            (tree / name).write_text(text)
            os.utime(tree / name, (0, 0))

    def set(self, *texts: str) -> dict[str, str]:
        """Apply patches; return the files that differ from the source."""
        files = []
        for number, text in enumerate(texts):
            files.append(self._patches / f"{number}.patch")
            files[-1].write_text(text)
        set_patches(self.place, self.unpack, files)
        return self.changed()

    def changed(self) -> dict[str, str]:
        tree = self.place / "tree"
        assert sorted(path.name for path in tree.iterdir()) == sorted(SOURCE)
        texts = {name: (tree / name).read_text() for name in SOURCE}
        return {name: text for name, text in texts.items() if text != SOURCE[name]}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_patches_replace_those_of_the_build_before(folder: Folder) -> None:
    second = patch("a.c", "long a;", "char a;")
    assert folder.set(patch("a.c", "int a;", "long a;"), second)["a.c"].startswith("char a;")
    assert folder.set(patch("b.c", "int x;", "int y;")) == {"b.c": "int y;\n"}
    assert folder.set() == {}
    assert folder.unpacked == 1


def test_only_a_file_that_changes_gets_a_new_time(folder: Folder) -> None:
    folder.set(patch("b.c", "int x;", "int y;"))
    assert (folder.place / "tree/a.c").stat().st_mtime == 0
    (folder.place / "objects").mkdir()
    os.utime(folder.place / "tree/b.c", (0, 0))
    folder.set()
    # make must see that b.c was restored.
    assert (folder.place / "tree/b.c").stat().st_mtime > 0
    assert (folder.place / "objects").exists()


def test_a_patch_that_does_not_apply_leaves_the_source(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"1\.patch does not apply") as caught:
        folder.set(patch("b.c", "int x;", "int y;"), patch("a.c", "int z;", "int y;"))
    assert "-p1" in str(caught.value.hint)
    assert folder.changed() == {}
    assert folder.set(patch("b.c", "int x;", "int y;")) == {"b.c": "int y;\n"}
    assert folder.unpacked == 1


def test_a_missing_patch_is_an_error(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        set_patches(folder.place, folder.unpack, [tmp_path / "none.patch"])
    assert folder.changed() == {}


def test_after_an_interruption_the_source_is_unpacked_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.set(patch("b.c", "int x;", "int y;"))
    (folder.place / "objects").mkdir()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("paprscm.build.patches.run", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.set()
    # Half reverted: the next patch would not apply.
    (folder.place / "tree/b.c").write_text("int half;\n")
    assert folder.set() == {}
    assert folder.unpacked == 2
    # Objects of the old files are older than the old files, but not than the new ones.
    assert not (folder.place / "objects").exists()


def test_patch_must_be_installed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(HostError, match="patch is not installed") as caught:
        folder.set(patch("b.c", "int x;", "int y;"))
    assert caught.value.hint == "apt install patch"
