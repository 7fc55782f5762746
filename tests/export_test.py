"""Tests of the files: what is written, that it is all or nothing, and what is refused.

python -m unittest tests.export_test
"""

import csv
import errno
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import unittest
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

import vae_lib
from tests.vae_test import failing
from vae_lib import VAE, WEIGHTS, Losses, load, load_images

ROOT = Path(__file__).resolve().parent.parent
FILES = (*WEIGHTS, "samples.png", "result.csv")
LOSSES = [Losses(30.25 + 1 / 3, 30.0, 0.25 + 1 / 3), Losses(20.1, 18.0, 2.1), Losses(9.5, 5.0, 4.5)]
PARTS = [name.removesuffix(".pth") for name in WEIGHTS]

threads = torch.get_num_threads()


def setUpModule():
    """One thread, as in the fresh processes; figures without a window."""
    torch.set_num_threads(1)
    plt.switch_backend("Agg")


def tearDownModule():
    torch.set_num_threads(threads)


# ---- helpers -------------------------------------------------------------------------------


class FolderTest(unittest.TestCase):
    """Each test has an empty folder, with a space and letters beyond ASCII in its name."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="vae test é漢 ")
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)


def small(seed=0):
    return VAE(2, hidden=16, seed=seed)


def export(folder, seed=0, **options):
    """The submission of an untrained model."""
    vae = small(seed)
    vae_lib.export(vae, vae.sample(100, seed=1), 12.5 + seed, LOSSES, folder=folder, **options)
    return vae


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def tensors(vae):
    return {**vae.state_dict(), **dict(vae.named_buffers())}


def same(one, two):
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def fresh_python(code, *arguments, **options):
    """What a new Python, started in the project with one thread, prints for `code`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        **options,
    )


# ---- what is written -----------------------------------------------------------------------


class SaveTest(FolderTest):
    def test_fresh_process_draws_the_same_samples(self):
        """And exports the same bytes again."""
        (self.folder / "again").mkdir()
        vae = export(self.folder)
        code = """
import sys, torch, vae_lib
folder = sys.argv[1]
vae = vae_lib.load(folder)
torch.save([vae.sample(100, method, 7) for method in ("iid", "sobol", "lattice")], folder + "/out")
losses = [vae_lib.Losses(*map(float, row.split())) for row in sys.argv[2:]]
vae_lib.export(vae, vae.sample(100, seed=1), 12.5, losses, folder=folder + "/again")
"""
        losses = (" ".join(map(repr, epoch)) for epoch in LOSSES)
        done = fresh_python(code, self.folder, *losses)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        drawn = torch.load(self.folder / "out")
        for method, images in zip(("iid", "sobol", "lattice"), drawn, strict=True):
            self.assertTrue(torch.equal(images, vae.sample(100, method, 7)), method)
        again = contents(self.folder / "again")
        self.assertEqual(again, {name: (self.folder / name).read_bytes() for name in FILES})

    def test_load_returns_what_was_saved(self):
        for latent_dim, hidden in ((2, 16), (1, 3), (5, 40)):
            with self.subTest(D=latent_dim, hidden=hidden):
                vae = VAE(latent_dim, hidden, seed=3)
                vae.latent.prior_mu += 0.5
                vae_lib.save(vae, self.folder)
                loaded = load(self.folder)
                self.assertTrue(same(vae, loaded))
                self.assertFalse(loaded.training)
                self.assertEqual({p.device.type for p in loaded.parameters()}, {"cpu"})
                epochs = list(vae_lib.train(loaded, torch.rand(3, 1, 32, 32), 2))
                self.assertTrue(math.isfinite(epochs[-1].loss))
                self.assertFalse(same(vae, loaded))

    def test_plain_state_dictionaries(self):
        vae = VAE()
        vae_lib.save(vae, self.folder)
        self.assertEqual(sorted(contents(self.folder)), sorted(WEIGHTS))
        for name, part in zip(WEIGHTS, PARTS, strict=True):
            state = torch.load(self.folder / name, weights_only=True)
            module = getattr(vae, part)
            self.assertEqual(list(state), list(module.state_dict()))
            self.assertTrue(all(type(value) is torch.Tensor for value in state.values()))
            self.assertFalse(any(value.requires_grad for value in state.values()))
            module.load_state_dict(state)
            if part == "latent":
                self.assertEqual(list(state), ["prior_mu", "prior_logvar"])
            else:
                for key in state:
                    self.assertRegex(key, r"^net\.\d+\.(weight|bias)$")
        size = sum(len(content) for content in contents(self.folder).values())
        self.assertLess(size, 5e6)

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        export(self.folder)
        load(self.folder)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))


