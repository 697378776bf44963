"""Every option of every job, with its default: `configs/*.py` start from `default_config()`.

Options live under the job or the part they belong to. Optional fields are typed placeholders, so
that ``--config.data.path=/images`` works although the default is unset. `lfm_jax.config_check`
holds the accepted ranges and is applied before any job starts.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lfm_jax.errors import UserError


def default_config() -> ConfigDict:
    """A new config with every field at its default."""
    config = ConfigDict()
    config.job = "pipeline"  # what runs without --job; one of lfm_jax.jobs.JOBS
    config.seed = 0  # >= 0; every random number follows from it and from a position (rng.py)
    config.init = placeholder(str)  # another workdir or release whose weights training starts from
    config.loss = "flow"  # objective of the train job: "flow" (flow matching)

    # ---- images: where pixels come from (data/images.py)
    config.data = ConfigDict()
    config.data.source = "digits"  # digits | idx | folder | zip | lmdb | tfds:<name>
    config.data.path = placeholder(str)  # folder or file of the source; unused by digits
    config.data.image_size = 8  # side in pixels after crop, resize or padding
    config.data.channels = 1  # 1 gray, 3 RGB
    config.data.num_classes = 10  # 0: unconditional; the null label of guidance comes on top
    config.data.class_names = ()  # shown instead of the source's own, e.g. digits where it has none
    config.data.fit = placeholder(str)  # crop | pad; unset: pad for digits and idx, else ADM's crop
    config.data.labels = placeholder(str)  # folder, zip: CSV file of `file,label` rows
    config.data.limit = 0  # first N images only; 0: all (LFM trained LSUN on the first 120,000)

    # ---- autoencoder: pixels <-> latents (vae/)
    config.autoencoder = ConfigDict()
    config.autoencoder.kind = (
        "train"  # train: our own | pretrained: load weights | identity: pixels
    )
    config.autoencoder.weights = placeholder(str)  # pretrained: file, folder or hub repository
    config.autoencoder.block_out_channels = (32, 64)  # one downsampling by 2 between two entries
    config.autoencoder.layers_per_block = 1  # residual blocks a level; the SD VAE has 2
    config.autoencoder.latent_channels = 4  # SD 4, SD3/FLUX 16
    config.autoencoder.norm_groups = 8  # must divide every entry of block_out_channels
    config.autoencoder.mid_attention = True  # self-attention at the lowest resolution, as in SD
    config.autoencoder.steps = 1000  # updates
    config.autoencoder.batch_size = 128  # images over all devices
    config.autoencoder.learning_rate = 1e-3  # peak; warm-up then cosine to zero
    config.autoencoder.warmup_steps = 100
    config.autoencoder.ema_decay = 0.999  # the exported weights are the averaged ones
    config.autoencoder.kl_weight = 1e-4  # a weight per element; small keeps detail, large smooths
    config.autoencoder.reconstruction = "l2"  # l1 | l2
    config.autoencoder.mirror = False  # random horizontal mirror; wrong for digits and text

    # ---- latent cache (data/latents.py)
    config.encode = ConfigDict()
    config.encode.mirror = False  # store the encoded mirror image too: a latent cannot be flipped
    config.encode.splits = ("train",)  # splits of the source that get a cache
    config.encode.batch_size = 256  # images over all devices
    config.encode.shard_size = 16384  # examples a shard; a shard is the unit of resume

    # ---- velocity network (models/)
    config.model = ConfigDict()
    config.model.name = "DiT"  # DiT, or a published size such as DiT-B/2 (models.create_model)
    config.model.dtype = "float32"  # activations: float32 | bfloat16; parameters stay float32
    # Fields of the named network. Unset ones are those of the weights that the workdir was
    # converted from or that `init` names, else the network's own default. A field that the network
    # does not have is refused.
    config.model.hidden = placeholder(int)  # DiT: width
    config.model.depth = placeholder(int)  # DiT: blocks
    config.model.heads = placeholder(int)
    config.model.patch = placeholder(int)  # DiT: latent pixels along a token's side
    config.model.mlp_ratio = placeholder(float)  # DiT: width of the MLP over the block's
    config.model.channels = placeholder(int)  # U-Nets: width of the first level
    config.model.mult = placeholder(tuple)  # U-Nets: width of each level over `channels`
    config.model.blocks = placeholder(int)  # U-Nets: residual blocks a level
    config.model.attention_resolutions = placeholder(tuple)  # U-Nets: sides of maps with attention
    config.model.attention_reading = placeholder(str)  # unet: resolution | factor (published code)
    config.model.head_channels = placeholder(int)  # U-Nets: channels a head, in place of heads
    config.model.scale_shift = placeholder(bool)  # unet: steer by scale and shift, not by a sum
    config.model.resblock_updown = placeholder(bool)  # unet: resample inside residual blocks
    config.model.dropout = placeholder(float)  # U-Nets
    config.model.embedding = placeholder(str)  # ddpm++, ncsn++: positional | fourier
    config.model.encoder = placeholder(str)  # ddpm++, ncsn++: standard | residual
    config.model.filter_taps = placeholder(tuple)  # ddpm++, ncsn++: of the resampling filter
    config.model.noise_mult = placeholder(int)  # ddpm++, ncsn++: width of the time embedding
    config.model.context_dim = placeholder(int)  # width of context tokens for cross-attention
    config.model.transformer_depth = placeholder(int)  # unet_context: blocks an attention
    config.model.out_channels = placeholder(int)  # of the velocity; unset: those of the latents
    config.model.null_row = placeholder(bool)  # DiT: a label table of the null row alone (LFM)
    config.model.convention = placeholder(str)  # flow | what an imported network predicts
    config.model.time_scale = placeholder(float)  # t times this enters the sinusoids; LFM: 1
    config.model.time_endpoint = placeholder(bool)  # DiT: diffusers' reading of the frequencies
    config.model.remat = placeholder(str)  # recomputation of activations in the backward pass
    config.model.scan_blocks = placeholder(bool)  # DiT: compile one block for all, ~10x faster
    config.model.attention = placeholder(str)  # auto | xla | cudnn

    # ---- training of the velocity network (jobs/train.py)
    config.train = ConfigDict()
    config.train.steps = 1000  # updates in all; raising it later goes on from the last checkpoint
    config.train.batch_size = 256  # latents over all devices and accumulation steps
    config.train.accumulate = 1  # micro-batches an update; divides batch_size
    config.train.learning_rate = 1e-4  # peak
    config.train.schedule = "constant"  # constant | cosine (to learning_rate_final), after warm-up
    config.train.learning_rate_final = 0.0  # floor of the cosine; LFM: 1e-5, absolute
    config.train.warmup_steps = 0
    config.train.weight_decay = 0.0  # AdamW; the papers use 0
    config.train.b1 = 0.9
    config.train.b2 = 0.999
    config.train.grad_clip = 0.0  # global norm; 0: off, as in LFM
    config.train.ema_decay = 0.9999  # 0: off; ramps up as (1 + step) / (10 + step)
    config.train.label_drop = 0.1  # probability of the null label in training (guidance needs it)
    config.train.mirror = False  # pick the cached mirror image with probability 1/2
    config.train.time_sampling = "uniform"  # uniform (LFM) | logit_normal (more mid-path times)
    config.train.in_memory = False  # hold the whole cache in host memory: small caches load faster
    config.train.log_every = 50  # steps between metric fetches: the only host syncs of the loop
    config.train.save_every = 1000  # steps between checkpoints; the last step is always saved
    config.train.keep = 2  # newest checkpoints kept
    config.train.preview_every = 0  # steps between picture grids of a fixed noise set; 0: off

    # ---- sampling (jobs/sample.py)
    config.sample = ConfigDict()
    config.sample.num_samples = 1000
    config.sample.batch_size = 250  # images over all devices
    config.sample.solver = "euler"  # a name of flow.SOLVERS
    config.sample.num_steps = 50  # intervals of a fixed-step solve; ignored when rtol is set
    config.sample.grid = "uniform"  # spacing of the fixed steps: a name of flow.GRIDS
    config.sample.rtol = placeholder(float)  # set both tolerances for an adaptive solve
    config.sample.atol = placeholder(float)
    config.sample.error_norm = (
        "sample"  # adaptive error control: per "sample" or whole "batch" (LFM)
    )
    config.sample.guidance = 1.0  # classifier-free scale; 1: off, one network call an evaluation
    config.sample.guidance_interval = (0.0, 1.0)  # times (1 is noise) at which guidance acts
    config.sample.guidance_channels = 0  # guided latent channels; 0: all (LFM), 3: DiT and SiT
    config.sample.labels = "balanced"  # balanced | uniform | a class list such as "3,7"
    config.sample.ema = True  # sample the averaged weights
    config.sample.seed = 0  # of the noise: sample i is the same for any batch size and topology
    config.sample.png = False  # one PNG an image beside samples.npz
    config.sample.latents = False  # also write samples/latents.npz, scaled, float32
    config.sample.trajectory = (
        0  # columns of samples/trajectory.png (x_t over its estimate); 0: off
    )
    config.sample.latency = 0  # timed single samples, with and without decoding; 0: off

    # ---- evaluation (jobs/evaluate.py)
    config.evaluate = ConfigDict()
    config.evaluate.samples = placeholder(str)  # an npz to judge; unset: the workdir's own samples
    config.evaluate.reference = placeholder(str)  # statistics to compare with, of any known format
    config.evaluate.num_real = 10000  # without a reference: at most this many held-out images
    config.evaluate.extractor = "classifier"  # classifier (trained here) | random | published ones
    config.evaluate.weights = placeholder(str)  # file of a published extractor; unset: its cache
    config.evaluate.pipeline = ""  # pixels to network: tf1 | torch | clean; empty: its usual one
    config.evaluate.metrics = ("fd", "kid", "pr")  # of evaluate.METRICS
    config.evaluate.jpeg = 0  # quality of a JPEG round trip before judging (LFM: 75); 0: none
    config.evaluate.bootstrap = 0  # replicates of the interval of the Frechet distance; 0: none
    config.evaluate.force = False  # compare across pipelines all the same; the result is marked
    config.evaluate.classifier_epochs = 8  # training of the small judge on the real train split
    config.evaluate.classifier_width = 32  # its base channels
    config.evaluate.classifier_seed = 1234  # not the run's seed: the judge is independent of it
    config.evaluate.svc = False  # also judge class accuracy by a scikit-learn SVC on pixels

    # ---- weights of other projects in (jobs/convert.py), releases out (jobs/export.py)
    config.convert = ConfigDict()
    config.convert.family = "lfm-dit"  # whose file; a name of weights.FAMILIES
    config.convert.file = placeholder(str)  # path or URL (kept in the user's cache)
    config.convert.sha256 = placeholder(str)  # checksum that the file must have; unset: not checked
    config.convert.weights = "auto"  # ema | raw | auto (ema where the file has it)
    config.export = ConfigDict()
    config.export.ema = True  # release the averaged weights
    config.export.push = placeholder(str)  # owner/name on the Hugging Face hub; unset: local only
    config.export.dry_run = False  # with push: say what would be uploaded, upload nothing
    config.reference = ConfigDict()
    config.reference.split = "train"  # of the images whose statistics are written
    config.reference.format = "lfm_jax"  # a name of evaluate.FORMATS
    config.compare = ConfigDict()
    config.compare.runs = ("",)  # workdirs to show beside this one

    # ---- devices (sharding.py)
    config.mesh = ConfigDict()
    config.mesh.data = -1  # data-parallel devices; -1: all that the other axes leave
    config.mesh.fsdp = 1  # devices that share one copy of parameters, optimizer and EMA
    return config


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types, unset placeholders as null."""
    return json.loads(config.to_json_best_effort())


