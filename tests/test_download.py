"""Downloads, archives and data sets, against a server with faults on this machine. Nothing uses the network."""

import gzip
import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nbdev_trainer.data.archives import extract
from nbdev_trainer.data.catalog import KnownFile, KnownSet, known_set, known_sets
from nbdev_trainer.data.datasets import fetch
from nbdev_trainer.data.download import check_file, download

CONTENT = bytes(range(251)) * 800  # 200,800 bytes
DATA = os.environ.get("NBDEV_TRAINER_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="NBDEV_TRAINER_DATA names no folder with the data sets")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


KNOWN = {"sha256": sha256(CONTENT), "size": len(CONTENT)}


class Faulty(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults` are done first, one for each request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        fault = server.faults.pop(0) if server.faults else {}
        if "status" in fault:
            return self.send_error(fault["status"])
        if "silent" in fault:
            server.closing.wait(fault["silent"])
            return self.close()
        if self.path not in server.files:
            return self.send_error(404)
        content = server.files[self.path]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.knows_ranges else 0
        if start >= len(content):
            return self.send_error(416)
        shown = start + fault.get("shift", 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        if fault.get("length", True):
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content[start : start + fault.get("cut", len(content))])
        if "stall" in fault:
            server.closing.wait(fault["stall"])
        if fault:
            self.close()

    def close(self):
        self.close_connection = True

    def log_message(self, *values):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for every request, so none is left behind

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Faulty)
        self.files, self.faults, self.asked = {"/data.bin": CONTENT}, [], []
        self.knows_ranges, self.closing = True, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/data.bin"

    def handle_error(self, request, client_address):
        pass  # the client went away, as it should


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    before = set(threading.enumerate())
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join(10)
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


@pytest.fixture
def quick(monkeypatch):
    """No pauses between tries."""
    monkeypatch.setattr("nbdev_trainer.data.download.time.sleep", lambda seconds: None)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


@contextmanager
def within(seconds):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# One file


def test_a_file_arrives_whole_and_nothing_lies_beside_it(server, tmp_path, capfd):
    path = download(server.url, tmp_path / "new" / "data.bin", **KNOWN)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["new", "new/data.bin"]
    assert server.asked == [("/data.bin", None)]
    assert capfd.readouterr() == ("", "")
    assert download("http://127.0.0.1:9/never asked", path, **KNOWN) == path


def test_a_cut_download_goes_on_where_it_was_cut(server, tmp_path, quick):
    server.faults = [{"cut": 81_920}, {"cut": 40_960}]
    assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert server.asked == [("/data.bin", text) for text in (None, "bytes=81920-", "bytes=122880-")]
    assert names(tmp_path) == ["data.bin"]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, tmp_path, quick):
    server.faults = [{"cut": 81_920}, *[{"status": 503}] * 2]
    with pytest.raises(ConnectionError, match="503.*81,920 of 200,800 bytes are in '.*data.bin.part'"):
        download(server.url, tmp_path / "data.bin", **KNOWN, attempts=2)
    assert names(tmp_path) == [
        "data.bin.download",
        "data.bin.download.lock",
        "data.bin.download/data.bin.part",
    ]
    assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert server.asked[-1] == ("/data.bin", "bytes=81920-")
    assert names(tmp_path) == ["data.bin"]


def test_a_process_that_is_killed_leaves_a_part_that_is_used(server, tmp_path):
    server.faults = [{"cut": 100_000, "stall": 30}]
    program = "import sys; from nbdev_trainer.data.download import download; download(*sys.argv[1:3], "
    program += f"sha256={KNOWN['sha256']!r}, size={KNOWN['size']})"
    command = [sys.executable, "-c", program, server.url, str(tmp_path / "data.bin")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        part, deadline = tmp_path / "data.bin.download/data.bin.part", time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 90_000) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        process.wait(20)
    have = part.stat().st_size
    with within(20):
        assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert server.asked == [("/data.bin", None), ("/data.bin", f"bytes={have}-")]
    assert names(tmp_path) == ["data.bin"]


def test_a_server_without_ranges_sends_everything_again(server, tmp_path, quick):
    server.knows_ranges, server.faults = False, [{"cut": 81_920}]
    assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert [text for _, text in server.asked] == [None, "bytes=81920-"]


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server, tmp_path, quick):
    server.knows_ranges, server.faults = False, [{"cut": 81_920}] * 9
    with pytest.raises(ConnectionError, match="could not be downloaded: 81,920 of 200,800"):
        download(server.url, tmp_path / "data.bin", **KNOWN, attempts=3)
    assert len(server.asked) == 4


@pytest.mark.parametrize("shift", [-1, 1])
def test_an_answer_that_begins_elsewhere_is_not_appended(server, tmp_path, quick, shift):
    server.faults = [{"cut": 81_920}, {"shift": shift}]
    assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert [text for _, text in server.asked] == [None, "bytes=81920-", None]


def test_an_end_without_a_length_is_seen_as_a_cut(server, tmp_path, quick):
    server.faults = [{"cut": 81_920, "length": False}]
    assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "spoilt", [b"x" * 1000, CONTENT + b"x", b"x" * len(CONTENT)], ids=["short", "long", "full"]
)
def test_a_spoilt_part_is_found_out(server, tmp_path, quick, spoilt):
    (tmp_path / "data.bin.download").mkdir()
    (tmp_path / "data.bin.download/data.bin.part").write_bytes(spoilt)
    assert download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes() == CONTENT
    assert server.asked[-1] == ("/data.bin", None)


def test_a_wrong_hash_names_file_expected_and_found(server, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError) as caught:
        download(server.url, tmp_path / "data.bin", sha256="0" * 64, size=len(CONTENT))
    for text in ("data.bin", "0" * 64, KNOWN["sha256"], server.url):
        assert text in "\n".join([str(caught.value), *caught.value.__notes__])
    assert names(tmp_path) == ["data.bin.download.lock", "mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert len(server.asked) == 1


def test_a_file_that_is_too_long_is_not_read_to_its_end(server, tmp_path, quick):
    with pytest.raises(ValueError, match="has 1,001 bytes; expected 1,000"):
        download(server.url, tmp_path / "data.bin", sha256="0" * 64, size=1000)
    with pytest.raises(ConnectionError, match="cannot go on after 200,800 of 200,801 bytes"):
        download(server.url, tmp_path / "data.bin", sha256=KNOWN["sha256"], size=200_801, attempts=1)


def test_a_wrong_file_of_somebody_else_stays(server, tmp_path):
    (tmp_path / "data.bin").write_text("somebody's work")
    with pytest.raises(ValueError, match="not the file that was meant"):
        download(server.url, tmp_path / "data.bin", **KNOWN)
    assert (tmp_path / "data.bin").read_text() == "somebody's work"
    assert server.asked == []


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (410, 1), (429, 3), (500, 3), (503, 3)])
def test_only_failures_that_may_pass_are_tried_again(server, tmp_path, quick, status, tries):
    server.faults = [{"status": status}] * 5
    with pytest.raises(ConnectionError, match=str(status)):
        download(server.url, tmp_path / "data.bin", **KNOWN, attempts=3)
    assert len(server.asked) == tries


def test_a_silent_server_is_given_up_in_time(server, tmp_path, quick):
    server.faults = [{"silent": 30}] * 9
    with within(5), pytest.raises(ConnectionError, match="timed out"):
        download(server.url, tmp_path / "data.bin", **KNOWN, timeout=0.2, attempts=2)
    server.faults = [{"cut": 81_920, "stall": 30}]
    with within(5):
        assert download(server.url, tmp_path / "data.bin", **KNOWN, timeout=0.2).read_bytes() == CONTENT


def test_the_whole_has_a_limit_too(server, tmp_path):
    server.faults = [{"status": 503}] * 99
    with within(5), pytest.raises(ConnectionError, match="503"):
        download(server.url, tmp_path / "data.bin", **KNOWN, attempts=99, within=0.6)


def test_a_host_that_is_not_there_is_an_error_that_names_the_address(tmp_path, quick, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/data.bin"
        with within(10), pytest.raises(ConnectionError, match=url):
            download(url, tmp_path / "data.bin", **KNOWN)


def test_two_at_once_ask_once(server, tmp_path):
    server.faults = [{"cut": len(CONTENT), "stall": 0.3}]
    found, errors = [], []

    def work():
        try:
            found.append(download(server.url, tmp_path / "data.bin", **KNOWN).read_bytes())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == [] and found == [CONTENT] * 4
    assert len(server.asked) == 1
    assert names(tmp_path) == ["data.bin"]


def test_a_slow_download_shows_a_bar(server, tmp_path, capfd):
    server.faults = [{"cut": 100_000, "stall": 1.3}]
    before = set(threading.enumerate())  # a bar of another package may have started a thread
    download(server.url, tmp_path / "data.bin", **KNOWN)
    download(server.url, tmp_path / "other.bin", **KNOWN, progress=False)
    assert capfd.readouterr().out == ""
    assert not [thread for thread in set(threading.enumerate()) - before if "TMonitor" in type(thread).__name__]


# Archives


def zip_of(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def tar_of(path, entries, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


BAD_NAMES = [
    "../evil",
    "a/../../evil",
    "/evil",
    "//evil",
    "a\\..\\..\\evil",
    "C:evil",
    "C:/evil",
    "..",
    "\\evil",
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_a_name_that_leads_out_is_refused_before_anything_is_written(tmp_path, make, name):
    archive = make(tmp_path / f"bad.{make.__name__[:3]}", [("good.txt", b"x"), (name, b"evil")])
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(
        ValueError, match="is refused: its entry .* leads out of the folder. Nothing was unpacked"
    ):
        extract(archive, inside / "folder")
    assert names(tmp_path) == [archive.name, "inside"]


@pytest.mark.parametrize(
    "entry",
    [
        special("x", tarfile.SYMTYPE, "/"),
        special("x", tarfile.LNKTYPE, "/etc/passwd"),
        special("x", tarfile.CHRTYPE),
        special("x", tarfile.BLKTYPE),
        special("x", tarfile.FIFOTYPE),
    ],
    ids=lambda entry: entry.type.decode(),
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, entry):
    archive = tar_of(tmp_path / "bad.tar", [("good.txt", b"x"), (entry, b""), ("x/evil", b"evil")])
    with pytest.raises(ValueError, match="its entry 'x' is a link or a device"):
        extract(archive, tmp_path / "folder")
    assert names(tmp_path) == ["bad.tar"]


def test_links_in_a_zip_are_refused(tmp_path):
    archive = zip_of(tmp_path / "bad.zip", [("good.txt", b"x"), (zip_link("x"), b"/")])
    with pytest.raises(ValueError, match="its entry 'x' is a link or a device"):
        extract(archive, tmp_path / "folder")
    assert names(tmp_path) == ["bad.zip"]


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize("limits", [{"max_bytes": 3_000_000}, {"max_files": 3}])
def test_bombs_are_refused_before_anything_is_written(tmp_path, make, limits):
    archive = make(tmp_path / f"bomb.{make.__name__[:3]}", [(f"{i}", b"\0" * 1_000_000) for i in range(4)])
    with pytest.raises(ValueError, match="is refused.*Nothing was unpacked"):
        extract(archive, tmp_path / "folder", **limits)
    assert names(tmp_path) == [archive.name]
    assert len(names(extract(archive, tmp_path / "folder"))) == 4


def test_a_tar_that_claims_to_be_huge_is_refused_at_once(tmp_path):
    """The claimed content is never read: the sum of the sizes is known from the headers."""
    path = tmp_path / "huge.tar.gz"
    info = tarfile.TarInfo("zeros")
    info.size = 2**50
    path.write_bytes(gzip.compress(info.tobuf() + b"\0" * 10_000))
    with within(2), pytest.raises(ValueError, match="makes 1,125,899,906,842,624 bytes"):
        extract(path, tmp_path / "folder")


def test_a_zip_that_lies_about_a_size_writes_no_more_than_it_says(tmp_path):
    archive = zip_of(tmp_path / "lie.zip", [("zeros", b"\0" * 100_000)])
    content = archive.read_bytes()
    true, false = (100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    archive.write_bytes(content.replace(true, false))
    with pytest.raises(ValueError, match="cannot be unpacked|is refused"):
        extract(archive, tmp_path / "folder")
    assert names(tmp_path) == ["lie.zip"]


def test_a_packed_file_that_is_too_long_is_stopped(tmp_path):
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(b"\0" * 5_000_000))
    with pytest.raises(ValueError, match="expected 1,000,000"):
        extract(tmp_path / "zeros.gz", tmp_path / "folder", max_bytes=1_000_000)
    assert names(tmp_path) == ["zeros.gz"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "a.gz"])
def test_damaged_archives_leave_nothing_behind(tmp_path, name):
    entries = [(f"{i}.bin", os.urandom(5000)) for i in range(5)]
    archive = tmp_path / name
    if name == "a.zip":
        zip_of(archive, entries)
    elif name == "a.gz":
        archive.write_bytes(gzip.compress(entries[0][1]))
    else:
        tar_of(archive, entries, {"tar": "w", "gz": "w:gz", "xz": "w:xz"}[name.split(".")[-1]])
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"<html>Not found</html>", b""):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}' cannot be unpacked"):
            extract(archive, tmp_path / "folder")
        assert names(tmp_path) == [name]
    if name not in ("a.tar", "a.tar.gz"):  # these have no sum of their content, or one at the very end
        spoilt = bytearray(whole)
        spoilt[len(whole) // 2] ^= 255
        archive.write_bytes(spoilt)
        with pytest.raises(ValueError, match="cannot be unpacked"):
            extract(archive, tmp_path / "folder")
    assert names(tmp_path) == [name]


def test_an_interrupt_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "a.zip", [("one", b"1"), ("two", b"2")])
    copied = []

    def interrupted(*values):
        copied.append(values)
        if len(copied) == 2:
            raise KeyboardInterrupt
        return 1

    monkeypatch.setattr("nbdev_trainer.data.archives._copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(archive, tmp_path / "folder")
    assert names(tmp_path) == ["a.zip"]


def test_of_two_that_extract_at_once_one_folder_is_kept(tmp_path):
    archive = zip_of(tmp_path / "a.zip", [(f"{i}", b"x" * 1000) for i in range(200)])
    results, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait(10)
        try:
            results.append(extract(archive, tmp_path / "folder"))
        except FileExistsError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 4 and any(isinstance(one, Path) for one in results)
    assert len(names(tmp_path / "folder")) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "folder"]


def test_rights_in_an_archive_are_ignored(tmp_path):
    info = tarfile.TarInfo("program")
    info.mode, info.uid = 0o4777, 0
    path = extract(tar_of(tmp_path / "a.tar", [(info, b"x")]), tmp_path / "folder") / "program"
    assert not path.stat().st_mode & (stat.S_ISUID | stat.S_IXUSR | stat.S_IWOTH)


# Data sets


@pytest.fixture
def insects(server, monkeypatch, tmp_path):
    """A set on the server: an archive, a packed file and a plain one; the cache is in tmp_path."""
    monkeypatch.setenv("NBDEV_TRAINER_DATA", "")
    monkeypatch.setenv("NBDEV_TRAINER_CACHE", str(tmp_path / "cache"))
    photos = zip_of(tmp_path / "photos.zip", [(f"photos/{i}.txt", f"{i}") for i in range(50)])
    contents = {
        "photos.zip": photos.read_bytes(),
        "words.txt.gz": gzip.compress(b"ant bee", mtime=0),
        "table.csv": b"a,b\n1,2\n" * 5000,
    }
    photos.unlink()
    server.files = {f"/{name}": content for name, content in contents.items()}
    host = server.url.removesuffix("/data.bin")
    files = [KnownFile(name, len(one), sha256(one), f"{host}/{name}") for name, one in contents.items()]
    layout = {"photos": "photos", "words.txt": "words", "table.csv": "a table"}
    facts = {"task": "t", "about": "Insects.", "licence": "CC0", "homepage": "http://x", "citation": "c"}
    return KnownSet("insects", layout=layout, files=tuple(files), **facts)


def put(insects, server, folder, unpacked=False):
    """The files of the set in a folder, as NBDEV_TRAINER_DATA would have them."""
    (folder / "insects").mkdir(parents=True)
    for file in insects.files:
        content = server.files[f"/{file.name}"]
        if file.name == "table.csv" and not unpacked:
            (folder / "insects" / "table.csv.gz").write_bytes(gzip.compress(content))
        else:
            (folder / "insects" / file.name).write_bytes(content)
    return folder / "insects"


def test_a_set_is_fetched_once_and_says_its_licence_once(insects, server, tmp_path, capsys):
    folder = fetch(insects)
    assert set(insects.layout) <= set(names(folder))
    assert (folder / "words.txt").read_bytes() == b"ant bee"
    assert len(names(folder / "photos")) == 50
    assert len(server.asked) == 3
    assert capsys.readouterr().out == "insects: Insects. Licence: CC0.\n"
    assert fetch(insects) == folder
    assert len(server.asked) == 3
    assert capsys.readouterr().out == ""
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_set_that_was_cut_off_is_completed_by_the_next_call(insects, server, tmp_path, quick):
    server.faults = [{}, {}, {"cut": 16_384}, *[{"status": 503}] * 9]
    with pytest.raises(ConnectionError, match="table.csv"):
        fetch(insects)
    assert not list((tmp_path / "cache").glob("insects-????????"))
    server.faults, server.asked = [], []
    folder = fetch(insects)
    assert server.asked == [("/table.csv", "bytes=16384-")]
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_what_a_killed_process_left_is_cleared_away(insects, tmp_path):
    left = tmp_path / "cache" / f".insects-{insects.digest}.1234.tmp"
    left.mkdir(parents=True)
    (left / "half.txt").write_text("half")
    folder = fetch(insects)
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_two_that_fetch_at_once_get_the_same(insects, server, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(insects))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 3 and len(set(found)) == 1
    assert len(server.asked) == 3
    assert list((tmp_path / "cache").iterdir()) == found[:1]


def test_a_set_that_is_there_is_unpacked_into_the_cache(insects, server, tmp_path, monkeypatch):
    given = put(insects, server, tmp_path / "data")
    before = names(given)
    for path in [*given.iterdir(), given, given.parent]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("NBDEV_TRAINER_DATA", str(tmp_path / "data"))
    folder = fetch(insects)
    assert folder.parent == tmp_path / "cache"
    assert (folder / "table.csv").read_bytes() == server.files["/table.csv"]
    assert len(names(folder / "photos")) == 50
    assert server.asked == []
    assert names(given) == before
    (folder / "table.csv").write_text("the copy can be written to")
    for path in [given.parent, given]:
        path.chmod(0o755)


def test_a_set_that_is_there_unpacked_is_used_in_place(insects, server, tmp_path, monkeypatch):
    shutil.copytree(fetch(insects), tmp_path / "data" / "insects")
    monkeypatch.setenv("NBDEV_TRAINER_DATA", str(tmp_path / "data"))
    assert fetch(insects, tmp_path / "elsewhere") == tmp_path / "data" / "insects"
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "data" / "insects" / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="table.csv' is not the file that was meant: it has 4 bytes"):
        fetch(insects)


@pytest.mark.parametrize("name", ["photos.zip", "table.csv.gz"])
def test_a_wrong_file_there_is_an_error_and_leaves_nothing(insects, server, tmp_path, monkeypatch, name):
    given = put(insects, server, tmp_path / "data")
    content = (given / name).read_bytes()
    (given / name).write_bytes(content[:-30] + bytes(30) if name.endswith("zip") else gzip.compress(b"a,b\n"))
    monkeypatch.setenv("NBDEV_TRAINER_DATA", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="is not the file that was meant"):
        fetch(insects)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_what_is_missing_there_is_downloaded(insects, server, tmp_path, monkeypatch):
    (put(insects, server, tmp_path / "data") / "photos.zip").unlink()
    monkeypatch.setenv("NBDEV_TRAINER_DATA", str(tmp_path / "data"))
    assert set(insects.layout) <= set(names(fetch(insects)))
    assert [path for path, _ in server.asked] == ["/photos.zip"]


def test_a_set_without_address_says_where_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NBDEV_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NBDEV_TRAINER_DATA", "")
    without = [one for one in known_sets().values() if one.repacked]
    assert len(without) == 6
    for known in without:
        with pytest.raises(FileNotFoundError) as caught:
            fetch(known.name)
        for text in (known.name, known.homepage, "NBDEV_TRAINER_DATA", *known.layout):
            assert text in str(caught.value)
    monkeypatch.setenv("NBDEV_TRAINER_DATA", str(tmp_path))
    (tmp_path / "bccd_voc").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks bccd_voc.zip"):
        fetch("bccd_voc")
    for path in known_set("bccd_voc").layout:
        (tmp_path / "bccd_voc" / path).mkdir(parents=True)
    assert fetch("bccd_voc") == tmp_path / "bccd_voc"
    assert not (tmp_path / "cache").exists()


def test_an_archive_without_what_its_layout_says_is_an_error(insects, tmp_path):
    wrong = KnownSet(**{**vars(insects), "layout": {**insects.layout, "sounds": "none"}})
    with pytest.raises(FileNotFoundError, match="do not hold sounds"):
        fetch(wrong)
    assert not list((tmp_path / "cache").glob("insects-????????"))


def test_nothing_optional_is_imported_before_it_is_needed():
    program = "import sys, nbdev_trainer.data.datasets; print({'pooch', 'requests'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60).strip() == "set()"


# The real files


@needs_data
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "cifar10_jpg")) for name in known_sets()]
)
def test_the_catalog_is_true_of_the_real_files(name, tmp_path, monkeypatch):
    """Sizes and hashes are those of the real files, and the finished folder has what the layout says."""
    known, given = known_set(name), Path(DATA) / name
    if not given.is_dir():
        pytest.skip(f"NBDEV_TRAINER_DATA has no {name}")
    monkeypatch.setenv("NBDEV_TRAINER_DATA", DATA)
    for file in known.files:
        packed = given / f"{file.name}.gz"
        content = (
            gzip.decompress(packed.read_bytes()) if packed.is_file() else (given / file.name).read_bytes()
        )
        assert (len(content), sha256(content)) == (file.size, file.sha256), file.name
    before = names(given)
    folder = fetch(name, tmp_path)
    assert [path for path in known.layout if not (folder / path).exists()] == []
    assert names(given) == before
    if folder != given:
        singles = {file.unpacked for file in known.files} - {None}
        assert singles <= set(names(folder))
        assert known.repacked or singles == set(names(folder))
        assert fetch(name, tmp_path) == folder
        for file in known.files:
            if not file.is_archive:
                check_file(folder / file.name, sha256=file.sha256, size=file.size)
    shutil.rmtree(tmp_path)  # pytest would keep it
