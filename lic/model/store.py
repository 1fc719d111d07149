"""Weights files: one safetensors file a model, with configuration, tables, identities and provenance inside.

Listing models never imports torch. A file holds, for the matrices of the exact entropy path, 8-bit integers with a
power of two for each row, and its biases as 32-bit floats; for those of the other networks 8-bit rows with a float
scale; 16-bit floats for whatever else the networks have, for the centroids and the shortcut's first rows, 12-bit
integers with a power of two for each of its other rows, 32-bit floats for gains and priors, and the integer tables.
Large arrays that become much smaller by it are deflated.

The *entropy identity* of a model is the first 4 bytes of the SHA-256 over everything that the symbols of a file depend
on: configuration, units of the activations, the arrays of h_s and of the context model, the tables, trellis, chain and
neighbours. The *synthesis identity* (2 bytes) covers what pixels depend on besides: g_s, the shortcut, the gains, the
centroids, the offsets and the refinement. Weights with a refinement have a second one, without it, so that they still
decode the files of weights that had none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lic import atomic
from lic.coder import Tables
from lic.container import Header
from lic.errors import LicError, UnsupportedError
from lic.model.config import Config
from lic.model.dependent import FIRST_CHAINS, Chains, Dependent, polynomials_of, trellis_of
from lic.model.neighbours import TYPES, Neighbours
from lic.quality import Tune

if TYPE_CHECKING:
    from lic.model.codec import CodecModel

SUFFIX = ".safetensors"
EXACT_PARTS = ("h_s", "context")
ENTROPY_PARTS = (*EXACT_PARTS, "units", "tables", "trellis", "chain", "neighbours")
SYNTHESIS_PARTS = ("shortcut", "g_s", "log_gain", "log_igain", "centroids", "offsets", "refinement")
REVISION = 2  # of what the code computes from the same arrays: raised whenever that changes
NETWORKS = ("g_a", "g_s", "h_a", "refinement")
HALF_PARTS = (*NETWORKS, *EXACT_PARTS, "shortcut", "centroids")
SHORTCUT, PACKED = "shortcut.weight", "shortcut.packed"
LARGE_ROWS = 16  # of the shortcut, whose latents span so many steps that 12 bits would show
SMALLEST_ROW = 1e-3  # largest value of a row of 8-bit integers; smaller rows lose bits, which do not matter
REFINEMENT = "refinement"  # the field of the configuration, and the part
LIMIT = "g_s.limit"  # Synthesis.limit, left out where it is infinite
ADAPTED = "g_a.last.left"  # an adapter's first half; if there is one, every matrix of g_a and g_s has one of that rank
CENTROIDS = "centroids"  # left out where they are zeros
OFFSETS = "offsets"  # of dependent quantisation; weights without are of scalar quantisation
TRELLIS, CHAIN = "trellis", "chain"  # of dependent quantisation, the second the least and large of its Chains
LARGEST_TABLE = 256  # states; trellises of more are stored as their polynomials
NEIGHBOURS = "neighbours."  # of dependent quantisation, a part: the arrays of lic.model.neighbours.Neighbours
SCALE, EXPONENT = ".row_scale", ".exponent"  # what goes with an array of 8-bit integers
DEFLATE_FROM, DEFLATE_TO = 2048, 0.9  # bytes of an array, and the share of them, or less, that are worth the trouble
MOST_INFLATED = 2**28  # bytes of an array: far more than any has


@dataclass(frozen=True)
class ModelInfo:
    """What a weights file says of itself."""

    name: str
    path: Path
    entropy_id: bytes
    synthesis_id: bytes
    plain_synthesis_id: bytes | None  # without its refinement, if it has one
    config: dict[str, Any]
    grids: dict[str, int]  # fraction bits of the activations of the exact path
    parameters: int
    kmac: dict[str, float]  # thousand multiply-adds per pixel of each part, and of the whole decoder
    rate_range: tuple[float, float] | None  # bits per pixel at quality 0 and 100, Kodak average
    provenance: dict[str, Any]
    shared_from: str | None  # weights file in the same folder that holds the other arrays
    shared: list[str]  # their names, or those of whole parts with a dot: "g_a."
    deflated: dict[str, tuple[str, list[int]]]  # type and shape of the arrays that are stored as zlib streams

    def plain(self) -> ModelInfo:
        """The same model without its refinement, if it has one; parameters and kmac still count that."""
        if self.plain_synthesis_id is None:
            return self
        config = {name: value for name, value in self.config.items() if name != REFINEMENT}
        return replace(self, synthesis_id=self.plain_synthesis_id, plain_synthesis_id=None, config=config)

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, which is read when this is first asked for. Raises OSError."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A network on its device and its integer tables: rows of z are (bucket, channel), of y (scale, fraction) or those
    of :class:`lic.model.dependent.Dependent`."""

    info: ModelInfo
    net: CodecModel
    y_tables: Tables
    z_tables: Tables
    device: str