def content_hash(value: Any) -> str:
    """sha256 of a JSON value in canonical form: how "the inputs changed" is decided."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def overrides(section: ConfigDict) -> dict[str, Any]:
    """The fields of a section that are set, without the unset placeholders."""
    return {key: value for key, value in section.items() if value is not None}


def sd_latents_256(config: ConfigDict) -> ConfigDict:
    """What LFM's experiments at 256x256 share: SD VAE latents with mirrors, dopri5, 50k samples."""
    config.data.image_size = 256
    config.data.channels = 3
    config.autoencoder.kind = "pretrained"
    config.autoencoder.weights = "stabilityai/sd-vae-ft-mse"
    config.encode.mirror = True
    config.model.dtype = "bfloat16"
    config.train.mirror = True
    config.train.log_every = 100
    config.train.save_every = 10_000
    config.evaluate.extractor = "inception"
    config.evaluate.metrics = ("fd", "sfd", "is", "kid", "pr")
    config.sample.num_samples = 50_000
    config.sample.solver = "dopri5"
    config.sample.rtol = 1e-5
    config.sample.atol = 1e-5
    return config


def lfm_network(
    config: ConfigDict, name: str, mult: tuple[int, ...], attention: tuple[int, ...]
) -> ConfigDict:
    """One of LFM's U-Nets: ``adm`` (EDM's form) or ``unet`` (guided-diffusion's).

    `attention` is read as the published code reads it: map sides by ``adm``, downsampling factors
    by ``unet``.
    """
    config.model.name = name
    config.model.mult = mult
    config.model.attention_resolutions = attention
    if name == "unet":
        config.model.attention_reading = "factor"
    return config


