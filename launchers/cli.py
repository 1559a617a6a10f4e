"""The `crosstune` command: reads the command line, starts a step, turns faults into messages and exit codes.

Imports a step only when it is asked for, so that ``crosstune --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from configs.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_RUN_FAILED, ConfigError
from launchers.command_line import COMMANDS, COMPOSED, WITH_PATH, Request, parse

if TYPE_CHECKING:
    from configs.errors import CrosstuneError

EXIT_BROKEN_PIPE = 141
"""As of a program that SIGPIPE ended."""
FIRST_RANK_SECONDS = 3
"""By so much the first worker of a machine may be later than the others with a fault that all of them meet."""

TOP_HELP = """crosstune: fine-tunes open-weight language models on the accelerators a team really has.

usage: crosstune COMMAND [group=option ...] [key=value ...]

commands:
{commands}

  crosstune run experiment=licenses                                      the demo
  crosstune run model.path=/models/m dataset.path=data.jsonl dataset.test_fraction=0.1
  crosstune prep --dry-run model.path=/models/m dataset.path=data.jsonl  what would come of these records
  crosstune COMMAND --help                                               its groups, options and keys

options of every command:
  --cfg job         print the config that would run, and stop
  --config-dir DIR  YAML of your own: DIR/experiment/mine.yaml, DIR/tuning/wide.yaml, ...
  --resolved FILE   take the config from a run's resolved.yaml
  --json            print the result, or the faults, as JSON on standard output
options of some:
  --dry-run         prep: what would come of the records; launch: the files that would be submitted
  --multirun        launch: a run for each combination of values, such as seed=0,1,2
  -f, --node K      logs: go on as it grows; another machine than the first
  --hard            cancel: without a save
  --fit '64GiB x 8' plan: which settings would fit these devices

exit codes: 0 done, 2 something to mend in what was asked, 3 the run failed, 75 stopped early and can be resumed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    out = _json_channel() if "--json" in arguments else sys.stdout
    request: Request | None = None
    try:
        request = parse(arguments)
        result = _dispatch(request)
        if request.json and result is not None:
            _print_json(result, out)
        sys.stdout.flush()
        return EXIT_DONE if result is None else int(result.get("exit_code", EXIT_DONE))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE if request is None or request.help or request.cfg else EXIT_BROKEN_PIPE
    except Exception as error:
        return _fail(error, request, out)


def _dispatch(request: Request) -> dict[str, Any] | None:
    """Runs what was asked for; the result is for ``--json``."""
    if request.help:
        _print_help(request)
        return None
    if request.command in WITH_PATH:
        return _with_path(request)
    if request.command.startswith("launch"):
        return _launch(request)
    cfg = _config(request)
    if request.cfg:
        _print_config(cfg)
        return None
    if request.command == "doctor ascend-standin":
        from launchers.doctor.standin.command import standin

        # Before the process is prepared: the program gets the user's own environment.
        return standin(cfg, request.program)
    _prepare_process(cfg)
    if request.command.startswith("doctor"):
        return _doctor(request, cfg)
    if request.command == "plan":
        from launchers.plan.command import plan

        return plan(cfg)
    from launchers import prep, steps
    from launchers.failure import ERROR_DIR, LAUNCHED
    from launchers.torchrun import join_terminal

    join_terminal()

    if request.command.startswith("prove"):
        return _prove(request, cfg)
    if request.command in ("train", "run") and LAUNCHED in os.environ:
        step = steps.train if request.command == "train" else steps.run
        return step(cfg, resume=request.resume, launched=True)
    if request.command == "train":
        return steps.train(cfg, worker=ERROR_DIR in os.environ, resume=request.resume)
    commands: dict[str, Callable[[Any], dict[str, Any]]] = {
        "prep": prep.dry_run if request.dry_run else prep.prep,
        "run": steps.run,
        "export": steps.export,
        "eval": steps.evaluate,
    }
    return commands[request.command](cfg)


def _launch(request: Request) -> dict[str, Any] | None:
    """Words of the launch are told from those of the step by their keys."""
    from configs.compose import compose
    from launchers import launch, launch_words
    from launchers.sweep import configs_of, with_own_port

    ours, theirs = launch_words.split_words(request.words)
    command = request.command.removeprefix("launch ")
    options = compose("launch", ours, config_dir=request.config_dir)
    launch_words.check_words(command, theirs, options)
    step = replace(request, command=command, words=theirs)
    if request.multirun:
        swept = configs_of(theirs, lambda words: _config(replace(step, words=words)))
        plans = [
            launch.plan(command, cfg, with_own_port(options, number), label=f"-{number}")
            for number, cfg in enumerate(swept)
        ]
        return launch.launch_all(plans, dry_run=request.dry_run)
    cfg = _config(step)
    if request.cfg:
        _print_config(options)
        print("---")
        _print_config(cfg)
        return None
    return launch.launch(launch.plan(command, cfg, options), dry_run=request.dry_run)


def _doctor(request: Request, cfg: Any) -> dict[str, Any]:
    if request.command == "doctor nodes":
        from launchers.doctor.nodes.command import doctor_nodes

        return doctor_nodes(cfg)
    if request.command == "doctor portability":
        from launchers.doctor.portability import portability

        return portability(cfg)
    from launchers.doctor.device import doctor

    return doctor(cfg)


def _prove(request: Request, cfg: Any) -> dict[str, Any]:
    if request.command == "prove resume":
        from launchers.prove.resume import prove_resume

        return prove_resume(cfg)
    if request.command == "prove layout":
        from launchers.prove.layout import prove_layout

        return prove_layout(cfg, request.config_dir)
    from launchers.prove.reshard import prove_reshard, reload

    if request.resume and request.resolved is not None:
        return reload(cfg, request.resolved)
    return prove_reshard(cfg, request.config_dir)


