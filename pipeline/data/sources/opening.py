"""Which kind of source a name means: decided by what is there."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from pipeline import storage
from pipeline.data.index import ShardError
from pipeline.data.sources import cifar, drawn, files, idx, lmdb, parquet, tfrecord
from pipeline.data.sources.source import Source


def normalize_source(spec: str) -> str:
    """The one spelling of a source: an absolute path, or `portraits:...` as it is.

    Raises StoreError if `spec` can be neither.
    """
    return spec if spec.startswith(drawn.PREFIX) else storage.normalize(spec)


@contextmanager
def open_source(spec: str, image_size: int | None) -> Iterator[Source]:
    """The source that `spec` names; it can be read inside the `with` block.

    `spec` is `portraits:COUNT` or `portraits:COUNT@SEED` (drawn at `image_size`), or the path of
    a folder, archive or file of one of the kinds below. A source whose images are all of
    one split has none of its own. Raises ShardError if there is no such source or it holds nothing.
    """
    with _opened(spec, image_size) as source:
        if not source.images:
            raise ShardError(f"{storage.shown(spec)}: there is nothing in it.")
        if len({image.split for image in source.images}) == 1:
            source = replace(source, images=[replace(image, split=None) for image in source.images])
        yield source


def _opened(spec: str, image_size: int | None) -> AbstractContextManager[Source]:
    if spec.startswith(drawn.PREFIX):
        return nullcontext(drawn.portraits(spec, image_size or drawn.DEFAULT_SIZE))
    if not storage.is_local(storage.normalize(spec)):
        raise ShardError(f"{storage.shown(spec)}: images are read from this machine; copy them here first.")
    path = Path(storage.normalize(spec))
    if not path.exists():
        raise ShardError(f"{path}: there is no such file or folder of images.")
    return _folder(path, image_size) if path.is_dir() else _file(path, image_size)


def _folder(root: Path, image_size: int | None) -> AbstractContextManager[Source]:
    top = sorted(root.iterdir())
    for kind, name in ((idx.idx, idx.NAME), (cifar.cifar_folder, cifar.NAME)):
        if found := [path for path in top if name.fullmatch(path.name) and path.is_file()]:
            return nullcontext(kind(found))
    found = list(files.files_below(root))
    if databases := [path for path in found if path.name == lmdb.DATA_NAME]:
        return lmdb.lmdb(root, databases)
    # Beside images these hold what is known of them.
    if not any(files.is_named_like_an_image(path.name) for path in found):
        if records := [path for path in found if path.suffix in tfrecord.SUFFIXES]:
            return tfrecord.tfrecords(root, records, image_size)
        if tables := [path for path in found if path.suffix == parquet.SUFFIX]:
            return parquet.parquet(root, tables)
    return nullcontext(files.folder(root, found))


def _file(path: Path, image_size: int | None) -> AbstractContextManager[Source]:
    suffix = path.suffix.lower()
    if idx.NAME.fullmatch(path.name):
        return nullcontext(idx.idx([path]))
    if cifar.NAME.fullmatch(path.name):
        return nullcontext(cifar.cifar_folder([path]))
    if cifar.ARCHIVE_NAME.fullmatch(path.name):
        return nullcontext(cifar.cifar_archive(path))
    if suffix == ".zip":
        return files.zip_file(path)
    if suffix == ".tar":
        return files.tar_file(path)
    if suffix in lmdb.SUFFIXES:
        return lmdb.lmdb(path.parent if path.name == lmdb.DATA_NAME else path, [path])
    if suffix in tfrecord.SUFFIXES:
        return tfrecord.tfrecords(path, [path], image_size)
    if suffix == parquet.SUFFIX:
        return parquet.parquet(path, [path])
    raise ShardError(
        f"{path}: is none of the files that images are read from: .zip, .tar, .tfrecord, .parquet, .lmdb, "
        f"MNIST's and CIFAR-10's. Other compressed tars have to be unpacked first."
    )
