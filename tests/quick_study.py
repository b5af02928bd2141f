"""A study whose jobs do nothing but leave a cell each and what stands for weights, run here in any order."""

import random

import micro

from modalmerge.records import Cell
from modalmerge.study import driver as driver_module
from modalmerge.study import jobs as jobs_module
from modalmerge.study import run_study
from modalmerge.study.plan import LEAVES_WEIGHTS


class Quick:
    """What happened, and what is to happen: hooks are called in their jobs."""

    def __init__(self):
        self.order, self.width = 0, 3  # random seed of the order in which jobs come back; jobs at a time
        self.began, self.hooks = [], {}

    def leave(self, job, context, scratch):
        self.began.append(job.id)
        for need in job.needs:
            assert context.folder(need).exists() and not (context.folder(need) / "removed").exists()
        self.hooks.get(job.id, lambda: None)()
        cell = Cell(
            id=job.id, role="other", stage="zero-shot", random_seed=job.random_seed, initialisation="random",
            base_fraction=0.0, architecture="agnostic", method="none", settings={"control": job.id}, dataset="scenes",
            task="vqa", split="test", metric="accuracy", value=1.0, unit="percent", direction="higher",
            num_samples=1, steps=0, parameters=1, distances={}, commit=context.commit, command=context.command,
        )  # fmt: skip
        jobs_module.leave(context, job, scratch, steps=1, cells=[cell])
        if job.kind == "statistics":
            (context.folder(job.id) / "statistics.safetensors").write_text("weights")
        elif job.kind in LEAVES_WEIGHTS:
            (context.folder(job.id) / "model").mkdir()
            (context.folder(job.id) / "model" / "model.safetensors").write_text("weights")

    def run(self, folder, **changes):
        """Run the micro study; keys are of `run_study`, or of the preset."""
        own = {key: changes.pop(key) for key in ("only", "budget_minutes", "command") if key in changes}
        self.began.clear()
        return run_study(micro.preset(**changes), folder, **{"command": "modalmerge study tiny", **own})


class Inline:
    """Workers that run a job when one is waited for, whichever comes next by chance."""

    def __init__(self, quick, context):
        self.quick, self.context, self.running = quick, context, []
        self.draw = random.Random(quick.order)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def has_room(self):
        return len(self.running) < self.quick.width

    def submit(self, job):
        self.running.append(job)

    def wait(self, seconds):
        job = self.running.pop(self.draw.randrange(len(self.running)))
        try:
            jobs_module.run_job(job, self.context)
        except Exception as error:
            return [(job, error)]
        return [(job, None)]


def install(monkeypatch):
    """Put quick jobs and workers in place of the real ones."""
    quick = Quick()
    for kind in jobs_module.KINDS:
        monkeypatch.setitem(jobs_module.KINDS, kind, quick.leave)
    monkeypatch.setattr(driver_module, "open_workers", lambda workers, context, say: Inline(quick, context))
    return quick


def weights(run):
    """Jobs whose weights are there."""
    files = [*run.glob("jobs/*/model/model.safetensors"), *run.glob("jobs/*/statistics.safetensors")]
    return {path.relative_to(run / "jobs").parts[0] for path in files}


def marked(run):
    """Jobs whose weights are marked as removed."""
    return {path.parent.name for path in run.glob("jobs/*/removed")}
