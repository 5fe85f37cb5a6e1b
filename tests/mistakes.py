"""What users get wrong: command lines, files, environments, and the message that each must give.

A table of (command line, part of the message). The files that lines name are made by test_errors.py.
"""

from __future__ import annotations

D = "--experiment digits --run.dir out "
STACKED = D + "--model.hidden 32 32 32 --model.stacked "

TABLE = {
    "experiment": ("--experiment digitz", "Did you mean 'digits'"),
    "experiment_path": ("--experiment gone.py", "no experiment file 'gone.py'"),
    "experiment_missing": ("--train.steps 5", "no experiment given"),
    "command": ("trian --experiment digits", "Did you mean 'train'"),
    "field": (D + "--train.stepz 5", "--train.steps"),
    "field_last_part": (D + "--batch-size 5", "Did you mean '--data.batch-size'"),
    "field_group": (
        D + "--mesh 8",
        "--mesh is a group of options; give one of --mesh.replica, --mesh.data",
    ),
    "field_of_command": (f"eval {D}--stepp 3", "Did you mean '--step'"),
    "field_of_launcher": (f"launch local {D}--proceses 3", "Did you mean '--processes'"),
    "field_of_experiment": (f"plan {D}--experimnt x", "Did you mean '--experiment'"),
    "field_twice": (D + "--experiment digits", "--experiment is given twice"),
    "type": (D + "--train.steps abc", "--train.steps takes INT or None, not 'abc'"),
    "type_equals": (D + "--train.steps=1.5", "--train.steps takes INT or None, not '1.5'"),
    "type_many": (D + "--model.hidden a b", "--model.hidden takes any number of INT, not 'a b'"),
    "no_value": (D + "--train.steps", "--train.steps needs a value: INT or None"),
    "no_class": (D + "--strategy --train.steps 5", "--strategy needs a value, one of auto,"),
    "switch": (
        D + "--log.tensorboard true",
        "takes no value; --log.no-tensorboard is its opposite",
    ),
    "stray": (D + "--train.steps 5 6", "'6' after --train.steps is not understood"),
    "command_last": (
        D + "eval",
        "'eval' after --run.dir is not understood: options are given",
    ),
    "choice": (
        D + "--optimizer.schedule consine",
        "takes one of constant, cosine, wsd, not 'consine'. Did you mean 'cosine'?",
    ),
    "zero_steps": (D + "--train.steps 0", "train.steps=0 must be at least 1"),
    "rate": (
        D + "--optimizer.learning-rate -1",
        "optimizer.learning_rate=-1.0 must not be negative",
    ),
    "in_flight": (D + "--train.steps-in-flight 9", "must be at most 8"),
    "profile": (D + "--log.profile 30:20", "log.profile='30:20' must be FIRST:LAST"),
    "simulate": (D + "--simulate -1", "simulate=-1"),
    "mesh_product": (D + "--simulate 8 --mesh.data 3", "multiply to 3, but there are 8 devices"),
    "mesh_rest": (D + "--simulate 8 --mesh.fsdp -1", "only one mesh axis may be -1"),
    "mesh_zero": (D + "--mesh.tensor 0", "mesh.tensor=0"),
    "batch": (D + "--simulate 8 --data.batch-size 20", "data.batch_size=20 does not divide"),
    "accumulate": (D + "--simulate 8 --train.accumulate 3", "train.accumulate=3"),
    "batch_zero": (D + "--data.batch-size 0", "data.batch_size=0"),
    "tensor": (
        D + "--simulate 8 --mesh.tensor 8 --mesh.data 1 --model.hidden 36",
        "of size 36 does not divide by mesh.tensor=8",
    ),
    "strategy": (D + "--strategy autoo", "Did you mean 'auto'"),
    "optimizer": (D + "--optimizer adam", "Did you mean 'adamw'"),
    "staleness": (D + "--strategy server --strategy.staleness -1", "staleness=-1 must not be"),
    "bidirectional": (
        D + "--strategy allreduce --strategy.bidirectional",
        "strategy.bidirectional is for strategy.reduction=ring, not psum",
    ),
    "bucket": (D + "--strategy allreduce --strategy.bucket-mb 0", "must be more than 0"),
    "compress_ring": (
        D + "--strategy allreduce --strategy.reduction ring --strategy.compress.kind int8",
        "kind=int8 has collectives of its own and takes no strategy.reduction=ring",
    ),
    "keep": (
        D + "--strategy server --strategy.compress.keep 1.5",
        "strategy.compress.keep=1.5 must be in (0, 1]",
    ),
    "privacy_compress": (
        D + "--strategy allreduce --strategy.compress.kind int8 --privacy.epsilon 8",
        "privacy: strategy.compress.kind=int8 changes the sum; use",
    ),
    "noise_compress": (
        D + "--simulate 2 --strategy server --strategy.compress.kind int8 --train.noise-scale",
        "train.noise_scale compares gradients, which strategy.compress.kind=int8 changes",
    ),
    "noise_local": (
        D
        + "--simulate 1 --strategy local --strategy.period 1 --train.noise-scale --train.accumulate 2",
        "replicas that go their own ways never take",
    ),
    "experts_every": (
        "--experiment lm_stdlib --model.experts.num 4 --model.experts.every 5",
        "model.experts.every=5 leaves none of the 4 layers with experts",
    ),
    "experts_every_stage": (
        "--experiment lm_stdlib --simulate 4 --mesh.data 1 --mesh.stage 4 --model.experts.num 4"
        " --model.experts.every 2 --run.dir out",
        "4 layers of the model, which repeat every 2 (model.experts.every); use mesh.stage=2",
    ),
    "stage_privacy": (
        STACKED + "--simulate 2 --mesh.data 1 --mesh.stage 2 --privacy.noise-multiplier 1",
        "privacy needs gradients of parts of the batch, which a pipeline (mesh.stage=2) sums up",
    ),
    "plan_strategy": (
        "plan --experiment digits --strategy server --no-compile",
        "no closed form covers strategy server with these options: drop --no-compile",
    ),
    "not_prepared": ("--experiment mnist --run.dir out", "run.py data prepare"),
    "data_dir": (D + "--data.dir nowhere", "data.dir='nowhere' is no directory"),
    "data_name": (D + "--data.name ../evil", "is not a TFDS name"),
    "data_version": (D + "--data.name digits:9.9.9", "no version 9.9.9 of the embedded set"),
    "split_percent": (D + "--data.train-split train[:150%]", "150% is beyond the split"),
    "warmup": (
        D + "--train.steps 30 --optimizer.warmup-steps 31",
        "optimizer.warmup_steps=31 is more than the 30 steps of the run",
    ),
    "ema": (D + "--optimizer.ema 1.0", "optimizer.ema=1.0 must be in [0, 1)"),
    "muon": (D + "--optimizer muon --optimizer.rms 0", "optimizer.rms=0.0 must be more than 0"),
    "crop": (D + "--data.transforms crop:8", "must be less than the image's 8 x 8 pixels"),
    "mixup": (D + "--data.transforms mixup:-1", "mixup: alpha=-1.0 must be more than 0"),
    "transform": (
        D + "--data.transforms corp:1",
        "'corp'. Did you mean 'crop'? Known: decode",
    ),
    "transform_value": (D + "--data.transforms crop", "crop is given as crop:PIXELS[:IMAGES]"),
    "transform_type": (D + "--data.transforms flip,crop:x", "pixels takes a whole number, not 'x'"),
    "transform_image": (
        D + "--data.transforms flip:imag",
        "no feature 'imag'. Did you mean 'image'",
    ),
    "eval_transform": (D + "--data.eval-transforms flop", "'flop'. Did you mean 'flip'?"),
    "transform_none": (D + "--data.transforms", "--data.transforms needs a value: NAME:VALUE,..."),
    "split": (D + "--data.train-split trian", "Did you mean 'train'"),
    "run_dir": ("--experiment digits --run.dir file/out", "cannot write run directory"),
    "run_file": ("--experiment digits --run.dir file", "is a file"),
    "run_scheme": (
        "--experiment digits --run.dir s3://bucket/run",
        "run.dir='s3://bucket/run': give a local directory or gs://bucket/dir",
    ),
    "run_foreign": ("--experiment digits --run.dir foreign", "holds no run"),
    "run_corrupt": ("--experiment digits --run.dir corrupt", "not a run's configuration"),
    "run_other": (
        "--experiment digits --run.dir other",
        "optimizer.momentum: 0.5 -> 0.9 use --run.dir DIR for a second run, or --run.fresh",
    ),
    "run_identity": ("--experiment digits --run.dir listed", "not a run's configuration"),
    "eval_no_run": ("eval --experiment digits --run.dir gone", "no run in"),
    "data_action": ("data prepar --experiment digits", "Did you mean 'prepare'"),
    "no_config": ("--experiment empty.py", "no config() function"),
    "wrong_config": ("--experiment wrong.py", "returned 3, not an spmd.Experiment"),
    "epochs": (D + "--train.epochs inf", "'inf' must be a finite number"),
    "epochs_float": (D + "--train.epochs 1e300", "'1e300' must be a finite number"),
    "epochs_many": (D + "--train.epochs 1e30", "more than the 2147483647 that are counted"),
    "rate_nan": (D + "--optimizer.learning-rate nan", "'nan' must be a finite number"),
    "steps_huge": (
        D + f"--train.steps {10**30}",
        "train.steps=1000000000000000000000000000000 is too",
    ),
    "seed_huge": (D + f"--seed {2**70}", "at most 4294967295"),
    "hidden_huge": (D + f"--model.hidden 8 {2**31}", "model.hidden[1]=2147483648 is too large"),
    "optax": (D + "--optimizer optax", "Optax takes a function, which a command line cannot give"),
    "grace": (D + "--runtime.grace 1e9", "must be at most 1000000 seconds"),
}