def variants(
    config: ConfigDict, name: str, **choices: Callable[[ConfigDict], ConfigDict]
) -> ConfigDict:
    """The config as its file's variant changes it; `smoke` is there for every file.

    Args:
        config: changed in place and returned.
        name: what stands behind the colon in ``--config=FILE:NAME``; empty for none.
        **choices: variant name (with "_" for "/") -> what it changes.

    Raises:
        UserError: an unknown variant.
    """
    choices = {"smoke": smoke, **choices}
    if not name:
        return config
    key = name.replace("/", "_")
    if key not in choices:
        known = ", ".join(choice.replace("_", "/") for choice in choices)
        raise UserError(f"--config=...:{name}: expected no variant or one of {known}")
    return choices[key](config)


def smoke(config: ConfigDict, *, synthetic: bool = True) -> ConfigDict:
    """Shrink an experiment until every stage of it runs in seconds on a CPU; it learns nothing.

    Args:
        config: changed in place and returned.
        synthetic: replace the images by small synthetic ones, so that no data set is needed.
    """
    if synthetic:
        config.data.source = "synthetic"
        config.data.path = ""
        config.data.image_size = 16
        config.data.limit = 256
        config.autoencoder.kind = "train"
        config.autoencoder.block_out_channels = (8, 8, 16)
        config.autoencoder.norm_groups = 4
        config.autoencoder.layers_per_block = 1
    config.autoencoder.steps = 10
    config.autoencoder.batch_size = 32
    config.model.name = "DiT"
    for key in ("mult", "attention_resolutions", "attention_reading"):
        config.model[key] = None
    config.model.hidden = 32
    config.model.depth = 2
    config.model.heads = 2
    config.model.patch = 2
    config.model.dtype = "float32"
    config.train.steps = 20
    config.train.batch_size = 32
    config.train.log_every = 5
    config.train.save_every = 10
    config.train.preview_every = 10
    config.train.warmup_steps = 5
    config.sample.num_samples = 60
    config.sample.batch_size = 30
    config.sample.num_steps = 4
    config.sample.rtol = None
    config.sample.atol = None
    config.evaluate.num_real = 50
    # Without labels there is nothing to train a judge on.
    config.evaluate.extractor = "classifier" if config.data.num_classes else "random"
    config.evaluate.metrics = ("kid",)
    config.evaluate.classifier_epochs = 1
    config.evaluate.classifier_width = 4
    return config
