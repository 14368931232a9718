"""The one configuration tree. Every field is documented here, once; files in `configs/` only set values.

A field is overridden from the command line as `--config.aepo.window=8`. The tree is locked: an unknown field is an error.
"""

from dataclasses import asdict
from pathlib import Path

from ml_collections import ConfigDict

from data_pipeline.records import Keys


def endpoint_section() -> ConfigDict:
    """Returns the section of an OpenAI-compatible endpoint; our own sampler service is one."""
    e = ConfigDict()
    e.url = ""  # such as http://host:8000; empty: none
    e.model = ""  # its name there
    e.key_variable = "OPENAI_API_KEY"  # environment variable with the key; ARES_TOKEN for our service
    e.instruction = "Think step by step, then put the final answer in \\boxed{}."  # below every question
    e.temperature, e.top_p = 1.0, 1.0
    e.concurrency = 32  # requests in flight
    e.requests_per_minute = 0  # 0: no limit
    e.timeout = 1800.0  # seconds for one answer
    e.patience = 300.0  # seconds of an endpoint that is away, or has no room, before giving up
    e.retries = 6  # of a request that fails while others succeed
    return e


def default_config() -> ConfigDict:
    """Returns the tree with the paper's hyper-parameters (method.md, section 5) wherever the paper gives them."""
    c = ConfigDict()
    c.seed = 0  # every random choice of a run derives from it

    m = c.model = ConfigDict()
    m.pretrained = ""  # Hugging Face folder of a Qwen2.5-VL; empty: a new model of the shape below
    m.shape = ""  # "3b", "7b", "32b", "72b": the published shape that `plan` plans with, as long as there is no folder
    m.dtype = "bfloat16"  # arithmetic: float32 or bfloat16 (statistics and softmax are always float32)
    m.param_dtype = "float32"  # storage of the parameters; bfloat16: float32 copies of the trained ones in the optimizer
    # What the backward pass computes again: "none"; "dots": all but matrix products and attention; "full": all but the
    # layers' inputs; "offload": the same, those kept in the host's memory (TPU, GPU)
    m.remat = "full"
    t = m.text = ConfigDict()  # text decoder, used when `pretrained` is empty
    t.hidden_size, t.intermediate_size = 128, 384
    t.num_layers, t.num_heads, t.num_kv_heads = 4, 4, 2
    t.mrope_section = (4, 6, 6)  # rotary pairs for time, height, width; sums to half the head size
    t.rope_theta = 10_000.0
    v = m.vision = ConfigDict()  # vision tower, used when `pretrained` is empty
    v.hidden_size, v.intermediate_size = 64, 128
    v.num_layers, v.num_heads = 2, 2
    v.full_attention_layers = (1,)  # the others attend within windows

    lora = c.lora = ConfigDict()  # low-rank adaptation of the text decoder: then nothing else is trained
    lora.rank = 0  # of the factors; 0: off
    lora.alpha = 32.0  # their product counts alpha / rank times
    c.watchdog_seconds = 3600.0  # where no step ends, and no answer comes, for so long, all stacks are dumped; 0: never

    h = c.mesh = ConfigDict()  # how the learner's devices are used; one may be -1: what the others leave
    h.data = 1  # parameters repeated
    h.fsdp = -1  # parameters split, gathered layer by layer
    h.sequence = 1  # tokens of a row split, keys and values gathered; parameters split, too
    h.tensor = 1  # heads, hidden units and vocabulary split

    d = c.data = ConfigDict()
    d.train = ("digits://train?size=20000",)  # URIs, also several, with weights: data_pipeline/sources/__init__.py
    d.validation = ("digits://validation?size=192",)
    d.test = ("digits://test?size=900",)
    d.fields = ConfigDict(asdict(Keys()))  # names of a record's fields; the first it holds counts (data_pipeline/records.py)
    d.format_prompt = ""  # file with a Jinja template around the question, its {{ content }}; empty: the question alone
    d.max_corrupt_share = 0.01  # of a split's problems that may be unreadable: they are named and left out
    d.workers = 0  # processes that read and preprocess; 0: threads of the command itself
    d.prefetch = 64  # prompts read ahead
    d.vocab_size = 448  # of the BPE tokenizer that the digits task trains on its own text
    d.min_pixels, d.max_pixels = 262_144, 4_194_304  # of an image or a video's frame once scaled (paper, section 5)

    s = c.sampler = ConfigDict()
    s.url = ""  # address of a running `ares_jax.serve`; empty: the command starts one as its own process (on a CPU)
    # Draw in the learner's own processes, one engine a host; weights go from device to device. On a TPU or a GPU this is so
    # wherever there is no url
    s.colocated = False
    # Devices of a host over which the sampler's model and cache are split, by heads, hidden units and vocabulary: as many
    # as the weights need, for memory
    s.tensor = 1
    s.host, s.port = "127.0.0.1", 0  # where `serve` listens; port 0 takes a free one
    s.image_hosts = ()  # from which a chat's images may be fetched over HTTP, such as ("images.example.org",)
    # Folders below which weights may be loaded by path, also gs://bucket/folder, besides the run's own checkpoints
    s.weight_roots = ()
    # Fetch weights from a learner on another host through JAX's transfer server (jax.experimental.transfer), which listens
    # without a token on the address by which the two reach each other; otherwise they come over HTTP
    s.transfers = False
    s.slots = 256  # sequences decoded together
    s.page_size = 16  # tokens a KV page
    s.pages = 8192  # pages of the KV cache
    s.decode_steps = 16  # tokens decoded per round trip to the host
    s.prefill_batch = 16  # prompts prefilled together
    s.prefill_layers = 16  # of the vision tower or the text decoder, run on them between two decode calls
    # Tokens, whole pages, of a longer prompt that go through the decoder between two decode calls, all layers: neither what
    # a long prompt holds up nor its activations grow with its length then. Prompts are padded to whole chunks. 0: never cut
    s.prefill_chunk = 4096
    # Decode all slots over whole page tables always, and prefill prompts one by one: a seed then gives the same bits,
    # log-probs and all, whatever else is drawn. Otherwise they may differ by some 1e-6. Slower while slots are empty.
    # The bits are those of these sizes: of another `prefill_chunk`, say, a longer prompt's differ.
    s.one_shape = False
    # Draws a token, tests its window: "tpu" and "gpu" (Pallas, no logits in memory; on that device alone), "xla", and for
    # tests "tpu_interpret" and "gpu_interpret". Empty: what has been timed and won on the device, today "xla" everywhere
    s.kernel = ""
    # Of a decode step: "ragged" (JAX's kernel, TPU), "triton" (ours, GPU, never timed), "gather" (anywhere). Empty: "ragged"
    # on a TPU if it takes the heads, otherwise "gather"
    s.paged_attention = ""
    s.max_prompt_tokens = 4096  # text and image tokens
    s.max_prompt_patches = 16_384  # pixel patches of one prompt (four a merged vision token)
    s.max_response_tokens = 16_384
    s.temperature, s.top_p, s.top_k = 1.0, 0.99, 0  # top_k 0: off
    s.start_timeout = 300.0  # seconds to wait for the service to answer
    s.drain_seconds = 30.0  # that what it has begun has to finish, once the service is told to end (SIGTERM)

    p = c.packing = ConfigDict()  # shape of a learner's micro-batch; nothing else is ever compiled but its halves
    p.rows = 0  # of all processes together; 0: as few as can be split over the mesh, `data` x `fsdp`
    p.row_tokens = 32_768
    p.row_patches = 65_536
    # The last micro-batches of an update may be a half, a quarter, ... of that, so often halved: fewer rows where they can
    # still be split over the mesh, otherwise shorter ones. Less padding, more programs.
    p.halvings = 2

    o = c.optimizer = ConfigDict()  # AdamW of both stages; the learning rates stand with their stage
    o.b1, o.b2, o.eps = 0.9, 0.999, 1e-8
    o.weight_decay = 0.01
    o.clip_norm = 1.0  # gradients above this global norm are scaled down
    o.mu_dtype = "float32"  # storage of the first moment; bfloat16 saves two bytes a parameter
    o.freeze_vision = False  # train the text decoder alone

    k = c.cold_start = ConfigDict()  # AdaCS: method.md, section 4
    k.alignment_steps = 0  # of the vision tower on captioned digits, before the warm-up; 0: it is pretrained
    k.warmup_steps = 0  # short SFT that makes the starting model; 0: `model.pretrained` is the starting model
    k.warmup_learning_rate = 2e-3
    k.pass_rate_problems = 20_000  # problems whose pass rate is measured
    k.pass_rate_samples = 8
    k.selected = 10_000  # problems kept, uniformly over pass-rate brackets
    k.epochs = 2
    k.batch_size = 256  # responses per update
    k.learning_rate = 2e-5
    k.warmup_fraction = 0.05  # of the steps; then a cosine down to a tenth
    k.save_every = 50  # steps
    # The starting model's, for pass rates. No url: our sampler, with the starting weights, at this temperature and top_p
    k.endpoint = endpoint_section()
    r = k.teacher = ConfigDict()  # whose traces are learned
    r.source = "data"  # "data": the problems' own responses; "file": r.files; "endpoint": r.endpoint
    r.files = ()  # JSONL of {"problem_id", "responses": [text]}
    r.samples = 8  # drawn from the endpoint for each problem; 3 wrong first ones make it a hard-validation problem
    r.endpoint = endpoint_section()
    k.kl = ConfigDict()  # KL-guided fine-tuning: drift from the starting weights on the response's tokens costs
    k.kl.weight = (0.0, 0.0, 0.0)  # for easy, medium, hard problems by their pass rate; all 0: no reference model
    k.kl.estimator = "k3"  # as aepo.kl.estimator

    a = c.aepo = ConfigDict()  # AEPO: method.md, sections 2 and 3
    a.steps = 400  # updates of the policy
    a.token_budget = 0  # also stop once this many response tokens were sampled; 0: no limit
    a.prompts_per_step = 512  # groups that survive filtering, per iteration
    a.learning_rate = 1e-6
    a.warmup_steps = 0
    a.staleness = 1  # updates by which the sampler's weights may be behind, 0 or 1; 0: strictly on-policy, nothing overlaps
    a.minibatches = 4  # updates per iteration (512 prompts, global batch 128)
    a.group_size = 8  # leaves of a rollout tree
    a.root_leaves = 4  # of which this many start at the root; group_size: no branching
    a.max_branches_per_sequence = 2  # of a first root
    # Where a leaf forks for a window: "window_end", as its last distribution is known and no token is drawn from it yet; or
    # "window_start", as the paper draws it, which the parent has left behind by then
    a.branch_at = "window_end"
    # Which windows fork: the "first" ones, whatever comes later; or the "highest", chosen once the roots have ended
    a.branch_choice = "first"
    a.window = 4  # tokens of an entropy window
    a.trigger_words = ""  # file of trigger words, one a line (ares_jax.cold_start.triggers mines one); empty: our list
    a.tau_definition = "trajectory"  # or "window_median": batch median of the quantile of window means
    a.tau_quantile = 0.95
    a.tau_decay = 0.99  # EMA over iterations
    a.difficulty_rule = "paper"  # buckets at 6/8 and 3/8; "released": 2/3 and 1/3
    a.shaping = "paper"  # entropy reward: "paper"; "released", which measured worse (benchmarks/RESULTS.md); or "none"
    a.shaping_weight = 0.5  # scale of the paper's reward; alpha of the released one at the start
    a.shaping_cap = 1.0  # largest multiplier lambda_d of the paper's reward
    a.easy_excess = 0.5  # of the paper's reward: most that a right answer to an easy problem loses for excess windows
    a.target_decay = 0.9  # EMA of windows per bucket: the target of later iterations
    a.overlong_buffer = 0  # DAPO's penalty on overlong answers: tokens before the limit over which it grows; 0: none
    a.overlong_penalty = 1.0  # its size at the limit
    # Advantages on trees (ares_jax/aepo/advantage.py). Unbiased: "split", where children count for their prefix, too (only
    # with the first forks, at window ends), and "local", where they do not (any forks). Biased, as the paper words it:
    # "subtree", the mean advantage of the leaves below a token; "leaf", leaves as independent samples. Without branches
    # "split" and "local" are RLOO, and "leaf" with aepo.scale="group" is GRPO
    a.tree = "split"
    # What advantages are divided by: the std of accuracy over a "batch"'s roots; over a "group", of its rewards; "none"
    a.scale = "batch"
    a.entropy_bonus = 0.0  # weight of Algorithm 1's token bonus
    a.entropy_bonus_levels = (1.0, 1.0, 1.0)  # its lambda_d: factors of that for easy, medium, hard problems
    a.entropy_bonus_centred = False  # its b: take the mean bonus of an update's tokens from each token
    a.clip_low, a.clip_high, a.clip_dual = 0.2, 0.3, 3.0
    # "token": the mean over the batch's tokens; "seq": over each leaf's, a shared token's by its owner's length, then leaves
    a.reduction = "token"
    a.old_log_probs = "sampler"  # denominator of the ratio; "recomputed": the learner's own, with truncated IS
    a.importance_cap = 2.0
    kl = a.kl = ConfigDict()
    kl.weight = 0.01  # kappa at the start; 0: no reference model at all
    kl.reference = "device"  # where its weights live between updates: "device" or "host"
    kl.dynamic = True  # per-bucket controller and token-wise weights; False: a constant weight everywhere
    kl.estimator = "k3"
    kl.rho = 0.5  # factor inside validated windows
    kl.target = (0.05, 0.05, 0.05)  # nats a token, easy, medium, hard: what the controller steers to
    kl.rate = 0.1  # alpha_k
    kl.minimum, kl.maximum = 1e-4, 0.5
    f = a.filter = ConfigDict()
    f.by = "accuracy"  # mean over a group's leaves; "reward": the overall reward, shaping and all (the paper's wording)
    f.low, f.high = 0.01, 0.99  # groups whose mean lies outside are dropped
    f.attempts = 20  # rounds of drawing before giving up
    a.save_every = 20  # steps; those that are validated are saved besides
    a.validate_every = 20
    a.log_rollouts_every = 10
    a.keep_checkpoints = 2  # the newest; the best on validation is kept besides

    e = c.evaluation = ConfigDict()
    e.temperature = 0.5
    e.top_p = 1.0
    e.samples_shown = 60  # answers kept with their image for the report

    c.lock()
    return c


def to_plain(config: ConfigDict) -> dict:
    """Returns the tree as nested plain dicts (JSON-serialisable: tuples become lists)."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config.to_dict())