# Mistakes in an experiment file: (what is replaced in that of digits, by what, the message).
SGD = "SGD(learning_rate=0.1, momentum=0.9, warmup_steps=5)"
DOC = '"""A two-layer network with dropout."""'
ONDATA = (
    "evaluations=(__import__('spmd.train.evaluations').train.evaluations.OnData(name='other',"
    " data=TFDS(name='digits', batch_size=64, features={features})),), train=TrainConfig"
)
EDITS = {
    "keyword": (
        "SGD(learning_rate",
        "SGD(learning_rat",
        "keyword.py, line 24, in config(): SGD() has no 'learning_rat'. Did you mean 'learning_rate'?",
    ),
    "section": ("train=TrainConfig", "trian=TrainConfig", "has no 'trian'. Did you mean 'train'?"),
    "positional": (SGD, "SGD(0.1)", "It takes: learning_rate, schedule"),
    "lacking": ("inputs=64, ", "", "argument: 'inputs'. It takes: inputs, hidden"),
    "attribute": (SGD, "__import__('spmd.optim').optim.SDG()", "no 'SDG'. Did you mean 'SGD'?"),
    "undefined": (SGD, "SDG()", "the name 'SDG' is not defined. Did you mean 'SGD'?"),
    "imported": ("import SGD", "import SDG", "module spmd.optim has no 'SDG'. Did you mean 'SGD'?"),
    "root": ("import Experiment", "import Experimnt", "Did you mean 'Experiment'?"),
    "module": ("spmd.optim", "spmd.optm", "line 9: ModuleNotFoundError: No module named 'spmd.optm'."),
    "foreign_module": (DOC, "import no_such_module", "named 'no_such_module'. Is it installed?"),
    "syntax": ("def config() ->", "def config( ->", "syntax.py, line 14: SyntaxError"),
    "null": ("def config", "\0def config", "cannot contain null bytes"),
    "text_rate": ("=0.1, mom", "='0.1', mom", "SGD.learning_rate='0.1' must be a number, not str"),
    "nan_rate": ("=0.1, mom", "=float('nan'), mom", "SGD.learning_rate=nan must be a finite number"),
    "text_steps": ("epochs=40", "steps='40'", "steps='40' must be a whole number or None, not str"),
    "one_size": ("(256, 128)", "256", "hidden=256 must be a tuple, each a whole number, not int"),
    "task_class": ("Classification()", "Classification", "task=Classification must be a task"),
    "task_model": ("Classification()", "MLP(inputs=64)", "must be a task, as spmd.tasks.Class"),
    "model_number": ("MLP(inputs=64", "3 or MLP(inputs=64", "model=3 must be a model config"),
    "other_class": (SGD, "TrainConfig()", "must be of type Optimizer, not TrainConfig"),
    "refused": ("=0.1, mom", "=-1, mom", "line 24, in config(): optimizer.learning_rate=-1 must"),
    "group_twice": (
        SGD,
        "(o := __import__('spmd.optim').optim).SGD(groups=tuple(o.Group(match=m) for m in ('*s', '*/0/*')))",
        "'*s' and '*/0/*' both claim layers/0/bias; narrow one of the patterns",
    ),
    "group_none": (
        SGD,
        "(o := __import__('spmd.optim').optim).SGD(groups=(o.Group(match='layer/0/bias', freeze=True),))",
        "optimizer.groups: no array matches 'layer/0/bias'. Did you mean 'layers/0/bias'?",
    ),
    "optax_result": (
        SGD,
        "__import__('spmd.optim').optim.Optax(build=lambda rate: None)",
        "optimizer.build must return an optax.GradientTransformation, not NoneType",
    ),
    "optax_value": (
        SGD,
        "__import__('spmd.optim').optim.Optax(build=3)",
        "optimizer.build=3 must be of type Callable, not int",
    ),
    "values_shape": (
        "Classification()",
        "type('Odd', (Classification,), {'values': lambda self, outputs, batch, train: {'loss': outputs}})()",
        "task Odd: the values of term 'loss' are of shape [64, 10] and its weights of [64]: they must be",
    ),
    "metric_sums": (
        "Classification()",
        "type('Odd', (Classification,), {'metrics': (type('M', (__import__('spmd.metrics').metrics.Mean,),"
        " {'sums': lambda self, *args: {'sum': 1.0}})(name='odd'),), 'train_metrics': ()})()",
        "metric 'odd': sums() returned sum: float; it returns {name: array}",
    ),
    "evaluation_image": (
        "train=TrainConfig",
        ONDATA.format(features="{'image': ((4, 4, 1), 'uint8'), 'label': ((), 'int32')}"),
        "evaluation 'other': an example of shape [4, 4, 1] has 16 values and model.inputs=64",
    ),
    "evaluation_label": (
        "train=TrainConfig",
        ONDATA.format(features="{'image': ((8, 8, 1), 'uint8')}"),
        "evaluation 'other': the batch has no feature 'label'",
    ),
    "own_error": (DOC, "raise ValueError('no such data')", "line 15, in config(): no such data"),
    "library": (DOC, "import json; json.loads('{')", "line 1 column 2 (char 1) (raised by json/decoder.py"),
    "leaves": (DOC, "raise SystemExit(0)", "line 15, in config(): it ends the process (exit code 0)"),
    "argument": ("def config()", "def config(size)", "missing 1 required positional argument: 'size'"),
    "misspelt": ("def config()", "def confg()", "has no config() function"),
    "nothing": ("return Experiment", "Experiment", "returned None, not an spmd.Experiment"),
    "helper": (
        DOC,
        "def width(n): return n // 0\n    width(3)",
        "line 15, in width(): ZeroDivisionError: integer division or modulo by zero (called from line 16)",
    ),
}  # fmt: skip
TABLE |= {name: (f"--experiment {name}.py --run.dir out", edit[2]) for name, edit in EDITS.items()}