def own_folders() -> list[Path]:
    """Where the weights are that come with lic: the installed package, the checkout."""
    package = Path(__file__).resolve().parent.parent
    return [package / "weights", package.parent / "weights"]


def folders() -> list[Path]:
    """Where weights are looked for: $LIC_MODELS, then those that come with lic."""
    return [Path(p) for p in os.environ.get("LIC_MODELS", "").split(os.pathsep) if p] + own_folders()


def available() -> list[ModelInfo]:
    """Every model found, the first of each name in search order; what is no weights file or unreadable is left out."""
    found: dict[str, ModelInfo] = {}
    for folder in folders():
        for path in sorted(folder.glob("*" + SUFFIX)):
            try:
                info = read_info(path)
            except (LicError, OSError):
                continue
            found.setdefault(info.name, info)
    return list(found.values())


def read_info(path: Path) -> ModelInfo:
    """Read the header of a weights file only. Raises LicError if it is not a lic weights file, OSError."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < path.stat().st_size else b""
    try:
        meta = json.loads(json.loads(header)["__metadata__"]["lic"])
        rate_range = meta["rate_range"]
        return ModelInfo(
            name=meta["name"],
            path=path,
            entropy_id=bytes.fromhex(meta["entropy_id"]),
            synthesis_id=bytes.fromhex(meta["synthesis_id"]),
            plain_synthesis_id=bytes.fromhex(plain) if (plain := meta.get("plain_synthesis_id")) else None,
            config=meta["config"],
            grids=meta["grids"],
            parameters=meta["parameters"],
            kmac=meta["kmac"],
            rate_range=tuple(rate_range) if rate_range else None,
            provenance=meta["provenance"],
            shared_from=meta.get("shared_from"),
            shared=[str(name) for name in meta.get("shared", [])],
            deflated={str(name): (str(kind), list(shape)) for name, (kind, shape) in meta.get("deflated", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LicError(f"{path}: not a lic weights file") from error


def find(name: str, tune: Tune = "psnr") -> ModelInfo:
    """The model of that name, tuned as asked if there is a NAME-TUNE. Raises LicError if there is no NAME."""
    models = available()
    for wanted in (f"{name}-{tune}", name):
        for info in models:
            if info.name == wanted:
                return info
    names = ", ".join(m.name for m in models) or "none"
    raise LicError(f"no model named {name!r}; installed: {names}")


def load(name: str, device: str = "cpu") -> LoadedModel:
    """Load a model by name onto a device. Raises LicError if there is none, or a damaged one."""
    return load_file(find(name), device)


def find_for(header: Header) -> ModelInfo:
    """The installed model that a file was made with. Raises UnsupportedError naming it if there is none."""
    models = available()
    for info in (its for model in models for its in (model, model.plain())):
        if info.entropy_id == header.entropy_id and info.synthesis_id == header.synthesis_id:
            return info
    wanted = f"{header.model} {header.entropy_id.hex()}-{header.synthesis_id.hex()}"
    if any(info.name == header.model for info in models):
        raise UnsupportedError(f"needs other weights than the installed ones of that name: {wanted}")
    raise UnsupportedError(f"needs a model that is not installed: {wanted}")


def load_file(info: ModelInfo, device: str = "cpu") -> LoadedModel:
    """Load a weights file. Raises UnsupportedError if its contents do not fit its own identities."""
    from safetensors import SafetensorError

    try:
        arrays = read_arrays(info)
        if info.shared_from is not None:
            others = read_arrays(read_info(info.path.with_name(Path(info.shared_from).name)))
            parts = tuple(name for name in info.shared if name.endswith("."))
            names = {name for name in others if name.startswith(parts)} | set(info.shared).difference(parts)
            arrays = {name: others[name] for name in names} | arrays
        if REFINEMENT not in info.config:
            arrays = _plain(arrays)
        tables = {
            kind: Tables.from_arrays({k.split(".")[2]: v for k, v in arrays.items() if k.startswith(f"tables.{kind}.")})
            for kind in ("y", "z")
        }
        if identities(info.config, info.grids, arrays) != (info.entropy_id, info.synthesis_id):
            raise ValueError("its contents do not match its identity")
        dependent = None
        neighbours = _neighbours(arrays)
        if OFFSETS not in arrays and neighbours is not None:
            raise ValueError("neighbours without dependent quantisation")
        if OFFSETS in arrays:
            if TRELLIS not in arrays:
                raise ValueError("dependent quantisation without a trellis, as on 2026-11-29 alone")
            trellis = _trellis(arrays[TRELLIS])
            chains = _chains(arrays[CHAIN]) if CHAIN in arrays else FIRST_CHAINS
            offsets = arrays[OFFSETS].astype(np.float32)
            dependent = Dependent(tables["y"], offsets, trellis, chains, neighbours)
        net = _network(info, arrays, dependent, device)
    except (SafetensorError, LicError, zlib.error, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{info.path}: damaged or incompatible weights: {reason}") from error
    return LoadedModel(info, net, tables["y"], tables["z"], device)


def read_arrays(info: ModelInfo) -> dict[str, np.ndarray]:
    """What the file itself holds. Raises SafetensorError, zlib.error, ValueError, KeyError, TypeError and OSError."""
    from safetensors.numpy import load_file as read

    arrays = read(info.path)
    for name, (kind, shape) in info.deflated.items():
        data = zlib.decompressobj().decompress(arrays[name].tobytes(), MOST_INFLATED)
        arrays[name] = np.frombuffer(bytearray(data), kind).reshape(shape)  # bytes alone could not be written to
    return arrays


def _plain(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the model without its refinement."""
    return {name: value for name, value in arrays.items() if not name.startswith(REFINEMENT + ".")}