def _with_path(request: Request) -> dict[str, Any] | None:
    if not request.words:
        raise ConfigError(f"crosstune {request.command}", "needs a folder", remedy=WITH_PATH[request.command])
    path, overrides = Path(request.words[0]).expanduser(), request.words[1:]
    if request.command != "resume":
        if request.cfg:
            raise ConfigError("--cfg", f"`crosstune {request.command}` has no config", remedy="leave it out")
        _prepare_process(None)
    if request.command in ("status", "logs", "cancel"):
        return _of_job(request, path, overrides)
    if request.command == "prep inspect":
        from launchers.prep import inspect

        return inspect(path, overrides)
    from launchers import steps

    if request.command == "report":
        if overrides:
            raise ConfigError(overrides[0], "`crosstune report` takes one path")
        return steps.report(path)
    if request.resolved is not None:
        raise ConfigError("--resolved", "a run is resumed with its own resolved.yaml", remedy="leave it out")
    from launchers import launch, launch_words

    launched = launch.was_launched(path)
    ours, theirs = launch_words.split_words(overrides) if launched else ([], overrides)
    begun_as = launch.begun_as(path)
    cfg = steps.resumed_config(path, theirs, config_dir=request.config_dir, begun_as=begun_as)
    if request.cfg:
        _print_config(cfg)
        return None
    if launched:
        return launch.relaunch(cfg, ours, config_dir=request.config_dir)
    _prepare_process(cfg)
    return steps.resume(cfg)


def _of_job(request: Request, path: Path, rest: list[str]) -> dict[str, Any]:
    from launchers import status

    if rest:
        raise ConfigError(rest[0], f"`crosstune {request.command}` takes one folder")
    if request.command == "status":
        return status.status(path)
    if request.command == "logs":
        return status.logs(path, node=request.node, follow=request.follow)
    return status.cancel(path, hard=request.hard)


def _config(request: Request) -> Any:
    from configs.compose import amend, command_of, compose, load_resolved
    from configs.groups import ROOTS, spoken
    from configs.schema.prove import as_config_of, with_full_keys

    command = request.command.replace(" ", "_")
    words = with_full_keys(command, request.words)
    if request.resolved is None:
        return compose(command, words, config_dir=request.config_dir)
    cfg = load_resolved(request.resolved)
    # Commands that take a run's config and make something else of it.
    proofs = ("plan", *(name for name in COMPOSED if name.startswith("prove ")))
    made_by = spoken(command_of(cfg))
    fitting = {"run": ("run", "train", *proofs), "train": ("train", *proofs)}.get(made_by, (made_by,))
    if request.command not in fitting:
        raise ConfigError(
            "--resolved",
            f"'{request.resolved}' is the config of `crosstune {made_by}`",
            remedy=" or ".join(f"crosstune {name} --resolved ..." for name in fitting),
        )
    if request.command in proofs and made_by != request.command:
        cfg = as_config_of(ROOTS[command], cfg)
    return amend(cfg, words, config_dir=request.config_dir) if words else cfg


def _print_config(cfg: object) -> None:
    from configs.compose import to_yaml

    print(to_yaml(cfg), end="")


def _prepare_process(cfg: object) -> None:
    """What must stand before a library is imported."""
    import logging

    from launchers.environment import keep_out_plugins, prepare_environment
    from launchers.stages import is_first_rank

    notes = prepare_environment(cfg)
    keep_out_plugins(cfg)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    ours = logging.StreamHandler(sys.stdout)
    ours.setFormatter(logging.Formatter("      %(message)s"))
    for name in ("train", "data_prep"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [ours], False
        logger.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    for note in notes:
        logging.getLogger("train.devices").info(note)


def _print_help(request: Request) -> None:
    if request.command not in COMMANDS:
        shown = {name: text for name, text in COMMANDS.items() if name.startswith(request.command)}
        width = max(len(name) for name in shown)
        print(TOP_HELP.format(commands="\n".join(f"  {name:{width}}  {text}" for name, text in shown.items())))
    elif request.command in WITH_PATH:
        from launchers.help import path_command_help

        print(path_command_help(request.command, WITH_PATH[request.command]))
    else:
        from launchers.help import command_help

        launched = request.command.partition("launch ")[2]
        command = "launch" if launched else request.command.replace(" ", "_")
        print(command_help(command, COMPOSED[request.command], request.config_dir, launched=launched))


def _fail(error: Exception, request: Request | None, out: TextIO) -> int:
    """Shows a fault, or leaves it for the parent process."""
    from launchers.failure import DEBUG, ERROR_DIR, as_crosstune_error, as_json, leave_error

    fault: CrosstuneError = as_crosstune_error(error, None)
    if ERROR_DIR in os.environ:
        leave_error(fault)
    elif request is not None and request.json or out is not sys.stdout:
        _print_json(as_json(fault), out)
    else:
        _let_the_first_rank_speak(fault)
        print(fault.render(), file=sys.stderr)
    if os.environ.get(DEBUG):
        import traceback

        traceback.print_exception(error)
    return fault.exit_code


def _let_the_first_rank_speak(fault: CrosstuneError) -> None:
    """Waits in the other workers of an outer torchrun, which ends them as soon as the first one has told the same.

    What they are asked to do is the same; how it goes is not: a failed run is told at once by whom it befell.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0" and fault.exit_code != EXIT_RUN_FAILED:
        import time

        time.sleep(FIRST_RANK_SECONDS)


def _json_channel() -> TextIO:
    """Standard output for the result alone: whatever else prints, libraries included, goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    return channel


def _print_json(content: dict[str, Any], out: TextIO) -> None:
    import json

    print(json.dumps(content, ensure_ascii=False), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