# ---- text and weights: one block on eight bytes

T = "--experiment text.py --run.dir out --simulate 1 "
T2 = "--experiment text.py --run.dir out --simulate 2 "
TEXT = '''"""A tiny language model."""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import SGD
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, TrainConfig


def config():
    sizes = {"vocab": 256, "length": 8, "layers": 1, "heads": 2, "embed": 8}
    gpt2 = {"norm": "layer", "activation": "gelu", "position": "learned", "bias": True, "tied": True}
    return Experiment(
        model=Transformer(**sizes, **gpt2),
        task=LanguageModel(),
        data=Text(files=("poem.txt",), sequence_length=8, batch_size=8),
        optimizer=SGD(),
        train=TrainConfig(steps=2),
        checkpoint=CheckpointConfig(best=""),
    )
'''
NET = """

class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.iner(x.reshape(x.shape[0], -1))
"""
MASKS = """
from spmd import Experiment
from spmd.data.images import Images
from spmd.data.resizing import Decode, Resize
from spmd.models.cnn import CNN
from spmd.optim import SGD
from spmd.tasks import Classification


def config():
    how = (Decode(), Resize(8, 8, ("image", "mask")))
    data = Images(target="mask", transforms=how, eval_transforms=how)
    return Experiment(model=CNN(channels=3), task=Classification(), data=data, optimizer=SGD())
"""
TABLE |= {
    "text_twice": (T + "--data.files both/*", "both/a.txt and both/a.txt.gz, one the other compressed"),
    "text_surrogate": (T + "--data.files surrogate.jsonl", "surrogate.jsonl, line 1: half of a surrogate"),
    "text_null": (T + "--data.files null.jsonl", "null.jsonl, line 1: the field 'text' (data.field) is null"),
    "text_field": (T + "--data.files field.jsonl", "Did you mean 'txt'? It has: txt"),
    "text_format": (T + "--data.files text.tar", "text.tar is not read: an archive: unpack it"),
    "text_utf16": (T + "--data.files utf16.txt", "utf16.txt is UTF-16 text: convert it"),
    "text_empty": (T + "--data.files void.txt", "0 tokens, too few to fill a sequence"),
    "text_damaged": (T + "--data.files torn.txt.gz", "torn.txt.gz is damaged near line 1"),
    "text_gone": (T + "--data.files gone*.txt", "no file matches data.files='gone*.txt'"),
    "text_remote": (T + "--data.files gs://b/x.txt", "text is read from a local disk; copy it there"),
    "text_choice": (T + "--data.format csv", "--data.format takes one of auto, text, jsonl, not 'csv'"),
    "text_short": (T + "--data.sequence-length 900 --model.length 900", "has 540 tokens, too few"),
    "text_length": (T + "--data.sequence-length 9", "sequence_length=9 is more than model.length=8"),
    "text_vocab": (T + "--model.vocab 20", "model.vocab=20 is less than the 256 tokens"),
    "text_period": (
        T2 + "--mesh.data 1 --mesh.stage 2 --train.accumulate 4 --model.layers 6 --model.window 4 0",
        "the 6 layers of the model, which repeat every 2 (model.window); use mesh.stage=3, or 8 layers",
    ),
    "text_mask": (
        T2 + "--mesh.data 1 --mesh.context 2 --model.mask full --model.window 4",
        "model.context=ring cannot compute a window on both sides; model.context=ulysses can",
    ),
    "text_heads": (T + "--model.embed 9", "model.embed=9 does not divide by model.heads=2"),
    "tokenizer_folder": (T + "--data.tokenizer toks", "is a directory; give a tokenizer.json."),
    "tokenizer_other": (T + "--data.tokenizer null.jsonl", "is not a Hugging Face tokenizer.json"),
    "tokenizer_gone": (T + "--data.tokenizer gone.json", "no tokenizer file 'gone.json'"),
    "best": (T + "--checkpoint.best eval/accuracyy", "Did you mean 'eval/accuracy'?"),
    "sample_no_run": ("sample " + T + "--prompt x", "no run in"),
    "weights_pickled": (T + "--init.from pickled", "holds pytorch_model.bin, which is not read"),
    "weights_gone": (T + "--init.from gone", "init.from='gone': there is no such directory"),
    "weights_none": (T + "--init.from both", "init.from='both' holds no checkpoint"),
    "weights_field": (
        T + "--init.from weights",
        "scale_attn_by_inverse_layer_idx: True in config.json, False in the model",
    ),
    "weights_two": (T + "--init.from two", "a.safetensors, b.safetensors and no model.safetensors.index"),
    "model_code": ("--experiment net.py --run.dir out", "Net has no 'iner'. Did you mean 'inner'?"),
    "tables_local": (
        "--experiment clicks --simulate 8 --strategy local --train.steps 100",
        "strategy local gives each replica parameters of its own, and the rows exist once",
    ),
    "tables_devices": (
        "--experiment clicks --simulate 6 --data.batch-size 768",
        "stored in 1024 stripes, which 6 devices do not divide; use 1, 2, 4, 8, 16",
    ),
    "tables_ids": (
        "--experiment clicks --data.ids 9 8 --model.ids 9 7 --data.examples 20480",
        "(7 ids of table 'category_01')",
    ),
    "log_untimed": (
        "--experiment movielens_sasrec --run.dir out --data.files untimed.csv",
        "orders the events of a user by time, and the log has no column 'timestamp'",
    ),
    "log_untimed_ratio": (
        "--experiment movielens_sasrec --run.dir out --data.split ratio --data.files untimed.csv",
        "histories (HistoryLog) are ordered by time, and the log has no column 'timestamp'",
    ),
    "log_gone": (
        "--experiment movielens_mf --run.dir out --data.files ml/u1.base",
        "data.files='ml/u1.base' does not exist",
    ),
    "log_bucket": (
        "--experiment movielens_mf --run.dir out --data.files gs://bucket/u.data",
        "is in a bucket; copy the log to a disk",
    ),
    "log_ids": (
        "--experiment movielens_mf --run.dir out --model.items 100",
        "(100 ids of table 'items')",
    ),
    "recommend_none": (
        "recommend --experiment movielens_two_tower --run.dir out",
        "give users by the ids of the log",
    ),
    "recommend_run": (
        "recommend --experiment movielens_two_tower --run.dir out --user 42",
        "no run in",
    ),
    "named_twice": ("--experiment moe_tiny", "and a file moe_tiny.py in this directory"),
    "named_here": ("--experiment text", "Did you mean 'text.py'?"),
    "wandb_absent": (D + "--log.wandb p", "--log.wandb needs a package"),
    "runs_gone": ("runs list gone", "no directory"),
    "runs_file": ("runs check poem.txt", "no directory"),
    "export_family": ("export " + D + "--to new", "not of MLP"),
    "target": ("plan --experiment digits --target h100", "for example h100:8"),
    "target_unknown": ("plan --experiment digits --target v9p:4x4", "Did you mean 'v5p'?"),
    "verify_alone": ("verify --experiment digits --simulate 1", "nothing to compare it with"),
    "compare_unknown": ("compare --experiment digits --strategies autoo", "Did you mean 'auto'?"),
    "launch_none": ("launch local --experiment digits --processes 0", "--processes 0 must be at least 1"),
    "launch_bucket": ("launch gke --experiment digits", "--run.dir (not given): the disks of pods"),
    "host": (
        D + "--runtime.coordinator nohost --runtime.num-processes 2 --runtime.process-id 0",
        "runtime.coordinator='nohost' is no host:port",
    ),
}  # fmt: skip

