"""Every option of every job, with its default: `configs/*.py` start from `default_config()`.

Options live under the job or the part they belong to. Optional fields are typed placeholders, so
that ``--config.data.path=/images`` works although the default is unset. `lfm_jax.config_rules`
holds the accepted ranges; `lfm_jax.config_check` applies them before any job starts.
"""

import hashlib
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """A new config with every field at its default."""
    config = ConfigDict()
    config.job = "pipeline"  # what runs without --job; one of lfm_jax.jobs.JOBS
    config.seed = 0  # >= 0; every random number follows from it and from a position (rng.py)
    config.init = placeholder(str)  # another workdir or release whose weights training starts from
    config.loss = "flow"  # objective of the train job: flow (matching) | mmd (finetuning)

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
    config.autoencoder.family = placeholder(str)  # of a bare file: a name of vae.families.SCALES
    config.autoencoder.revision = placeholder(str)  # of the hub repository; known ones are pinned
    config.autoencoder.sha256 = placeholder(str)  # checksum that the weights must have
    config.autoencoder.preview = placeholder(str)  # TAESD: decodes the previews of training
    config.autoencoder.decode_dtype = "float32"  # activations of the decoder: float32 | bfloat16
    config.autoencoder.decode_slice = 0  # images a device decodes at a time; 0: by backend
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
    # For photographs: latent diffusion adds a perceptual distance (weight 1) and, late, a patch
    # discriminator (0.5); VGG16's weights are the user's to bring.
    config.autoencoder.perceptual_weight = 0.0  # of LPIPS; 0: off
    config.autoencoder.vgg = placeholder(str)  # file of torchvision's VGG16, for LPIPS
    config.autoencoder.lpips = placeholder(str)  # file of LPIPS' linear layers; unset: all ones
    config.autoencoder.adversarial_weight = 0.0  # of the patch discriminator; 0: off
    config.autoencoder.adversarial_start = 50_000  # update at which it sets in

    # ---- latent cache (data/latents.py)
    config.encode = ConfigDict()
    config.encode.mirror = False  # store the encoded mirror image too: a latent cannot be flipped
    config.encode.splits = ("train",)  # splits of the source that get a cache
    config.encode.batch_size = 256  # images at a time over the devices of one process
    config.encode.shard_size = 16384  # examples a shard; a shard is the unit of resume
    config.encode.workers = -1  # processes that read and crop; -1: by cores and source; 0: none
    # Another project's latents in place of images (data/latent_stores.py), for the split "train".
    config.encode.import_kind = placeholder(str)  # edm2 | mar | meanflow | fast_dit
    config.encode.import_path = placeholder(str)  # folder (edm2: or zip) of that store

    # ---- condition beside the class (conditions/)
    config.condition = ConfigDict()
    config.condition.kind = "none"  # none | inpainting | semantic | layout
    config.condition.drop = 0.1  # probability of the null condition in training, for guidance
    config.condition.source = "garment_parts"  # semantic: data.MAP_SOURCES; data.LAYOUT_SOURCES
    config.condition.path = placeholder(str)  # folder of maps or of COCO's annotations
    config.condition.num_classes = 0  # of maps in a folder; 0: what the source says
    config.condition.masks = "lama"  # names of conditions.MASKS joined by +; LFM: paper
    config.condition.variants = 2  # masks an image in the cache; one is picked at every visit
    config.condition.fill = -1.0  # value of a hole's pixels before encoding; -1: black, as LFM
    config.condition.mask_channels = "nearest"  # nearest (LFM) | pixels: all of a latent position
    config.condition.rescaler = "patches"  # encoder of maps: patches | average (LFM's)
    config.condition.channels = 16  # of an encoded map; LFM: 4
    config.condition.hidden = 64  # width of the encoder "patches"
    config.condition.scheme = "boxes"  # tokens of a layout: boxes | corners (LFM: 3 an object)
    config.condition.max_objects = 0  # of a layout; 0: what the source says
    config.condition.depth = 2  # of the layout encoder; LFM: 16; its width: model.context_dim
    config.condition.heads = 4  # LFM: 8
    config.condition.overlap = False  # whether the boxes of layouts from files may overlap

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
    config.train.keep_every = 0  # checkpoints of steps that it divides are kept for ever; 0: none
    config.train.keep_best = 0  # checkpoints of smallest logged loss that are kept; 0: none
    config.train.nonfinite = "stop"  # a NaN or infinite step: stop | skip (left out and counted)
    config.train.evaluate_every = 0  # steps between measurements, best step kept; 0: off
    config.train.evaluate_samples = 1000  # samples of each, from the same noises every time
    config.train.profile_steps = ()  # first and last step of a profile in logs/profile; empty: none
    config.train.preview_every = 0  # steps between picture grids of a fixed noise set; 0: off

    # ---- MMD finetuning: config.loss = "mmd" (jobs/mmd.py); config.init names the base
    config.mmd = ConfigDict()
    config.mmd.num_steps = 4  # N, solver steps of the sampler that is trained
    config.mmd.more_steps = ()  # further N for the same network, one of all drawn per update
    config.mmd.solver = "euler"  # a fixed-step name of flow.SOLVERS, or ddim
    config.mmd.grid = "uniform"  # a name of flow.GRIDS, or falling times such as "1,0.6,0"
    config.mmd.eta = 0.0  # noise of ddim; 0 is the Euler step
    config.mmd.backprop_steps = 0  # gradients through the last so many steps only; 0: all
    config.mmd.kept_steps = 1  # last Euler steps whose activations stay in memory, not run again
    config.mmd.guidance = 1.0  # classifier-free, inside the differentiated solve; 1: off
    config.mmd.baked = ()  # scales of guidance in the target instead; several: told to the network
    config.mmd.trainable = "all"  # all | adaln | lora | solver (the time grid and step scales)
    config.mmd.lora_rank = 8
    config.mmd.features = ("pixels",)  # of pixels latents tokens raw random and published names
    config.mmd.decoder = "autoencoder"  # that features see images through; preview: the TAESD's
    config.mmd.entries = ("features", "maps")  # of networks trained here; with classes also logits
    config.mmd.network_seeds = (11, 12)  # one network a seed; not those of any judge
    config.mmd.network_steps = 800  # updates of each, 128 examples an update
    config.mmd.network_objective = "classify"  # classify | mask | both; unlabelled data: mask
    config.mmd.network_noise = 0.0  # their examples get noise of a deviation from 0 to this
    config.mmd.networks = placeholder(str)  # folder of networks and bank that runs share
    config.mmd.weights_file = placeholder(str)  # of a published extractor; unset: its cache
    config.mmd.token_times = (0.25,)  # noise levels of the backbone's tokens, in (0, 1]
    config.mmd.weights = ()  # of the feature spaces, in their order; empty: 1 each
    config.mmd.kernel = "gaussian"  # a name of mmd.KERNELS
    config.mmd.bandwidth = 1.0  # in median distances of real rows
    config.mmd.factors = (0.5, 1.0)  # the kernel is a mean over bandwidths times these
    config.mmd.estimator = "unbiased"  # unbiased | biased
    config.mmd.joint = 4.0  # distance of two classes in bandwidths; 0: labels are not compared
    config.mmd.groups = 0  # classes an update, drawn for it; 0: labels as they come in the data
    config.mmd.real = "bank"  # bank | batch (computed on the fly) | mean | nystrom
    config.mmd.target = "images"  # images (pixel features of the data's own) | latents | teacher
    config.mmd.bank_size = 20000  # real examples whose features are kept
    config.mmd.bank_rows = 4096  # of them compared with in one update
    config.mmd.landmarks = 1024  # of nystrom
    config.mmd.teacher_steps = 50  # Euler steps of a teacher's samples
    config.mmd.teacher_guidance = 1.0
    config.mmd.block = 0  # rows of a pair matrix held at a time; 0: all
    config.mmd.chunks = 1  # parts of a batch, one in memory at a time; the gradient is the whole's
    config.mmd.backward_chunks = 0  # gradients through so many random chunks only; 0: all
    config.mmd.anchor = 0.0  # weight of the flow-matching loss beside it
    # Updates between scores of the snapshot; 0: keep the last, scored for collapse alone.
    config.mmd.validate_every = 20
    config.mmd.validate_samples = 500
    config.mmd.collapse = 0.3  # least spread of the samples over the real one's

    # ---- sampling (jobs/sample.py)
    config.sample = ConfigDict()
    config.sample.num_samples = 1000
    config.sample.batch_size = 250  # images over all devices
    config.sample.solver = "euler"  # a name of flow.SOLVERS, or ddim
    config.sample.eta = 0.0  # noise on the way: of solver ddim (0 is the Euler step), or of sde
    config.sample.num_steps = 50  # steps; times in grid, or rtol, go before it
    config.sample.grid = "uniform"  # fixed steps: a name of flow.GRIDS, or times "1,0.6,0.3,0"
    config.sample.rtol = placeholder(float)  # both > 0: an adaptive solve; 0 or unset: fixed steps
    config.sample.atol = placeholder(float)
    config.sample.error_norm = (
        "sample"  # adaptive error control: per "sample" or whole "batch" (LFM)
    )
    config.sample.guidance = 1.0  # classifier-free scale; 1: off, one network call an evaluation
    config.sample.guidance_interval = (0.0, 1.0)  # times (1 is noise) at which guidance acts
    config.sample.guidance_rescale = 0.0  # in [0, 1]: pulls the deviation back to the unguided one
    config.sample.guidance_channels = 0  # guided latent channels; 0: all (LFM), 3: DiT and SiT
    config.sample.labels = "balanced"  # balanced | uniform | a class list such as "3,7"; with a
    # condition, balanced means the classes of the images that the conditions are of
    config.sample.condition_guidance = 1.0  # scale of the condition; 1: off, as above
    config.sample.given = placeholder(str)  # conditions from files; unset: of held-out images
    config.sample.masks = ""  # inpainting: other masks than the condition's
    config.sample.repeats = 1  # samples under each condition
    config.sample.autoguidance = 1.0  # scale away from the network of `weak`; 1: off
    config.sample.weak = placeholder(str)  # workdir of a worse network of the same latents
    config.sample.weak_step = 0  # its checkpoint; 0: the newest (weak may be this workdir)
    config.sample.classifier_guidance = 0.0  # scale of the classifier's gradient; 0: off
    config.sample.classifier_max_weight = 10.0  # bound of its weight t / (1 - t)
    config.sample.sde = ""  # euler_maruyama | heun: noise on the way, of strength eta; empty: none
    config.sample.checkpoint = "newest"  # newest | best (by train.evaluate_every)
    config.sample.ema = True  # sample the averaged weights
    config.sample.seed = 0  # of the noise: sample i is the same for any batch size and topology
    config.sample.png = False  # one PNG an image beside samples.npz
    config.sample.jpeg = 0  # quality of one JPEG an image beside samples.npz; 0: none
    config.sample.latents = False  # also write samples/latents.npz, scaled, float32
    config.sample.trajectory = (
        0  # columns of samples/trajectory.png (x_t over its estimate); 0: off
    )
    config.sample.interpolation = 0  # columns of samples/interpolation.png; 0: off
    config.sample.class_switch = 0  # noises of samples/class_switch.png, a column a class; 0: off
    config.sample.latency = 0  # timed single samples, with and without decoding; 0: off

    # ---- classifier of noisy latents, for sample.classifier_guidance (jobs/classify.py)
    config.classifier = ConfigDict()
    config.classifier.steps = 2000
    config.classifier.batch_size = 256
    config.classifier.learning_rate = 1e-3  # peak; warm-up then cosine to zero
    config.classifier.warmup_steps = 100
    config.classifier.weight_decay = 0.05
    config.classifier.width = 64  # channels of the first level
    config.classifier.blocks = 1  # residual blocks a level
    config.classifier.log_every = 50
    config.classifier.save_every = 500

    # ---- evaluation (jobs/evaluate.py)
    config.evaluate = ConfigDict()
    config.evaluate.samples = placeholder(str)  # an npz to judge; unset: the workdir's own samples
    config.evaluate.reference = placeholder(str)  # statistics to compare with, of any known format
    config.evaluate.num_real = 10000  # at most this many held-out images
    config.evaluate.floors = True  # also measure reconstructions and real images, if at hand
    config.evaluate.memorisation = 0  # training images to look for copies among; 0: off
    config.evaluate.extractor = "classifier"  # classifier (trained here) | random | published ones
    config.evaluate.weights = placeholder(str)  # file of a published extractor; unset: its cache
    config.evaluate.pipeline = ""  # pixels to network: tf1 | torch | clean; empty: its usual one
    config.evaluate.metrics = ("fd", "kid", "pr")  # of evaluate.METRICS
    config.evaluate.lpips = placeholder(str)  # inpainting: a file of VGG16, or "VGG16,LPIPS"
    config.evaluate.jpeg = 0  # quality of a JPEG round trip before judging (LFM: 75); 0: none
    config.evaluate.bootstrap = 0  # replicates of the interval of the Frechet distance; 0: none
    config.evaluate.force = False  # compare across pipelines all the same; the result is marked
    config.evaluate.singular = False  # allow no more samples than dimensions (with a reference)
    config.evaluate.classifier_epochs = 8  # training of the small judge on the real train split
    config.evaluate.classifier_width = 32  # its base channels
    config.evaluate.classifier_seed = 1234  # not the run's seed: the judge is independent of it
    config.evaluate.svc = False  # also judge class accuracy by a scikit-learn SVC on pixels

    # ---- semantic boundaries (jobs/edit.py, boundary/)
    config.edit = ConfigDict()
    config.edit.attribute = placeholder(str)  # pair:A/B | class:A | table:A | pixels:A | text:A/B
    config.edit.also = ()  # attributes that are moved or kept with it
    config.edit.also_weights = ()  # their share of the strength; 0 keeps them where they are
    config.edit.leakage = ()  # further attributes whose change is measured
    config.edit.table = placeholder(str)  # of the table: attributes, CelebA's layout or CSV
    config.edit.clip = placeholder(str)  # CLIP weights' folder, for the text: attributes
    config.edit.images = "test"  # test | train | test:3,17 | sampled | a file or folder of images
    config.edit.count = 64  # images to edit where the source has more
    config.edit.boundary = placeholder(str)  # a saved boundary of z in place of fitting one
    config.edit.space = "z"  # z: the latent | h: a hidden state | both
    config.edit.layer = ""  # hidden state; empty: the middle (block at half depth, U-Net's mid)
    config.edit.pool = "mean"  # of the hidden state: mean over tokens | flat
    config.edit.method = "svm"  # a name of boundary.METHODS
    config.edit.cost = placeholder(float)  # C; unset: cross-validated
    config.edit.source = "inverted"  # states to fit on: inverted | noised | sampled
    config.edit.num_fit = 500  # training images of the boundary, both sides together
    config.edit.num_validation = 64  # training images that choose time and strength
    config.edit.time = placeholder(float)  # where to cross; unset: searched by rule
    config.edit.times = (0.5, 0.6, 0.7, 0.8, 0.9)  # candidates and places of the curves, rising
    config.edit.rule = "utility"  # a name of boundary.RULES; its curve decides
    config.edit.curves = ("radius", "separability", "utility")  # to compute; commitment costs most
    config.edit.completions = 8  # stochastic completions of a state, for commitment
    config.edit.mode = "project"  # shift | project | reflect | rotate
    config.edit.unit = "margin"  # of strengths: margin (standard deviations) | absolute (paper)
    config.edit.strengths = (-4.5, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.5)  # columns of a strip
    config.edit.hidden_weight = 1.0  # strength in h over the strength in z
    config.edit.window = (0.0, 1.0)  # times at which the hidden state is shifted
    config.edit.eta = 0.0  # noise on the way down: 0 deterministic .. 1 ancestral
    config.edit.solver = "midpoint"  # both ways
    config.edit.num_steps = 24  # over the whole of [0, 1]
    config.edit.batch_size = 128  # images a program
    config.edit.strips = 12  # rows of strips.png
    config.edit.seed = 0  # of the split, the folds and fresh noise

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
    config.export.licence = placeholder(str)  # of the weights, for the model card
    config.export.families = ()  # also write the files of these: names of weights.FAMILIES
    config.reconstruct = ConfigDict()
    config.reconstruct.split = "test"  # of the images that the autoencoder is judged on
    config.reconstruct.num_images = 10_000  # evenly spaced; at most what the split has
    config.reconstruct.rfd = True  # also the Frechet distance, by evaluate.extractor
    config.reconstruct.pictures = 8  # columns of the side-by-side picture
    config.reference = ConfigDict()
    config.reference.split = "train"  # of the images whose statistics are written
    config.reference.format = "lfm_jax"  # a name of evaluate.FORMATS
    config.reference.of = "images"  # images | latents: those of the cache, decoded
    config.reference.images = 0  # images kept in the file, as ADM's 10,000; 0: none

    # ---- what the flow itself is like (jobs/diagnose.py), on held-out images
    config.diagnose = ConfigDict()
    config.diagnose.parts = ("bound", "likelihood", "inversion", "curve")
    config.diagnose.num_images = 256
    config.diagnose.points = 16  # bound: points at which a Lipschitz constant is estimated
    config.diagnose.times = 9  # bound: times at which the velocity's is
    config.diagnose.iterations = 20  # bound: of each power iteration
    config.diagnose.probes = 4  # likelihood: random vectors an image; 0: the exact trace
    config.diagnose.likelihood_steps = 20  # likelihood: rk4 steps
    config.diagnose.inversion_steps = (4, 8, 16, 32)  # inversion: midpoint steps one way
    config.diagnose.switched = 6  # inversion: images shown as every other class; 0: none
    config.diagnose.switch_t = 0.7  # inversion: time up to which they are taken (1: all the way)
    config.diagnose.curve = ("euler:4", "euler:16", "heun:8", "dopri5:1e-3")  # solver:steps or rtol
    config.diagnose.curve_samples = 2000
    config.compare = ConfigDict()
    config.compare.runs = ("",)  # workdirs to show beside this one

    # ---- devices (sharding.py)
    config.mesh = ConfigDict()
    config.mesh.data = -1  # data-parallel devices; -1: all that the other axes leave
    config.mesh.fsdp = 1  # devices that share one copy of parameters, optimizer and EMA
    config.mesh.tensor = 1  # devices that share one product; none of them sees less of a batch
    # Layouts by name instead of size: (regular expression of a path, an axis or None a dimension).
    config.mesh.rules = ()  # e.g. (("mlp_in/kernel", (None, "fsdp", "tensor")),)

    # ---- compilation for machines that are not there (jobs/compile.py)
    config.compile = ConfigDict()
    config.compile.topology = placeholder(str)  # v5p:2x2x4, v5e:16x16, ...; unset: local devices
    config.compile.slices = 1  # such slices, joined by the data-centre network
    config.compile.step = "train"  # train | sample
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