def _deflated(value: np.ndarray) -> np.ndarray:
    """As the bytes of a zlib stream, or unchanged where that is not worth the trouble."""
    if value.nbytes < DEFLATE_FROM:
        return value
    stream = np.frombuffer(zlib.compress(value.tobytes(), 9), np.uint8)
    return stream if stream.nbytes <= DEFLATE_TO * value.nbytes else value


def _network(info: ModelInfo, arrays: dict[str, np.ndarray], dependent: Dependent | None, device: str) -> CodecModel:
    """The network, exact, with its certificates checked. Raises ValueError, KeyError or RuntimeError."""
    import torch

    from lic import exact
    from lic.model.codec import CodecModel

    net = CodecModel(Config.from_json(info.config))
    net.quantise(dependent)
    net.g_s.limit = float(arrays[LIMIT][0]) if LIMIT in arrays else math.inf
    if ADAPTED in arrays:
        net.adapt(len(arrays[ADAPTED]))
    state = {CENTROIDS: torch.zeros_like(net.centroids)}
    for name, value in arrays.items():
        if (
            name.partition(".")[0] in ("tables", "units", "neighbours")
            or name.endswith((SCALE, EXPONENT))
            or name in (LIMIT, PACKED, OFFSETS, TRELLIS, CHAIN)
        ):
            continue
        full = value.astype(np.float32)
        if name == SHORTCUT and PACKED in arrays:  # which weights from before there were packed rows have not
            full = _shortcut(arrays)
        elif name + SCALE in arrays:
            full = _rows(arrays, name)
        elif name + EXPONENT in arrays:
            full = _scaled(full, -arrays[name + EXPONENT].astype(np.int32))
        state[name] = torch.from_numpy(full)
    net.load_state_dict(state)
    for name, layer in net.exact_layers().items():
        exponent = arrays[f"{name}.weight{EXPONENT}"]
        if exponent.min() < 0 or exponent.max() > exact.MAX_EXPONENT or arrays[f"{name}.weight"].min() < -127:
            raise ValueError("its weights or their exponents are out of range")
        layer.exponent = torch.from_numpy(exponent)
    net.set_grid_bits(info.grids)
    log2, index = (torch.from_numpy(arrays[f"units.{name}"]) for name in ("log2", "index"))
    if int(log2.abs().max()) > exact.MAX_LOG2:
        raise ValueError("a unit of its latents is out of range")
    net.unit_tables = log2, index
    net.set_exact(True)
    net.eval().requires_grad_(False)
    with exact.exact_arithmetic():
        net.visit()
    exact.known_answer(torch.device(device))
    net.unit_tables = log2.to(device), index.to(device)
    return net.to(device)