# ---- images: the files, and the indices of images

F = "--experiment image_folder --run.dir out --data.path "
IMAGES = (
    "nothing/a/",
    "hole/a/0.png",
    "hole/b/",
    "stray/0.png",
    "stray/a/0.png",
    "unknown/train/a/0.png",
    "unknown/eval/b/0.png",
    *(f"torn_images/{c}/{i}.png" for c in "ab" for i in range(40)),
    "unpaired/image/0.png",
    "unpaired/mask/1.png",
)
INDICES = {
    "no_label.csv": "image,lable\nhole/a/0.png,x\n",
    "no_value.csv": "image,label\nhole/a/0.png,\n",
    "no_file.csv": "image,label\n" + "".join(f"gone{i}.png,{i % 2}\n" for i in range(40)),
}
TABLE |= {
    "choice": ("--experiment image_folder --model vitb", "--model vitb: choose one of cnn, resnet, vit, "),
    "images_none": ("--experiment image_folder --run.dir out", "or name the images: --data.path DIR"),
    "images_gone": (F + "gone", "data.path='gone' does not exist"),
    "images_empty": (F + "nothing", "holds no image (.jpg,"),
    "images_class_empty": (F + "hole", "class without images in"),
    "images_stray": (F + "stray", "images that are in no class folder: 0.png"),
    "images_class_unknown": (F + "unknown", "evaluation images that are not among the 1 of training: b."),
    "images_kind": (F + "poem.txt", "is neither a folder nor an index of images"),
    "images_column": (F + "no_label.csv", "no column 'label' (data.label_column). Did you mean 'lable'?"),
    "images_value": (F + "no_value.csv", "column 'label' is empty in 1 of 1 rows, first in row 1"),
    "images_file": (F + "no_file.csv --data.batch-size 8", "cannot read"),
    "images_group": (F + "hole --data.group-by patient", "name columns of an index"),
    "images_torn": (F + "torn_images --data.batch-size 8", "(a/0.png) of the training data: 'image'"),
    "images_mask": (
        "--experiment masks.py --run.dir out --data.path unpaired",
        "have no mask of their name in mask: 0.png",
    ),
    "images_decode": (F + "hole --data.transforms flip", "flip needs one image, a feature of shape"),
    "images_resize": (F + "hole --data.transforms decode", "'image' is of different sizes after"),
}  # fmt: skip

