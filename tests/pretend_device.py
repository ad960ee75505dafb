"""A device for tests, "pretend", that refuses what CUDA refuses and computes on the CPU.

Its tensors hold CPU tensors. An operation that is given some of them and a CPU tensor is an error, but for what CUDA
allows: copies from one to the other, CPU scalars, and CPU indices of its tensors. So a script that would fail on a GPU
because of a tensor on the wrong device fails here, on a machine without one. PyTorch calls backends that are written in
Python experimental.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = aten.copy_.default, aten._to_copy.default  # from one device to the other
WAITS = aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default  # until values are known
INDEXING = aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default  # whose indices may be on the CPU


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", Backend())
DEVICE = torch.device("pretend", 0)
waits: list[str] = []  # operations that have made the program wait for the device


class Pretend(torch.Tensor):
    """A tensor on the device; `held` is its CPU tensor."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Pretend":
        more = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **more)
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # saved as the CPU tensor, which torch.load moves here again
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if getattr(self, "_is_param", False) else made
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.data.__set__:
            args[0].held = args[1].held
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is of the class that it is
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def is_here(value: Any) -> bool:
    return isinstance(value, Pretend) or (isinstance(value, torch.device) and value.type == "pretend")


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """On the CPU, once it is clear that all that takes part is on one device."""
    if torch.is_inference_mode_enabled():  # whose tensors cannot be held by one of ours, and whose operations are whole
        with torch.inference_mode(False), torch.no_grad(), Operations():
            return (function.decompose if function._can_decompose() else function)(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    here = any(map(is_here, devices or leaves))  # where the result is to be
    values = tree_leaves((args[0], args[2:])) if function in INDEXING else leaves
    there = any(isinstance(leaf, torch.Tensor) and not is_here(leaf) and leaf.dim() > 0 for leaf in values)
    ours = any(isinstance(leaf, Pretend) for leaf in leaves)
    masks = function in INDEXING and any(getattr(leaf, "dtype", None) == torch.bool for leaf in tree_leaves(args[1]))
    if (ours and (function in WAITS or masks)) or (function in COPIES and (ours != here or (ours and there))):
        waits.append(str(function))
    if ours and there and function not in COPIES:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    if here and kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: expected a 'pretend' device type for generator but found 'cpu'")

    def held(value: Any) -> Any:
        if isinstance(value, Pretend):
            return value.held
        return torch.device("cpu") if is_here(value) else value

    found = function(*tree_map(held, args), **tree_map(held, kwargs))
    if function is aten.copy_.default:
        return args[0]
    if not here:
        return found
    found = tree_map(lambda value: Pretend(value) if type(value) is torch.Tensor else value, found)
    return return_and_correct_aliasing(function, args, kwargs, found)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """torch.tensor goes to a device past all modes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_here(device := kwargs.get("device")):
            return function(*args, **kwargs | {"device": "cpu"}).to(device)
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretending() -> Iterator[torch.device]:
    """Where tensors can be on the device; files are loaded to it as well."""
    load = torch.load

    def load_to(file: Any, map_location: Any = "cpu", **more: Any) -> Any:
        found = load(file, map_location="cpu", **more)
        return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, found)

    with mock.patch.object(torch, "load", load_to), Functions(), Operations():
        yield DEVICE
