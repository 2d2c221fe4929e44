"""Files of torch.save: what is read, and what is refused before it is unpacked."""

import io
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from pecker_fast.archives import check_archive, load_mapping, load_plain


class Touch:
    """An object whose unpickling runs a command."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def compress(path) -> None:
    """Write an archive again with compressed members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read(tmp_path, zipped):
    path = tmp_path / "a.pth"
    tree = {"a": torch.randn(3), "b": torch.arange(4)}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    for content in (load_mapping(path), load_plain(path), load_plain(io.BytesIO(path.read_bytes()))):
        assert content.keys() == tree.keys() and all(torch.equal(content[name], tree[name]) for name in tree)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_refusals_are_in_our_words(tmp_path, recwarn, capfd, protocol, zipped):
    """torch's own message advises to load the file unsafely, in colours, after a warning."""
    path, trap = tmp_path / "a.pth", tmp_path / "trap"
    torch.save([Touch(trap)], path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"code in it is not run|damaged, or has other objects") as error:
        load_plain(path)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and "\x1b" not in text and "weights_only" not in text
    assert not trap.exists() and not recwarn.list and capfd.readouterr() == ("", "")
    if protocol == 2:
        assert "mkdir" in text


def test_compressed_members_are_refused_before_they_are_unpacked(tmp_path):
    """400 MB of zeros in 400 KB."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(400):
                member.write(bytes(1 << 20))
    script = (
        "import resource, sys, pecker_fast.archives as a\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n a.load_plain(sys.argv[1])\n"
        "except ValueError as error:\n print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    message, grown = result.stdout.splitlines()
    assert "archive/data/0 is compressed" in message or "archive/data.pkl is compressed" in message
    assert int(grown) < 100_000


def test_archives_with_false_sizes_and_damaged_members(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    check_archive(path)
    compress(path)
    with pytest.raises(ValueError, match="compressed"):
        load_plain(path)
    # The same bytes of the file as the content of several members.
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for name in ("x", "y", "z"):
            other = zipfile.ZipInfo(name)
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(other, field, getattr(largest, field))
            archive.filelist.append(other)
            archive.NameToInfo[name] = other
        archive._didModify = True
    with pytest.raises(ValueError, match=r"claim more bytes than the file has|damaged"):
        check_archive(path)
    for cut in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"damaged") as error:
            load_plain(path)
        assert len(str(error.value).splitlines()) == 1


def test_other_contents(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError, match="no such file"):
        load_mapping(path)
    for content, message in (
        ([1], "has a list"),
        ({"a": 1}, "'a', which is not a tensor"),
        ({1: torch.ones(1)}, "'1'"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_mapping(path)
