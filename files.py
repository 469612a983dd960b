"""
Files that a run relies on: each is written complete or not at all, and what is read back is verified.

    write_json, read_json               config.json, run_state.json, the index of a cache: JSON with a checksum
    save_weights, read_checkpoint       folders with weights, ours or those of Hugging Face
    write_safetensors, read_safetensors tensors with a checksum of names, shapes and contents

Files of other projects have no checksum and are read without one. This file imports no other file of the project.
"""

import hashlib
import json
import os
import re
import tempfile
import typing
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Writing

class WriteError(OSError):
    """A file could not be written, as the disk is full, the name is too long or writing is not permitted."""

    def __init__(self, path: str, error: OSError, kept: bool = False):
        """kept: whether the write would have replaced the file as a whole, so that an older one is unchanged."""
        kept = "; the file that was there is unchanged" if kept and os.path.isfile(path) else ""
        super().__init__(f"{path} could not be written ({error.strerror or error}){kept}")


@contextmanager
def atomic_write(path: str):
    """Open a binary file that appears at `path` complete or not at all, even if the machine loses power."""
    folder, name = os.path.split(path)
    try:
        descriptor, temp = tempfile.mkstemp(".tmp", name[:40] + ".", folder or ".")
    except OSError as error:
        raise WriteError(path, error, kept=True) from None
    try:
        with open(descriptor, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.fchmod(f.fileno(), 0o644)        # temporary files are private by default
        os.replace(temp, path)
        sync_folder(folder or ".")
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.remove(temp)
        if isinstance(error, OSError) and error.filename in (None, temp):       # not an error of what the caller reads
            raise WriteError(path, error, kept=True) from None
        raise


def sync_folder(folder: str):
    """Wait until the names of the files in a folder have reached the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: str, text: str):
    """Write a UTF-8 text file that appears complete or not at all."""
    with atomic_write(path) as f:
        f.write(text.encode())


def append_line(path: str, values: dict):
    """Append a JSON object as one line. A WriteError names the file."""
    try:
        with open(path, "a") as f:
            f.write(json.dumps(values) + "\n")
    except OSError as error:
        raise WriteError(path, error) from None


def write_all(f, content: bytes, offset: int | None = None):
    """Write all bytes to an open file, at its end or at an offset, without a buffer. A WriteError names the file."""
    try:
        while content:                      # a disk that fills up takes a part first
            count = os.write(f.fileno(), content) if offset is None else os.pwrite(f.fileno(), content, offset)
            content, offset = content[count:], None if offset is None else offset + count
    except OSError as error:
        raise WriteError(f.name, error) from None


# ---------------------------------------------------------------------------------------------------------------------
# Messages

def escape_control(text: str) -> str:
    """Replace what a terminal would obey or could not print, such as ESC in the name of a file, by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_error(error: Exception) -> str:
    """Format the type and message of an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def require(ok: bool, path: str, key: str, expected: str, value):
    """Raise a one-line ValueError that names file, key, expected and actual value, unless ok."""
    if not ok:
        raise ValueError(f"{path}: {key} must be {expected}, got {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# JSON

def write_json(path: str, values: dict, indent: int | None = 1):
    """Write one JSON object, complete or not at all, with a checksum that read_json verifies."""
    atomic_write_text(path, json.dumps({**values, "checksum": hash_json(values)}, indent=indent) + "\n")


def hash_json(values) -> str:
    """Hash the content of a JSON value, however it is formatted."""
    content = json.loads(json.dumps(values))            # keys become strings and tuples lists, as in a file
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_json(path: str) -> dict:
    """Read a file that holds one JSON object. ValueError if it has a checksum, as write_json's have, that is wrong."""
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {format_error(error)}. Restore it from a copy") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: the content must be one JSON object, got a {type(values).__name__}")
    checksum = values.pop("checksum", None)
    if checksum not in (None, hash_json(values)):
        raise ValueError(f"{path} is damaged or was edited: its checksum is wrong. Restore it from a copy; if you "
                         'edited it, delete its "checksum"')
    return values


