"""The engine: admits prompts, decodes all live leaves together, branches, and hands back finished trees.

A leaf is only a page-table row and a few numbers, so the batch is put together anew at every call from whatever is live.
Every leaf starts the same way: it takes over the cached tokens before its first own token, feeds the last of them again
and samples. For a root that prefix is the prompt, for a branch the prompt and the parent's tokens before the branch point.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool

from ares_jax.errors import UserError
from ares_jax.models.qwen2_5_vl import Qwen25VL
from ares_jax.models.qwen2_5_vl.paged import cache_spec, cached_heads
from ares_jax.params import to_flat, with_params
from ares_jax.sampling.forecast import PageForecast
from ares_jax.sampling.growing_tree import Group, Leaf
from ares_jax.sampling.options import EngineOptions, check_request
from ares_jax.sampling.pages import OutOfPages, PagePool
from ares_jax.sampling.policy import Policy, mesh_of
from ares_jax.sampling.prefill import PrefillJob, PromptShapes
from ares_jax.sampling.programs import Programs, leaf_keys
from ares_jax.sampling.requests import Piece, RolloutRequest
from ares_jax.sampling.rollout_tree import RolloutTree
from ares_jax.sampling.rows import page_table, record, to_rows
from ares_jax.sampling.saved_pages import Content, Saved, save
from ares_jax.sampling.shapes import bucket


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
        token_bytes: Sequence[bytes] = (),
        policy_version: int = 0,
    ):
        """`token_bytes`: the text of each token, for stop strings; without it requests with any are refused."""
        o, text = options, model.config.text
        self.options = o
        flat = to_flat(model)
        self._policy = Policy(flat, policy_version)
        self._programs = Programs(
            with_params(model, self._policy.specs),  # its weights must not stay when others come
            eos_token_ids=tuple(eos_token_ids), banned=jnp.asarray(banned), trigger=jnp.asarray(trigger_mask),
            steps=o.decode_steps, prefill_layers=o.prefill_layers, prefill_chunk=o.prefill_chunk, kernel=o.kernel,
            paged_attention=o.paged_attention,
        )  # fmt: skip
        self._config = model.config
        self._eos, self._token_bytes = frozenset(map(int, eos_token_ids)), token_bytes
        self._shapes = PromptShapes(o, model.config.vision.spatial_merge_size**2)
        self._table_width = o.pages(o.max_context_tokens)
        self._mesh = mesh_of(flat)
        heads = cached_heads(text.num_heads, text.num_kv_heads, self._mesh.shape["tensor"] if self._mesh else 1)
        shape = (text.num_layers, o.num_pages, o.page_size, 2 * heads, text.head_dim)
        with self._on_mesh():
            self._place = NamedSharding(self._mesh, cache_spec(heads)) if self._mesh else None
            self._kv_pages = jnp.zeros(shape, model.text.dtype, device=self._place)
        self._pool = PagePool(o.num_pages)
        self._copies: list[tuple[int, int]] = []  # of pages, not yet made
        self._forecast = PageForecast(o)
        self._queue: collections.deque[tuple[int, RolloutRequest]] = collections.deque()
        self._groups: dict[int, Group] = {}  # admitted, oldest first
        self._prefill_jobs: collections.deque[PrefillJob] = collections.deque()
        self._saved: dict[int, Saved] = {}
        self._live: list[Leaf] = []
        self._next = 0
        self._begun: set[int] = set()  # requests that were admitted and have not finished
        self._totals = collections.Counter(prefilled=0, decoded=0, groups=0, preempted=0, calls=0)

    # Requests.

    def submit(self, request: RolloutRequest) -> int:
        """Queues a request and returns its number. Raises `UserError` as `check` does."""
        self.check(request)
        number, self._next = self._next, self._next + 1
        self._queue.append((number, request))
        return number

    def room(self, prompt_tokens: int, leaves: int) -> int:
        """Returns the most tokens that each of `leaves` may draw after such a prompt; below 1 there is no room."""
        return self.options.room(prompt_tokens, leaves)

    def check(self, request: RolloutRequest) -> None:
        """Raises `UserError` if a request can never fit, its image tokens and image features do not match, or it has stop
        strings and this engine knows no text.

        May be called from any thread.
        """
        check_request(request, self.options, self._config)
        if request.stop and not self._token_bytes:
            raise UserError(f"problem {request.problem_id}: stop strings, but this engine was made without token_bytes")

    def cancel(self, number: int) -> None:
        """Forgets a request; an unknown number is no error (it may just have finished)."""
        self._queue = collections.deque(item for item in self._queue if item[0] != number)
        if number in self._groups:
            self._drop(self._groups[number])
        self._saved.pop(number, None)
        self._forget(number)

    def drawn(self, number: int, seen: Mapping[int, int]) -> list[Piece]:
        """Returns what each leaf of an unfinished request has drawn after its first `seen[leaf]` (default 0) tokens."""
        group = self._groups.get(number) or (self._saved[number].group if number in self._saved else None)
        return [leaf.piece(seen.get(leaf.index, 0)) for leaf in group.leaves] if group else []

    # Weights.

    @property
    def policy_version(self) -> int:
        return self._policy.version

    @property
    def weights_wait(self) -> bool:
        return self._policy.waits

    def weight_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape, type and placement of every parameter. May be called from any thread."""
        return self._policy.specs

    def load_weights(self, flat: Mapping[str, jax.Array | np.ndarray], version: int, *, finish: bool = False) -> None:
        """Takes new weights at once: leaves in flight go on with them. Raises `UserError` and changes nothing if they do
        not fit.

        `finish`: what was begun ends with the old weights; until then nothing else is begun, and `weights_wait`.
        """
        self._policy.stage(flat, version)
        if not (finish and self._begun):
            self._commit()

    def _commit(self) -> None:
        self._policy.commit()
        for job in self._prefill_jobs:  # a prompt is seen by one set of weights
            job.restart()

    def _forget(self, number: int) -> None:
        self._begun.discard(number)
        if self.weights_wait and not self._begun:
            self._commit()

    # The loop.

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._groups)

    def stats(self) -> dict[str, int]:
        """Returns totals since the start (tokens prefilled and decoded, groups, preemptions) and the present load."""
        return {
            **self._totals, "live": len(self._live), "waiting": len(self._queue), "free_pages": self._pool.free,
            "policy_version": self.policy_version,
        }  # fmt: skip

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutTree]:
        """Returns the groups of `requests`, in order."""
        numbers = [self.submit(request) for request in requests]
        finished: dict[int, RolloutTree] = {}
        while self.busy:
            finished.update(self.step())
        return [finished[number] for number in numbers]

    def step(self) -> list[tuple[int, RolloutTree]]:
        """Admits what fits, decodes some tokens, and returns the groups that are complete, by request number."""
        self._admit_leaves()
        self._admit_groups(at_once=not self._live)
        if not self._live and len(self._groups) > 1 and all(group.waiting for group in self._groups.values()):
            self._preempt(next(reversed(self._groups.values())))  # leaves wait for pages that only waiting groups hold
        if self._live:
            self._decode()
        finished = []
        for group in list(self._groups.values()):
            group.branch(self.options.window)
            if group.ended:
                finished.append((group.number, self._finish(group)))
        return finished

    # Admission.

    def _admit_groups(self, *, at_once: bool) -> None:
        """Prefills what fits: all of it `at_once`, else one part, so that leaves never wait longer for their next tokens."""
        while self._prefill_jobs or self._begin_groups():
            job = self._prefill_jobs[0]
            with self._on_mesh():
                self._kv_pages, job.x = self._programs.prefill_part(
                    self._policy.params, self._kv_pages, job.prompts, job.x, job.parts[job.done]
                )
            job.done += 1
            if job.done == len(job.parts):
                self._prefill_jobs.popleft()
                for group in job.groups:
                    group.filled = True
                self._admit_leaves()
            if not at_once:
                return

    def _begin_groups(self) -> bool:
        """Takes the next prompts from the queue, if there is room for their leaves; returns whether there are any.

        A preempted group that comes first goes on where it was.
        """
        o = self.options
        batch: list[Group] = []
        claimed = self._forecast.claimed(self._groups.values())
        while self._queue and len(batch) < o.prefill_batch:
            number, request = self._queue[0]
            if number in self._saved:
                if batch or not self._resume(self._saved[number]):
                    break
                claimed = self._forecast.claimed(self._groups.values())
                continue
            if self.weights_wait and number not in self._begun:
                break
            tokens = len(request.token_ids)
            wanted = len(self._live) + sum(group.request.root_leaves for group in batch)
            needed = o.group_pages(tokens, request.root_leaves, o.decode_steps) + request.root_leaves
            needed = max(needed, self._forecast.expected(request))
            if wanted >= o.max_slots or self._groups and needed > self._pool.free - claimed:
                break
            self._queue.popleft()
            pages = self._pool.allocate(o.pages(tokens))
            claimed += needed - len(pages)
            keys = np.asarray(leaf_keys(jax.random.key(request.seed), request.group_size))
            group = Group(number, request, pages, keys)
            batch.append(group)
            self._groups[number] = group
            self._begun.add(number)
            self._totals["prefilled"] += tokens
        self._prefill_jobs.extend(self._shapes.jobs(batch, self._programs.parts))
        return bool(batch)

    def _admit_leaves(self) -> None:
        """Starts waiting leaves of admitted groups, oldest group first, while there are slots and pages."""
        for group in list(self._groups.values()):
            while group.filled and group.waiting and len(self._live) < self.options.max_slots:
                try:
                    self._start_leaf(group)
                except OutOfPages:
                    return
        self._flush_copies()

    def _start_leaf(self, group: Group) -> None:
        source, cached = group.prefix()
        full, rest = divmod(cached, self.options.page_size)
        own = self._pool.allocate(1) if rest else []  # both will write to the page that is not full
        if rest:
            self._copies.append((source[full], own[0]))
        self._live.append(group.begin_leaf(self._pool.share(source[:full]) + own, self.options.window))

    # Decoding.

    def _decode(self) -> None:
        o = self.options
        self._flush_copies()
        self._grow_pages()
        leaves = self._live
        rows, width = o.max_slots, self._table_width
        if not o.one_shape:
            rows = bucket(len(leaves), rows)
            width = bucket(max(len(leaf.pages) for leaf in leaves), width, smallest=8)
        table = page_table(leaves, rows, width)
        with self._on_mesh():
            self._kv_pages, _, drawn = self._programs.decode(
                self._policy.params, self._kv_pages, table, to_rows(leaves, rows, o.window)
            )
        self._totals["decoded"] += record(
            leaves, jax.device_get(drawn), window=o.window, eos=self._eos, table=self._token_bytes,
            version=self.policy_version,
        )  # fmt: skip
        self._live = [leaf for leaf in leaves if not leaf.done]
        self._totals["calls"] += 1

    def _grow_pages(self) -> None:
        """Gives every live leaf the pages of its next tokens; the youngest groups make room if there are too few."""
        for leaf in list(self._live):
            if leaf not in self._live:
                continue  # its group was just preempted
            request = leaf.group.request
            end = min(leaf.cached + self.options.decode_steps, len(request.token_ids) + request.max_new_tokens)
            while (need := self.options.pages(end) - len(leaf.pages)) > 0:
                try:
                    leaf.pages += self._pool.allocate(need)
                except OutOfPages:
                    youngest = next(reversed(self._groups.values()))
                    self._preempt(youngest)
                    if youngest is leaf.group:
                        break

    def _finish(self, group: Group) -> RolloutTree:
        self._forecast.learn(group)
        self._drop(group)
        self._forget(group.number)
        self._totals["groups"] += 1
        return group.result(self.options.window)

    # Preemption.

    def _preempt(self, group: Group) -> None:
        """Puts a group back to the head of the queue, its pages into the host's memory."""
        self._flush_copies()
        if group.filled:
            self._saved[group.number] = save(group, self._read_pages)
        self._drop(group)
        self._queue.appendleft((group.number, group.request))
        self._totals["preempted"] += 1

    def _resume(self, saved: Saved) -> bool:
        """Gives a preempted group pages again, if there are enough for it to go on; returns whether there were."""
        o, group = self.options, saved.group
        leaves = [leaf for leaf in group.leaves if not leaf.done]
        needed = saved.pages + (len(leaves) + bool(group.waiting)) * (o.pages(o.decode_steps) + 1)
        needed = max(needed, self._forecast.expected(group.request))
        free = self._pool.free - self._forecast.claimed(self._groups.values())
        if self._groups and (needed > free or len(self._live) + len(leaves) > o.max_slots):
            return False
        saved.restore(self._pool, self._write_pages)
        self._queue.popleft()
        del self._saved[group.number]
        self._groups[group.number] = group
        self._live += leaves
        return True

    def _drop(self, group: Group) -> None:
        """Takes a group and its pages out of the cache."""
        self._flush_copies()  # a page must not be given away with a copy into it under way
        self._prefill_jobs = collections.deque(job for job in self._prefill_jobs if job.drop(group))
        for pages in group.page_lists():
            self._pool.release(pages)
            pages.clear()
        self._live = [leaf for leaf in self._live if leaf.group is not group]
        del self._groups[group.number]

    # The cache's pages on the devices.

    def _on_mesh(self) -> AbstractContextManager:
        """Returns the context in which the programs run."""
        return jax.set_mesh(self._mesh) if self._mesh else nullcontext()

    def _flush_copies(self) -> None:
        count = self.options.max_slots  # one shape; the rest copies trash onto trash
        for begin in range(0, len(self._copies), count):
            pairs = np.zeros((2, count), np.int32)
            chunk = np.array(self._copies[begin : begin + count], np.int32).T
            pairs[:, : chunk.shape[1]] = chunk
            with self._on_mesh():
                self._kv_pages = self._programs.copy_pages(self._kv_pages, pairs[0], pairs[1])
        self._copies.clear()

    def _read_pages(self, pages: Iterable[int]) -> Content:
        with self._on_mesh():
            return jax.device_get(self._programs.read_pages(self._kv_pages, self._padded(pages)))

    def _write_pages(self, pages: Iterable[int], content: Content) -> None:
        with self._on_mesh():
            content = jax.device_put(content, self._place)
            self._kv_pages = self._programs.write_pages(self._kv_pages, self._padded(pages), content)

    def _padded(self, pages: Iterable[int]) -> np.ndarray:
        """Returns pages, then trash up to a compiled size."""
        some = np.fromiter(pages, np.int32)
        return np.pad(some, (0, bucket(len(some), self.options.num_pages) - len(some)))
