"""A teacher and a student graph, evaluated side by side from one cut to the next over a set of images.

A cut is a value through which everything passes, such as the output of a residual block. Between two cuts both
networks need nothing but their values at the first, so each part of a deep network can be fitted without running the
parts before it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from pipeline.errors import FoldError

__all__ = ["Images", "Walk", "as_batches", "cuts", "first_image", "run", "value_name"]

_NO_IMAGE, _IMAGES = "no image was given", "pass a tensor of images, or batches that can be read again"

Images = Tensor | Iterable[Tensor | Sequence[Tensor]] | Callable[[], Iterable[Tensor | Sequence[Tensor]]]


def as_batches(images: Images, batch_size: int, *, again: bool = True) -> Callable[[], Iterator[Tensor]]:
    """A function that starts a new pass over images.

    Args:
        images: Tensor[N, C, H, W]; or an iterable of such batches that can be iterated again, alone or with labels
            after them; or a function that returns such an iterable.
        batch_size: Size of the batches that a tensor is cut into.
        again: Whether more than one pass is to come.

    Raises:
        FoldError: More is to come, but the images can be read only once.
    """
    if again and isinstance(images, Iterator):
        raise FoldError(f"images is a {type(images).__name__}, which can be read only once", hint=_IMAGES)

    def begin() -> Iterator[Tensor]:
        if isinstance(images, Tensor):
            for start in range(0, images.shape[0], batch_size):
                yield images[start : start + batch_size]
            return
        for batch in images() if callable(images) else images:
            yield batch if isinstance(batch, Tensor) else batch[0]

    return begin


def first_image(batches: Callable[[], Iterator[Tensor]]) -> Tensor:
    """The first image of a pass, Tensor[1, C, H, W].

    Raises:
        FoldError: There is none.
    """
    example = next(batches(), torch.empty(0))[:1]
    if not example.numel():
        raise FoldError(_NO_IMAGE, hint=_IMAGES)
    return example


def value_name(node: fx.Node) -> str:
    """Name of the value that a node computes, the same in a graph and in a folded copy of it."""
    return str(node.meta.get("stands_for", node.name))


def cuts(graph: fx.Graph) -> list[fx.Node]:
    """Values through which everything passes, from the input to what the output returns."""
    left: dict[fx.Node, int] = {}
    found = []
    for node in graph.nodes:
        if node.op in ("output", "get_attr"):
            continue
        for source in set(node.all_input_nodes):
            if source in left:
                left[source] -= 1
                if not left[source]:
                    del left[source]
        left[node] = len(node.users)
        if len(left) == 1:
            found.append(node)
    return found


def run(
    traced: fx.GraphModule, start: fx.Node, stop: fx.Node, value: Tensor, wanted: Collection[fx.Node] = ()
) -> dict[fx.Node, Tensor]:
    """Evaluates a graph between two cuts.

    Args:
        traced: The graph.
        start: A cut, whose value is given.
        stop: A later cut.
        value: The value at `start`, Tensor[N, ...].
        wanted: Values in between to return as well.

    Returns:
        The values of `stop` and of the wanted nodes.
    """
    values = {start: value}
    if start is stop:
        return values
    running = False
    left: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        if node is start:
            running = True
            continue
        if not running and node.op != "get_attr":
            continue
        values[node] = _evaluate(traced, node, values)
        if node is stop:
            break
        left[node] = len(node.users)
        for source in node.all_input_nodes:
            if source in left:
                left[source] -= 1
                if not left[source] and source not in wanted:
                    del values[source]
    return {node: values[node] for node in (stop, *wanted) if node in values}


def _evaluate(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    args = fx.map_arg(node.args, lambda source: values[source])
    kwargs = fx.map_arg(node.kwargs, lambda source: values[source])
    if node.op == "call_module":
        out: Tensor = traced.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_function":
        assert callable(node.target)
        out = node.target(*args, **kwargs)
    elif node.op == "call_method":
        out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        module, _, name = str(node.target).rpartition(".")
        out = getattr(traced.get_submodule(module), name)
    return out


class Walk:
    """Values of a teacher and a student at a cut, for every image of a set.

    Args:
        teacher: The original network's graph.
        student: A graph whose cuts carry the names of the teacher's cuts.
        images: Starts a pass over batches Tensor[N, C, H, W].
        cache_bytes: Values up to this size are kept; a larger set is run through both networks from the start
            in every pass, in memory that does not depend on the number of images.
    """

    def __init__(
        self,
        teacher: fx.GraphModule,
        student: fx.GraphModule,
        images: Callable[[], Iterator[Tensor]],
        *,
        cache_bytes: int,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.cache_bytes = cache_bytes
        known = {value_name(node): node for node in cuts(teacher.graph)}
        self.pairs = [(known[name], node) for node in cuts(student.graph) if (name := value_name(node)) in known]
        self.at = 0
        self.alike = True  # until something is fitted, the student is the teacher
        self.images = 0  # how many, known after the first advance
        self.batch_count = 0  # the same
        self._images = images
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        for module in (*teacher.modules(), *student.modules()):
            # A value that is wanted later must not be overwritten by the activation after it.
            if isinstance(getattr(module, "inplace", None), bool):
                module.inplace = False  # type: ignore[assignment]

    @property
    def keeps_values(self) -> bool:
        """Whether the values at the present cut are in memory."""
        return self._kept is not None

    def mark(self) -> Callable[[], None]:
        """A function that goes back to the present cut, whose values no later change to the student concerns."""
        at, kept = self.at, self._kept

        def go_back() -> None:
            self.at, self._kept = at, kept

        return go_back

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Values (teacher's, student's) at the present cut, batch by batch."""
        if self._kept is not None:
            yield from self._kept
            return
        first, here = self.pairs[0], self.pairs[self.at]
        for batch in self._images():
            yield self._both(batch, batch, first, here)

    def parts(self, held_out: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Values (teacher's, student's) at the present cut, and whether they are of images to hold out.

        Every so many-th batch is held out; of a set with fewer batches, every so many-th image; of a set with fewer
        images, none.
        """
        before = 0
        for number, (of_teacher, of_student) in enumerate(self.batches(), start=1):
            if self.batch_count >= held_out:
                yield of_teacher, of_student, number % held_out == 0
                continue
            index = torch.arange(before + 1, before + of_teacher.shape[0] + 1, device=of_teacher.device)
            before += of_teacher.shape[0]
            for part, held in ((index % held_out != 0, False), (index % held_out == 0, True)):
                if part.any():
                    yield of_teacher[part], of_student[part], held

    def _both(
        self,
        of_teacher: Tensor,
        of_student: Tensor,
        start: tuple[fx.Node, fx.Node],
        stop: tuple[fx.Node, fx.Node],
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = run(self.teacher, start[0], stop[0], of_teacher)[stop[0]]
            if self.alike:
                return target, target
            return target, run(self.student, start[1], stop[1], of_student)[stop[1]]

    def advance(self, to: int) -> None:
        """Goes to a later cut, keeping the values there if they fit."""
        start, stop = self.pairs[self.at], self.pairs[to]
        kept: list[tuple[Tensor, Tensor]] | None = []
        size = self.images = self.batch_count = 0
        for of_teacher, of_student in self.batches():
            self.images += of_teacher.shape[0]
            self.batch_count += 1
            if kept is not None:
                values = self._both(of_teacher, of_student, start, stop)
                size += sum(value.nbytes for value in values[: 1 if self.alike else 2])
                kept = [*kept, values] if size <= self.cache_bytes else None
        if not self.images:
            raise FoldError(_NO_IMAGE, hint=_IMAGES)
        self._kept = kept
        self.at = to

    def between(self, start: int, stop: int) -> list[tuple[str, nn.Module, fx.Node]]:
        """Layers of the student between two cuts: name, module, node."""
        found, running = [], False
        first, last = self.pairs[start][1], self.pairs[stop][1]
        for node in self.student.graph.nodes:
            if running and node.op == "call_module":
                found.append((str(node.target), self.student.get_submodule(str(node.target)), node))
            if node is first:
                running = True
            if node is last:
                break
        return found

    def has_convolution(self, start: int, stop: int) -> bool:
        """Whether the student has a convolution between two cuts."""
        return any(isinstance(module, nn.Conv2d) for _, module, _ in self.between(start, stop))