class ResultTest(FolderTest):
    def test_rows(self):
        path = self.folder / "result.csv"
        vae_lib.write_result(path, 1 / 3, LOSSES)
        head = [["FID", repr(1 / 3)], ["FID_digits", repr(1 / 3)], ["score", repr(100 - 1 / 3)]]
        self.assertEqual(rows(path), head + [["loss", repr(epoch.loss)] for epoch in LOSSES])
        vae_lib.write_result(path, np.float64(2.5), [], features="inception", checksum=2**32 - 1)
        expected = b"FID,2.5\nFID_inception,2.5\nscore,97.5\nchecksum,4294967295\n"
        self.assertEqual(path.read_bytes(), expected)
        self.assertEqual(list(contents(self.folder)), ["result.csv"])

    def test_readers(self):
        export(self.folder)
        path = self.folder / "result.csv"
        keys, numbers = zip(*((key, float(number)) for key, number in rows(path)), strict=True)
        self.assertEqual(keys, ("FID", "FID_digits", "score", "checksum", *["loss"] * 3))
        self.assertEqual(numbers[:3], (12.5, 12.5, 87.5))
        self.assertEqual(numbers[4:], tuple(epoch.loss for epoch in LOSSES))
        self.assertEqual(int(rows(path)[3][1]), vae_lib.checksum(self.folder))

    @unittest.skipUnless(importlib.util.find_spec("pandas"), "needs pandas")
    def test_pandas(self):
        import pandas

        export(self.folder)
        table = pandas.read_csv(self.folder / "result.csv", header=None, names=["key", "number"])
        self.assertEqual(table["number"].dtype, float)
        self.assertEqual(len(table), 7)
        values = table.set_index("key")["number"]
        self.assertEqual(values["FID"], 12.5)
        self.assertEqual(values["checksum"], vae_lib.checksum(self.folder))
        np.testing.assert_allclose(values["loss"], [epoch.loss for epoch in LOSSES], rtol=1e-15)


class ExportTest(FolderTest):
    def test_five_files(self):
        vae = export(self.folder)
        self.assertEqual(sorted(contents(self.folder)), sorted(FILES))
        self.assertTrue(same(load(self.folder), vae))

    def test_checksum_is_that_of_the_other_four(self):
        export(self.folder)
        files = contents(self.folder)
        expected = zlib.crc32(b"".join(files[name] for name in (*WEIGHTS, "samples.png")))
        self.assertEqual(vae_lib.checksum(self.folder), expected)
        self.assertIn(["checksum", str(expected)], rows(self.folder / "result.csv"))
        for name in (*WEIGHTS, "samples.png"):
            (self.folder / name).write_bytes(files[name][:-1] + b"?")
            self.assertNotEqual(vae_lib.checksum(self.folder), expected, name)
            (self.folder / name).write_bytes(files[name])

    def test_samples_are_drawn_three_times_enlarged(self):
        vae = export(self.folder)
        with Image.open(self.folder / "samples.png") as image:
            self.assertEqual((image.mode, image.size), ("L", (1026, 1026)))
            pixels = np.array(image)
        self.assertTrue((pixels[::3, ::3].repeat(3, 0).repeat(3, 1) == pixels).all())
        samples = (255 * vae.sample(100, seed=1)).round().byte().numpy()
        for i in (0, 9, 10, 57, 99):
            top, left = 2 + 34 * (i // 10), 2 + 34 * (i % 10)
            cell = pixels[::3, ::3][top : top + 32, left : left + 32]
            self.assertTrue((cell == samples[i, 0]).all(), i)
        self.assertTrue((pixels[:6] == 255).all())

    def test_same_bytes_when_exported_twice(self):
        export(self.folder)
        first = contents(self.folder)
        export(self.folder)
        self.assertEqual(contents(self.folder), first)
        other = self.folder / "elsewhere"
        other.mkdir()
        export(other)
        self.assertEqual(contents(other), first)

    def test_export_replaces_all_five(self):
        export(self.folder)
        first = contents(self.folder)
        vae = export(self.folder, seed=1)
        second = contents(self.folder)
        changed = {name for name in FILES if first[name] != second[name]}
        self.assertEqual(changed, set(FILES) - {"latent.pth"})  # the prior is the same
        self.assertTrue(same(load(self.folder), vae))


# ---- all or nothing ------------------------------------------------------------------------


STEPS = (  # of an export, in order: what is called, and how often
    (torch, "save", 3),
    (Image, "fromarray", 1),
    (Image.Image, "resize", 1),
    (Image.Image, "save", 1),
    (vae_lib, "checksum", 1),
    (csv, "writer", 1),
    (vae_lib, "write_result", 1),
)


class AllOrNothingTest(FolderTest):
    def setUp(self):
        super().setUp()
        export(self.folder)
        self.before = contents(self.folder)

    def check_refused(self, action, kind=OSError, words="nothing was written to"):
        """`action` fails, the old five are there bit for bit, and nothing else is."""
        with self.assertRaises(kind) as caught:
            action()
        if kind is OSError:
            self.assertIn(words, str(caught.exception))
            self.assertIn(str(self.folder), str(caught.exception))
        self.assertEqual(contents(self.folder), self.before)

    def test_failure_at_any_step(self):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writer = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        for (owner, name, times), (error, kind) in itertools.product(
            STEPS,
            (
                (full, OSError),
                (writer, OSError),
                (KeyboardInterrupt(), KeyboardInterrupt),
                (MemoryError(), MemoryError),
                (ValueError("a fault"), ValueError),
            ),
        ):
            for k in range(1, times + 1):
                broken = failing(getattr(owner, name), k, error)
                with (
                    self.subTest(call=name, k=k, error=error),
                    mock.patch.object(owner, name, broken),
                ):
                    self.check_refused(lambda: export(self.folder, seed=1), kind)
        export(self.folder, seed=1)
        self.assertNotEqual(contents(self.folder), self.before)

    def test_save_and_write_result_alone(self):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for k in (1, 2, 3):
            with mock.patch.object(torch, "save", failing(torch.save, k, full)):
                self.check_refused(lambda: vae_lib.save(small(1), self.folder))
        result = self.folder / "result.csv"
        with mock.patch.object(csv, "writer", failing(csv.writer, 1, full)):
            self.check_refused(lambda: vae_lib.write_result(result, 1.0, LOSSES))

    def test_files_are_renamed_within_the_folder(self):
        """From elsewhere, such as another disk, they would be copied, and could be cut short."""
        with mock.patch.object(os, "replace", wraps=os.replace) as replace:
            export(self.folder)
        self.assertTrue(replace.call_args_list)
        for (source, target), _ in replace.call_args_list:
            self.assertIn(self.folder, Path(source).parents)
            self.assertIn(self.folder, Path(target).parents)

    def test_renaming_that_fails_is_found_out(self):
        """After a rename the old five cannot come back, but result.csv gives a mixture away."""
        broken = OSError(errno.EIO, os.strerror(errno.EIO))

        def failing_before(k):
            calls, replace = itertools.count(1), os.replace

            def wrapper(source, target):
                if next(calls) == k:
                    raise broken
                replace(source, target)

            return wrapper

        for k in range(1, 10):  # three of save, one of write_result, five of the whole
            with self.subTest(rename=k):
                with (
                    mock.patch.object(os, "replace", failing_before(k)),
                    self.assertRaises(OSError) as caught,
                ):
                    export(self.folder, seed=k)
                message = str(caught.exception)
                self.assertTrue(message.startswith("nothing was" if k < 6 else "only "), message)
                if k > 5:
                    self.assertEqual(sum(name in message for name in FILES), k - 5)
                now = contents(self.folder)
                self.assertEqual(sorted(now), sorted(FILES))
                stored = int(dict(rows(self.folder / "result.csv"))["checksum"])
                self.assertEqual(now != self.before, k > 5)
                if k > 5:
                    self.assertNotEqual(stored, vae_lib.checksum(self.folder))
                else:
                    self.assertEqual(stored, vae_lib.checksum(self.folder))
                export(self.folder)

    @unittest.skipUnless(importlib.util.find_spec("resource"), "needs the resource module")
    def test_full_disk(self):
        """A limit on the size of a file in place of a disk that is full."""
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        for limit in (0, 1, 500, 3000, 60_000):
            with self.subTest(limit=limit):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                self.check_refused(lambda: export(self.folder, seed=1))

    def test_folder_that_cannot_be_written(self):
        file = self.folder / "samples.png"
        missing = self.folder / "no such folder"
        actions = {
            "export": export,
            "save": lambda folder: vae_lib.save(small(), folder),
            "write_result": lambda folder: vae_lib.write_result(folder / "r.csv", 1.0, LOSSES),
        }
        for (name, action), folder in itertools.product(actions.items(), (missing, file)):
            with self.subTest(function=name, folder=folder.name):
                self.check_refused(lambda action=action, folder=folder: action(folder))
        if getattr(os, "geteuid", lambda: 0)() == 0:
            self.skipTest("root writes into read-only folders: the other cases passed")
        self.folder.chmod(0o555)
        self.addCleanup(self.folder.chmod, 0o755)
        for name, action in actions.items():
            with self.subTest(function=name, folder="read-only"):
                self.check_refused(lambda action=action: action(self.folder))


# ---- files that are let in, or not ---------------------------------------------------------


class Gadget:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def gadgets(marker):
    """Objects that write the file `marker` when unpickled."""
    statement = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Gadget(os.system, f"echo > '{marker}'"),
        "eval": Gadget(eval, statement),
        "exec": Gadget(exec, statement),
        "open": Gadget(open, str(marker), "w"),
    }