def _trellis(array: np.ndarray) -> np.ndarray:
    """Raises ValueError if the array says nothing of a trellis."""
    if array.dtype == np.uint16 and array.shape == (2,) and array[0] > 2 * LARGEST_TABLE:
        return trellis_of(*array.tolist())
    if array.dtype != np.uint8 or array.ndim != 2:
        raise ValueError("a trellis of no known kind")
    return array.astype(np.int64)


def _stored_trellis(trellis: np.ndarray) -> np.ndarray:
    """The inverse: many states as their polynomials. Raises ValueError if they have none."""
    if len(trellis) <= LARGEST_TABLE:
        return trellis.astype(np.uint8)
    return np.array(polynomials_of(trellis), np.uint16)


def _chains(array: np.ndarray) -> Chains:
    """Raises ValueError if the array says nothing of chains."""
    if array.dtype != np.uint8 or array.shape != (2,):
        raise ValueError("chains of no known kind")
    return Chains(*array.tolist())


def _neighbours(arrays: dict[str, np.ndarray]) -> Neighbours | None:
    """Raises ValueError if the arrays say nothing of neighbours."""
    found = {name.removeprefix(NEIGHBOURS): a for name, a in arrays.items() if name.startswith(NEIGHBOURS)}
    if not found:
        return None
    if found.keys() != TYPES.keys() or any(
        array.dtype != TYPES[name] or array.ndim != (1 if name == "channels" else 2) for name, array in found.items()
    ):
        raise ValueError("neighbours of no known kind")
    return Neighbours(**{name: array.astype(np.int64) for name, array in found.items()})


def without_dependence(model: LoadedModel) -> LoadedModel:
    """The same model with scalar quantisation, in which others can code its integers. Changes its network."""
    from lic.coder import gaussian_tables

    if model.net.dependent is None:
        return model
    model.net.quantise(None)
    return replace(model, y_tables=gaussian_tables())


