"""Every mistake of a user: one clear message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json

import pytest

from spmd.commands import main
from spmd.registry import find, from_file

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
    "stage_privacy": (
        STACKED + "--simulate 2 --mesh.data 1 --mesh.stage 2 --privacy.noise-multiplier 1",
        "privacy needs gradients of parts of the batch, which a pipeline (mesh.stage=2) sums up",
    ),
    "plan_strategy": (
        "plan --experiment digits --strategy server --no-compile",
        "of strategy server as it is set, only the compiled program tells what moves: leave out --no-compile",
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
    "crop": (D + "--data.augment.crop 8", "must be less than the image's 8 x 8 pixels"),
    "mixup": (D + "--data.augment.mixup -1", "data.augment.mixup=-1.0 must not be negative"),
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
    "grace": (D + "--runtime.grace 1e9", "must be at most 1000000 seconds"),
}

# Mistakes in an experiment file: (what is replaced in that of digits, by what, the message).
SGD = "SGD(learning_rate=0.1, momentum=0.9, warmup_steps=5)"
DOC = '"""A two-layer network with dropout."""'
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
    "model_number": ("MLP(inputs=64", "3 or MLP(inputs=64", "model=3 must be a model config"),
    "other_class": (SGD, "TrainConfig()", "must be of type Optimizer, not TrainConfig"),
    "refused": ("=0.1, mom", "=-1, mom", "line 24, in config(): optimizer.learning_rate=-1 must"),
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
TABLE |= {
    name: (f"--experiment {name}.py --run.dir out", message)
    for name, (_, _, message) in EDITS.items()
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the files that the table names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("mine")
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt/config.json").write_text("{")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed/config.json").write_text('{"identity": []}')
    same = from_file(find("digits")).identity() | {"optimizer.momentum": 0.5}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"identity": same}))
    digits = find("digits").read_text()
    for name, (old, new, _) in EDITS.items():
        assert old in digits, name
        (tmp_path / f"{name}.py").write_text(digits.replace(old, new, 1))
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "wrong.py").write_text("def config():\n    return 3\n")
    return tmp_path


def files(root):
    return {
        p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("case", TABLE)
def test_one_clear_message(case, place, capsys):
    line, message = TABLE[case]
    before = files(place)
    code = main(line.split())
    shown = capsys.readouterr()
    text = " ".join((shown.err + shown.out).split())
    assert code == 2, text
    assert shown.err.startswith("error: ") and "╭" not in text
    assert message in text
    assert "Traceback" not in text
    assert files(place) == before


@pytest.mark.smoke
def test_through_the_process(run_cli):
    done = run_cli("--experiment", "digitz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown experiment 'digitz'")


def test_a_checkpoint_of_another_run_shows_the_difference(run_cli, tmp_path):
    args = ("--experiment", "digits", "--run.dir", "out", "--train.steps")
    assert run_cli(*args, 5).returncode == 0
    config = tmp_path / "out/config.json"
    known = json.loads(config.read_text())
    known["identity"]["model.hidden"] = [64, 32]  # as if the directory were that model's
    config.write_text(json.dumps(known))
    saved = files(tmp_path / "out/checkpoints")
    done = run_cli(*args, 9, "--model.hidden", 64, 32)
    assert files(tmp_path / "out/checkpoints") == saved
    assert not (tmp_path / "out/checkpoints/9").exists()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the checkpoint was saved by another run" in done.stderr
    assert "model.hidden: [256, 128] -> [64, 32]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "holds a run of another identity" in run_cli("eval", *args[:4]).stderr