def text(value):
    """The opcodes of a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor_pickle(numel=2, size=(2,), stride=(1,), offset=0, key="0"):
    """The opcodes of a float32 tensor, with what it claims of its storage."""
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + storage
        + integer(numel)
        + b"tQ"
        + integer(offset)
        + b"".join(b"(" + b"".join(map(integer, values)) + b"t" for values in (size, stride))
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state_pickle(**tensors_):
    """The opcodes of a dictionary of such tensors, protocol 2."""
    items = b"".join(text(name) + opcodes for name, opcodes in tensors_.items())
    return b"\x80\x02}(" + items + b"u."


GOOD = state_pickle(prior_mu=tensor_pickle(), prior_logvar=tensor_pickle(key="1"))


def called(name, *arguments):
    """A pickle that is the value of a call, such as bytearray(3000000000)."""
    opcodes = b"".join(integer(value) for value in arguments)
    return b"\x80\x02c" + name.replace(".", "\n").encode() + b"\n(" + opcodes + b"tR."


def archive(path, *pickles, storage=bytes(8), names=("data.pkl",) * 9, compression=0):
    """A .pth file, by default the prior of `small()`, with one entry for each pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, content in zip(names, pickles, strict=False):
                file.writestr(f"latent/{name}", content)
            file.writestr("latent/byteorder", b"little")
            file.writestr("latent/data/0", storage)
            file.writestr("latent/data/1", storage)
            file.writestr("latent/version", b"3\n")


def legacy(path, content):
    """The older format of torch.save: pickles one after the other, here with no storage."""
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, sizes]
    parts = [pickle.dumps(value, 2) for value in head] + [content, pickle.dumps([], 2)]
    path.write_bytes(b"".join(parts))


def state_of(name):
    return getattr(small(), name.removesuffix(".pth")).state_dict()


