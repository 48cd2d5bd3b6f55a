"""`gossamer run`: paint pictures from prompts. What is there already with the same settings is not painted again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gossamer.cli.arguments import add_options, option_values
from gossamer.cli.console import note, note_adapters, note_costs, print_json, progress_bar
from gossamer.pipeline.options import LoadOptions, PaintOptions, RunOptions, make

if TYPE_CHECKING:
    from gossamer.adapters.cost import Cost
    from gossamer.pipeline.accuracy import Accuracy
    from gossamer.pipeline.outputs import Job
    from gossamer.pipeline.painter import Painting, Pipeline
    from gossamer.pipeline.prepare import Prepared

INTERRUPTED = 130


def add_to(verbs: Any) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser("run", help="paint pictures from prompts", description=__doc__, allow_abbrev=False)
    add_options(parser, (RunOptions, PaintOptions, LoadOptions))
    parser.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Everything is checked first, cheapest first; then the model is loaded and painting begins."""
    given = vars(arguments)
    options = make(RunOptions, option_values(RunOptions, given))
    paint = option_values(PaintOptions, {**given, "prompt": None})
    loading = make(LoadOptions, option_values(LoadOptions, given))

    from gossamer.pipeline.adapter_report import report_adapter
    from gossamer.pipeline.outputs import divide, plan_jobs
    from gossamer.pipeline.prepare import prepare, prepare_with_control

    jobs = plan_jobs(options)
    wanted = {job: make(PaintOptions, {**paint, "prompt": job.prompt, "seed": job.seed}) for job in jobs}
    prepared = (prepare_with_control if "control" in paint else prepare)(loading, wanted[jobs[0]])
    prepared.check(wanted[jobs[0]])
    for remark in prepared.model.remarks():
        note(remark)
    note_adapters([report_adapter(named) for named in prepared.adapters], wanted[jobs[0]].steps)
    division = divide(jobs, lambda job: prepared.recipe(wanted[job]), options.overwrite)
    return _Session(options, prepared, wanted).finish(division.todo, division.done)


class _Session:
    """The painting part of one run, and what it reports."""

    def __init__(self, options: RunOptions, prepared: Prepared, wanted: dict[Job, PaintOptions]) -> None:
        self._options = options
        self._prepared = prepared
        self._wanted = wanted
        self._pictures: list[dict[str, Any]] = []
        self._costs: Mapping[str, Cost] = {}
        self._accuracy: Accuracy | None = None

    def finish(self, todo: tuple[Job, ...], done: tuple[Job, ...]) -> int:
        for job in done:
            self._add({"path": str(job.path), "seed": job.seed, "prompt": job.prompt, "painted": False})
        try:
            self._paint_all(todo)
        except KeyboardInterrupt:
            self._report(interrupted=True)
            left = len(todo) + len(done) - len(self._pictures)
            note(f"Interrupted with {left} of {len(todo) + len(done)} pictures left. Run the same command to resume.")
            return INTERRUPTED
        self._report(interrupted=False)
        return 0

    def _paint_all(self, todo: tuple[Job, ...]) -> None:
        if not todo:
            return
        from gossamer.pipeline.accuracy import accuracy
        from gossamer.pipeline.load import assemble
        from gossamer.pipeline.picture import save

        for line in self._prepared.fit.said():
            note(line)
        with progress_bar(sum(self._wanted[job].steps for job in todo)) as bar:
            pipeline = assemble(self._prepared, note)
            self._costs = pipeline.adapter_costs
            note_costs(self._costs)
            for number, job in enumerate(todo, start=1):
                bar.say(f"Painting {number} of {len(todo)}")
                painting = pipeline.paint(self._wanted[job], bar.on_step)
                save(painting.image, job.path)
                self._add(_describe(job, painting, pipeline))
                self._accuracy = accuracy(pipeline, painting)
        for line in self._accuracy.said() if self._accuracy is not None else ():
            note(line)

    def _add(self, picture: dict[str, Any]) -> None:
        self._pictures.append(picture)
        if self._options.format == "text":
            print(
                f"{picture['path']}  {picture['seconds']:.1f} s" if picture["painted"] else f"{picture['path']}  kept"
            )

    def _report(self, interrupted: bool) -> None:
        if self._options.format == "json":
            document = {"adapters": self._adapters(), "pictures": self._pictures, "interrupted": interrupted}
            print_json({**self._prepared.fit.as_json(), **document, **self._actual()})

    def _actual(self) -> dict[str, Any]:
        """How right the plan in force was about the last picture."""
        return {} if self._accuracy is None else {"actual": self._accuracy.as_json()}

    def _adapters(self) -> list[dict[str, Any]]:
        """What each adapter is, and the bytes that it takes, where it was attached."""
        from gossamer.pipeline.adapter_report import report_adapter

        told = []
        for named in self._prepared.adapters:
            cost = self._costs.get(named.name)
            bytes_ = {"factor_bytes": cost and cost.factor_bytes, "merged_bytes": cost and cost.merged_bytes}
            told.append({**report_adapter(named).as_json(), **bytes_})
        return told


def _describe(job: Job, painting: Painting, pipeline: Pipeline) -> dict[str, Any]:
    recipe = painting.recipe
    return {
        "path": str(job.path),
        "seed": job.seed,
        "prompt": job.prompt,
        "painted": True,
        "seconds": round(painting.seconds, 4),
        "seconds_per_step": painting.seconds_per_step and round(painting.seconds_per_step, 4),
        "storage": recipe.storage,
        "text_storage": recipe.text_storage,
        "weight_bytes": pipeline.weight_bytes,
        "adapters": pipeline.adapters,
        "schedules": {name: [window.start, window.end] for name, window in pipeline.schedules.items()},
        "kept_layers": pipeline.kept_layers,
        "pixels_sha256": painting.pixels_sha256,
    }
