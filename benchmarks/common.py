"""What the benchmarks share: processes, results on disk, tables, and the look of the pictures.

Each finished run is written to disk at once, so an interrupted benchmark goes on where it stopped.
Importing this file loads neither torch nor matplotlib.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RED, BLUE, GREY, GREEN = "#c0392b", "#2471a3", "#7d8a97", "#117a65"


def git(*arguments):
    """What a git command prints, in bytes; nothing if it fails."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True).stdout


def commit():
    """The commit of both files and of the benchmarks, with -dirty if one has changed since."""
    head = git("rev-parse", "--short=10", "HEAD").decode().strip() or "unknown"
    changed = git("diff", "--name-only", "HEAD", "--", "ppo_*.py", "benchmarks/*.py")
    return head + "-dirty" * bool(changed)


def hardware(*packages):
    """What results were measured on: machine, date, commit, and versions of packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    found = {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(),
             "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    torch = sys.modules.get("torch")  # only if the script itself uses it
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # a peer that this call does not need
            found[name] = version(name)
    return found


def run_python(*arguments, may_fail=False, threads=1, **options):
    """Run a Python process on one thread of the CPU, because two may run at a time.

    Returns: the finished process. Raises: RuntimeError with its last words if it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, *map(str, arguments)], env=environment, text=True,
                             capture_output=True, **options)
    if process.returncode != 0 and not may_fail:
        raise RuntimeError(process.stderr[-3000:])
    return process


def run_apart(script, job, threads=1):
    """script --run JOB in a process of its own, which prints its result as a line of JSON last."""
    output = run_python(script, "--run", json.dumps(job), threads=threads).stdout
    return json.loads(output.splitlines()[-1])


def start(main, one_run):
    """main in the script that the user calls, one_run in a process that run_apart has started."""
    if "--run" in sys.argv:
        print(json.dumps(one_run(json.loads(sys.argv[sys.argv.index("--run") + 1]))))
    else:
        main()


def edition(file_name, commit, folder):
    """A file of this repository as it was at a commit, written to folder. Returns: its path."""
    path, text = Path(folder, file_name), git("show", f"{commit}:{file_name}")
    if not text:
        raise SystemExit(f"the git history has no {file_name} of {commit}")
    path.write_bytes(text)
    return path


def import_ppo_rlhf(folder=ROOT):
    """ppo_rlhf.py of this checkout, or of a folder that edition has written to."""
    sys.path.insert(0, str(folder))
    import ppo_rlhf

    return ppo_rlhf


