"""Packing: every picture is decoded once, and the pixels are kept in a cache folder, memory-mapped the next time."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common import Progress, UsageError, printable
from pictures.batches import Split
from pictures.decoding import decode, map_bytes, one_line
from pictures.sources import SPLITS

FORMAT = 2  # of a packed store; raise it when the same source would give other bytes


@dataclass
class Dataset:
    """What `pack` gives. A split that the source lacks, or that was not asked for, is None."""

    train: Split | None
    val: Split | None
    test: Split | None
    classes: list
    mean: tuple
    std: tuple
    size: int
    kind: str


def pack(source, size, cache=None, splits=("train", "val"), quiet=False, skip_unreadable=False, workers=None):
    """Decodes the splits asked for, or finds them in the cache. Other splits are not touched.

    size             S: the packed images are (N, 3, S, S).
    cache            folder, default $XDG_CACHE_HOME/unlabeled or ~/.cache/unlabeled.
    skip_unreadable  leave out files that cannot be decoded, instead of refusing the source.
    workers          threads that decode, default one per core that this process may use.
    returns          Dataset.  raises: UsageError, of files that cannot be read or a cache that cannot be written.
    """
    try:
        default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "unlabeled")
        cache = Path(cache or default).expanduser().absolute()
    except RuntimeError:  # a user without a home, in a container
        raise UsageError("no home folder to keep packed images in; choose a folder with --cache") from None
    packed = dict.fromkeys(SPLITS)
    for split, items in source.splits.items():
        if items and split in splits:
            if items.wrong:
                raise UsageError(items.wrong)
            final = cache / f"{source.name}-{split}-{size}-{store_key(items, size)}"
            packed[split] = open_store(final)
            if packed[split] is None:
                packed[split] = build_store(final, split, items, size, quiet, workers)
    report_unreadable(packed, source, cache / f"{source.name}-unreadable.txt", skip_unreadable, quiet)
    for split, part in packed.items():
        if not quiet and part is not None and nearly_black(part.images[:: max(1, len(part) // 100)]):
            print(f"note    most {split} pictures are nearly black, at most 16 of 255; if they are deep ones "
                  "that fill few of\n        their bits, scale them first", flush=True)
    return Dataset(*packed.values(), source.classes, source.mean, source.std, size, source.kind)


def nearly_black(images):
    return (images.flatten(1).amax(dim=1) <= 16).float().mean() > 0.5


def store_key(items, size):
    """Changes when a file is added, removed, renamed, relabelled or written to, or when S changes."""
    digest = hashlib.sha256(repr((FORMAT, size, items.tag, items.labels)).encode())
    for path in items.files:
        facts = None
        with contextlib.suppress(OSError):  # gone meanwhile: decoding will say so
            facts = os.stat(path).st_size, os.stat(path).st_mtime_ns
        digest.update(repr((path, facts)).encode())
    return digest.hexdigest()[:20]


def open_store(folder):
    """-> Split, or None if there is no whole store, or if the system gives a file now that it refused before."""
    try:
        meta = torch.load(folder / "meta.pt", weights_only=True)
        count, size = meta["shape"]
        if os.path.getsize(folder / "images.bin") != count * 3 * size * size:
            return None
        pixels = map_bytes(folder / "images.bin", count * 3 * size * size) if count else torch.empty(0).byte()
        paths = meta["paths"].split("\0") if count else []
        packed = Split(pixels.view(count, 3, size, size), meta["labels"], meta["aspect"], paths, meta["skipped"])
    except Exception:  # absent or damaged, in whatever way: it is built anew
        return None
    for path, _, refused in packed.skipped:
        with contextlib.suppress(Exception):
            if refused and decode(path, size):
                return None
    return packed


def build_store(final, split, items, size, quiet, workers):
    """Packs one split into a folder beside `final` that gets this name when it is whole. -> Split"""
    started, aside = time.perf_counter(), final.with_name(f".packing-{uuid.uuid4().hex}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for old in final.parent.glob(".packing-*"):  # of processes that were killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - old.lstat().st_mtime > 86400:
                    remove(old)
        aside.mkdir()
        write_store(aside, items, size, f"packing {split}", quiet, workers)
        if not final.name.endswith(store_key(items, size)):
            raise UsageError(f"the {split} images changed while they were packed; start again once "
                             "nothing writes to them any more")
        packed = publish(aside, final)
    except BrokenPipeError:  # of stdout: nobody reads the progress any more
        raise
    except OSError as error:
        why = one_line(error, getattr(error, "filename", ""))
        raise UsageError(f"cannot keep packed images in {final.parent} ({why}); make room there or choose another "
                         "folder with --cache") from error
    finally:
        remove(aside)
    if not quiet:
        bad = f", {len(packed.skipped):,} unreadable" if packed.skipped else ""
        print(f"packed {split}: {len(packed):,} images of {size} x {size} in "
              f"{time.perf_counter() - started:.1f} s{bad}", flush=True)
    return packed


def publish(aside, final):
    """Renames the finished store into place. Whoever comes second uses what stands there already."""
    for attempt in range(3):
        time.sleep(0.5 * attempt)  # on Windows a virus scanner may still be reading it
        with contextlib.suppress(OSError):
            os.rename(aside, final)  # atomic; fails if `final` is there
        packed = open_store(final)
        if packed is not None:
            return packed
        remove(final)  # a damaged one, or one that lacks what can be read by now
    raise OSError(f"{final.name} cannot be replaced")


def remove(path):
    """Removes a folder, file or link, if there is one and the system allows it."""
    shutil.rmtree(path, ignore_errors=True)  # which takes no file or link
    with contextlib.suppress(OSError):
        path.unlink()


def write_store(folder, items, size, label, quiet, workers):
    """Writes images.bin and meta.pt; when it returns, they are on the disk."""
    labels, names, chunks = items.load(size) if items.load else (items.labels, items.files, None)
    images, aspect, bad = create_images(folder, len(names), size), torch.ones(len(names)), {}
    steps = fill(images, chunks) if items.load else decode_all(names, images, aspect, bad, workers)
    progress, done = Progress(len(names), label=label, quiet=quiet), 0
    with contextlib.closing(progress), contextlib.closing(steps):
        for count in steps:
            done += count
            progress.update(done)
    kept = [i for i in range(len(names)) if i not in bad]
    for new, old in enumerate(kept if bad else ()):  # close the gaps
        images[new] = images[old]
    del images
    os.truncate(folder / "images.bin", len(kept) * 3 * size * size)
    buffer = io.BytesIO()
    torch.save({
        "shape": [len(kept), size],
        "labels": torch.tensor(labels)[kept],
        "aspect": aspect[kept],
        "paths": "\0".join(names[i] for i in kept),  # one string: reading a million would take seconds
        "skipped": [bad[i] for i in sorted(bad)],
    }, buffer)
    (folder / "meta.pt").write_bytes(buffer.getvalue())
    for name in ("images.bin", "meta.pt"):
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())


def create_images(folder, count, size):
    """A new images.bin with its disk space reserved: a mapping that meets a full disk kills the process."""
    needed, path = count * 3 * size * size, folder / "images.bin"
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, needed)
    try:
        return torch.from_file(str(path), shared=True, size=needed, dtype=torch.uint8).view(count, 3, size, size)
    except RuntimeError as error:  # the system refuses the mapping
        raise OSError(errno.ENOMEM, one_line(error)) from error


def fill(images, chunks):
    """Copies pixels that need no decoding; yields how many at a time."""
    done, size = 0, images.shape[-1]
    for chunk in chunks:                                                            # (n, 3, s, s)
        if chunk.shape[-1] != size:
            chunk = F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
            chunk = chunk.round().clamp(0, 255).to(torch.uint8)                     # (n, 3, S, S)
        images[done : done + len(chunk)] = chunk
        done += len(chunk)
        yield len(chunk)


def decode_all(files, images, aspect, bad, workers=None):
    """Decodes in threads, as Pillow works without holding Python's lock; yields how many at a time.

    bad  row -> what Split.skipped says of it, filled in.
    """
    def decode_rows(rows):
        for i in rows:
            try:
                images[i], aspect[i] = decode(files[i], images.shape[-1])
            except Exception as error:  # broken files raise almost anything
                refused = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
                bad[i] = (files[i], one_line(error, files[i]), refused)
        return len(rows)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(workers or cores)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        try:
            yield from pool.map(decode_rows, [range(a, min(a + 16, len(files))) for a in range(0, len(files), 16)])
        finally:
            pool.shutdown(cancel_futures=True)


def report_unreadable(packed, source, listing, skipping, quiet):
    """Lists what cannot be read, of all splits together, in a file, and says so; raises unless `skipping`."""
    packed = {split: part for split, part in packed.items() if part is not None}
    bad = [(printable(path), why) for part in packed.values() for path, why, _ in part.skipped]
    if not bad:
        return
    try:
        listing.write_text("".join(f"{path}\t{why}\n" for path, why in bad), encoding="utf-8")
        where = f"listed in {listing}"
    except OSError as error:
        where = f"{listing} cannot be written: {error.strerror}"
    empty = [split for split, part in packed.items() if not len(part)]
    if empty or not skipping:
        first = "; ".join(f"{path} ({why})" for path, why in bad[:3])
        more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
        fix = (f"nothing is left of the {' and '.join(empty)} split" if skipping
               else "or go on without them: --skip-unreadable")
        raise UsageError(f"{len(bad):,} of {len(bad) + sum(map(len, packed.values())):,} images cannot be read: "
                         f"{first}{more} ({where}); repair or remove them, {fix}")
    for split, part in packed.items() if not quiet else ():
        gone = [source.classes[c] for c in sorted({*source.splits[split].labels} - {*part.labels.tolist(), -1})]
        none = f"; none is left of class {', '.join(gone)}" if gone else ""
        if part.skipped:
            print(f"left out {len(part.skipped):,} of {len(part) + len(part.skipped):,} {split} images that cannot be "
                  f"read{none}")
    if not quiet:
        print(where, flush=True)