# ---- tables and tar files, by an experiment of two numbers

TABLES = """
from spmd import Experiment
from spmd.data.huggingface import HuggingFace
from spmd.data.tables import Table
from spmd.data.tar import Tar
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.tasks import Classification
from spmd.train import TrainConfig

FEATURES = {"x": ((2,), "float32"), "label": ((), "int32")}
DATA = {
    "table": lambda: Table(features=FEATURES, columns={"x": ("a", "b")}),
    "tar": lambda: Tar(features=FEATURES, members={"x": "npy", "label": "cls"}),
    "saved": lambda: HuggingFace(features=FEATURES),
}


def config():
    model = MLP(inputs=2, hidden=(4,), classes=2)
    train, task = TrainConfig(steps=2), Classification(input="x")
    return Experiment(model=model, task=task, data=DATA["KIND"](), optimizer=SGD(), train=train)
"""
CSV = {
    "good.csv": "a,b,label\n" + "1,2,0\n" * 40,
    "untimed.csv": "user,item\n" + "".join(f"{i % 3},{i}\n" for i in range(12)),
    "lacks.csv": "a,c,label\n" + "1,2,0\n" * 40,
    "words.csv": "a,b,label\n" + "1,x,0\n" * 40,
    "holes.csv": "a,b,label\n" + "1,,0\n" * 40,
    "high.csv": "a,b,label\n" + "1,2,7\n" * 40,
    "no_rows.csv": "a,b,label\n",
}
B = " --run.dir out --data.batch-size 8 --data.cache-dir cached "
TABLE |= {
    "table_none": ("--experiment table.py" + B, "data.files is empty; give files, globs in quotes"),
    "table_gone": ("--experiment table.py --data.files gone*.csv" + B, "matches data.files='gone*.csv'"),
    "table_kind": ("--experiment table.py --data.files poem.txt" + B, "is no table; what works: .parquet"),
    "table_parquet": ("--experiment table.py --data.files table.parquet" + B, "is no Parquet file"),
    "table_fraction": (
        "--experiment table.py --data.files good.csv --data.eval-fraction 0.7" + B,
        "data.eval_fraction=0.7 must be more than 0 and at most 0.5",
    ),
    "tar_none": ("--experiment tar.py --data.files poem.txt" + B, "is no .tar file"),
    "tar_text": ("--experiment tar.py --data.files text.tar" + B, "text.tar is damaged, or no tar file"),
    "saved_none": ("--experiment saved.py --run.dir out --data.path hole", "was not written by save_to_disk"),
}  # fmt: skip
# Reading these tables converts them to Arrow IPC first: the cache is written, the run is not.
CONVERTED = {
    "table_column": ("lacks.csv", "has no column 'b' (feature 'b')"),
    "table_words": ("words.csv", "words.csv cannot be read: "),
    "table_holes": (
        "holes.csv",
        "values are missing in b (40 of 40); take --data.missing nan or zero",
    ),
    "table_range": ("high.csv", "feature 'label' is 7 in example"),
    "table_empty": ("no_rows.csv", "no rows; give files that have some"),
}