def identities(config: dict[str, Any], grids: dict[str, int], arrays: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    """(entropy identity, synthesis identity) of a configuration, units and the arrays of a weights file."""
    entropy, synthesis = hashlib.sha256(), hashlib.sha256()
    shape = {k: v for k, v in config.items() if k not in ("name", REFINEMENT)} | {"grids": grids, "revision": REVISION}
    entropy.update(json.dumps(shape, sort_keys=True).encode())
    for name in sorted(arrays):
        part = name.partition(".")[0]
        digest = entropy if part in ENTROPY_PARTS else synthesis if part in SYNTHESIS_PARTS else None
        if digest is not None:
            value = arrays[name]
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return entropy.digest()[:4], synthesis.digest()[:2]


def write_model(path: Path, net: CodecModel, meta: dict[str, Any], shared_from: ModelInfo | None = None) -> None:
    """Write a weights file of a network whose exact path is frozen (:meth:`CodecModel.freeze`).

    ``meta`` holds rate_range and provenance; everything else is made here. With ``shared_from`` the file leaves out the
    arrays that are the same in that file, which must lie in the same folder, or is replaced: then it stays whole. The
    exact path of the network is rounded to what the file holds. Raises ValueError, before anything is written, if it is
    not frozen or a certificate fails.
    """
    import torch
    from safetensors.numpy import save

    from lic.model.complexity import kmac_per_pixel
    from lic.model.tables import make_tables

    layers = net.exact_layers()
    if any(layer.exponent is None for layer in layers.values()):
        raise ValueError("the exact path is not frozen")
    theirs = {} if shared_from is None else read_arrays(shared_from)
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in net.state_dict().items():
        value = tensor.detach().float().cpu().numpy()
        part, layer = name.partition(".")[0], layers.get(name.removesuffix(".weight"))
        if layer is not None and layer.exponent is not None and name.endswith(".weight"):
            exponent = layer.exponent.cpu().numpy()
            arrays[name] = _scaled(value, exponent).astype(np.int8)
            arrays[name + EXPONENT] = exponent
        elif part in NETWORKS and value.ndim == 2 and name.endswith((".weight", ".left", ".right")):
            scale = _half(np.maximum(np.abs(value).max(axis=1), SMALLEST_ROW) / 127)
            if name + SCALE in theirs and np.array_equal(_rows(theirs, name), value):
                scale = theirs[name + SCALE]  # which the largest value need not give to the last bit
            arrays[name] = np.rint(value / scale.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
            arrays[name + SCALE] = scale
        elif name in theirs and np.array_equal(theirs[name].astype(np.float32), value):
            arrays[name] = theirs[name]
        elif name == SHORTCUT:
            large, small = np.split(value, [LARGE_ROWS])
            exponent = np.floor(np.log2(2047 / np.abs(small).max(axis=1).clip(SMALLEST_ROW))).astype(np.int8)
            arrays[SHORTCUT] = _half(large)
            arrays[PACKED] = pack12(np.rint(_scaled(small, exponent)).astype(np.int16))
            arrays[PACKED + EXPONENT] = exponent
            tensor.copy_(torch.from_numpy(_shortcut(arrays)))
        elif part in HALF_PARTS and name.removesuffix(".bias") not in layers:
            arrays[name] = _half(value)
            tensor.copy_(torch.from_numpy(arrays[name].astype(np.float32)))
        else:
            arrays[name] = value
    if net.dependent is not None:
        arrays[OFFSETS] = _half(net.dependent.offsets)
        arrays[TRELLIS] = _stored_trellis(net.dependent.trellis)
        if net.dependent.chains != FIRST_CHAINS:
            arrays[CHAIN] = np.array([net.dependent.chains.least, net.dependent.chains.large], np.uint8)
        if (neighbours := net.dependent.neighbours) is not None:
            arrays |= {NEIGHBOURS + name: array.astype(TYPES[name]) for name, array in vars(neighbours).items()}
    if not arrays[CENTROIDS].any():
        del arrays[CENTROIDS]
    if math.isfinite(net.g_s.limit):
        arrays[LIMIT] = np.array([net.g_s.limit], np.float32)
    with torch.no_grad():
        net.visit()
    for name, table in zip(("log2", "index"), net.unit_tables or net.make_unit_tables(), strict=True):
        arrays[f"units.{name}"] = table.cpu().numpy().astype(np.int32)
    y_tables, z_tables = make_tables(net)
    for kind, tables in (("y", y_tables), ("z", z_tables)):
        for key, value in tables.to_arrays().items():
            arrays[f"tables.{kind}.{key}"] = value
    parent = None if shared_from is None or _is_same(path, shared_from.path) else shared_from.path.name
    shared = {name for name, value in theirs.items() if name in arrays and np.array_equal(arrays[name], value)}
    own = {k: np.ascontiguousarray(v) for k, v in arrays.items() if parent is None or k not in shared}
    stored = {k: _deflated(v) for k, v in own.items()}
    config = net.config.to_json()
    grids = net.grid_bits()
    as_read = json.loads(json.dumps(config))
    entropy_id, synthesis_id = identities(as_read, grids, arrays)
    plain_id = identities(as_read, grids, _plain(arrays))[1].hex() if REFINEMENT in config else None
    header = {
        "name": net.config.name,
        "config": config,
        "grids": grids,
        "entropy_id": entropy_id.hex(),
        "synthesis_id": synthesis_id.hex(),
        "plain_synthesis_id": plain_id,
        "parameters": sum(p.numel() for p in net.parameters()),
        "kmac": kmac_per_pixel(net),
        "rate_range": meta.get("rate_range"),
        "provenance": meta["provenance"],
        "shared_from": parent,
        "shared": [] if parent is None else _parts_and_names(shared, theirs, arrays),
        "deflated": {k: (v.dtype.str, v.shape) for k, v in own.items() if stored[k] is not v},
    }
    atomic.write(path, save(stored, {"lic": json.dumps(header)}))


def _parts_and_names(shared: Collection[str], theirs: Collection[str], arrays: Collection[str]) -> list[str]:
    """``shared`` in short: a part that has all of their arrays stands for them. Its own ones go before those."""
    parts = {"".join(name.partition(".")[:2]) for name in theirs}  # "g_a." and the like, or a whole name
    whole = {part for part in parts if all(name in arrays for name in theirs if name.startswith(part))}
    return sorted({part if (part := "".join(name.partition(".")[:2])) in whole else name for name in shared})


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)


def _half(value: np.ndarray) -> np.ndarray:
    """As 16-bit floats. Raises ValueError for values that these cannot hold."""
    half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a weight is too large for 16 bits")
    return half


def _rows(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The matrix (N, K) that is stored as 8-bit rows with scales."""
    return arrays[name].astype(np.float32) * arrays[name + SCALE].astype(np.float32)[:, None]


def _shortcut(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The shortcut's matrix (M, K), of rows of 16-bit floats and packed ones."""
    packed = _scaled(unpack12(arrays[PACKED]).astype(np.float32), -arrays[PACKED + EXPONENT].astype(np.int32))
    return np.concatenate([arrays[SHORTCUT].astype(np.float32), packed])


def pack12(values: np.ndarray) -> np.ndarray:
    """Integers (N, 2·K) from -2048 to 2047 as bytes (N, 3·K), big-endian."""
    even, odd = (values[:, i::2].astype(np.int32) & 0xFFF for i in (0, 1))
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=-1)
    return packed.astype(np.uint8).reshape(len(values), 3 * even.shape[1])


def unpack12(packed: np.ndarray) -> np.ndarray:
    """The integers that :func:`pack12` was given."""
    first, middle, last = (packed[:, i::3].astype(np.int32) for i in range(3))
    values = np.stack([first << 4 | middle >> 4, (middle & 15) << 8 | last], axis=-1)
    return ((values ^ 0x800) - 0x800).astype(np.int16).reshape(len(packed), 2 * first.shape[1])


def _scaled(weight: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """weight · 2**exponent; the exponents of a matrix (N, K) are (N,), of depthwise kernels (..., 3, 3, C) (..., C)."""
    exponent = exponent.astype(np.int32)
    return np.ldexp(weight, exponent[:, None] if weight.ndim == 2 else exponent[..., None, None, :])
