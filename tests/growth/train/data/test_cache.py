"""The cache: whole directories or none."""

import pytest

from apical.growth.train.data.cache import cache_dir, cached


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("APICAL_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "apical"


def test_built_once(tmp_path):
    def build(directory):
        assert not (tmp_path / "deep" / "entry").exists()
        (directory / "file").write_text("1")

    path = cached(tmp_path / "deep" / "entry", build)
    assert (path / "file").read_text() == "1"
    assert cached(path, lambda _: pytest.fail("built again")) == path
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_nothing_and_is_heard_of(tmp_path):
    def build(directory):
        (directory / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cached(tmp_path / "entry", build)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path):
    path = tmp_path / "entry"

    def fast(directory):
        (directory / "file").write_text("first")

    def slow(directory):
        (directory / "file").write_text("second")
        cached(path, fast)

    cached(path, slow)
    assert (path / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_entry_is_built_again(tmp_path):
    path = tmp_path / "entry"
    path.mkdir()
    cached(path, lambda each: (each / "file").touch(), is_intact=lambda _: False)
    assert (path / "file").is_file()