# ---- environments: the variables of a row

ENVIRONMENTS = {
    "env_number": {"SPMD_NUM_PROCESSES": "abc"},
    "env_half": {"SPMD_NUM_PROCESSES": "2"},
    "env_range": {
        "SPMD_NUM_PROCESSES": "2",
        "SPMD_PROCESS_ID": "2",
        "SPMD_COORDINATOR": "localhost:1",
    },
    "env_host": {
        "SPMD_NUM_PROCESSES": "2",
        "SPMD_PROCESS_ID": "0",
        "SPMD_COORDINATOR": "localhost",
    },
    "env_mpi": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "5"},
    "env_cache": {"SPMD_CACHE_DIR": "poem.txt"},
    "env_data": {"TFDS_DATA_DIR": "/nowhere"},
    "env_proxy": {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
}
TABLE |= {
    "env_number": (D, "the environment variable SPMD_NUM_PROCESSES='abc' must be a number"),
    "env_half": (D, "missing: --runtime.coordinator (SPMD_COORDINATOR)"),
    "env_range": (D, "runtime.process_id=2 must be in 0..1"),
    "env_host": (D, "runtime.coordinator='localhost' is no host:port"),
    "env_mpi": (D, "runtime.process_id=5 must be in 0..1"),
    "env_cache": (T, "cannot write the directory poem.txt/tokens"),
    "env_data": ("--experiment mnist --run.dir out", "is not prepared in /nowhere"),
    "env_proxy": (D + "--train.steps abc", "--train.steps takes INT or None, not 'abc'"),
}
