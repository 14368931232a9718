"""The engine: admits prompts, decodes all live leaves together, branches, and hands back finished trees.

A leaf is only a page-table row and a few numbers, so the batch is put together anew at every call from whatever is live.
Every leaf starts the same way: it takes over the cached tokens before its first own token, feeds the last of them again
and samples. For a root that prefix is the prompt, for a branch the prompt and the parent's tokens before the branch point.
"""

import bisect
import collections
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool

from ares_jax.errors import UserError
from ares_jax.models.params import check_flat, to_flat, with_params
from ares_jax.models.qwen2_5_vl import Qwen25VL, VisionInputs
from ares_jax.models.qwen2_5_vl.paged import cache_spec, cached_heads
from ares_jax.sampling.branching import select_branches
from ares_jax.sampling.pages import OutOfPages, PagePool
from ares_jax.sampling.programs import Part, Programs, Prompts, Rows, cut_layers, leaf_keys
from ares_jax.sampling.trajectory import Piece, RolloutGroup, RolloutRequest, Trajectory
from data_pipeline.errors import DataError
from data_pipeline.placeholders import vision_spans
from data_pipeline.vision_layout import vision_layout


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine: all shapes that are ever compiled follow from them."""

    max_slots: int  # leaves decoded together
    page_size: int  # tokens
    num_pages: int
    max_prompt_tokens: int
    max_prompt_patches: int
    max_context_tokens: int  # prompt and response
    prefill_batch: int
    decode_steps: int  # tokens between two looks of the host
    window: int  # tokens of an entropy window
    kernel: str = "xla"  # implementation of `kernels.sample_with_entropy`
    prefill_layers: int = 16  # run between two decode calls


@dataclass(eq=False)
class _Leaf:
    group: "_Group"
    index: int
    parent: int
    start: int  # branch position
    pages: list[int]
    cached: int  # tokens in the cache
    count: int  # response tokens so far
    done: bool = False
    reason: str = ""
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(eq=False)
class _Group:
    number: int
    request: RolloutRequest
    prompt_pages: list[int]
    keys: np.ndarray  # [G, 2] uint32
    leaves: list[_Leaf] = field(default_factory=list)
    waiting: collections.deque = field(default_factory=collections.deque)  # (parent, start) of leaves not yet begun
    branched: bool = False
    filled: bool = False  # the prompt's keys and values are all in the cache

    def page_lists(self) -> list[list[int]]:
        return [self.prompt_pages, *(leaf.pages for leaf in self.leaves)]


@dataclass(frozen=True)
class _Saved:
    """A preempted group: its page lists hold places in `content` for as long as it has no pages."""

    group: _Group
    content: np.ndarray  # [layers, pages (of a compiled size), slots, 2 x heads, head size], in the host's memory
    pages: int


@dataclass(eq=False)
class _Filling:
    """Prompts of one shape on their way through the layers."""

    groups: list[_Group]  # row by row
    prompts: Prompts
    parts: list[Part]
    x: Any = None  # what the next part takes
    done: int = 0  # parts


class Engine:
    """Single-threaded: `submit`, then `step` until it has returned everything."""

    def __init__(
        self,
        model: Qwen25VL,
        options: EngineOptions,
        *,
        eos_token_ids: Sequence[int],
        banned: Bool[np.ndarray, "V"],
        trigger_mask: Bool[np.ndarray, "V"],
        policy_version: int = 0,
    ):
        o, text = options, model.config.text
        if o.max_prompt_tokens % o.page_size:
            raise UserError(
                f"sampler.max_prompt_tokens={o.max_prompt_tokens}: make it a multiple of page_size {o.page_size}"
            )
        self.options = o
        self.policy_version = policy_version
        if o.prefill_layers < 1:
            raise UserError(f"sampler.prefill_layers={o.prefill_layers}: give at least 1")
        flat = to_flat(model)
        self._shapes = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for name, v in flat.items()}
        model = with_params(model, self._shapes)  # its weights must not stay when others come
        self._params = _arranged(flat)
        self._programs = Programs(
            model, eos_token_ids=tuple(eos_token_ids), banned=jnp.asarray(banned), trigger=jnp.asarray(trigger_mask),
            steps=o.decode_steps, kernel=o.kernel, prefill_layers=o.prefill_layers,
        )  # fmt: skip
        self._config = model.config
        self._eos = set(map(int, eos_token_ids))
        # What prompts are padded to: few shapes, as each is compiled.
        self._prompt_sizes = _sizes(o.max_prompt_tokens, o.page_size)
        self._patch_sizes = (0, *_sizes(o.max_prompt_patches, model.config.vision.spatial_merge_size**2))
        self._table_width = -(-o.max_context_tokens // o.page_size)
        self._mesh = _mesh(flat)
        heads = cached_heads(text.num_heads, text.num_kv_heads, self._mesh.shape["tensor"] if self._mesh else 1)
        shape = (text.num_layers, o.num_pages, o.page_size, 2 * heads, text.head_dim)
        with self._on_mesh():
            self._place = NamedSharding(self._mesh, cache_spec(heads)) if self._mesh else None
            self._kv_pages = jnp.zeros(shape, model.text.dtype, device=self._place)
        self._pool = PagePool(o.num_pages)
        self._queue: collections.deque[tuple[int, RolloutRequest]] = collections.deque()
        self._groups: dict[int, _Group] = {}  # admitted, oldest first
        self._fillings: collections.deque[_Filling] = collections.deque()
        self._saved: dict[int, _Saved] = {}
        self._live: list[_Leaf] = []
        self._copies: list[tuple[int, int]] = []
        self._next = 0
        self._begun: set[int] = set()  # requests that were admitted and have not finished
        self._coming: tuple[dict[str, Any], int] | None = None  # weights that wait for what was begun
        self._leaf_pages = 0.0  # running mean over finished groups: pages a leaf had to itself
        self._totals = collections.Counter(prefilled=0, decoded=0, groups=0, preempted=0, calls=0)

    def submit(self, request: RolloutRequest) -> int:
        """Queues a request and returns its number. Raises `UserError` as `check` does."""
        self.check(request)
        number, self._next = self._next, self._next + 1
        self._queue.append((number, request))
        return number

    def room(self, prompt_tokens: int, leaves: int) -> int:
        """Returns the most tokens that each of `leaves` may draw after such a prompt; below 1 there is no room."""
        o = self.options
        pages = (o.num_pages - 1 - -(-prompt_tokens // o.page_size)) // leaves
        return min(o.max_context_tokens, pages * o.page_size) - prompt_tokens

    def check(self, request: RolloutRequest) -> None:
        """Raises `UserError` if a request can never fit, or its image tokens and image features do not match.

        May be called from any thread.
        """
        o, tokens = self.options, len(request.token_ids)
        context = tokens + request.max_new_tokens
        limits = [
            ("prompt tokens", tokens, o.max_prompt_tokens, "sampler.max_prompt_tokens"),
            ("image patches", len(request.patches), o.max_prompt_patches, "sampler.max_prompt_patches"),
            ("prompt and response tokens", context, o.max_context_tokens, "sampler.max_response_tokens"),
        ]
        pages = -(-tokens // o.page_size) + request.group_size * (-(-context // o.page_size))
        limits.append(("cache pages", pages, o.num_pages - 1, "sampler.pages"))
        for what, value, limit, setting in limits:
            if value > limit:
                raise UserError(f"problem {request.problem_id}: {value} {what}, the limit is {limit}; raise {setting}")
        if min(tokens, request.max_new_tokens) < 1 or not 1 <= request.root_leaves <= request.group_size:
            raise UserError(
                f"problem {request.problem_id}: {tokens} prompt tokens, max_new_tokens={request.max_new_tokens}, "
                f"group_size={request.group_size}, root_leaves={request.root_leaves}; need a prompt, a token to draw and "
                "1 <= root_leaves <= group_size"
            )
        if (patches := int(request.grid_thw.prod(axis=1).sum())) != len(request.patches):
            raise UserError(f"problem {request.problem_id}: {len(request.patches)} image patches, grid_thw says {patches}")
        c = self._config
        try:
            vision_spans(
                request.token_ids, request.grid_thw, {c.image_token_id, c.video_token_id}, problem_id=request.problem_id
            )
        except DataError as error:
            raise UserError(str(error)) from None

    def cancel(self, number: int) -> None:
        """Forgets a request; an unknown number is no error (it may just have finished)."""
        self._queue = collections.deque(item for item in self._queue if item[0] != number)
        if number in self._groups:
            self._drop(self._groups[number])
        self._saved.pop(number, None)
        self._forget(number)

    def drawn(self, number: int, seen: Mapping[int, int]) -> list[Piece]:
        """Returns what each leaf of an unfinished request has drawn after its first `seen[leaf]` (default 0) tokens."""
        pieces, group = [], self._begun_group(number)
        for leaf in group.leaves if group else ():
            new = slice(seen.get(leaf.index, 0), leaf.count)
            names = ("token_ids", "log_probs", "entropies", "window_means")
            columns = {name: leaf.columns[name][new].copy() for name in names}
            pieces.append(Piece(leaf.index, **columns, finish_reason=leaf.reason if leaf.done else ""))
        return pieces

    def end_leaf(self, number: int, index: int) -> None:
        """Ends a leaf where it stands, as "stop"; its request finishes once all have ended. Others are no error."""
        group = self._begun_group(number)
        if group and index < len(group.leaves) and not group.leaves[index].done:
            leaf = group.leaves[index]
            leaf.done, leaf.reason = True, "stop"
            self._live = [other for other in self._live if other is not leaf]

    def _begun_group(self, number: int) -> _Group | None:
        return self._groups.get(number) or (self._saved[number].group if number in self._saved else None)

    def load_weights(self, flat: Mapping[str, jax.Array | np.ndarray], version: int, *, finish: bool = False) -> None:
        """Takes new weights at once: leaves in flight go on with them. Raises `UserError` and changes nothing if they do
        not fit.

        `finish`: what was begun ends with the old weights; until then nothing else is begun, and `weights_wait`.
        """
        check_flat(self._shapes, flat)
        self._coming = dict(flat), version
        self._swap(at_once=not finish)

    @property
    def weights_wait(self) -> bool:
        return self._coming is not None

    def weight_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape, type and placement of every parameter. May be called from any thread."""
        return self._shapes

    def _swap(self, *, at_once: bool = False) -> None:
        if self._coming is not None and (at_once or not self._begun):
            (flat, version), self._coming = self._coming, None
            self._params = _arranged(
                {n: jax.device_put(flat[n].astype(old.dtype, copy=False), old.sharding) for n, old in self._shapes.items()}
            )
            self.policy_version = version
            for filling in self._fillings:  # a prompt is seen by one set of weights
                filling.x, filling.done = None, 0

    def _on_mesh(self) -> AbstractContextManager:
        """Returns the context in which the programs run."""
        return jax.set_mesh(self._mesh) if self._mesh else nullcontext()

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._groups)

    def stats(self) -> dict[str, int]:
        """Returns totals since the start (tokens prefilled and decoded, groups, preemptions) and the present load."""
        return {
            **self._totals, "live": len(self._live), "waiting": len(self._queue), "free_pages": self._pool.free,
            "policy_version": self.policy_version,
        }  # fmt: skip

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutGroup]:
        """Returns the groups of `requests`, in order."""
        numbers = [self.submit(request) for request in requests]
        finished: dict[int, RolloutGroup] = {}
        while self.busy:
            finished.update(self.step())
        return [finished[number] for number in numbers]

    def step(self) -> list[tuple[int, RolloutGroup]]:
        """Admits what fits, decodes some tokens, and returns the groups that are complete, by request number."""
        self._admit_leaves()
        self._admit_groups(at_once=not self._live)
        if not self._live and len(self._groups) > 1 and all(group.waiting for group in self._groups.values()):
            self._preempt(next(reversed(self._groups.values())))  # leaves wait for pages that only waiting groups hold
        if self._live:
            self._decode()
        finished = []
        for group in list(self._groups.values()):
            if group.waiting or not all(leaf.done for leaf in group.leaves):
                continue
            if not group.branched:
                self._branch(group)
            if not group.waiting:
                finished.append((group.number, self._finish(group)))
        return finished

    # Admission.

    def _admit_groups(self, *, at_once: bool) -> None:
        """Prefills what fits: all of it `at_once`, else one part, so that leaves never wait longer for their next tokens."""
        while self._fillings or self._begin_groups():
            filling = self._fillings[0]
            with self._on_mesh():
                self._kv_pages, filling.x = self._programs.prefill_part(
                    self._params, self._kv_pages, filling.prompts, filling.x, filling.parts[filling.done]
                )
            filling.done += 1
            if filling.done == len(filling.parts):
                self._fillings.popleft()
                for group in filling.groups:
                    group.filled = True
                self._admit_leaves()
            if not at_once:
                return

    def _begin_groups(self) -> bool:
        """Takes the next prompts from the queue, if there is room for their leaves; returns whether there are any.

        A preempted group that comes first goes on where it was.
        """
        o = self.options
        batch: list[_Group] = []
        claimed = self._pages_claimed()
        while self._queue and len(batch) < o.prefill_batch:
            number, request = self._queue[0]
            if number in self._saved:
                if batch or not self._resume(self._saved[number]):
                    break
                claimed = self._pages_claimed()
                continue
            if self._coming is not None and number not in self._begun:
                break
            wanted = len(self._live) + sum(group.request.root_leaves for group in batch)
            needed = request.root_leaves * (-(-(len(request.token_ids) + o.decode_steps) // o.page_size) + 1)
            needed = max(needed, self._pages_expected(request))
            if wanted >= o.max_slots or self._groups and needed > self._pool.free - claimed:
                break
            self._queue.popleft()
            pages = self._pool.allocate(-(-len(request.token_ids) // o.page_size))
            claimed += needed - len(pages)
            keys = np.asarray(leaf_keys(jax.random.key(request.seed), request.group_size))
            group = _Group(number, request, pages, keys)
            group.waiting.extend([(-1, 0)] * request.root_leaves)
            batch.append(group)
            self._groups[number] = group
            self._begun.add(number)
        self._fillings.extend(self._alike(batch))
        return bool(batch)

    def _pages_expected(self, request: RolloutRequest) -> int:
        """Returns the pages a group takes until its end, if its leaves are as long as those of earlier groups."""
        return -(-len(request.token_ids) // self.options.page_size) + round(request.group_size * self._leaf_pages)

    def _pages_claimed(self) -> int:
        """Returns the pages that the admitted groups will still ask for: given away, they would cost a preemption."""
        groups = self._groups.values()
        return sum(max(0, self._pages_expected(group.request) - self._pages_held(group)) for group in groups)

    def _pages_held(self, group: _Group) -> int:
        prompt, size = len(group.request.token_ids), self.options.page_size
        return len(group.prompt_pages) + sum(len(leaf.pages) - (prompt + leaf.start - 1) // size for leaf in group.leaves)

    def _alike(self, groups: list[_Group]) -> list[_Filling]:
        """Returns the prompts by shape, each in the smallest of the compiled shapes that holds it.

        Never in a larger one that holds its neighbours: sums over other paddings round differently, and a prompt must give
        the same bits whatever comes with it.
        """
        shapes: dict[tuple[int, int], list[_Group]] = collections.defaultdict(list)
        for group in groups:
            tokens, patches = len(group.request.token_ids), len(group.request.patches)
            shapes[_smallest(self._prompt_sizes, tokens), _smallest(self._patch_sizes, patches)].append(group)
        return [self._filling(alike, length, space) for (length, space), alike in shapes.items()]

    def _filling(self, groups: list[_Group], length: int, space: int) -> _Filling:
        o, rows = self.options, _bucket(len(groups), self.options.prefill_batch, smallest=1)
        tokens = np.zeros((rows, length), np.int32)
        segments, positions = np.zeros_like(tokens), np.zeros((rows, 3, length), np.int32)
        pages = np.zeros((rows, length // o.page_size), np.int32)
        patches = np.zeros((rows, space, groups[0].request.patches.shape[1]), np.float32)
        places = np.zeros((rows, space, 2), np.int32)
        windows, frames = np.zeros((2, rows, space), np.int32)
        for r, group in enumerate(groups):
            request, count = group.request, len(group.request.token_ids)
            tokens[r, :count], segments[r, :count], positions[r, :, :count] = request.token_ids, 1, request.positions
            pages[r, : len(group.prompt_pages)] = group.prompt_pages
            layout, size = vision_layout(request.grid_thw), len(request.patches)
            patches[r, :size], places[r, :size] = request.patches, layout.position_hw
            windows[r, :size], frames[r, :size] = layout.window_ids, layout.frame_ids
            self._totals["prefilled"] += count
        vision = VisionInputs(patches, places, windows, frames) if space else None  # text alone needs no vision tower
        prompts = Prompts(tokens, positions, segments, pages, vision)
        return _Filling(groups, prompts, self._programs.parts(prompts))

    def _admit_leaves(self) -> None:
        """Starts waiting leaves of admitted groups, oldest group first, while there are slots and pages."""
        for group in list(self._groups.values()):
            while group.filled and group.waiting and len(self._live) < self.options.max_slots:
                try:
                    self._start_leaf(group, *group.waiting[0])
                except OutOfPages:
                    return
                group.waiting.popleft()
        self._flush_copies()

    def _start_leaf(self, group: _Group, parent: int, start: int) -> None:
        request, size = group.request, self.options.page_size
        cached = len(request.token_ids) + start - 1
        source = group.prompt_pages if parent < 0 else group.leaves[parent].pages
        full, rest = divmod(cached, size)
        own = self._pool.allocate(1) if rest else []
        if rest:
            self._copies.append((source[full], own[0]))
        pages = self._pool.share(source[:full]) + own
        leaf = _Leaf(group, len(group.leaves), parent, start, pages, cached, start)
        for name, kind in _COLUMNS.items():
            leaf.columns[name] = np.zeros(request.max_new_tokens, kind)
            if parent >= 0:
                leaf.columns[name][:start] = group.leaves[parent].columns[name][:start]
        # Windows that reach over the branch point are the leaf's own.
        begun = max(0, start - self.options.window + 1)
        leaf.columns["window_means"][begun:] = 0
        leaf.columns["window_mask"][begun:] = False
        group.leaves.append(leaf)
        self._live.append(leaf)

    def _flush_copies(self) -> None:
        if not self._copies:
            return
        count = self.options.max_slots  # one shape; the rest copies trash onto trash
        for begin in range(0, len(self._copies), count):
            pairs = np.zeros((2, count), np.int32)
            chunk = np.array(self._copies[begin : begin + count], np.int32).T
            pairs[:, : chunk.shape[1]] = chunk
            with self._on_mesh():
                self._kv_pages = self._programs.copy_pages(self._kv_pages, pairs[0], pairs[1])
        self._copies.clear()

    # Decoding.

    def _decode(self) -> None:
        o = self.options
        self._flush_copies()
        self._grow_pages()
        leaves = self._live
        rows = _bucket(len(leaves), o.max_slots)
        longest = max(len(leaf.pages) for leaf in leaves)
        width = min(self._table_width, _bucket(longest, max(self._table_width, longest), smallest=8))
        table = np.zeros((rows, width), np.int32)
        for r, leaf in enumerate(leaves):
            table[r, : len(leaf.pages)] = leaf.pages
        with self._on_mesh():
            self._kv_pages, _, drawn = self._programs.decode(self._params, self._kv_pages, table, self._rows(leaves, rows))
        self._record(leaves, jax.device_get(drawn))
        self._live = [leaf for leaf in leaves if not leaf.done]
        self._totals["calls"] += 1

    def _grow_pages(self) -> None:
        """Gives every live leaf the pages of its next tokens; the youngest groups make room if there are too few."""
        size = self.options.page_size
        for leaf in list(self._live):
            if leaf not in self._live:
                continue  # its group was just preempted
            request = leaf.group.request
            end = min(leaf.cached + self.options.decode_steps, len(request.token_ids) + request.max_new_tokens)
            while (need := -(-end // size) - len(leaf.pages)) > 0:
                try:
                    leaf.pages += self._pool.allocate(need)
                except OutOfPages:
                    youngest = next(reversed(self._groups.values()))
                    self._preempt(youngest)
                    if youngest is leaf.group:
                        break

    def _preempt(self, group: _Group) -> None:
        """Puts a group back to the head of the queue, its pages into the host's memory.

        To compute them again from its tokens would round differently: the same seed would give other trees.
        """
        self._flush_copies()
        place = {page: i for i, page in enumerate(dict.fromkeys(p for pages in group.page_lists() for p in pages))}
        if group.filled:
            with self._on_mesh():
                content = jax.device_get(self._programs.read_pages(self._kv_pages, self._padded(place)))
        self._drop(group)
        if group.filled:
            for pages in group.page_lists():
                pages[:] = [place[page] for page in pages]
            self._saved[group.number] = _Saved(group, content, len(place))
        self._queue.appendleft((group.number, group.request))
        self._totals["preempted"] += 1

    def _resume(self, saved: _Saved) -> bool:
        """Gives a preempted group pages again, if there are enough for it to go on; returns whether there were."""
        o, group = self.options, saved.group
        leaves = [leaf for leaf in group.leaves if not leaf.done]
        needed = saved.pages + (len(leaves) + bool(group.waiting)) * (-(-o.decode_steps // o.page_size) + 1)
        needed = max(needed, self._pages_expected(group.request))
        if self._groups and (
            needed > self._pool.free - self._pages_claimed() or len(self._live) + len(leaves) > o.max_slots
        ):
            return False
        pages = self._pool.allocate(saved.pages)
        with self._on_mesh():
            content = jax.device_put(saved.content, self._place)
            self._kv_pages = self._programs.write_pages(self._kv_pages, self._padded(pages), content)
        for places in group.page_lists():
            places[:] = self._pool.share([pages[i] for i in places])
        self._pool.release(pages)
        self._queue.popleft()
        del self._saved[group.number]
        self._groups[group.number] = group
        self._live += leaves
        return True

    def _padded(self, pages: Iterable[int]) -> np.ndarray:
        """Returns pages, then trash up to a compiled size."""
        some = np.fromiter(pages, np.int32)
        return np.pad(some, (0, _bucket(len(some), self.options.num_pages) - len(some)))

    def _drop(self, group: _Group) -> None:
        self._flush_copies()  # a page must not be given away with a copy into it under way
        for leaf in group.leaves:
            self._pool.release(leaf.pages)
        for filling in self._fillings:
            for row in (row for row, other in enumerate(filling.groups) if other is group):
                pages = filling.prompts.pages.copy()  # a part that is under way may read it
                pages[row] = 0  # what is still to come goes to the trash
                filling.prompts = filling.prompts._replace(pages=pages)
        self._fillings = collections.deque(filling for filling in self._fillings if filling.prompts.pages.any())
        self._pool.release(group.prompt_pages)
        self._live = [leaf for leaf in self._live if leaf.group is not group]
        del self._groups[group.number]

    def _forget(self, number: int) -> None:
        self._begun.discard(number)
        self._swap()

    def _rows(self, leaves: list[_Leaf], count: int) -> Rows:
        w = self.options.window
        rows = Rows(
            token=np.zeros(count, np.int32), length=np.zeros(count, np.int32), place=np.zeros(count, np.int32),
            alive=np.zeros(count, bool), rope_delta=np.zeros(count, np.int32), end=np.zeros(count, np.int32),
            key=np.zeros((count, 2), np.uint32), temperature=np.ones(count, np.float32),
            top_p=np.ones(count, np.float32), top_k=np.zeros(count, np.int32),
            tau_high=np.full(count, np.inf, np.float32), ring=np.zeros((count, w), np.float32),
            ring_tokens=np.zeros((count, w), np.int32),
        )  # fmt: skip
        for r, leaf in enumerate(leaves):
            request, n = leaf.group.request, leaf.count
            rows.token[r] = leaf.columns["token_ids"][n - 1] if n else request.token_ids[-1]
            rows.length[r], rows.place[r], rows.alive[r] = leaf.cached, n, True
            rows.rope_delta[r], rows.end[r] = request.rope_delta, request.max_new_tokens
            rows.key[r] = leaf.group.keys[leaf.index]
            rows.temperature[r], rows.top_p[r], rows.top_k[r] = request.temperature, request.top_p, request.top_k
            rows.tau_high[r] = request.tau_high
            seen = min(n, w)
            if seen:
                rows.ring[r, w - seen :] = leaf.columns["entropies"][n - seen : n]
                rows.ring_tokens[r, w - seen :] = leaf.columns["token_ids"][n - seen : n]
        return rows

    def _record(self, leaves: list[_Leaf], drawn) -> None:
        counts = drawn.valid.sum(axis=0)
        reach = self.options.window - 1
        for r, leaf in enumerate(leaves):
            new, n = int(counts[r]), leaf.count
            own, begun = slice(n, n + new), max(0, n - reach)
            leaf.columns["token_ids"][own] = drawn.token[:new, r]
            leaf.columns["log_probs"][own] = drawn.log_prob[:new, r]
            leaf.columns["entropies"][own] = drawn.entropy[:new, r]
            leaf.columns["policy_version"][own] = self.policy_version
            ended = slice(begun, max(begun, n + new - reach))  # a window that ends at s began at s - w + 1
            skip = begun - (n - reach)
            leaf.columns["window_means"][ended] = drawn.window_mean[skip:new, r]
            leaf.columns["window_mask"][ended] = drawn.window_hit[skip:new, r]
            leaf.count += new
            leaf.cached += new
            stopped = int(leaf.columns["token_ids"][leaf.count - 1]) in self._eos
            leaf.done = stopped or leaf.count >= leaf.group.request.max_new_tokens
            leaf.reason = "stop" if stopped else "length"
            self._totals["decoded"] += new

    # Trees.

    def _branch(self, group: _Group) -> None:
        request = group.request
        points = select_branches(
            [leaf.columns["window_means"][: leaf.count] for leaf in group.leaves],
            [leaf.columns["window_mask"][: leaf.count] for leaf in group.leaves],
            slots=request.group_size - request.root_leaves,
            max_per_sequence=request.max_branches_per_sequence,
            spacing=self.options.window,
        )
        fresh = request.group_size - request.root_leaves - len(points)
        group.waiting.extend([*points, *[(-1, 0)] * fresh])
        group.branched = True

    def _finish(self, group: _Group) -> RolloutGroup:
        prompt = len(group.request.token_ids)
        leaves = tuple(
            Trajectory(
                **{name: column[: leaf.count].copy() for name, column in leaf.columns.items()},
                parent=leaf.parent, branch_position=leaf.start, finish_reason=leaf.reason,
            )
            for leaf in group.leaves
        )  # fmt: skip
        delivered = sum(prompt + leaf.count for leaf in group.leaves)
        computed = prompt + sum(leaf.count - leaf.start for leaf in group.leaves)
        own = (self._pages_held(group) - len(group.prompt_pages)) / len(leaves)
        self._leaf_pages += (own - self._leaf_pages) / min(self._totals["groups"] + 1, 64)
        self._drop(group)
        self._forget(group.number)
        self._totals["groups"] += 1
        return RolloutGroup(group.request.problem_id, leaves, prompt, computed, delivered - computed)


_COLUMNS = {
    "token_ids": np.int32, "log_probs": np.float32, "entropies": np.float32, "window_means": np.float32,
    "window_mask": np.bool_, "policy_version": np.int32,
}  # fmt: skip


def _mesh(flat: Mapping[str, jax.Array]) -> Mesh | None:
    """Returns the mesh over which parameters are split, if they are."""
    mesh = getattr(next(iter(flat.values())).sharding, "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None


def _arranged(flat: Mapping[str, jax.Array]) -> Mapping[str, Any]:
    """Returns parameters in the form that decodes fastest where they live."""
    device = next(iter(next(iter(flat.values())).devices()))
    return flat if device.platform == "tpu" else cut_layers(flat)


def _bucket(value: int, largest: int, *, smallest: int = 16) -> int:
    """Returns the smallest of smallest, 2 x, 4 x, ... that holds `value`, at most `largest`: few shapes are compiled."""
    size = smallest
    while size < value:
        size *= 2
    return min(size, largest)


def _sizes(largest: int, unit: int) -> tuple[int, ...]:
    """Returns an eighth, a quarter, a half, three quarters and all of `largest`, in whole units, ascending."""
    whole = {min(largest, -(-largest * eighths // (8 * unit)) * unit) for eighths in (1, 2, 4, 6, 8)}
    return tuple(sorted(whole))


def _smallest(sizes: Sequence[int], value: int) -> int:
    """Returns the first of the ascending `sizes` that holds `value`."""
    return sizes[bisect.bisect_left(sizes, value)]