def code_running(folder, marker):
    """Write files that run code when unpickled without care; yield (kind, path)."""
    number = itertools.count()

    def path(kind):
        return folder / f"{next(number)} {kind}"

    for name, gadget in gadgets(marker).items():
        for protocol, zipped in itertools.product((2, 4), (True, False)):
            kind = f"{name}, protocol {protocol}, {'zip' if zipped else 'legacy'}"
            target = path(kind)
            state = {**state_of("latent.pth"), "more": gadget}
            options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
            torch.save(state, target, **options)
            yield kind, target
        target = path("archive")
        archive(target, pickle.dumps(gadget, 4))
        yield f"{name} alone", target
        target = path("pickle")
        target.write_bytes(pickle.dumps(gadget, 2))
        yield f"{name}, a bare pickle", target
    command = f"open({str(marker)!r}, 'w').close()"
    inst = b"\x80\x02(" + text(command) + b"ibuiltins\nexec\n."
    bad = pickle.dumps(gadgets(marker)["exec"], 2)
    obj = b"\x80\x02(cbuiltins\nexec\n" + text(command) + b"o."
    for kind, pickles, names in (
        ("INST", [inst], ["data.pkl"]),
        ("OBJ", [obj], ["data.pkl"]),
        ("capitals", [bad], ["DATA.PKL"]),
        ("twice, good first", [GOOD, bad], ["data.pkl"] * 2),
        ("twice, good last", [bad, GOOD], ["data.pkl"] * 2),
        ("capitals and good", [bad, GOOD], ["Data.pkl", "data.pkl"]),
        ("good and capitals", [GOOD, bad], ["data.pkl", "DATA.pkl"]),
    ):
        target = path("archive")
        archive(target, *pickles, names=names)
        yield kind, target
    target = path("polyglot")
    archive(target, GOOD)
    appended = target.read_bytes()
    legacy(target, bad)
    target.write_bytes(target.read_bytes() + appended)
    yield "pickle before an archive", target
    target = path("tar")
    with tarfile.open(target, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(entry := tarfile.TarInfo(name), io.BytesIO(bad))
            entry.size = len(bad)
    yield "tar", target


def over_sized(folder):
    """Write files that claim, or unpack to, more than 1 GB; yield (kind, name to go by, path)."""
    number = itertools.count()

    def path():
        return folder / f"{next(number)}.pth"

    huge = 500_000_000  # floats: 2 GB
    for kind, claims in {
        "expanded tensor": {"size": (4 * huge,), "stride": (0,)},
        "expanded matrix": {"size": (2 * huge, 2), "stride": (0, 0)},
        "huge storage": {"numel": huge},
        "huge storage and size": {"numel": huge, "size": (huge,)},
        "huge size": {"size": (huge,)},
        "huge offset": {"offset": huge},
        "huge stride": {"stride": (huge,)},
        "2⁶² floats": {"numel": 2**62, "size": (2**62,)},
        "negative storage": {"numel": -huge},
        "negative size": {"size": (-huge,)},
    }.items():
        target = path()
        archive(
            target, state_pickle(prior_mu=tensor_pickle(**claims), prior_logvar=tensor_pickle())
        )
        yield kind, "latent.pth", target
    for function, size in (
        ("builtins.bytearray", 3 * 10**9),
        ("torch.FloatTensor", huge),
        ("torch.FloatStorage", huge),
        ("torch.UntypedStorage", 4 * huge),
        ("torch.zeros", huge),
    ):
        bad = called(function, size)
        for kind, pickles, names in (
            ("plain", [bad], ["data.pkl"]),
            ("capitals", [bad], ["DATA.PKL"]),
            ("twice", [bad, GOOD], ["data.pkl"] * 2),
        ):
            target = path()
            archive(target, *pickles, names=names)
            yield f"{function}, {kind}", "latent.pth", target
        target = path()
        archive(target, GOOD)
        appended = target.read_bytes()
        legacy(target, bad)
        target.write_bytes(target.read_bytes() + appended)
        yield f"{function}, before an archive", "latent.pth", target
        target = path()
        legacy(target, bad)
        yield f"{function}, legacy", "latent.pth", target
    target = path()
    archive(target, b"\x80\x02" + b"}" * 18_000_000 + b".", compression=zipfile.ZIP_DEFLATED)
    yield "18 million dictionaries", "latent.pth", target
    target = path()
    archive(target, GOOD)
    with (
        zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("latent/data/2", "w", force_zip64=True) as entry,
    ):
        for _ in range(66):
            entry.write(bytes(16_000_000))
    yield "zip bomb", "latent.pth", target
    for kind, name, key, value in (
        ("wide network", "encoder.pth", "net.0.weight", torch.zeros(4_000_000)),
        ("wide network, flat", "encoder.pth", "net.0.weight", torch.zeros(20_000, 1)),
        ("wide network, no pixels", "encoder.pth", "net.0.weight", torch.zeros(10**9, 0)),
        ("many dimensions", "latent.pth", "prior_mu", torch.zeros(4_000_000)),
    ):
        target = path()
        torch.save({**state_of(name), key: value}, target)
        yield kind, name, target


# Loads the folders named on stdin, the first of them good, and prints what came of each of the
# others: two lines, so that a crash is traced to its folder. The memory that may be asked for is
# limited, so that a fault hurts nobody else; an error for want of memory is told.
LOADER = """
import json, sys, torch, vae_lib

def peak():
    try:
        with open("/proc/self/status") as file:
            return max(int(line.split()[1]) for line in file if line.startswith("VmPeak")) * 1024
    except OSError:
        return 0

good = vae_lib.load(sys.stdin.readline().rstrip("\\n")).state_dict()
if peak():
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (peak() + 4 * 10**9,) * 2)
for line in sys.stdin:
    before = peak()
    print(json.dumps({"folder": line.rstrip("\\n")}), flush=True)
    try:
        state = vae_lib.load(line.rstrip("\\n")).state_dict()
        outcome = {"error": None, "good": all(torch.equal(state[key], good[key]) for key in good)}
    except BaseException as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
        while error is not None:
            if isinstance(error, MemoryError) or "allocate" in str(error):
                outcome["memory"] = repr(error)
            error = error.__cause__ or error.__context__
    print(json.dumps({**outcome, "rise": peak() - before}), flush=True)
"""


class LoadTest(FolderTest):
    def setUp(self):
        super().setUp()
        self.good = self.folder / "good"
        self.good.mkdir()
        self.vae = small()
        vae_lib.save(self.vae, self.good)
        self.count = itertools.count()

    def spoiled(self, name, path=None):
        """A new folder with the three files, `name` among them replaced by `path`, or removed."""
        folder = self.folder / f"case {next(self.count)}"
        shutil.copytree(self.good, folder)
        (folder / name).unlink()
        if path is not None:
            shutil.copy(path, folder / name)
        return folder

    def saved(self, name, value):
        """A new folder in which `name` is what torch.save makes of `value`."""
        folder = self.spoiled(name)
        torch.save(value, folder / name)
        return folder

    def check_refused(self, folder, name, kind=ValueError, words="."):
        with self.assertRaises(kind) as caught:
            load(folder)
        self.assertIn(str(folder / name), str(caught.exception))
        self.assertRegex(str(caught.exception), words)

    def test_the_files_made_here_are_good_but_for_their_faults(self):
        archive(self.folder / "made", GOOD)
        self.assertTrue(same(load(self.spoiled("latent.pth", self.folder / "made")), self.vae))

    def test_hostile_files(self):
        """Refused in a fresh process: no file runs code or has load ask for 1 GB. Those that also
        hold a good file may be read as that. Each file with code runs it where nobody takes care.
        """
        marker = self.folder / "marker"
        cases = []  # (kind, file name, folder)
        for kind, path in code_running(self.folder, marker):
            if not any(word in kind for word in ("tar", "twice", "capitals and")):
                with self.subTest(kind, weights_only=False), open(path, "rb") as file:
                    pickle.load(file) if "bare" in kind else torch.load(file, weights_only=False)
                    self.assertTrue(marker.exists())
                    marker.unlink()
            cases.append((kind, "latent.pth", self.spoiled("latent.pth", path)))
        for name in WEIGHTS:
            cases.append((f"eval in {name}", name, self.saved(name, gadgets(marker)["eval"])))
        for kind, name, path in over_sized(self.folder):
            cases.append((kind, name, self.spoiled(name, path)))
            path.unlink()
        state = {**state_of("encoder.pth"), "net.0.weight": torch.zeros(4096, 1024)}
        folder = self.saved("encoder.pth", state)
        state = {**state_of("latent.pth"), "prior_mu": torch.zeros(4_000_000)}
        torch.save(state, folder / "latent.pth")
        cases.append(("wide, and many dimensions", "encoder.pth", folder))
        folders = "\n".join([str(self.good), *(str(folder) for *_, folder in cases), ""])
        done = fresh_python(LOADER, input=folders)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(done.returncode, 0, f"{lines[-1:]} {done.stderr}")
        self.assertEqual(len(lines), 2 * len(cases))
        for (kind, name, folder), outcome in zip(cases, lines[1::2], strict=True):
            with self.subTest(kind):
                self.assertNotIn("memory", outcome)
                self.assertLess(outcome["rise"], 1e9)
                if outcome["error"] is None:
                    self.assertRegex(kind, "twice|before an archive|capitals and good")
                    self.assertTrue(outcome["good"])
                else:
                    self.assertEqual(outcome["error"], "ValueError", outcome)
                    self.assertIn(str(folder), outcome["message"])
                    if "many dimensions" not in kind:  # or is the encoder of too few?
                        self.assertIn(str(folder / name), outcome["message"])
        self.assertFalse(marker.exists())

    def test_damage(self):
        for name in WEIGHTS:
            content = (self.good / name).read_bytes()
            for kind, damaged in {
                "empty": b"",
                "text": b"Die Gewichte sind im anderen Ordner.\n",
                "zeros": bytes(len(content)),
                "web page": b"<!DOCTYPE html><html><body>404</body></html>",
                "large-file pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                "empty archive": b"PK\5\6" + bytes(18),
                "image": (self.png()).read_bytes(),
                "byte too few": content[:-1],
                "half": content[: len(content) // 2],
                "twice": content + content,
            }.items():
                with self.subTest(file=name, kind=kind):
                    folder = self.spoiled(name)
                    (folder / name).write_bytes(damaged)
                    if kind == "twice":  # reads as one
                        self.assertTrue(same(load(folder), self.vae))
                    else:
                        self.check_refused(folder, name)

    def png(self):
        path = self.folder / "image.png"
        Image.new("L", (32, 32)).save(path)
        return path

    def test_no_file(self):
        for name in WEIGHTS:
            with self.subTest(file=name):
                folder = self.spoiled(name)
                self.check_refused(folder, name, FileNotFoundError, "missing")
                (folder / name).symlink_to(folder / "nowhere")
                self.check_refused(folder, name, FileNotFoundError, "missing")
                (folder / name).unlink()
                (folder / name).mkdir()
                self.check_refused(folder, name, (ValueError, OSError))
        with self.assertRaisesRegex(FileNotFoundError, "no such folder.*encoder.pth"):
            load(self.folder / "no such folder")

    def test_symbolic_link_to_a_file(self):
        folder = self.spoiled("latent.pth")
        (folder / "latent.pth").symlink_to(self.good / "latent.pth")
        self.assertTrue(same(load(folder), self.vae))

    def test_swapped_files(self):
        for order in itertools.permutations(WEIGHTS):
            folder = self.folder / " ".join(order)
            folder.mkdir()
            for name, other in zip(WEIGHTS, order, strict=True):
                shutil.copy(self.good / other, folder / name)
            with self.subTest(order=order):
                if order == WEIGHTS:
                    self.assertTrue(same(load(folder), self.vae))
                else:
                    moved = [n for n, o in zip(WEIGHTS, order, strict=True) if n != o]
                    with self.assertRaises(ValueError) as caught:
                        load(folder)
                    self.assertTrue(any(str(folder / n) in str(caught.exception) for n in moved))

    def test_another_architecture(self):
        convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4)).state_dict()
        deeper = vae_lib.mlp(1024, 16, 16, 4).state_dict()
        others = {"wider": VAE(2, 17), "more dimensions": VAE(3, 16)}
        for name, part in zip(WEIGHTS, PARTS, strict=True):
            with self.subTest(file=name):
                self.check_refused(self.saved(name, convolution), name)
                self.check_refused(self.saved(name, deeper), name)
            for kind, other in others.items():
                if (name, kind) == ("latent.pth", "wider"):
                    continue  # it has no width
                with self.subTest(file=name, kind=kind):
                    folder = self.saved(name, getattr(other, part).state_dict())
                    with self.assertRaisesRegex(ValueError, r"(encoder|latent|decoder)\.pth"):
                        load(folder)

    def test_missing_and_extra_keys(self):
        for name in WEIGHTS:
            state = state_of(name)
            self.check_refused(self.saved(name, {}), name)
            for key in state:
                with self.subTest(file=name, missing=key):
                    rest = {k: value for k, value in state.items() if k != key}
                    self.check_refused(self.saved(name, rest), name)
            for extra in ("more", "net.99.weight", "", 3, (1, 2), None):
                with self.subTest(file=name, extra=extra):
                    self.check_refused(self.saved(name, {**state, extra: torch.zeros(2)}), name)

    def test_values_that_are_not_finite_floats(self):
        for name in WEIGHTS:
            state = state_of(name)
            for key, number in itertools.product(state, (math.nan, math.inf, -math.inf)):
                with self.subTest(file=name, key=key, number=number):
                    value = state[key].clone()
                    value.view(-1)[-1] = number
                    self.check_refused(
                        self.saved(name, {**state, key: value}), name, words="finite"
                    )
            with self.subTest(file=name, kind="no dimension"), self.assertRaises(ValueError):
                load(self.saved(name, dict.fromkeys(state, torch.zeros(()))))
            key = list(state)[0]
            for kind, value in {
                "whole numbers": state[key].long(),
                "float64": state[key].double(),
                "float16": state[key].half(),
                "complex": state[key].cfloat(),
                "one dimension more": state[key][None],
                "sparse": state[key].to_sparse(),
                "list": state[key].tolist(),
                "number": 1.5,
                "nothing": None,
                "text": "weights",
                "dictionary": {"weight": state[key]},
            }.items():
                with self.subTest(file=name, kind=kind):
                    self.check_refused(self.saved(name, {**state, key: value}), name)

    def test_no_dictionary(self):
        for name in WEIGHTS:
            values = (list(state_of(name).values()), torch.zeros(2), 3, "text", None, [])
            for value in values:
                with self.subTest(file=name, value=type(value)):
                    self.check_refused(self.saved(name, value), name)

    def test_flipped_and_missing_bytes(self):
        """Any damage is told, or harmless: never other weights."""
        for name, step in (("latent.pth", 11), ("decoder.pth", 1999)):
            content, folder = (self.good / name).read_bytes(), self.spoiled(name)
            for position in range(0, len(content), step):
                changed = bytearray(content)
                changed[position] ^= 1 << position % 8
                for kind, damaged in (("bit", changed), ("end", content[:position])):
                    with self.subTest(file=name, kind=kind, position=position):
                        (folder / name).write_bytes(damaged)
                        try:
                            self.assertTrue(same(load(folder), self.vae))
                        except ValueError as error:
                            self.assertIn(str(folder / name), str(error))


