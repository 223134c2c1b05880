"""CUDA graphs: a forward is recorded once for each shape of its input; from then on a call starts one launch."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_map_only

from tokencut.limits import check_number
from tokencut.messages import listed, one_line
from tokencut.model import require_one_schedule
from tokencut.observers import Observer

# Until then kernels have been compiled and chosen, and libraries have taken their workspaces.
WARM_UPS = 3
DEFAULT_MAX_GRAPHS = 8
# Whose memory is where they say: not sharded, quantised or fake ones.
_PLAIN = (Tensor, nn.Parameter)


def capture(
    model: nn.Module,
    example: Tensor,
    *,
    max_graphs: int = DEFAULT_MAX_GRAPHS,
    copy: bool = True,
    observer: Observer | None = None,
) -> CapturedModel:
    """Has a model run from CUDA graphs, so that small batches do not wait for their kernels to be started one by one.

    The model is recorded for the example at once, and for any other shape, dtype or autocast when it first comes.
    Weights changed in place are seen by the next call; weights or modules put in the place of others (`.to()`, a new
    head) are noticed and recorded anew. Other settings that change after a capture, such as timm's `global_pool`, are
    not seen: call `forget()`. Calls may come from several threads and streams.

    Where nothing can be captured the model is called as it is, and a note says why: without a GPU, in training mode,
    where gradients are asked for, under `torch.compile`, with hooks on modules, with more arguments than the images, or
    where CUDA refuses, such as for an operation that waits for the GPU.

    Args:
        model: Any model on a GPU in eval mode, dense or compressed; it is not copied.
        example: Images as they will come, `(B, C, H, W)`, on the model's device and of its dtype.
        max_graphs: How many graphs are kept; the one unused for longest gives way. They share the memory for what a
            forward holds between its layers.
        copy: Whether each call returns a tensor of its own. Else the result holds until the next call, of any shape.
        observer: Told each reason why the model is called as it is, once.

    Returns:
        A module with the model's input, output and attributes; `model` is the model itself.

    Raises:
        UsageError: `max_graphs` is no number that it may be.

    Example:
        >>> import timm, torch, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit").eval(), keep=0.5, layers=[2, 4])
        >>> images = torch.zeros(2, 3, 160, 160)
        >>> fast = tokencut.capture(model, images)
        >>> with torch.no_grad():
        ...     logits = fast(images)
        >>> logits.shape, fast.notes
        (torch.Size([2, 1000]), ('images on cpu are not captured: CUDA graphs need an NVIDIA GPU',))
    """
    inside = model.model if isinstance(model, CapturedModel) else model
    captured = CapturedModel(inside, max_graphs=max_graphs, copy=copy, observer=observer)
    captured.record(example)
    return captured


class CapturedModel(nn.Module):
    """A model run from CUDA graphs; made by `capture`.

    Attributes:
        model: The model.
        max_graphs: How many graphs are kept.
        copy: Whether each call returns a tensor of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_graphs: int = DEFAULT_MAX_GRAPHS,
        copy: bool = True,
        observer: Observer | None = None,
    ) -> None:
        """Captures nothing yet; the arguments are those of `capture`."""
        check_number("max_graphs", max_graphs)
        require_one_schedule(model, "capture")
        super().__init__()
        self.model = model
        self.max_graphs = max_graphs
        self.copy = copy
        self.training = model.training
        self._observer = observer or Observer()
        self._told: dict[str, None] = {}
        self._recorder = _Recorder(model)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the model was called as it is; empty where every call came from a graph."""
        return tuple(self._told)

    @property
    def graphs(self) -> int:
        """How many graphs there are now."""
        return len(self._recording().graphs)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for images `(B, C, H, W)`."""
        if torch.compiler.is_compiling():
            self._tell_compiling()
        elif args or kwargs:
            self._tell("calls with more arguments than the images are not captured; leave them out")
        elif self._ready(images):
            recorder = self._recording()
            with recorder.lock:
                graph = self._graph(recorder, images)
                if graph is not None:
                    return recorder.replay(graph, images, self.copy)
        return self.model(images, *args, **kwargs)

    @torch.no_grad()
    def record(self, images: Tensor) -> bool:
        """Captures a graph for such images, unless there is one.

        Args:
            images: `(B, C, H, W)`; what they show does not matter.

        Returns:
            Whether calls with such images come from a graph.
        """
        if not self._ready(images):
            return False
        recorder = self._recording()
        with recorder.lock:
            return self._graph(recorder, images) is not None

    def forget(self) -> None:
        """Drops all graphs and the memory that they hold; the next call captures anew."""
        self._recorder.forget()

    def _recording(self) -> _Recorder:
        """The graphs of the model that is there now."""
        if self._recorder.model is not self.model:
            self._recorder.forget()
            self._recorder = _Recorder(self.model)
        return self._recorder

    def _ready(self, images: Tensor) -> bool:
        """Whether such a call can come from a graph; tells why not."""
        if not isinstance(images, Tensor) or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
            return False  # somebody looks at the single operations
        if "_is_replica" in vars(self):
            return False  # DataParallel's, which lives for one call
        if images.device.type != "cuda":
            self._tell(f"images on {images.device} are not captured: CUDA graphs need an NVIDIA GPU")
            return False
        if type(images) not in _PLAIN or torch.cuda.is_current_stream_capturing():
            return False  # somebody else's tensors, or graph
        reason = self._recording().watched().obstacle(images)
        if reason is not None:
            self._tell(reason)
        return reason is None

    def _graph(self, recorder: _Recorder, images: Tensor) -> _Graph | None:
        if recorder.gave_way(images):
            self._tell(f"images of more than {self.max_graphs} shapes come in turns, and each capture takes several "
                       "forwards; pad batches to one size, or type "
                       f"`tokencut.capture(model, example, max_graphs={2 * self.max_graphs})`")  # fmt: skip
        graph, failure = recorder.graph(images, self.max_graphs)
        if failure:
            self._tell(f"CUDA could not capture the model, so it is called as it is ({failure})")
        return graph

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told[reason] = None
            self._observer.note(reason)

    @torch.compiler.assume_constant_result
    def _tell_compiling(self) -> None:
        """Tells while a compiler traces, and leaves nothing in its graph."""
        self._tell("under torch.compile nothing is captured; compile the model alone, in mode 'reduce-overhead', which "
                   "captures as well")  # fmt: skip

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """`.to()`, `.half()`, `.cpu()`, ...: does not keep the old weights' memory until the next call."""
        super()._apply(*args, **kwargs)
        self._recorder.check()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, captures anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_recorder", "_observer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._observer = Observer()
        self._recorder = _Recorder(self.model)