def memory(kind):
    """Resident memory of this process in GB: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def read_metrics(run_dir):
    """The iterations of a run of ppo_rlhf.py, a dict each."""
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def flags_of(settings):
    """Settings as words of a command line: {"kl_coef": 0} becomes --kl-coef 0."""
    return [x for key, value in settings.items()
            for x in (f"--{key.replace('_', '-')}", str(value))]


def word_tokenizer(words):
    """A tokenizer whose tokens are [PAD], [EOS] and the words, with spaces between them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[EOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def save_random_models(folder, words, config):
    """A random policy and a random reward model of one shape, whose tokens are the words."""
    import torch
    import transformers

    torch.manual_seed(1)
    for name, kind in (("policy", transformers.AutoModelForCausalLM),
                       ("reward_model", transformers.AutoModelForSequenceClassification)):
        kind.from_config(config).save_pretrained(folder / name)
        word_tokenizer(words).save_pretrained(folder / name)


def trl_trainer(policy_folder, reward_folder, prompts, settings, callbacks=()):
    """trl's PPOTrainer, with nothing reported or saved; its critic starts from the reward model.
    prompts: texts; settings: of PPOConfig; by default the CPU and float32 are used."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(policy_folder, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(policy_folder) for _ in range(2))
    reward_model, critic = (AutoModelForSequenceClassification.from_pretrained(reward_folder)
                            for _ in range(2))
    config = PPOConfig(
        num_mini_batches=4, num_ppo_epochs=4, temperature=1.0, stop_token="eos",
        num_sample_generations=0, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False,
        **{"use_cpu": True, "bf16": False} | settings)
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts]
    return PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=reference,
                      reward_model=reward_model, value_model=critic, callbacks=list(callbacks),
                      train_dataset=datasets.Dataset.from_list(rows))


def read_results(name):
    """The content of results/NAME.json; empty if there is no such file yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(name, results):
    """Replace results/NAME.json in one step, so that it is complete at any time; a line per run."""
    texts = {field: "[\n" + ",\n".join(map(json.dumps, x)) + "\n]" if isinstance(x, list)
             else json.dumps(x) for field, x in results.items()}
    parts = [f"{json.dumps(field)}: {text}" for field, text in texts.items()]
    temporary = RESULTS / f"{name}.json.tmp"
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(RESULTS / f"{name}.json")


def timed(one_run, job):
    """The result of one run, the code it was made with, and how long it took."""
    start, made_with = time.time(), commit()
    return one_run(job) | {"seconds": round(time.time() - start), "commit": made_with}


def wanted(job):
    """Whether a job is one of those that the command line asks for with --only KEY=A,B ..."""
    words = sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else []
    chosen = dict(x.split("=") for x in words)
    return all(str(job.get(key, "")) in values.split(",") for key, values in chosen.items())


def run_missing(name, jobs, keys, one_run, packages, shown=(), field="runs", at_once=2):
    """Run the jobs that results/NAME.json lacks, at_once together, and write each result at once.

    keys: what tells one job from another; shown: what is printed of a finished run beside them.
    With --table nothing runs; with --only KEY=A,B ... at the end of the command line, only the jobs
    whose KEY is A or B. Returns: all results."""
    results = {field: []} | read_results(name)
    done = {tuple(x.get(key) for key in keys) for x in results[field]}
    missing = [x for x in jobs if tuple(x.get(key) for key in keys) not in done and wanted(x)]
    if "--table" in sys.argv or not missing:
        return results
    machine, errors, pool = hardware(*packages), [], ThreadPoolExecutor(at_once)
    # Of the latest runs, and versions of peers from earlier ones; each run has its own commit.
    results["hardware"] = results.get("hardware", {}) | machine
    futures = {pool.submit(timed, one_run, job): job for job in missing}
    try:
        for future in as_completed(futures):
            result = {key: x for key, x in futures[future].items() if key in keys}
            if error := future.exception():  # the other runs go on
                errors.append(f"{result} failed: {error}")
                print(errors[-1], flush=True)
                continue
            result |= future.result() | {key: machine[key] for key in ("cpu", "date")}
            results[field].append(result)
            write_results(name, results)
            print(", ".join(f"{key} {result[key]}" for key in (*keys, *shown, "seconds")
                            if key in result), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted: no further run starts
    if errors:
        raise SystemExit(f"{len(errors)} runs failed; the next call tries them again")
    return results


def compare(one, other, digits=2):
    """Cells of two contestants, given their figures by round: the median of each, the ratio of the
    medians, and the range of the ratios within a round. All are speeds: larger is better."""
    middle = median(one.values()), median(other.values())
    ratios = [one[x] / other[x] for x in one if x in other]
    return [*(f"{x:,.{digits}f}" for x in middle), f"{middle[0] / middle[1]:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""]


def spread(values, digits=2):
    """A cell: mean (range, number of seeds); empty without values."""
    if not values:
        return ""
    middle, *ends = (f"{x:.{digits}f}" for x in (mean(values), min(values), max(values)))
    return f"{middle} ({f'{ends[0]} to {ends[1]}, ' * (len(values) > 1)}{len(values)})"


def markdown(columns, rows):
    """A table, as lines."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def publish(name, lines):
    """Print lines, and write them to results/NAME.md."""
    print("\n".join(lines))
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def picture(name, rows, columns, size):
    """Axes (rows, columns) to draw on; at the end of the block they become results/NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.titlesize": 10,
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "legend.fontsize": 9, "savefig.dpi": 110}
    with plt.rc_context(look):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained",
                                    squeeze=False)
        yield axes
        figure.savefig(RESULTS / f"{name}.png")
    print(f"wrote {RESULTS / name}.png")