def config_from_dict(cls, values: dict, path: str, strict: bool = True):
    """
    Build the dataclass `cls`, and the dataclasses in it, from a dict read from JSON.

    strict: an unknown key is a ValueError that names it, as in config files of this project. Otherwise unknown keys are
    dropped, as is right for Hugging Face configs.
    """
    known = {f.name: f for f in fields(cls)}
    unknown = [key for key in values if key not in known]
    if strict and unknown:
        raise ValueError(f"{path}: {cls.__name__} has no field {unknown[0]!r}; its fields are "
                         f"{', '.join(known)}")
    arguments = {}
    for key in known.keys() & values.keys():
        kind, value = known[key].type, values[key]
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        if is_dataclass(kind):
            require(isinstance(value, dict), path, key, "an object", value)
            value = config_from_dict(kind, value, path, strict)
        elif typing.get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)
        arguments[key] = value
    try:
        return cls(**arguments)
    except TypeError as error:                  # a check of values met one of another type
        raise ValueError(f"{path}: a value of {cls.__name__} has a wrong type ({format_error(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Folders with weights

def resolve_checkpoint(name: str, what: str) -> str:
    """
    Return the folder of a checkpoint: `name` if it is a folder, else the hub id `name` from the hub or its cache.

    what: "a SigLIP", "a BERT", ... for the error message.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name} is not a folder of {what}: there is no such folder")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return snapshot_download(name, allow_patterns=["*.json", "vocab.txt", "spiece.model", "model*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise FileNotFoundError(
            f"{name} is not a folder of {what}: it is neither at {os.path.abspath(name)} nor in the hub's cache "
            f"({constants.HF_HUB_CACHE}), and it could not be fetched ({reason}); on a machine with a network: "
            f"hf download {name} --local-dir {name}",
        ) from None


def read_checkpoint(folder: str, what: str) -> tuple[dict, dict[str, Tensor]]:
    """Read config.json and model.safetensors, or its shards, of a folder -> (config, weights by name)."""
    def require_file(name):
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileNotFoundError(f"{folder} is not a folder of {what}: it has no {name}")
        return os.path.join(folder, name)

    config, files, weights = read_json(require_file("config.json")), ["model.safetensors"], {}
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index) and not os.path.isfile(os.path.join(folder, files[0])):
        shards = read_json(index).get("weight_map")
        require(isinstance(shards, dict) and all(isinstance(file, str) for file in shards.values()), index,
                "weight_map", "an object: weight name -> file", shards)
        files = sorted(set(shards.values()))
    for name in files:
        weights |= read_safetensors(require_file(name))[0]
    return config, weights


def load_state_dict_strict(model: nn.Module, weights: dict[str, Tensor], path: str, assign: bool = False):
    """Load every weight of the model, and no other. A ValueError names the first one that does not fit."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    actual = {key: tuple(value.shape) for key, value in weights.items()}
    for key in [*expected, *(key for key in actual if key not in expected)]:
        if expected.get(key) != actual.get(key):
            raise ValueError(f"{path}: {key} must be {expected.get(key, 'absent')}, got {actual.get(key, 'no weight')}")
    model.load_state_dict(weights, assign=assign)


def save_weights(model: nn.Module, folder: str):
    """
    Write model.safetensors into the folder, complete or not at all.

    It holds checksums of the weights and of the folder's tokenizer.json, which verify_tokenizer reads.
    """
    tokenizer, metadata = os.path.join(folder, "tokenizer.json"), {"format": "pt"}
    if os.path.isfile(tokenizer):
        metadata["tokenizer.json"] = hash_file(tokenizer)
    write_safetensors(os.path.join(folder, "model.safetensors"), model.state_dict(), metadata)


def verify_tokenizer(path: str):
    """Raise a ValueError if a tokenizer.json is not the one that model.safetensors beside it was saved with."""
    weights = os.path.join(os.path.dirname(path), "model.safetensors")
    if not os.path.isfile(weights):
        return
    with open_safetensors(weights) as f:
        expected = (f.metadata() or {}).get("tokenizer.json")
    if expected not in (None, hash_file(path)):
        raise ValueError(f"{path} is damaged or was replaced: it is not the one that {weights} was saved with. Restore "
                         "it from a copy")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors

def write_safetensors(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """
    Write tensors and texts, complete or not at all, with a checksum of both, which read_safetensors verifies.

    Equal contents give equal files: the library writes the texts in a random order, so the header is written again.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    content = memoryview(save(tensors, {**metadata, "checksum": hash_tensors(tensors, metadata)}))
    end = 8 + int.from_bytes(content[:8], "little")         # of the header, whose length is in the first 8 bytes
    header = json.loads(bytes(content[8:end]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    header = json.dumps(header, separators=(",", ":")).encode()
    header = header.ljust(-len(header) // 8 * -8)           # tensors begin at a multiple of 8
    with atomic_write(path) as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(content[end:])


def read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    Read a safetensors file -> (tensors by name, metadata). ValueError if it has a checksum, as write_safetensors'
    have, that is wrong.
    """
    with open_safetensors(path) as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}     # noqa: SIM118
    checksum = metadata.pop("checksum", None)
    if checksum not in (None, hash_tensors(tensors, metadata)):
        raise ValueError(f"{path} is damaged: its checksum is wrong. Restore it from a copy, or delete it and write it "
                         "again (a run's: with --resume)")
    return tensors, metadata


@contextmanager
def open_safetensors(path: str):
    """Open a safetensors file for reading. A ValueError says that it is none."""
    try:
        # By its number, as the library takes no name that is not UTF-8.
        with open(path, "rb") as file, safe_open(f"/dev/fd/{file.fileno()}", "pt") as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {format_error(error)}") from None


def hash_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Hash the names, dtypes, shapes and contents of tensors on the CPU, and the metadata beside them."""
    content = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, x in sorted(tensors.items()):
        content.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        content.update(x.contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else b"")
    return content.hexdigest()


def hash_file(path: str) -> str:
    """Hash the content of a file."""
    content = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while chunk := f.read(2 ** 20):
            content.update(chunk)
    return content.hexdigest()