@dataclass(frozen=True)
class _Graph:
    """One recorded forward.

    Attributes:
        graph: What is replayed.
        images: Where it reads its input.
        output: Where it leaves its output: a tensor, or whatever holds tensors.
    """

    graph: torch.cuda.CUDAGraph
    images: Tensor
    output: Any


class _Watched:
    """What a graph has taken for granted of a model: asked before every replay, which takes some 60 us for DeiT-S.

    It holds the weights' memory, so that no other weights can come to lie where a graph reads.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        self._settings = [vars(part) for part in parts]
        self._children = [(part._modules, tuple(part._modules.values())) for part in parts if part._modules]
        self._named = [named for part in parts for named in (part._parameters, part._buffers) if named]
        self._hooks = [hooks for part in parts for hooks in (part._forward_pre_hooks, part._forward_hooks)]
        self._hooks += [everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks]
        self._held = [tensor.detach() for tensor in self._tensors()]
        self._odd = sorted({type(tensor).__name__ for tensor in self._tensors() if type(tensor) not in _PLAIN})
        self._addresses = [] if self._odd else self._look()

    def is_same(self) -> bool:
        """Whether modules and weights still are where they were."""
        if self._odd:
            return False
        for now, then in self._children:
            if tuple(now.values()) != then:
                return False
        try:
            return self._look() == self._addresses
        except RuntimeError:  # a weight of a class that has no address has come
            return False

    def obstacle(self, images: Tensor) -> str | None:
        """Why a call with images on a GPU cannot come from a graph; None where it can."""
        for settings in self._settings:
            if settings["training"]:
                return "a model in training mode is not captured; call `model.eval()`"
        if torch.is_grad_enabled() and (images.requires_grad or any(held.requires_grad for held in self._tensors())):
            return "calls that ask for gradients are not captured; call the model under `torch.no_grad()`"
        if self._odd:
            return f"a model with weights of class {listed(self._odd)} is not captured"
        if any(self._hooks):
            return "a model with hooks on its modules is not captured, since a graph would not run them; remove them"
        return None

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for named in self._named for tensor in named.values() if tensor is not None)

    def _look(self) -> list[int]:
        # A plain loop: a generator took twice as long.
        addresses = []
        for named in self._named:
            for tensor in named.values():
                if tensor is not None:
                    addresses.append(tensor.data_ptr())
        return addresses


class _Recorder:
    """The graphs of one model, by what they were recorded for; those that could not be recorded are None.

    They share a pool of memory. Each replay is followed by the copy of its output, in order, also when calls come from
    several streams; so no graph's work is disturbed by another's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lock = threading.RLock()
        self.graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._evicted: set[Hashable] = set()
        self._watched: _Watched | None = None
        self._pool: Any = None
        self._aside: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None

    def watched(self) -> _Watched:
        """The model as it is now; graphs of how it was before are dropped."""
        with self.lock:
            self.check()
            self._watched = self._watched or _Watched(self.model)
            return self._watched

    def check(self) -> None:
        """Drops graphs of how the model was before."""
        with self.lock:
            if self._watched is not None and not self._watched.is_same():
                self.forget()

    def forget(self) -> None:
        """Drops all graphs, and the memory they hold."""
        with self.lock:
            self._finish()
            self.graphs.clear()
            self._failed.clear()
            self._evicted.clear()
            self._watched = self._pool = self._aside = self._stream = None

    def gave_way(self, images: Tensor) -> bool:
        """Whether there was a graph for such images, which had to give way."""
        return _key(images) in self._evicted

    def graph(self, images: Tensor, most: int) -> tuple[_Graph | None, str]:
        """The graph for such images, recorded if there is none.

        Args:
            images: The images.
            most: How many graphs there may be then.

        Returns:
            The graph, or None and, if this call has found that out, why there can be none.
        """
        key = _key(images)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key], ""
        if key in self._failed:
            return None, ""
        while len(self.graphs) >= most:
            self._finish()
            self._evicted.add(self.graphs.popitem(last=False)[0])
        self._evicted.discard(key)
        made = self._record(images)
        if isinstance(made, str):
            self._failed.add(key)
            return None, made
        self.graphs[key] = made
        return made, ""

    def replay(self, graph: _Graph, images: Tensor, copy: bool) -> Any:
        """Runs a graph on images, on the current stream.

        Args:
            graph: Recorded for such images.
            images: The images.
            copy: Whether the output may outlast the next replay.
        """
        with torch.cuda.device(images.device), torch.no_grad():
            self._take_turn(torch.cuda.current_stream())
            graph.images.copy_(images)
            graph.graph.replay()
            return tree_map_only(Tensor, Tensor.clone, graph.output) if copy else graph.output

    def _take_turn(self, stream: torch.cuda.Stream) -> None:
        """Has this stream wait for the one of the call before."""
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _finish(self) -> None:
        """Waits for the last replay, whose memory is about to be given back."""
        if self._stream is not None:
            self._stream.synchronize()

    def _record(self, images: Tensor) -> _Graph | str:
        """A graph for such images, or why there can be none. What the model itself raises is raised."""
        with torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad(), _casting_anew():
            here = torch.cuda.current_stream()
            self._take_turn(here)
            # A stream of its own for warm-up and capture: what libraries work in belongs to a stream, and graphs that
            # were captured in one must not run at the same time.
            aside = self._aside = self._aside or torch.cuda.Stream()
            still = torch.empty_like(images).copy_(images)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self.model(still)
            here.wait_stream(aside)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            made = _captured(lambda: self.model(still), images.device, self._pool, aside, here)
            if isinstance(made, str):
                self._pool = self._aside = None
                return made
            return _Graph(made[0], still, made[1])