# ---- images --------------------------------------------------------------------------------


def ramp():
    """Each of the 256 greys four times: (32, 32) uint8."""
    return np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)


def png_chunk(name, content):
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def header(width=32, height=32, depth=8, colour=0):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def scanlines(pixels):
    """Pixels as IDAT content: each line after a filter byte of zero."""
    return b"".join(b"\0" + line.tobytes() for line in pixels)


class ImagesTest(FolderTest):
    def setUp(self):
        super().setUp()
        self.grey = Image.fromarray(ramp())

    def add(self, name, image, **options):
        path = self.folder / name
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path, "PNG", **options)
        return path

    def check_refused(self, name, image, words="."):
        """A folder that also holds a good image is refused for this one, which is named."""
        self.add("000.png", self.grey)
        path = self.add(name, image) if image is not None else self.folder / name
        with self.assertRaises(ValueError) as caught:
            load_images(self.folder)
        self.assertIn(str(path), str(caught.exception))
        self.assertRegex(str(caught.exception), words)
        path.unlink()

    def test_shape_and_range(self):
        self.add("0.png", self.grey)
        self.add("1.png", Image.new("L", (32, 32), 255))
        images = load_images(self.folder)
        self.assertEqual((images.shape, images.dtype), ((2, 1, 32, 32), torch.float32))
        self.assertTrue(torch.equal(images[0, 0], torch.from_numpy(ramp()).float() / 255))
        self.assertTrue((images[1] == 1).all())
        self.assertTrue(torch.equal(load_images(str(self.folder)), images))

    def test_training_images(self):
        images = load_images(ROOT / "data" / "train")
        self.assertEqual(images.shape, (100, 1, 32, 32))
        vae_lib.check_images(images)

    def test_every_kind_of_png_is_the_same_grey(self):
        rgb = self.grey.convert("RGB")
        palette = Image.fromarray(255 - ramp())
        palette.putpalette([255 - i // 3 for i in range(768)])
        kinds = {
            "grey": self.grey,
            "16-bit": Image.fromarray(ramp().astype(np.uint16) * 257),
            "RGB": rgb,
            "RGBA": rgb.convert("RGBA"),
            "LA": self.grey.convert("LA"),
            "palette": palette,
        }
        self.assertEqual(palette.mode, "P")
        for number, image in enumerate(kinds.values()):
            self.add(f"{number}.png", image)
        self.add("6.png", self.grey, optimize=True)
        deep = png(
            header(depth=16), (b"IDAT", zlib.compress(scanlines(257 * ramp().astype(">u2"))))
        )
        self.add("7.png", deep + png_chunk(b"IEND", b""))
        images = load_images(self.folder)
        self.assertEqual(len(images), 8)
        for name, image in zip([*kinds, "optimised", "16-bit by hand"], images, strict=True):
            with self.subTest(name):
                self.assertTrue(torch.equal(image, images[0]))

    def test_one_bit(self):
        black_and_white = Image.fromarray((ramp() // 128) * 255)
        self.add("0.png", black_and_white)
        self.add("1.png", black_and_white.convert("1"))
        two_bits = np.array([0, 85, 170, 255], np.uint8)[ramp() // 64]
        self.add("2.png", Image.fromarray(two_bits))
        levels = (ramp() // 64).reshape(32, 8, 4) @ np.array([64, 16, 4, 1])  # four to the byte
        content = zlib.compress(scanlines(levels.astype(np.uint8)))
        self.add("3.png", png(header(depth=2), (b"IDAT", content), (b"IEND", b"")))
        images = load_images(self.folder)
        self.assertTrue(torch.equal(images[0], images[1]))
        self.assertTrue(torch.equal(images[2], images[3]))
        self.assertEqual(images[1].unique().tolist(), [0, 1])

    def test_name_order_and_what_is_passed_over(self):
        names = ["b 10.png", "a.PNG", "é.png", "b 2.png", "Z.png", "漢.png"]
        for value, name in enumerate(names):
            self.add(name, Image.new("L", (32, 32), value))
        for name in (".hidden.png", "._b 2.png", "notes.txt", "Thumbs.db", "c.jpg", "png"):
            self.add(name, b"not an image")
        (self.folder / "folder").mkdir()
        values = (255 * load_images(self.folder)[:, 0, 0, 0]).round().int().tolist()
        self.assertEqual([names[value] for value in values], sorted(names))

    def test_no_images(self):
        self.add("notes.txt", b"nothing here")
        for folder in (self.folder, self.folder / "missing", self.folder / "notes.txt"):
            with self.assertRaisesRegex(FileNotFoundError, "holds no PNG") as caught:
                load_images(folder)
            self.assertIn(str(folder), str(caught.exception))

    def test_transparent(self):
        veiled = self.grey.convert("RGBA")
        veiled.putalpha(254)
        self.check_refused("1.png", veiled, "transparent")
        corner = self.grey.convert("LA")
        corner.putpixel((31, 31), (0, 0))
        self.check_refused("1.png", corner, "transparent")
        content = (b"IDAT", zlib.compress(scanlines(ramp())))
        key = (b"tRNS", struct.pack(">H", 7))
        self.check_refused("1.png", png(header(), key, content, (b"IEND", b"")), "transparent")
        deep = (b"IDAT", zlib.compress(scanlines(257 * ramp().astype(">u2"))))
        key = (b"tRNS", struct.pack(">H", 7 * 257))
        self.check_refused("1.png", png(header(depth=16), key, deep, (b"IEND", b"")))

    def test_wrong_size(self):
        for size in ((28, 28), (32, 31), (33, 32), (64, 64), (1, 1)):
            words = f"{size[1]}×{size[0]}, expected 32×32"
            self.check_refused("1.png", Image.new("L", size), words)

    def test_size_that_is_only_claimed(self):
        """A decompression bomb: 4 gigapixels in the header."""
        content = (b"IDAT", zlib.compress(bytes(1000)))
        for side in (10_000, 20_000, 65_535):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self.check_refused("1.png", png(header(side, side), content, (b"IEND", b"")))

    def test_other_formats(self):
        for kind in ("JPEG", "GIF", "BMP", "TIFF", "WEBP"):
            file = io.BytesIO()
            self.grey.save(file, kind)
            self.check_refused("1.png", file.getvalue())

    def test_nothing_to_open(self):
        (self.folder / "1.png").symlink_to(self.folder / "nowhere")
        self.check_refused("1.png", None)
        (self.folder / "1.png").mkdir()
        with self.assertRaisesRegex(ValueError, "1.png"):
            load_images(self.folder)

    def test_damage(self):
        for kind, content in {
            "empty": b"",
            "text": b"not an image",
            "signature alone": png(),
            "no pixels": png(header(), (b"IEND", b"")),
            "compression cut short": png(
                header(), (b"IDAT", zlib.compress(scanlines(ramp()))[:-40]), (b"IEND", b"")
            ),
            **{
                f"{rows} rows": png(
                    header(), (b"IDAT", zlib.compress(scanlines(ramp()[:rows]))), (b"IEND", b"")
                )
                for rows in (0, 1, 20, 31)
            },
            "no compression": png(header(), (b"IDAT", scanlines(ramp())), (b"IEND", b"")),
        }.items():
            with self.subTest(kind):
                self.check_refused("1.png", content)

    def test_every_truncation_and_every_flipped_bit(self):
        """Refused, or read as it was: never as another image."""
        few = np.random.default_rng(0).integers(0, 2, (32, 32), np.uint8) * 255
        path = self.add("0.png", Image.fromarray(few))
        content, expected = path.read_bytes(), load_images(self.folder)
        read = 0
        for position, bit in itertools.product(range(len(content)), range(8)):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            cases = [("bit", changed)] + ([("end", content[:position])] if bit == 0 else [])
            for kind, damaged in cases:
                path.write_bytes(damaged)
                try:
                    images = load_images(self.folder)
                except ValueError as error:
                    self.assertIn(str(path), str(error))
                else:
                    read += 1
                    self.assertTrue(torch.equal(images, expected), (kind, position, bit))
        self.assertLess(read, 100)  # of the length and checksum of the last, empty chunk


# ---- figures -------------------------------------------------------------------------------


class FigureTest(unittest.TestCase):
    def setUp(self):
        self.addCleanup(plt.close, "all")
        caught = warnings.catch_warnings()
        caught.__enter__()
        self.addCleanup(caught.__exit__, None, None, None)
        warnings.simplefilter("error")

    def pixels(self, figure):
        """The figure as drawn, (height, width, 3)."""
        figure.canvas.draw()
        return np.array(figure.canvas.buffer_rgba())[..., :3]

    def test_images_in_a_grid(self):
        images = torch.rand(23, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        figure = vae_lib.show_images(images, columns=8)
        (axes,) = figure.axes
        (shown,) = axes.images
        drawn = np.asarray(shown.get_array())
        self.assertEqual(drawn.shape, (2 + 3 * 34, 2 + 8 * 34))
        self.assertEqual(shown.get_clim(), (0, 1))
        for i in (0, 7, 8, 22):
            top, left = 2 + 34 * (i // 8), 2 + 34 * (i % 8)
            np.testing.assert_array_equal(drawn[top : top + 32, left : left + 32], images[i, 0])
        self.assertEqual(len(axes.get_xticks()) + len(axes.get_yticks()), 0)
        self.assertGreater(self.pixels(figure).std(), 10)

    def test_rows_are_labelled(self):
        labels = ["data", "reconstruction"]
        figure = vae_lib.show_images(torch.rand(20, 1, 32, 32), rows=labels)
        (axes,) = figure.axes
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], labels)
        for row, tick in enumerate(axes.get_yticks()):
            self.assertTrue(2 + 34 * row < tick < 34 + 34 * row)
        self.pixels(figure)

    def test_few_images(self):
        for n in (1, 3):
            figure = vae_lib.show_images(torch.rand(n, 1, 32, 32))
            width, height = figure.get_size_inches()
            self.assertAlmostEqual(width, 6)
            self.assertLess(height, 6.5)
            self.pixels(figure)

    def test_nothing_to_show(self):
        for images, words in ((torch.rand(0, 1, 32, 32), "1 or more"), (torch.rand(3), "expected")):
            self.assertRaisesRegex(ValueError, words, vae_lib.show_images, images)
            self.assertRaisesRegex(ValueError, words, vae_lib.tile, images, 10)
        self.assertRaisesRegex(ValueError, "no losses", vae_lib.plot_losses, [])

    def test_losses(self):
        for losses in (LOSSES, LOSSES * 100, LOSSES[:1], [Losses(3.0, 3.0, 0.0)]):
            with self.subTest(epochs=len(losses)):
                figure = vae_lib.plot_losses(losses, "Training")
                (axes,) = figure.axes
                self.assertEqual(axes.get_xlabel(), "epoch")
                self.assertIn("nats", axes.get_ylabel())
                self.assertEqual(axes.get_title(), "Training")
                self.assertEqual(len(axes.lines), 3)
                for line, values in zip(axes.lines, zip(*losses, strict=True), strict=True):
                    np.testing.assert_array_equal(line.get_ydata(), values)
                    np.testing.assert_array_equal(line.get_xdata(), range(1, len(losses) + 1))
                legend = [label.get_text() for label in axes.get_legend().get_texts()]
                for name, label in zip(("ELBO", "reconstruction", "KL"), legend, strict=True):
                    self.assertIn(name, label)
                self.assertEqual(len({line.get_color() for line in axes.lines}), 3)
                self.pixels(figure)

    def test_one_epoch_can_be_seen(self):
        figure = vae_lib.plot_losses(LOSSES[-1:])
        drawn = self.pixels(figure)
        for line in figure.axes[0].lines:
            line.set_visible(False)
        self.assertGreater((self.pixels(figure) != drawn).any(2).sum(), 20)


if __name__ == "__main__":
    unittest.main()
