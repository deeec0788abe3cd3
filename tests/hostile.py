"""Files that no honest program writes, and how they are refused."""

import io
import pickle
import time
import zipfile

import pytest
import torch

from cauchy_kernel.benchmark import peak_bytes
from rawaudio.checkpoint import load_checkpoint
from rawaudio.errors import CheckpointError

SECRET = "${oc.env:SECRET}"  # in the environment
ENDLESS = b"q\x00h\x00\x86" * 100  # a pair of twice the same pair of twice the same pair ...


def assert_refused(path, *words, load=load_checkpoint):
    """At once, in little memory, by one short printable line that names the file, says these words
    and tells nothing of the environment."""
    start, before = time.process_time(), peak_bytes("cpu", reset=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as raised:
        patch.setenv("SECRET", "4096123")  # would do as a number
        load(path)
    seconds, grown = time.process_time() - start, peak_bytes("cpu") - before
    message = str(raised.value)
    assert path.name in message and message.isprintable() and len(message) < 800, message
    assert "4096123" not in message and seconds < 1 and grown < 2e8, (message, seconds, grown)
    assert all(word in message for word in words), message


class Trap:
    """Makes this call when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_pickle(path, program, zipped=True):
    """A file of torch.save in either container, but for the pickle; a storage of four floats."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in (("data.pkl", program), ("version", b"3\n"), ("data/0", bytes(16))):
                archive.writestr(f"archive/{name}", part)
    else:
        legacy = io.BytesIO()
        torch.save({}, legacy, _use_new_zipfile_serialization=False)
        path.write_bytes(legacy.getvalue().replace(pickle.dumps({}, protocol=2), program))
    return path


PROGRAMS = {  # of no object, or that never end
    "key": b"\x80\x02}K\x01" + ENDLESS + b"K\x01s.",
    "keys": b"\x80\x02}(K\x01" + ENDLESS + b"K\x01u.",
    "id": b"\x80\x02K\x01" + ENDLESS + b"Q.",
    "list in itself": b"\x80\x02]r\x00\x00\x00\x00h\x00a.",
    "marks": b"\x80\x02" + b"(" * 10_000 + b".",
    "nothing": b"\x80\x02.",
    "pop": b"\x80\x020.",
    "no such memo": b"\x80\x02h\x05.",
    "empty": b"",
    "call of lists": b"\x80\x02]" + b"q\x00](h\x00h\x00e" * 60 + b")R.",
    "memory": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
}
