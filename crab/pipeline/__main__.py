"""Commands of the pipeline. DVC runs `resolve`, `run` and `report`; the Makefile runs the others."""

from __future__ import annotations

import argparse
import os
import sys

try:
    from crab.pipeline import params, stages
    from crab.pipeline.paths import Paths, root
except ModuleNotFoundError as error:  # the usual slip: the environment is not active
    fix = "run `make setup`, then `source .venv/bin/activate`"
    sys.exit(f"error: {error.name} is not installed for {sys.executable}; {fix}")

#: Options of `plan`, in place of what is found on this machine.
MACHINE = {
    "memory-gib": "memory of one GPU",
    "disk-gb": "free disk",
    "tflops": "peak of one GPU in matrix products, 10^12 per second",
    "mfu": "share of the peak that is reached",
    "samples-per-second": "of one process, in place of these two",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m crab.pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="name the profile that params.yaml chooses")
    commands.add_parser("base", help="print the paths of its base, and of the pointer to it")
    commands.add_parser("choose", help="choose another profile").add_argument("profile")
    commands.add_parser("defaults", help="write the default values into the notebooks' parameters cells")
    commands.add_parser("resolve", help="check everything and write what each stage depends on")
    commands.add_parser("run", help="execute the notebook of a stage").add_argument("stage")
    commands.add_parser("page", help="execute a notebook that is no stage").add_argument("notebook")
    commands.add_parser("report", help="render the report from executed notebooks").add_argument("--profile", nargs="+")
    accept = commands.add_parser("accept", help="let changed code count as older code, whose results it gives")
    accept.add_argument("revision", help="of git, e.g. HEAD: the code that made the results")
    accept.add_argument("why", help="how you know that the results are the same")
    accept.add_argument(
        "--only", nargs="+", default=(), help="of base, encode, train, answer and score; by default all"
    )
    plan = commands.add_parser("plan", help="print what training takes; fail if it does not fit")
    plan.add_argument("--profile")
    for name, unit in MACHINE.items():
        plan.add_argument(f"--{name}", type=float, help=unit)
    options = parser.parse_args(arguments)
    folder = root()
    # the user's own kernels and templates reach no result
    os.environ.pop("JUPYTER_PATH", None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    for stream in (sys.stdout, sys.stderr):  # a cell may print what the user's locale has not
        stream.reconfigure(errors="backslashreplace")
    try:
        match options.command:
            case "show":
                print(f"profile: {params.load(folder)['profile']} (params.yaml)")
            case "base":
                values = params.resolve(folder)
                print(folder / "models" / values["base"]["folder"], Paths(values["profile"]).base_pointer, sep="\n")
            case "choose":
                params.choose(folder, options.profile)
            case "defaults":
                print("changed:", ", ".join(params.write_defaults(folder)) or "nothing")
            case "resolve":
                stages.resolve(folder)
            case "run":
                from crab.pipeline import stage

                stage.end_with_dvc()
                stage.show_output()
                stage.run(folder, options.stage)
            case "page":
                from crab.pipeline import stage

                stage.show_output()
                print(stage.run_alone(folder, options.notebook))
            case "accept":
                from crab.pipeline.accept import accept

                changed = accept(folder, options.revision, options.why, options.only)
                print(
                    f"count as the code of {options.revision}:",
                    *(changed or ["nothing; no result would be stale"]),
                    sep="\n",
                )
            case "plan":
                from crab.pipeline.plan import plan_of, text

                given = {field: getattr(options, field) for field in (name.replace("-", "_") for name in MACHINE)}
                plan, notes = plan_of(folder, options.profile or params.load(folder)["profile"], given)
                print(text(plan, notes))
                plan.check()
            case "report":
                from crab.pipeline import report

                for profile in options.profile or [params.load(folder)["profile"]]:
                    print(report.write(folder, profile))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
