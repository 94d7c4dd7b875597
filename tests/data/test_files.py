"""Files are whole or not there, and what a person sees while work goes on."""
import threading

import pytest

from qlora_kit.data import files
from qlora_kit.data.files import put_in_place, write_atomic


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    def full(*args): raise OSError(28, "No space left on device")
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(broken, full)
    with pytest.raises(OSError): write_atomic(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_put_in_place_of_another(tmp_path, monkeypatch, swaps):
    if not swaps: monkeypatch.setattr(files, "exchange", lambda a, b: False)
    for n in "123":
        (tmp_path / "new/deeper").mkdir(parents=True)
        (tmp_path / "new/deeper/file").write_text(n)
        assert put_in_place(tmp_path / "new", tmp_path / "folder") == tmp_path / "folder"
        assert [p.name for p in tmp_path.iterdir()] == ["folder"] and (tmp_path / "folder/deeper/file").read_text() == n


def test_there_is_no_moment_without_the_folder(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    if not files.exchange(tmp_path / "a", tmp_path / "b"): pytest.skip("this disk cannot swap names")
    folder, missed, over = tmp_path / "folder", [], threading.Event()
    def look():
        while not over.is_set(): missed.append(not folder.exists())
    folder.mkdir()
    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(200):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/file").write_text("new")
        put_in_place(tmp_path / "new", folder)
    over.set(), reader.join()
    assert len(missed) > 100 and not any(missed)