def _captured(
    call: Callable[[], object], device: torch.device, pool: Any, aside: torch.cuda.Stream, here: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Any] | str:
    """One graph of a call that has warmed up, with what the call gave, or why there can be none.

    Args:
        call: What to record.
        device: The GPU.
        pool: The memory that graphs share.
        aside: The stream to record in.
        here: The stream that is the current one.
    """
    graph, random = torch.cuda.CUDAGraph(), torch.cuda.default_generators[device.index or 0]
    state = random.clone_state()
    try:
        # Other threads, such as those that load images, may ask the GPU for memory all the while.
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            output = call()
    except RuntimeError as error:
        # Ending a capture that has failed raises once more, and leaves its stream and random numbers behind.
        torch.cuda.set_stream(here)
        random.graphsafe_set_state(state)
        return one_line(str(error.__context__ or error).partition("\n")[0])
    return graph, output


def record_calls(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], object]]:
    """CUDA graphs of calls, to be timed: they share the memory for what they hold and give, so none gives anything.

    Args:
        calls: What to record, by name: each reads tensors that stay where they are.
        device: The GPU.

    Returns:
        The replay of each; the call itself where it cannot be recorded.
    """
    made = dict(calls)
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        here, aside, pool = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        device = torch.device("cuda", torch.cuda.current_device())
        for name, call in calls.items():
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    call()
            here.wait_stream(aside)
            recorded = _captured(call, device, pool, aside, here)
            if isinstance(recorded, str):
                aside, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            else:
                made[name] = recorded[0].replay
            del recorded  # with what it gave, whose memory the next may have
    return made


@contextlib.contextmanager
def _casting_anew() -> Iterator[None]:
    """Has autocast cast weights at every use: a graph that reads casts from before would not see new weights."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _key(images: Tensor) -> Hashable:
    """What a graph is recorded for, the weights aside."""
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return images.shape, images.dtype, images.device, cast
